"""Adapters in the forms that people have: the same change of the output as their own readers make, or a refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from densegrpo_fast.common.errors import NonFiniteError, SetupError
from densegrpo_fast.models.adapter_formats import fit_to, read_lora
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import add_lora, attached_lora
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.run_files.model_refs import locate

MODULES = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj", "transformer_blocks.1.ff.net.2"]


@torch.no_grad()
def output(model: Any) -> Tensor:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.velocity(latents, torch.tensor([0.3, 0.9]), model.encode(["a cat", "the moon"])).combined()


def change(path: Path) -> Tensor:
    """What an adapter's file does to the output, as it is read here."""
    model = tiny_sd3()
    before = output(model)
    with attached_lora(model.network, read_lora(path)):
        return output(model) - before


def trained(**options: Any) -> Any:
    """A tiny model with an adapter of peft's, with B drawn at random."""
    model = tiny_sd3()
    model.network.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": MODULES} | options)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.network.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"ff.net.2": 2}, "alpha_pattern": {"attn.to_q": 3}},
    {"rank_pattern": {r"transformer_blocks\.1\..*": 1}, "use_rslora": True},
]


@pytest.mark.ci
@pytest.mark.parametrize("options", SETTINGS)
def test_diffusers_metadata_in_the_header(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**options)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model.network),
        transformer_lora_adapter_metadata=model.network.peft_config["default"].to_dict(),
    )
    plain = tiny_sd3()
    before = output(plain)
    plain.pipeline.load_lora_weights(str(tmp_path))
    expected = output(plain) - before
    assert expected.abs().max() > 0.1
    found = change(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, output(model) - before, rtol=1e-3, atol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("options", SETTINGS)
def test_a_folder_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**options)
    layers = {f"base_model.model.{name}": t for name, t in get_peft_model_state_dict(model.network).items()}
    save_file(layers, tmp_path / "adapter_model.safetensors")
    model.network.peft_config["default"].save_pretrained(tmp_path)
    ref = locate(str(tmp_path))
    assert ref.adapter == tmp_path / "adapter_model.safetensors"
    torch.testing.assert_close(change(ref.adapter), output(model) - output(tiny_sd3()), rtol=1e-3, atol=1e-4)
    # a folder of PEFT with a pickle alone
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(SetupError, match="only adapter_model.bin, a pickle file"):
        locate(str(tmp_path))


def by_hand(updates: dict[str, Tensor]) -> Tensor:
    """What adding updates to weights does to the output."""
    model = tiny_sd3()
    before = output(model)
    for name, update in updates.items():
        model.network.get_submodule(name).weight.data += update
    return output(model) - before


def halves(inputs: int, outputs: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs), torch.randn(outputs, rank)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A", "lora_B"),
        ("", "lora_A.default", "lora_B.default"),
        ("transformer.", "lora.down", "lora.up"),
        ("diffusion_model.", "lora_down", "lora_up"),
        ("model.diffusion_model.", "lora_A", "lora_B"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_names_of_diffusers_with_any_prefix(
    prefix: str, down: str, up: str, alpha: float | None, tmp_path: Path
) -> None:
    module = "transformer_blocks.0.attn.to_q"
    a, b = halves(32, 32)
    tensors = {f"{prefix}{module}.{down}.weight": a, f"{prefix}{module}.{up}.weight": b}
    if alpha is not None:
        tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    expected = by_hand({module: b @ a * (1 if alpha is None else alpha / 2)})
    torch.testing.assert_close(change(tmp_path / "a.safetensors"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("kohya", [False, True])
def test_names_of_the_original_code(kohya: bool, tmp_path: Path) -> None:
    """One projection makes q, k and v there."""
    layers = {
        "joint_blocks.0.x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "joint_blocks.0.x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "joint_blocks.0.context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "joint_blocks.0.x_block.attn.proj": ["attn.to_out.0"],
        "joint_blocks.0.context_block.attn.proj": ["attn.to_add_out"],
        "joint_blocks.0.x_block.mlp.fc1": ["ff.net.0.proj"],
        "joint_blocks.0.x_block.mlp.fc2": ["ff.net.2"],
        "joint_blocks.0.context_block.mlp.fc1": ["ff_context.net.0.proj"],
    }
    network, tensors, updates = tiny_sd3().network, {}, {}
    for layer, names in layers.items():
        weights = [network.get_submodule(f"transformer_blocks.0.{name}").weight for name in names]
        a, b = halves(weights[0].shape[1], sum(len(weight) for weight in weights))
        start = f"lora_unet_{layer.replace('.', '_')}" if kohya else f"diffusion_model.{layer}"
        tensors |= {
            f"{start}.lora_down.weight": a,
            f"{start}.lora_up.weight": 0.1 * b,
            f"{start}.alpha": torch.tensor(1.0),
        }
        for name, part in zip(names, (0.1 * b @ a / 2).chunk(len(names)), strict=True):
            updates[f"transformer_blocks.0.{name}"] = part
    save_file(tensors, tmp_path / "a.safetensors")
    torch.testing.assert_close(change(tmp_path / "a.safetensors"), by_hand(updates), rtol=1e-3, atol=1e-4)


LAYER = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    [
        (LAYER | {"transformer.x.lora_magnitude_vector": torch.ones(4)}, None, "it is DoRA"),
        (LAYER | {"lora_unet_x.dora_scale": torch.ones(4)}, None, "it is DoRA"),
        ({"lora_unet_x.hada_w1_a": torch.ones(4, 2)}, None, "it is LoHa: extract a LoRA"),
        ({"lora_unet_x.lokr_w1": torch.ones(4, 2)}, None, "it is LoKr: extract a LoRA"),
        (LAYER | {"transformer.x.lora_B.bias": torch.ones(4)}, None, "a LoRA with biases"),
        (LAYER | {"text_encoder.x.lora_A.weight": torch.ones(2, 4)}, None, "a LoRA of text encoders, too"),
        (LAYER | {"lora_te1_x.lora_down.weight": torch.ones(2, 4)}, None, "a LoRA of text encoders, too"),
        (
            {"lora_unet_joint_blocks_0_x_block_adaLN_modulation_1.lora_down.weight": torch.ones(2, 4)},
            None,
            "two matching",
        ),
        ({"transformer.x.lora_A.weight": torch.ones(2, 4)}, None, "two matching halves of the layer 'transformer.x'"),
        (LAYER | {"transformer.y.alpha": torch.ones(())}, None, "an alpha of 'transformer.y' and no such layer"),
        ({name: t[:0] if "_A" in name else t[:, :0] for name, t in LAYER.items()}, None, "two matching halves"),
        ({}, None, "holds no layer"),
        (LAYER, "{", "its settings .* are damaged"),
        (LAYER, '{"transformer.peft_type": "IA3"}', "it is a IA3, expected a LORA"),
        (LAYER, '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.use_dora": true}', "it is DoRA"),
        (LAYER, '{"transformer.r": 2}', "no rank r and lora_alpha"),
        (LAYER, '{"transformer.r": 3, "transformer.lora_alpha": 1}', "say rank 3 of x, its tensors have 2"),
        (
            LAYER,
            '{"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.rank_pattern": {"(": 2}}',
            "which is none",
        ),
    ],
)
def test_what_is_not_read_says_what_it_is(
    tensors: dict[str, Tensor], header: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, None if header is None else {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=words) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("alpha", "header"),
    [
        (math.inf, None),
        (3e38, None),
        (math.nan, None),
        (None, '{"transformer.r": 2, "transformer.lora_alpha": Infinity}'),
        (None, '{"transformer.r": 2, "transformer.lora_alpha": 1e39}'),
        (None, '{"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"x": NaN}}'),
    ],
)
def test_an_alpha_that_makes_no_finite_update_is_refused(
    alpha: float | None, header: str | None, tmp_path: Path
) -> None:
    tensors = LAYER if alpha is None else LAYER | {"transformer.x.alpha": torch.tensor(alpha)}
    tensors = {name: 9 * tensor if "lora" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors", None if header is None else {"lora_adapter_metadata": header})
    with pytest.raises(NonFiniteError, match="a.safetensors: .*not finite"):
        read_lora(tmp_path / "a.safetensors")


def test_training_starts_from_an_adapter(tiny_policy: Callable[..., FlowModel], tmp_path: Path) -> None:
    model = trained()
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model.network),
        transformer_lora_adapter_metadata=model.network.peft_config["default"].to_dict(),
    )
    layers = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    fresh = tiny_sd3()
    before = output(fresh)
    add_lora(fresh.network, rank=4, alpha=6, targets=["attn.to_q", "attn.add_k_proj", "ff.net.2"], seed=0)
    fit_to(layers, fresh.trainable_parameters(), 6 / 4)
    torch.testing.assert_close(output(fresh), output(model), rtol=1e-4, atol=1e-4)
    with fresh.reference():
        assert torch.equal(output(fresh), before)
    for rank, targets, words in ((4, ["attn.to_q"], "is not among lora.targets"), (2, MODULES, r"\(lora.rank\)")):
        other = tiny_sd3()
        add_lora(other.network, rank=rank, alpha=2, targets=targets, seed=0)
        with pytest.raises(ValueError, match=words):
            fit_to(layers, other.trainable_parameters(), 1.0)
        # nothing of it was taken
        torch.testing.assert_close(output(other), before, rtol=0, atol=0)


@pytest.mark.ci
def test_a_run_starts_from_the_adapter_of_another_and_says_what_does_not_fit(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {"reward.observed": "[]", "evaluation.every": 0, "run.iterations": 1}
    assert train(tmp_path / "one", **quiet) == 0
    assert train(tmp_path / "two", **quiet, **{"lora.start": tmp_path / "one" / "adapter"}) == 0
    scores = {
        (run, when): json.loads((tmp_path / run / f"evaluation-{when}.json").read_text())["scores"]["reward"]
        for run in ("one", "two")
        for when in ("before", "after")
    }
    difference = torch.tensor(scores["two", "before"]) - torch.tensor(scores["one", "after"])
    assert difference.abs().max() < 1e-3 * torch.tensor(scores["one", "after"]).abs().max()
    assert math.isfinite(scores["two", "after"][0][0])
    assert train(tmp_path / "three", **quiet, **{"lora.start": tmp_path / "one" / "adapter", "lora.rank": 3}) == 3
    assert "error: lora.start: " in capsys.readouterr().err and not (tmp_path / "three").exists()
