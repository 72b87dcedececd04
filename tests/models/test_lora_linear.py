"""The adapter's product in half precision: the formula and its gradients, and peft's own forward everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import Linear
from torch import Tensor, nn

from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora_linear import LoraLinear, lora_config, lora_linear

Policy = Callable[..., FlowModel]
HALF = [torch.bfloat16, torch.float16]


def with_gradients(product: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    """The product of x, W, b, A, B, scale and, for a fixed cotangent, the gradients of x, A and B."""
    x, weight, bias, down, up, scale = inputs
    x, down, up = (tensor.detach().requires_grad_() for tensor in (x, down, up))
    output = product(x, weight, bias, down, up, scale)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, (x, down, up), cotangent.to(output.dtype))]


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down), up)


@pytest.mark.ci
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 24),
    outputs=st.integers(1, 24),
    rank=st.integers(1, 6),
    scale=st.floats(0.1, 4),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float64, *HALF]),
)
def test_product_and_gradients_are_those_of_the_formula(
    seed: int, rows: list[int], width: int, outputs: int, rank: int, scale: float, biased: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, bias = draw(*rows, width).to(dtype), draw(outputs, width).to(dtype), draw(outputs).to(dtype)
    masters = torch.promote_types(dtype, torch.float32)
    down, up = draw(rank, width).to(masters), draw(outputs, rank).to(masters)
    found = with_gradients(lora_linear, x, weight, bias if biased else None, down, up, scale)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, masters, masters]
    exact = (x.double(), weight.double(), bias.double() if biased else None, down.double(), up.double(), scale)
    # the size of the terms, not of their sum, bounds what rounding does to it
    sizes = with_gradients(formula, *(abs(value) if isinstance(value, Tensor) else value for value in exact))
    tolerance = 6 * torch.finfo(dtype).eps
    for tensor, expected, size in zip(found, with_gradients(formula, *exact), sizes, strict=True):
        error = (tensor.double() - expected).norm()
        assert error <= tolerance * max(size.norm(), expected.norm()) * 2


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_policy_computes_one_forward_with_and_without_a_graph(
    tiny_policy: Policy, dtype: torch.dtype
) -> None:
    model = tiny_policy(spread=0.3)
    half(model, dtype)
    assert {type(m) for m in model.network.modules() if isinstance(m, Linear)} == {LoraLinear}
    inputs = (torch.randn(3, *model.latent_shape), torch.tensor([0.2, 0.5, 0.9]), model.encode(["a cat", "", "a"]))
    with torch.no_grad():
        sampled = model.velocity(*inputs).cond
        with model.reference():
            base = model.velocity(*inputs).cond
    trained = model.velocity(*inputs).cond
    assert torch.equal(trained, sampled) and not torch.equal(sampled, base)
    parameters = list(model.trainable_parameters().values())
    gradients = torch.autograd.grad(trained.square().mean(), parameters)
    model.network.enable_gradient_checkpointing()
    recomputed = torch.autograd.grad(model.velocity(*inputs).cond.square().mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_a_fresh_adapter_leaves_a_half_precision_policy_at_its_reference(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.0)
    half(model, torch.bfloat16)
    inputs = (torch.randn(2, *model.latent_shape), torch.tensor([0.2, 0.9]), model.encode(["a cat", "a"]))
    with torch.no_grad():
        policy = model.velocity(*inputs).cond
        with model.reference():
            assert torch.equal(model.velocity(*inputs).cond, policy)


OTHERS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("case", ["float32", "merged", "disabled", "trained base", "two adapters", *OTHERS])
def test_everything_else_is_pefts_own_forward(case: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 8, dtype=torch.float32 if case == "float32" else torch.bfloat16).requires_grad_(False)
    config = lora_config(r=2, lora_alpha=4, init_lora_weights=False, **OTHERS.get(case, {}))
    layer = LoraLinear(base, "default", config=config, r=2, lora_alpha=4)
    if case == "two adapters":
        layer.update_layer("other", 2, lora_alpha=4, config=config)
        layer.set_adapter(["default", "other"])
    base.weight.requires_grad_(case == "trained base")
    if case == "merged":
        layer.merge()
    layer.enable_adapters(case != "disabled")
    x = torch.randn(3, 12).to(base.weight.dtype)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    assert torch.equal(found, Linear.forward(layer, x))


@pytest.mark.ci
def test_a_compiled_layer_is_traced_as_a_whole() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(12, 8).bfloat16(), "default", config=lora_config(init_lora_weights=False), r=2)
    layer.base_layer.requires_grad_(False)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(2, 3, 12).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(call(x).float().square().sum(), parameters) for call in (compiled, layer))
    assert torch.equal(compiled(x), layer(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def half(model: FlowModel, dtype: torch.dtype) -> None:
    """Round the frozen weights, as a pipeline that is loaded so has them."""
    for name, parameter in model.network.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
