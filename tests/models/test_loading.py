"""Loading a model with its options, from small saved pipelines; and what is said of directories that are not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.sections import ModelOptions
from densegrpo_fast.embedded.architecture import build_tokenizer
from densegrpo_fast.models import loading
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.loading import load_pipeline, pipeline_directory
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.sampling.replay import replay
from densegrpo_fast.sampling.rollout import rollout
from densegrpo_fast.training.models import load_model

CPU = torch.device("cpu")
Policy = Callable[..., DiffusersModel]


def options(**changes: object) -> ModelOptions:
    return parse_arguments([f"model.{key}={value}" for key, value in changes.items()])[0].model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD3.5's form at toy size, saved without a preview decoder."""
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_sd3()
    model.pipeline.vae.register_to_config(sample_size=32)
    model.pipeline.save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(tiny_directory, tmp_path / "pipeline")


def velocities(model: DiffusersModel, checkpointing: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    if checkpointing:
        model.checkpoint_gradients()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape, generator=generator)
    conditioning, sigma = model.encode(["a photo", "the moon"]), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        sampled = model.velocity(latents, sigma, conditioning, 2.0).combined()
    replayed = model.velocity(latents, sigma, conditioning, 2.0).combined()
    parameters = list(model.trainable_parameters().values())
    return sampled, replayed.detach(), list(torch.autograd.grad(replayed.square().mean(), parameters))


def test_checkpointing_computes_every_block_twice_for_the_same_gradients(tiny_policy: Policy) -> None:
    plain, model = tiny_policy(spread=0.1), tiny_policy(spread=0.1)
    calls = []
    for number, block in enumerate(model.network.transformer_blocks):
        block.register_forward_pre_hook(lambda _, __, number=number: calls.append(number))
    expected, found = velocities(plain, False), velocities(model, True)
    # sampled with both halves of the guidance, replayed with both, and each half again from its last block
    assert calls == [0, 1] * 4 + [1, 0] * 2
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], expected[1])
    for one, two in zip(found[2], expected[2], strict=True):
        assert torch.equal(one, two)


def test_an_unchanged_policy_s_ratio_is_1_with_checkpointing(tiny_policy: Policy) -> None:
    from densegrpo_fast.flow.dynamics import coefficients

    model = tiny_policy(spread=0.1)
    model.checkpoint_gradients()
    noise, index = torch.randn(2, *model.latent_shape), torch.arange(2)
    table = coefficients(model.sigmas(3), 0.7, "flow_sde")
    path = rollout(model, noise, model.encode(["a", "b"]), table, sample_index=index, seed=0, iteration=0)
    assert torch.equal(replay(model, path, 0, slice(0, 2))[0].detach(), path.log_probs[0])


@pytest.mark.ci
def test_options_reach_the_model(tiny_directory: Path) -> None:
    plain = load_model(options(path=tiny_directory, max_sequence_length=8), CPU)
    assert not plain.network.gradient_checkpointing and plain.attention == "auto"
    assert (plain.pipeline.vae.dtype, plain.pipeline.vae.use_slicing, plain.pipeline.vae.use_tiling) == (
        torch.float32,
        False,
        False,
    )
    asked = {"gradient_checkpointing": True, "attention": "native", "vae_dtype": "bfloat16", "vae_decode": "tiled"}
    model = load_model(options(path=tiny_directory, max_sequence_length=8, **asked), CPU)
    vae = model.pipeline.vae
    assert model.network.gradient_checkpointing and model.attention == "native"
    assert (vae.dtype, vae.use_slicing, vae.use_tiling) == (torch.bfloat16, True, True)
    assert model.network.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_slices_are_the_whole_and_tiles_nearly_so(tiny_directory: Path) -> None:
    model = load_model(options(path=tiny_directory, max_sequence_length=8), CPU)
    latents = torch.randn(3, *model.latent_shape)
    decoded = []
    original = model.pipeline.vae.decoder.forward
    model.pipeline.vae.decoder.forward = lambda z, *rest: decoded.append(tuple(z.shape)) or original(z, *rest)
    whole = model.decode(latents)
    model.decode_by("sliced")
    torch.testing.assert_close(model.decode(latents), whole, rtol=1e-5, atol=1e-5)
    assert decoded == [(3, 16, 8, 8), *[(1, 16, 8, 8)] * 3]
    # 64 pixels from an autoencoder of 32: tiles of 4 latents every 3
    decoded.clear()
    model.decode_by("tiled")
    tiled = model.decode(latents)
    assert max(max(shape[2:]) for shape in decoded) == 4 and {shape[0] for shape in decoded} == {1}
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    model.decode_by("whole")
    assert torch.equal(model.decode(latents), whole)


def test_a_bfloat16_decoder_is_close(tiny_directory: Path) -> None:
    one, two = (load_model(options(path=tiny_directory, max_sequence_length=8, vae_dtype=d), CPU) for d in DTYPES)
    latents = torch.randn(2, *one.latent_shape)
    exact, close = one.decode(latents), two.decode(latents)
    assert close.dtype == torch.float32
    assert 0 < (exact - close).abs().max() < 0.05


def test_a_bfloat16_preview_decoder_is_close(tiny_directory: Path, tmp_path: Path) -> None:
    preview = tiny_sd3().preview_decoder
    assert preview is not None
    preview.save_pretrained(tmp_path / "taesd3")
    own = {"path": tiny_directory, "max_sequence_length": 8, "preview_decoder": tmp_path / "taesd3"}
    one, two = (load_model(options(**own, preview_dtype=dtype), CPU) for dtype in DTYPES)
    assert (one.preview_dtype, two.preview_dtype) == (torch.float32, torch.bfloat16)
    # the full decoder is the same
    latents = torch.randn(2, *one.latent_shape)
    assert torch.equal(one.decode(latents), two.decode(latents)) and two.pipeline.vae.dtype == torch.float32
    exact, close = one.decode(latents, "preview"), two.decode(latents, "preview")
    assert close.dtype == torch.float32
    assert 0 < (exact - close).abs().max() < 0.05
    assert not any(parameter.requires_grad for parameter in two.preview_decoder.parameters())


DTYPES = ("float32", "bfloat16")


def test_a_preview_decoder_comes_from_its_own_directory(tiny_directory: Path, tmp_path: Path) -> None:
    preview = tiny_sd3().preview_decoder
    assert preview is not None
    preview.save_pretrained(tmp_path / "taesd3")
    model = load_model(options(path=tiny_directory, max_sequence_length=8, preview_decoder=tmp_path / "taesd3"), CPU)
    latents = torch.randn(2, *model.latent_shape)
    torch.testing.assert_close(model.decode(latents, "preview"), tiny_sd3().decode(latents, "preview"))
    assert load_model(options(path=tiny_directory, max_sequence_length=8), CPU).preview_decoder is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("absent", "model.preview_decoder: .* is no directory"),
        ("empty", "cannot load an AutoencoderTiny from .*: expected the file config.json"),
        ("channels", "decodes latents of 4 channels, this model has 16"),
    ],
)
def test_a_wrong_preview_decoder_is_named(tiny_directory: Path, tmp_path: Path, change: str, problem: str) -> None:
    from diffusers import AutoencoderTiny

    directory = tmp_path / "preview"
    if change == "empty":
        directory.mkdir()
    elif change == "channels":
        small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(latent_channels=4, **small).save_pretrained(directory)
    with pytest.raises(UserError, match=problem) as caught:
        load_model(options(path=tiny_directory, max_sequence_length=8, preview_decoder=directory), CPU)
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT


def test_pickles_are_refused_and_gaps_are_named(damaged: Path) -> None:
    def problem() -> str:
        with pytest.raises(UserError) as caught:
            pipeline_directory(str(damaged))
        assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT
        return str(caught.value)

    assert pipeline_directory(str(damaged)) == damaged
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.rename(weights.with_suffix(".bin"))
    assert "transformer: expected safetensors weights, found only diffusion_pytorch_model.bin" in problem()
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    weights.with_suffix(".bin").unlink()
    assert "transformer: expected safetensors weights, found none" in problem()
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    (damaged / "transformer" / "part-1.safetensors").write_bytes(whole)
    assert "transformer: expected 2 files of weights, part-2.safetensors is missing" in problem()
    index.write_text("[]")
    assert "is not the index of a model's files" in problem()
    index.unlink()
    (damaged / "text_encoder_2" / "config.json").unlink()
    assert "text_encoder_2: expected the file config.json" in problem()


def without_a_tensor(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


def of_another_shape(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    matrix = min(name for name in tensors if tensors[name].ndim == 2)
    save_file(tensors | {matrix: torch.zeros(3, 5)}, file, metadata={"format": "pt"})


def of_another_class(directory: Path) -> None:
    for file in directory.glob("*config.json"):
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"_class_name": "Another", "model_type": "another"}))


def emptied(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("part", "damage", "expected"),
    [
        ("transformer", without_a_tensor, r"its weights lack 1 of the network's tensors, such as \w+"),
        ("vae", without_a_tensor, r"its weights lack 1 of the network's tensors, such as \w+"),
        ("text_encoder_2", without_a_tensor, r"its weights lack 1 of the network's tensors, such as \w+"),
        ("transformer", of_another_shape, r"\S+ expected shape .*\[32, 128\].*, but got .*\[3, 5\]"),
        ("text_encoder", of_another_shape, r"asks for \S+ of shape \[16, 64\], its weights have \[3, 5\]"),
        ("transformer", of_another_class, r"expected a network of the kind SD3Transformer2DModel, .* says Another"),
        ("text_encoder", of_another_class, r"expected a network of the kind clip_text_model, .* says another"),
        ("scheduler", of_another_class, r"expected a FlowMatchEulerDiscreteScheduler, .* says Another"),
        ("scheduler", emptied, r"scheduler_config.json"),
        ("tokenizer_2", emptied, r"expected tokenizer.json, or vocab.json and merges.txt"),
    ],
)
def test_a_wrong_or_partial_component_is_named(
    damaged: Path, part: str, damage: Callable[[Path], None], expected: str
) -> None:
    damage(damaged / part)
    with pytest.raises(UserError, match=rf"model.path: cannot load {damaged}: {part}: .*{expected}") as caught:
        load_pipeline(str(damaged), device=CPU, dtype=torch.float32, max_sequence_length=8)
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT


@pytest.mark.ci
def test_a_tokenizer_of_another_encoder_is_named(damaged: Path) -> None:
    build_tokenizer([f"word{number}" for number in range(2000)]).save_pretrained(damaged / "tokenizer_2")
    with pytest.raises(UserError, match=r"tokenizer_2: it has \d+ tokens, text_encoder_2 has \d+"):
        load_pipeline(str(damaged), device=CPU, dtype=torch.float32, max_sequence_length=8)


def test_weights_that_do_not_fit_the_device_say_what_to_do(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import SD3Transformer2DModel

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SD3Transformer2DModel, "to", too_large)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 8 * 2**30))
    with pytest.raises(UserError, match=r"do not fit .* \(1.0 of 8.0 GiB free\).*model.prompt_cache") as caught:
        load_pipeline(str(tiny_directory), device=CPU, dtype=torch.float32, max_sequence_length=8)
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT


def test_a_hub_id_is_downloaded_as_safetensors(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusion3Pipeline

    asked = []

    def fetch(name: str, patterns: list[str], revision: str | None) -> Path:
        assert patterns == ["model_index.json"]
        return tiny_directory

    def download(name: str, **given: object) -> str:
        asked.append((name, given))
        if given["revision"] == "nowhere":
            raise ConnectionError("no route to host")
        return str(tiny_directory)

    monkeypatch.setattr(loading, "fetch", fetch)
    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    assert pipeline_directory("someone/something", "v1") == tiny_directory
    assert asked == [("someone/something", {"revision": "v1", "use_safetensors": True})]
    with pytest.raises(UserError, match="cannot load someone/something: the hub cannot be reached"):
        pipeline_directory("someone/something", "nowhere")
    caplog.clear()
    assert load_model(options(path="someone/something", max_sequence_length=8), CPU).latent_shape == (16, 8, 8)
    assert "no CUDA device" in caplog.text and "embedded model trains in minutes" in caplog.text


@pytest.mark.parametrize("name", ["someone/something", None])
def test_another_architecture_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    # nothing but the file that names it
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanDiTPipeline"}))
    monkeypatch.setattr(loading, "fetch", lambda *_: tmp_path)
    words = rf"model.path: {name or tmp_path}: HunyuanDiTPipeline is not supported; supported are .*StableDiffusion3"
    with pytest.raises(UserError, match=words) as caught:
        pipeline_directory(name or str(tmp_path))
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT
