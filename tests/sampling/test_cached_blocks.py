"""Reading and replacing the blocks of a transformer leaves no trace on it, whatever happens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from densegrpo_fast.models.cached_blocks import image_block, replaced_forward, split_heads
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.tiny import tiny_sd3

NODE, ROWS = 5, slice(0, 2)


@pytest.fixture
def model() -> DiffusersModel:
    return tiny_sd3()


def run(model: DiffusersModel, rows: int = 2) -> None:
    with torch.no_grad():
        model.velocity(torch.zeros(rows, *model.latent_shape), torch.full((rows,), 0.5), model.encode(["a cat"] * rows))


def untouched(model: DiffusersModel) -> bool:
    modules = model.network.modules()
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def test_an_error_leaves_nothing_behind(model: DiffusersModel) -> None:
    cache = FeatureCache(model.network, nodes=(NODE,), rows=2)
    for context in (cache.record, cache.reuse):
        with pytest.raises(ArithmeticError), context(NODE, ROWS):
            assert not untouched(model)
            raise ArithmeticError
        assert untouched(model)


def test_a_forward_that_fails_has_recorded_nothing(model: DiffusersModel) -> None:
    cache = FeatureCache(model.network, nodes=(NODE,), rows=2)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    with model.network.transformer_blocks[1].register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        with cache.record(NODE, ROWS):
            run(model)
    with pytest.raises(RuntimeError, match="not every row asked for is recorded"), cache.reuse(NODE, ROWS):
        run(model)
    with cache.record(NODE, ROWS):
        run(model)
    with cache.reuse(NODE, ROWS):
        run(model)
    assert untouched(model)


def test_a_forward_that_was_replaced_before_stays_so() -> None:
    module = torch.nn.Linear(2, 2)
    x, own = torch.ones(1, 2), module.forward
    module.forward = lambda x: 2 * own(x)
    before = module(x)
    with replaced_forward(module, lambda x: x):
        assert torch.equal(module(x), x)
    assert torch.equal(module(x), before)


@torch.no_grad()
def test_an_image_block_is_the_block_without_its_text_stream(model: DiffusersModel) -> None:
    for number, block in enumerate(model.network.transformer_blocks):
        assert block.use_dual_attention == (number == 0) and block.context_pre_only == (number == 1)
        image, text, embedding = torch.randn(2, 16, 32), torch.randn(2, 7, 32), torch.randn(2, 32)
        changed = block.norm1_context(text, embedding) if number else block.norm1_context(text, emb=embedding)[0]
        key = block.attn.norm_added_k(split_heads(block.attn.add_k_proj(changed), 2))
        value = split_heads(block.attn.add_v_proj(changed), 2)
        _, expected = block(hidden_states=image, encoder_hidden_states=text, temb=embedding)
        torch.testing.assert_close(image_block(block, image, embedding, key, value), expected, rtol=1e-5, atol=1e-5)


def test_the_host_reads_no_number() -> None:
    """On the meta device there are none to read, so a hidden synchronisation with a GPU would fail here."""
    network = tiny_sd3().network.to("meta")
    cache = FeatureCache(network, nodes=(NODE,), rows=3)

    def forward(rows: int) -> torch.Tensor:
        latents, text, pooled = (torch.empty(rows, *shape, device="meta") for shape in ((16, 8, 8), (7, 128), (128,)))
        return network(latents, text, pooled, torch.empty(rows, device="meta")).sample

    with torch.no_grad():
        for rows in (slice(0, 2), slice(2, 3)):
            with cache.record(NODE, rows):
                forward(rows.stop - rows.start)
        with cache.reuse(NODE, torch.empty(5, dtype=torch.int64, device="meta")):
            assert forward(5).shape == (5, 16, 8, 8)
