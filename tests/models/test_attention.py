"""Attention through diffusers' dispatcher: the same numbers, and plain words for what is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.models.attention import DispatchedJointAttention, check_attention, use_attention
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.tiny import tiny_sd3

Policy = Callable[..., DiffusersModel]
PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}


def velocity_and_gradients(model: DiffusersModel) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *model.latent_shape, generator=generator).to(model.device)
    sigma = torch.tensor([0.8, 0.3], device=model.device)
    velocity = model.velocity(latents, sigma, model.encode(["a photo", "the moon"])).cond
    gradients = torch.autograd.grad(velocity.square().mean(), list(model.trainable_parameters().values()))
    return velocity.detach(), list(gradients)


def test_native_through_the_dispatcher_is_the_model_s_own_to_the_bit(tiny_policy: Policy) -> None:
    # dual attention in block 0, no text output in block 1, query-key norm in both, an adapter on the projections
    model = tiny_policy(spread=0.1)
    before = velocity_and_gradients(model)
    calls = []
    model.set_attention("native")
    for module in model.network.modules():
        if isinstance(getattr(module, "processor", None), DispatchedJointAttention):
            calls.append(module)
    # two joint attentions and the second one of the dual block
    assert len(calls) == 3 and model.attention == "native"
    after = velocity_and_gradients(model)
    assert torch.equal(after[0], before[0])
    for found, expected in zip(after[1], before[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["auto", "native"])
def test_rollout_and_update_cannot_get_different_kernels(tiny_policy: Policy, name: str) -> None:
    # cuDNN has one kernel for inference and another that keeps what a backward needs
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_policy().set_attention(name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_every_call_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    backends: list[str] = []
    original = attention_dispatch.dispatch_attention_fn

    def watched(*tensors: Tensor, backend: object) -> Tensor:
        backends.append(backend.value)  # type: ignore[attr-defined]
        return original(*tensors, backend=backend)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", watched)
    model = tiny_sd3()
    conditioning = model.encode(["the moon"])
    model.velocity(torch.randn(1, *model.latent_shape), torch.ones(1), conditioning)
    assert backends == []
    model.set_attention("native")
    model.velocity(torch.randn(1, *model.latent_shape), torch.ones(1), conditioning)
    assert backends == ["native"] * 3


@pytest.mark.ci
@torch.no_grad()
def test_a_feature_cache_reads_the_same_keys(tiny_policy: Policy) -> None:
    def reused(attention: str) -> Tensor:
        model = tiny_policy(spread=0.1)
        model.set_attention(attention)
        generator = torch.Generator().manual_seed(0)
        one, other = torch.randn(2, 1, *model.latent_shape, generator=generator)
        sigma, conditioning = torch.full((1,), 0.5), model.encode(["the moon"])
        cache = FeatureCache(model.network, nodes=(1,), rows=1)
        with cache.record(1, slice(0, 1)):
            model.velocity(one, sigma, conditioning)
        with cache.reuse(1, torch.tensor([0])):
            return model.velocity(other, sigma, conditioning).cond

    torch.testing.assert_close(reused("native"), reused("auto"), rtol=1e-6, atol=1e-6)


def test_the_lookahead_copy_takes_the_policy_s(tiny_policy: Policy) -> None:
    model = tiny_policy()
    model.set_attention("native")
    copied = [m.processor for m in LookaheadCopy(model).network.modules() if hasattr(m, "processor")]
    assert len(copied) == 3 and all(isinstance(processor, DispatchedJointAttention) for processor in copied)


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_named(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed")
    with pytest.raises(UserError, match=rf"model.attention: {name} needs the package .* set model.attention to native"):
        use_attention(tiny_sd3().network, name)
    with pytest.raises(UserError) as caught:
        check_attention(name, torch.device("cuda"), torch.bfloat16)
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT


def test_packages_need_a_gpu_and_flash_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_attention("xformers", cuda, torch.float32)
    check_attention("flash", cuda, torch.bfloat16)
    for name, device, dtype, problem in (
        ("xformers", cpu, torch.float32, "xformers needs a CUDA device, the model is float32 on cpu"),
        ("flash", cuda, torch.float32, "bfloat16 or float16, the model is float32 on cuda"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            check_attention(name, device, dtype)
        assert exit_code_of(caught.value) == ExitCode.USAGE


def test_an_unknown_choice_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="attention must be one of auto, native, xformers, flash, got 'sage'"):
        use_attention(tiny_sd3().network, "sage")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["native", *PACKAGES])
def test_parity_on_a_gpu(name: str) -> None:
    from densegrpo_fast.models.lora import add_lora

    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed")

    def measured(attention: str) -> tuple[Tensor, list[Tensor]]:
        pipeline = tiny_sd3().pipeline.to("cuda", torch.bfloat16)
        model = DiffusersModel(pipeline, max_sequence_length=8)
        model.set_attention(attention)
        add_lora(model.network, rank=2, alpha=4, targets=["attn.to_q", "attn.to_v"], seed=0)
        for parameter in model.trainable_parameters().values():
            parameter.data.add_(0.05)
        return velocity_and_gradients(model)

    (expected, gradients), (found, own) = measured("auto"), measured(name)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    for one, two in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2 * two.abs().max().item())
