"""The adapter: a frozen base, and a file that plain diffusers loads to the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from densegrpo_fast.models.adapter_formats import read_lora
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import add_lora, attached_lora, lora_layers, save_lora
from densegrpo_fast.models.tiny import tiny_sd3

Policy = Callable[..., FlowModel]
TARGETS = ["attn.to_q", "attn.add_k_proj"]


@torch.no_grad()
def output(model: FlowModel) -> torch.Tensor:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = model.encode(["a cat", "the moon"])
    return model.velocity(latents, torch.tensor([0.3, 0.9]), conditioning).combined()


def test_only_the_adapter_is_trained() -> None:
    model = tiny_sd3()
    model.network.requires_grad_(True)
    add_lora(model.network, rank=3, alpha=3, targets=TARGETS, seed=0)
    for name, parameter in model.network.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
    parameters = model.trainable_parameters()
    # A and B of two projections in two blocks; the second attention of the first block is attn2
    assert len(parameters) == 8
    assert {tuple(p.shape) for name, p in parameters.items() if "lora_A" in name} == {(3, 32)}


def test_a_fresh_adapter_changes_nothing() -> None:
    plain, model = tiny_sd3(), tiny_sd3()
    add_lora(model.network, rank=2, alpha=8, targets=TARGETS, seed=0)
    assert torch.equal(output(model), output(plain))


def test_its_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = tiny_sd3()
        before = torch.get_rng_state()
        add_lora(model.network, rank=2, alpha=2, targets=TARGETS, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [p for name, p in model.trainable_parameters().items() if "lora_A" in name]

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_adapter_of_a_half_precision_base_is_float32() -> None:
    model = tiny_sd3()
    model.network.to(torch.bfloat16)
    add_lora(model.network, rank=2, alpha=2, targets=TARGETS, seed=0)
    parameters = model.trainable_parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    velocity = model.velocity(torch.randn(1, *model.latent_shape), torch.tensor([0.5]), model.encode(["a cat"]))
    assert velocity.combined().dtype == torch.float32
    velocity.combined().square().sum().backward()
    gradients = [p.grad for name, p in parameters.items() if "lora_B" in name]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_an_unknown_target_is_refused() -> None:
    model = tiny_sd3()
    with pytest.raises(ValueError, match=r"'attn.to_query' matches no module of SD3Transformer2DModel"):
        add_lora(model.network, rank=2, alpha=2, targets=["attn.to_q", "attn.to_query"], seed=0)
    # part of a name is not a name: "to_q" alone would be, "o_q" is not
    with pytest.raises(ValueError, match="'o_q'"):
        add_lora(model.network, rank=2, alpha=2, targets=["o_q"], seed=0)


@pytest.mark.parametrize(("rank", "alpha"), [(2, 7), (4, 4), (4, 1)])
def test_plain_diffusers_loads_the_same_model(tiny_policy: Policy, tmp_path: Path, rank: int, alpha: int) -> None:
    model = tiny_policy(spread=0.3, rank=rank, alpha=alpha)
    file = save_lora(model.network, tmp_path / "adapter", rank=rank, alpha=alpha)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "SHA256SUMS"}
    assert file == tmp_path / "adapter" / "pytorch_lora_weights.safetensors"

    fresh = tiny_sd3()
    before = output(fresh)
    fresh.pipeline.load_lora_weights(str(tmp_path / "adapter"))
    assert fresh.pipeline.get_active_adapters()
    torch.testing.assert_close(output(fresh), output(model), rtol=1e-5, atol=1e-5)
    assert (output(fresh) - before).abs().max() > 1e-2


def test_the_file_needs_no_alpha(tiny_policy: Policy, tmp_path: Path) -> None:
    # B in the file is alpha / rank = 2 times the trained B, so the update is B A for readers that know no alpha.
    model = tiny_policy(spread=0.3, rank=2, alpha=4)
    file = save_lora(model.network, tmp_path, rank=2, alpha=4)
    trained = {name.replace(".default.", "."): p for name, p in model.trainable_parameters().items()}
    with safe_open(file, "pt") as saved:
        names = {name.removeprefix("transformer."): name for name in saved.keys()}
        assert names.keys() == trained.keys()
        for name, parameter in trained.items():
            factor = 2.0 if ".lora_B." in name else 1.0
            assert torch.equal(saved.get_tensor(names[name]), factor * parameter.detach())
            assert saved.get_tensor(names[name]).dtype == torch.float32


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_is_attached_unrounded_and_leaves_no_trace(
    tiny_policy: Policy, tmp_path: Path, dtype: torch.dtype
) -> None:
    policy, plain = tiny_policy(spread=0.3), tiny_sd3()
    for model in (policy, plain):
        for name, parameter in model.network.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    file = save_lora(policy.network, tmp_path, rank=2, alpha=4)
    before, names = output(plain), list(plain.network.state_dict())
    generator = torch.get_rng_state()
    for _ in range(2):
        with attached_lora(plain.network, read_lora(file)):
            parameters = [p for name, p in plain.network.named_parameters() if ".lora_" in name]
            assert len(parameters) == len(policy.trainable_parameters())
            assert {parameter.dtype for parameter in parameters} == {torch.float32}
            torch.testing.assert_close(output(plain), output(policy), rtol=1e-5, atol=1e-5)
        assert list(plain.network.state_dict()) == names and torch.equal(output(plain), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_layers_of_a_checkpoint_are_those_of_the_file(tiny_policy: Policy, tmp_path: Path) -> None:
    policy = tiny_policy(spread=0.3, rank=2, alpha=6)
    saved = read_lora(save_lora(policy.network, tmp_path, rank=2, alpha=6))
    layers = lora_layers(policy.trainable_parameters(), rank=2, alpha=6)
    assert layers.keys() == saved.keys() and all(torch.equal(layers[name], saved[name]) for name in saved)


def test_ranks_may_differ_from_layer_to_layer() -> None:
    model, modules = tiny_sd3(), ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v")
    layers = {}
    for name, rank in zip(modules, (1, 3), strict=True):
        layers[f"{name}.lora_A.weight"] = torch.randn(rank, 32)
        layers[f"{name}.lora_B.weight"] = torch.randn(32, rank)
    expected = tiny_sd3()
    for name in modules:
        expected.network.get_submodule(name).weight.data += (
            layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"]
        )
    with attached_lora(model.network, layers):
        torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model() -> None:
    model = tiny_sd3()
    name = "transformer_blocks.0.attn.to_q"
    down, up = torch.zeros(2, 32), torch.zeros(32, 2)
    for layers, words in (
        ({f"{name}.lora_A.weight": down}, "does not belong to this SD3Transformer2DModel"),
        ({"blocks.0.lora_A.weight": down, "blocks.0.lora_B.weight": up}, "'blocks.0' does not belong"),
        ({f"{name}.lora_A.weight": down[:, :9], f"{name}.lora_B.weight": up}, r"the model \[32, 32\]"),
        ({f"{name}.lora_A.weight": down[:1], f"{name}.lora_B.weight": up}, r"has the shape \[32, 2\] x \[1, 32\]"),
    ):
        with pytest.raises(ValueError, match=words), attached_lora(model.network, layers):
            pass
        assert not [name for name in model.network.state_dict() if "lora" in name]


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    for number, content in enumerate(({"weight": torch.zeros(2, 2)}, {"a.lora_A.weight": torch.zeros(3)})):
        save_file(content, tmp_path / f"{number}.safetensors")
        with pytest.raises(ValueError, match="expected a LoRA of linear layers of a transformer, got"):
            read_lora(tmp_path / f"{number}.safetensors")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="broken cannot be read"):
        read_lora(tmp_path / "broken")
