"""The autoencoder stages of pretraining, in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from densegrpo_fast.embedded import architecture, autoencoder, pretrain
from densegrpo_fast.embedded.stages import save


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    pictures = autoencoder._pictures
    monkeypatch.setattr(autoencoder, "_pictures", lambda generator: pictures(generator, 4))


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_decoder_alone_is_fitted_to_the_latents_there_are(decoder_only: bool) -> None:
    torch.manual_seed(0)
    vae = architecture.build_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    autoencoder.train_vae(vae, seed=0, steps=2, batch=4, decoder_only=decoder_only)
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"decoder"} if decoder_only else {"encoder", "decoder"})
    assert all(p.requires_grad for p in vae.parameters()) and not vae.training


@pytest.mark.ci
def test_the_small_decoder_learns_what_the_full_one_makes() -> None:
    torch.manual_seed(0)
    vae, preview = architecture.build_vae(), architecture.build_preview_decoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()

    @torch.no_grad()
    def difference() -> float:
        z = latents.float()
        return float((preview.decode(z).sample - vae.decode(z).sample).square().mean())

    before = difference()
    autoencoder.train_preview(preview, vae, latents, latents, seed=0, steps=60, batch=8)
    assert difference() < before


@pytest.mark.ci
def test_sampled_latents_are_kept(pipeline_directory: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_directory, text_encoder_3=None, tokenizer_3=None)
    path, recipe = tmp_path / "sampled.safetensors", pretrain.Recipe(sampled=2)
    sampled = pretrain.sampled_latents(pipeline.to(torch.float32), path, recipe)
    assert sampled.shape == (2, 4, 16, 16) and sampled.dtype == torch.float16 and sampled.float().std() > 0.1
    # no pipeline is asked again
    assert torch.equal(pretrain.sampled_latents(None, path, recipe), sampled)  # type: ignore[arg-type]


def test_a_saved_pipeline_does_not_say_where_its_parts_came_from(pipeline_directory: Path, tmp_path: Path) -> None:
    pipeline, preview = pretrain._modules("scenes", pipeline_directory)
    save(pipeline, preview, tmp_path / "pipeline")
    files = {path.relative_to(tmp_path / "pipeline") for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    assert files == {path.relative_to(pipeline_directory) for path in pipeline_directory.rglob("*") if path.is_file()}
    for path in (tmp_path / "pipeline").rglob("*.json"):
        assert str(pipeline_directory) not in path.read_text(), path
