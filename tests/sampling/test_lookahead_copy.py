"""The lookahead copy: the policy's velocity from merged weights, while the policy stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.tiny import tiny_sd3

Policy = Callable[..., Any]
GUIDANCE = 3.0


@torch.no_grad()
def velocity(model: Any, seed: int = 0) -> Tensor:
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    conditioning = model.encode(["a cat", "the moon", "a cat"])
    return model.velocity(latents, torch.tensor([0.9, 0.5, 0.2]), conditioning, GUIDANCE).combined()


def tensors(network: Any) -> Iterator[Tensor]:
    yield from (tensor.detach() for tensor in (*network.parameters(), *network.buffers()))


def change_adapter(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("base", "dtype", "relative"),
    [
        (torch.float32, None, 1e-5),
        (torch.float32, torch.bfloat16, 0.05),
        (torch.bfloat16, None, 0.05),
        (torch.float32, torch.float64, 1e-5),
    ],
)
def test_it_is_the_policy_to_its_precision(
    tiny_policy: Policy, base: torch.dtype, dtype: torch.dtype | None, relative: float
) -> None:
    policy = tiny_policy(spread=0.3)
    exact = velocity(policy)
    for name, parameter in policy.network.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(base)
    copy = LookaheadCopy(policy, dtype)
    assert {p.dtype for p in copy.network.parameters()} == {dtype or base}
    found = velocity(copy)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < relative
    plain = tiny_sd3()
    assert (velocity(plain) - exact).norm() / exact.norm() > 2 * relative


def test_it_follows_the_adapter_in_place(tiny_policy: Policy) -> None:
    policy = tiny_policy(spread=0.3)
    copy = LookaheadCopy(policy)
    before, addresses = velocity(policy), [tensor.data_ptr() for tensor in tensors(copy.network)]
    change_adapter(policy)
    torch.testing.assert_close(velocity(copy), before, rtol=1e-5, atol=1e-5)
    copy.refresh()
    torch.testing.assert_close(velocity(copy), velocity(policy), rtol=1e-5, atol=1e-5)
    assert (velocity(copy) - before).abs().max() > 1e-2
    assert [tensor.data_ptr() for tensor in tensors(copy.network)] == addresses


def test_refreshing_does_not_accumulate(tiny_policy: Policy) -> None:
    policy = tiny_policy(spread=0.3)
    copy = LookaheadCopy(policy, torch.bfloat16)
    first = [tensor.clone() for tensor in tensors(copy.network)]
    adapter = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    for _ in range(3):
        change_adapter(policy)
        copy.refresh()
    assert not all(torch.equal(a, b) for a, b in zip(first, tensors(copy.network), strict=True))
    for name, parameter in policy.trainable_parameters().items():
        parameter.data.copy_(adapter[name])
    copy.refresh()
    assert all(torch.equal(a, b) for a, b in zip(first, tensors(copy.network), strict=True))


def test_the_policy_stays_as_it_is(tiny_policy: Policy) -> None:
    policy = tiny_policy(spread=0.3)
    before, output = [tensor.clone() for tensor in tensors(policy.network)], velocity(policy)
    copy = LookaheadCopy(policy, torch.bfloat16)
    copy.refresh()
    velocity(copy)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(policy.network), strict=True))
    assert torch.equal(velocity(policy), output)
    assert copy.network is not policy.network and policy.pipeline.transformer is policy.network
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(copy.network)}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in tensors(policy.network))


def test_the_rest_is_the_policy_s(tiny_policy: Policy) -> None:
    policy = tiny_policy()
    copy = LookaheadCopy(policy, torch.bfloat16)
    latents = torch.randn(1, *policy.latent_shape)
    assert torch.equal(copy.decode(latents, "preview"), policy.decode(latents, "preview"))
    assert torch.equal(copy.sigmas(5), policy.sigmas(5))
    assert copy.trainable_parameters() == {}
    # no adapter: the weights of the tiny model alone, two bytes each
    plain = tiny_sd3().network
    assert copy.bytes() == 2 * sum(tensor.numel() for tensor in tensors(plain))
    with pytest.raises(RuntimeError, match="ask the policy for the reference"), copy.reference():
        pass


def test_a_policy_without_an_adapter() -> None:
    policy = tiny_sd3()
    assert torch.equal(velocity(LookaheadCopy(policy)), velocity(policy))


@pytest.mark.parametrize(("dtype", "relative"), [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_it_reads_what_the_policy_recorded(tiny_policy: Policy, dtype: torch.dtype | None, relative: float) -> None:
    policy = tiny_policy(spread=0.3)
    copy, rows = LookaheadCopy(policy, dtype), slice(0, 3)
    cache = FeatureCache(policy.network, nodes=(2,), rows=3, halves=2, reader=copy.network)
    with cache.record(2, rows):
        exact = velocity(policy)
    with cache.reuse(2, rows):
        found = velocity(copy)
        assert torch.equal(velocity(policy), exact)
    assert (found - exact).norm() / exact.norm() < relative
    # its own forwards may be recorded as well
    cache.clear()
    with cache.record(2, rows):
        own = velocity(copy, seed=1)
    with cache.reuse(2, rows):
        assert (velocity(copy, seed=1) - own).norm() / own.norm() < relative
    # two blocks' keys and values of each half, 24 text tokens of width 32, in the copy's dtype
    assert cache.bytes() == copy.network.dtype.itemsize * 2 * 3 * 2 * 2 * 24 * 32


def test_what_it_cannot_follow(tiny_policy: Policy) -> None:
    policy = tiny_sd3()
    policy.network.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], use_dora=True))
    with pytest.raises(
        ValueError, match=r"^lookahead\.copy_dtype: .*to_q carries something else than .*; set it to null$"
    ):
        LookaheadCopy(policy)
    policy = tiny_policy()
    policy.network.proj_out.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^lookahead\.copy_dtype: proj_out.bias is trained .*; set it to null$"):
        LookaheadCopy(policy)
