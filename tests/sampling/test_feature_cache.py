"""Reused features against a plainly written reference of the same approximation, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from torch import Tensor

from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.lora import add_lora

BLOCKS, HEADS, WIDTH, ROWS, NODE = 4, 2, 32, 3, 5
Inputs = dict[str, Tensor]


def make_network(kind: str) -> Any:
    """Four blocks in float64 with an active adapter: SD3's plain blocks, or SD3.5's with norms and dual attention."""
    modern = kind == "sd35"
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm" if modern else None,
        dual_attention_layers=(0, 1) if modern else (),
    ).eval()
    targets = ["attn.to_q", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out"]
    add_lora(network, rank=2, alpha=4, targets=targets, seed=0)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
        elif ".norm_" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    return torch.nn.Module.to(network, torch.float64)


def make_inputs(rows: int = ROWS) -> Inputs:
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(rows, 7, 24, dtype=torch.float64),
        "pooled_projections": torch.randn(rows, 16, dtype=torch.float64),
        "timestep": torch.full((rows,), 700.0, dtype=torch.float64),
    }


def run(network: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return network(**inputs).sample


class Plain:
    """The network's blocks as formulas on merged weights; embeddings and the last projection are the network's own."""

    def __init__(self, network: Any):
        self.network = network

    def linear(self, name: str, x: Tensor) -> Tensor:
        layer = self.network.get_submodule(name)
        if hasattr(layer, "lora_A"):
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            return F.linear(x, layer.base_layer.weight + 2.0 * update, layer.base_layer.bias)
        return F.linear(x, layer.weight, layer.bias)

    def projected(self, name: str, kind: str, norm: str | None, x: Tensor) -> Tensor:
        heads = self.linear(f"{name}.{kind}", x).view(len(x), -1, HEADS, WIDTH // HEADS)
        weight = None if norm is None else getattr(self.network.get_submodule(name), norm)
        if weight is None:
            return heads
        return weight.weight * heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(WIDTH // HEADS)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)

    def modulation(self, name: str, embedding: Tensor) -> list[Tensor]:
        return list(self.linear(f"{name}.linear", F.silu(embedding))[:, None].split(WIDTH, -1))

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def block(
        self, number: int, image: Tensor, text: Tensor | None, embedding: Tensor, kept: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Both streams after the block, and the text's keys and values; with `kept` ones there is no text stream."""
        name = f"transformer_blocks.{number}"
        last = number == BLOCKS - 1
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.modulation(f"{name}.norm1", embedding)
        plain = normed(image)
        x = plain * (1 + scale) + shift
        query, key, value = (
            self.projected(f"{name}.attn", *kind, x)
            for kind in (("to_q", "norm_q"), ("to_k", "norm_k"), ("to_v", None))
        )
        text_query = query[:, :0]
        if kept is None:
            assert text is not None
            changes = self.modulation(f"{name}.norm1_context", embedding)
            if last:
                changes.reverse()  # the last block's modulation names the scale first
            y = normed(text) * (1 + changes[1]) + changes[0]
            text_query, text_key, text_value = (
                self.projected(f"{name}.attn", *kind, y)
                for kind in (("add_q_proj", "norm_added_q"), ("add_k_proj", "norm_added_k"), ("add_v_proj", None))
            )
            kept = text_key, text_value
        query = torch.cat([query, text_query], 1)
        mixed = self.attend(query, torch.cat([key, kept[0]], 1), torch.cat([value, kept[1]], 1))
        tokens = image.shape[1]
        image = image + gate * self.linear(f"{name}.attn.to_out.0", mixed[:, :tokens])
        if second:
            x = plain * (1 + second[1]) + second[0]
            other = [
                self.projected(f"{name}.attn2", *kind, x)
                for kind in (("to_q", "norm_q"), ("to_k", "norm_k"), ("to_v", None))
            ]
            image = image + second[2] * self.linear(f"{name}.attn2.to_out.0", self.attend(*other))
        image = image + gate_mlp * self.feed_forward(f"{name}.ff", normed(image) * (1 + scale_mlp) + shift_mlp)
        if mixed.shape[1] == tokens or last:
            return image, None, kept
        text = text + changes[2] * self.linear(f"{name}.attn.to_add_out", mixed[:, tokens:])
        y = normed(text) * (1 + changes[4]) + changes[3]
        return image, text + changes[5] * self.feed_forward(f"{name}.ff_context", y), kept

    @torch.no_grad()
    def __call__(self, inputs: Inputs, texts: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[Any]]:
        """Output, and each block's text keys and values; given `texts`, they are those."""
        network = self.network
        image = network.pos_embed(inputs["hidden_states"])
        embedding = network.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        text: Tensor | None = self.linear("context_embedder", inputs["encoder_hidden_states"])
        seen: list[Any] = []
        for number in range(BLOCKS):
            image, text, kept = self.block(number, image, text, embedding, None if texts is None else texts[number])
            seen.append(kept)
        scale, shift = self.modulation("norm_out", embedding)
        patches = self.linear("proj_out", normed(image) * (1 + scale) + shift).view(-1, 4, 4, 2, 2, 4)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 8, 8), seen


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def record(cache: FeatureCache, inputs: Inputs) -> Tensor:
    with cache.record(NODE, slice(0, ROWS)):
        return run(cache.reader, inputs)


def untouched(network: Any) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in network.modules())


@pytest.fixture(params=["sd3", "sd35"])
def network(request: pytest.FixtureRequest) -> Any:
    return make_network(request.param)


def tolerance(network: Any) -> float:
    """diffusers takes the mean square of its query-key norm in float32, whatever the network's dtype."""
    return 1e-6 if network.config.qk_norm else 1e-10


def test_the_reference_is_the_transformer(network: Any) -> None:
    inputs = make_inputs()
    torch.testing.assert_close(Plain(network)(inputs)[0], run(network, inputs), rtol=0, atol=tolerance(network))


def test_other_latents_run_on_the_recorded_features(network: Any) -> None:
    inputs, rows = make_inputs(), torch.tensor([2, 0, 1, 2, 0])
    cache = FeatureCache(network, nodes=(NODE,), rows=ROWS)
    record(cache, inputs)
    others = {name: value[rows] for name, value in inputs.items()}
    others["hidden_states"] = torch.randn_like(others["hidden_states"])
    with cache.reuse(NODE, rows):
        found = run(network, others)
    plain = Plain(network)
    expected, _ = plain(others, [(key[rows], value[rows]) for key, value in plain(inputs)[1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(network))
    # an approximation, and a real one
    assert (found - run(network, others)).abs().max() > 1e-3
    assert untouched(network)


def test_recording_changes_no_bit() -> None:
    network = make_network("sd35")
    inputs = make_inputs()
    cache = FeatureCache(network, nodes=(NODE,), rows=ROWS, halves=2)
    plain = run(network, inputs)
    with cache.record(NODE, slice(0, ROWS)):
        assert torch.equal(run(network, inputs), plain)
        assert not untouched(network)
    assert untouched(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_latents_give_the_same_output(network: Any, dtype: torch.dtype) -> None:
    torch.nn.Module.to(network, dtype)
    inputs = {name: value.to(dtype) for name, value in make_inputs().items()}
    cache = FeatureCache(network, nodes=(NODE,), rows=ROWS)
    exact = record(cache, inputs)
    with cache.reuse(NODE, slice(0, ROWS)):
        found = run(network, inputs)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, exact, rtol=rounding, atol=rounding)


def test_micro_batches_fill_one_record(network: Any) -> None:
    inputs, cache = make_inputs(), FeatureCache(network, nodes=(NODE, 7), rows=ROWS)
    for rows in (slice(0, 2), slice(2, 3)):
        with cache.record(NODE, rows):
            run(network, {name: value[rows] for name, value in inputs.items()})
        with cache.record(6, rows):  # no node of the lookahead
            assert untouched(network)
    exact, rows = run(network, inputs), slice(1, 3)
    with cache.reuse(NODE, rows):
        found = run(network, {name: value[rows] for name, value in inputs.items()})
    torch.testing.assert_close(found, exact[rows], rtol=1e-12, atol=1e-12)


def test_what_was_forgotten_is_recorded_anew(network: Any) -> None:
    cache = FeatureCache(network, nodes=(NODE,), rows=ROWS)
    assert cache.bytes() == 0
    record(cache, make_inputs())
    # keys and values of 7 text tokens in float64
    assert cache.bytes() == cache.capacity(7) == 8 * ROWS * BLOCKS * 2 * 7 * WIDTH
    cache.clear()
    second = make_inputs()
    with pytest.raises(RuntimeError, match="not every row"), cache.reuse(NODE, slice(0, ROWS)):
        run(network, second)
    exact = record(cache, second)
    with cache.reuse(NODE, slice(0, ROWS)):
        torch.testing.assert_close(run(network, second), exact, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_guided_halves_are_kept_apart(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy(spread=0.3)
    conditioning, empty = model.encode(["a cat", "the moon", "a cat"]), model.encode([""] * 3)
    latents, others = torch.randn(2, 3, *model.latent_shape)
    sigma, rows = torch.full((3,), 0.7), slice(0, 3)

    def reused(halves: int, prompts: Any, recorded_scale: float, scale: float) -> Any:
        cache = FeatureCache(model.network, nodes=(NODE,), rows=3, halves=halves)
        with cache.record(NODE, rows):
            model.velocity(latents, sigma, prompts, recorded_scale)
        with cache.reuse(NODE, rows):
            return model.velocity(others, sigma, prompts, scale)

    guided = reused(2, conditioning, 4.5, 4.5)
    torch.testing.assert_close(guided.cond, reused(1, conditioning, 1.0, 1.0).cond, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided.uncond, reused(1, empty, 1.0, 1.0).cond, rtol=1e-5, atol=1e-5)
    assert (guided.cond - guided.uncond).abs().max() > 1e-3
    # a guided rollout for a lookahead without guidance
    torch.testing.assert_close(reused(1, conditioning, 4.5, 1.0).cond, guided.cond, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="features of 1 are kept; build it with halves=2"):
        reused(1, conditioning, 4.5, 4.5)


def test_misuse(network: Any) -> None:
    cache = FeatureCache(network, nodes=(NODE,), rows=ROWS)
    inputs, everything = make_inputs(), slice(0, ROWS)
    with cache.record(NODE, slice(0, 2)):
        run(network, {name: value[:2] for name, value in inputs.items()})
    with cache.reuse(NODE, slice(0, 2)):
        run(network, {name: value[:2] for name, value in inputs.items()})
        with pytest.raises(RuntimeError, match="a record or reuse context is open already"):
            with cache.record(NODE, everything):
                pass
    for rows in (everything, torch.tensor([0, 1, 0])):
        with pytest.raises(RuntimeError, match="not every row"), cache.reuse(NODE, rows):
            run(network, inputs)
    with pytest.raises(RuntimeError, match=r"node 6; record the rollout first \(nodes of this cache: 5\)"):
        with cache.reuse(6, everything):
            run(network, inputs)
    with pytest.raises(ValueError, match="at least 1 row"):
        FeatureCache(network, nodes=(NODE,), rows=0)
    record(cache, inputs)
    with pytest.raises(ValueError, match="the forward has 3 rows, its context names 2"):
        with cache.reuse(NODE, torch.tensor([0, 1])):
            run(network, inputs)
    with pytest.raises(ValueError, match="the forward has 3 rows, its context names 1"):
        with cache.record(NODE, slice(2, 9)):
            run(network, inputs)
    with pytest.raises(RuntimeError, match="only under torch.no_grad"), cache.reuse(NODE, everything):
        network(**inputs)
    longer = {**inputs, "encoder_hidden_states": torch.randn(ROWS, 9, 24, dtype=torch.float64)}
    with pytest.raises(ValueError, match="made for 7 text tokens, got 9"):
        record(cache, longer)
    network.compile(backend="eager")
    with pytest.raises(RuntimeError, match="a compiled network hides its blocks"):
        record(cache, inputs)


def test_networks_that_are_not_supported() -> None:
    network = make_network("sd3")
    with pytest.raises(ValueError, match=r"^lookahead\.cache: only SD3's .* got Linear; set it to null for"):
        FeatureCache(torch.nn.Linear(1, 1), nodes=(NODE,), rows=1)
    network.transformer_blocks[1].attn.set_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(
        ValueError, match=r"^lookahead\.cache: block 1 has FusedJointAttnProcessor2_0 where plain joint"
    ):
        FeatureCache(network, nodes=(NODE,), rows=1)
