"""Operation counts against sums written out here and against figures known for the real models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from densegrpo_fast.models import feature_cache, flops
from densegrpo_fast.models.base import FlowModel


@pytest.fixture(scope="module")
def sd35() -> flops.ModelFlops:
    return flops.count(flops.sd35_medium())


@pytest.fixture(scope="module")
def embedded() -> flops.ModelFlops:
    return flops.count(flops.embedded(), lora_rank=16)


def test_a_multiply_add_is_two_operations() -> None:
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert flops.counted(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.ci
def test_sd35_medium_by_hand(sd35: flops.ModelFlops) -> None:
    """512 pixels: 32x32 = 1024 image tokens, 205 text tokens, width d = 1536, 24 blocks.

    A token meets 12 d^2 weights in a block (4 d^2 of attention, 8 d^2 of MLP) and 4 d^2 more in each of the 13 blocks
    with a second attention; the last block does without the text stream's output and MLP: 3 d^2 instead of 12.
    Attention costs 4 d operations per pair of tokens.
    """
    d, image, text = 1536, 1024, 205
    linear = 2 * image * (24 * 12 + 13 * 4) * d**2 + 2 * text * (23 * 12 + 3) * d**2
    attention = 4 * d * (24 * (image + text) ** 2 + 13 * image**2)
    # what is left out here: modulation, embeddings and the last projection, each below half a percent
    assert sd35.reference_forward == pytest.approx(linear + attention, rel=0.005)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("part", "tera"),
    [
        ("reference_forward", 2.224),
        ("forward", 2.247),
        ("backward", 2.522),
        ("full_decode", 2.515),
        ("preview_decode", 0.1414),
    ],
)
def test_figures_of_sd35_medium(sd35: flops.ModelFlops, part: str, tera: float) -> None:
    assert getattr(sd35, part) / 1e12 == pytest.approx(tera, rel=1e-3)


@pytest.fixture(scope="module")
def flux_forward() -> float:
    architecture = flops.flux()
    with torch.device("meta"), torch.no_grad():
        network = architecture.network()
        inputs = architecture.inputs(network, 1)
        return flops.counted(lambda: network(**inputs))


@pytest.mark.ci
def test_figure_of_flux(flux_forward: float) -> None:
    assert flux_forward / 1e12 == pytest.approx(17.69, rel=1e-3)
    assert not flops.flux().guided


@pytest.mark.ci
def test_the_embedded_model_is_ordered_as_it_should_be(embedded: flops.ModelFlops) -> None:
    assert 0 < embedded.preview_decode < embedded.reference_forward < embedded.forward < embedded.full_decode
    # no gradient of the frozen weights: about one product per forward product, more for attention and the adapter
    assert 1.0 < embedded.backward / embedded.forward < 1.2


def test_image_tower_of_pickscore() -> None:
    """ViT-H/14: 256 patches and a class token through 32 layers of 12 d^2 weights, d = 1280."""
    tokens, d = 257, 1280
    expected = 32 * (2 * tokens * 12 * d**2 + 4 * d * tokens**2) + 2 * 256 * d * 3 * 14**2
    assert flops.clip_h_image() == pytest.approx(expected, rel=1e-3)


@pytest.mark.ci
def test_the_adapter_costs_in_proportion_to_its_rank(embedded: flops.ModelFlops) -> None:
    single = flops.count(flops.embedded(), lora_rank=1)
    assert single.reference_forward == embedded.reference_forward
    assert embedded.forward - embedded.reference_forward == 16 * (single.forward - single.reference_forward)


def test_without_a_preview_decoder() -> None:
    assert math.isnan(flops.count(replace(flops.embedded(), preview_decoder=None)).preview_decode)


def test_a_loaded_model_is_counted_at_its_own_size(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy()
    architecture = flops.architecture_of(model)
    found = flops.count(architecture, lora_rank=2, lora_targets=("attn.to_q",))
    assert architecture.latent_shape == model.latent_shape
    assert model.network.device.type == "cpu"

    latents, sigma = torch.zeros(1, *model.latent_shape), torch.ones(1)
    conditioning = model.encode(["a cat"])
    # the CPU's fused attention is one opaque kernel to the counter
    with model.reference(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert found.reference_forward == flops.counted(lambda: model.velocity(latents, sigma, conditioning))
        assert found.full_decode == flops.counted(lambda: model.decode(latents, "full"))
        assert found.preview_decode == flops.counted(lambda: model.decode(latents, "preview"))


@pytest.mark.ci
def test_reused_text_by_hand(sd35: flops.ModelFlops) -> None:
    """Saved: the text stream's products (the last block's keys, values and queries only), its modulation, and what
    1229 tokens' answers to its 205 tokens cost; the embedding of 4096 values a token; all without an adapter."""
    d, image, text = 1536, 1024, 205
    linear = 2 * text * ((23 * 12 + 3) * d**2 + 4096 * d)
    modulation = 2 * (23 * 6 + 2) * d**2
    attention = 24 * 4 * d * text * (image + text)
    found = flops.cached_forward(flops.sd35_medium(), lora_rank=0)
    assert found == sd35.reference_forward - linear - modulation - attention


@pytest.mark.ci
def test_what_a_cache_saves(embedded: flops.ModelFlops, sd35: flops.ModelFlops) -> None:
    """As the docstring of `models/feature_cache.py` says."""
    stated = re.search(
        r"(\.\d\d) of the operations of the embedded model's forward, (\.\d\d) of", feature_cache.__doc__ or ""
    )
    assert stated is not None
    models = (flops.embedded(), embedded, 16), (flops.sd35_medium(), sd35, 32)
    for (architecture, plain, rank), saved in zip(models, stated.groups(), strict=True):
        left = flops.cached_forward(architecture, lora_rank=rank) / plain.forward
        assert f"{1 - left:.2f}" == f"0{saved}", architecture.title


def test_features_are_reused_in_sd3_alone() -> None:
    with pytest.raises(ValueError, match="got FluxTransformer2DModel; set it to null for this model"):
        flops.cached_forward(flops.flux())
