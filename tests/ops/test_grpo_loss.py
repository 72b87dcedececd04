from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow import native
from densegrpo_fast.flow.ops import grpo_loss
from densegrpo_fast.flow.reference import grpo_loss_ref

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand() -> None:
    # Ratios 1.5, .5, 1.1, .81; advantages 1, 1, -2, 0; clip .2.
    #   row 0: max(-1.5, -1.2) = -1.2 (clipped)      row 1: max(-.5, -.8) = -.5
    #   row 2: max(2.2, 2.2)   =  2.2                row 3: 0
    # policy = .5/4 = .125; kl = (.1+.2+.3+.4)/4 = .25; loss = .125 + .04*.25 = .135.
    # Outside the trusted interval: rows 0 and 1, half of them.
    ratio = rows(1.5, 0.5, 1.1, 0.81)
    old = rows(-1.0, -2.0, 0.5, 3.0)
    log_prob = (old + ratio.log()).requires_grad_()
    kl = rows(0.1, 0.2, 0.3, 0.4).requires_grad_()
    loss, metrics = grpo_loss(log_prob, old, rows(1, 1, -2, 0), kl, clip_range=0.2, kl_coef=0.04)
    torch.testing.assert_close(loss, torch.tensor(0.135, dtype=torch.float64))
    approx_kl = sum(r - 1 - math.log(r) for r in ratio.tolist()) / 4
    torch.testing.assert_close(metrics, rows(0.125, 0.25, 0.5, approx_kl, 0.5))
    loss.backward()
    # Unclipped rows: -A*ratio/4. Row 0 is clipped, row 3 has no advantage.
    torch.testing.assert_close(log_prob.grad, rows(0, -0.125, 0.55, 0))
    torch.testing.assert_close(kl.grad, rows(0.01, 0.01, 0.01, 0.01))
    assert not metrics.requires_grad


def test_the_first_update_is_the_plain_policy_gradient() -> None:
    log_prob = torch.randn(6, requires_grad=True)
    advantages = torch.randn(6)
    loss, metrics = grpo_loss(log_prob, log_prob.detach().clone(), advantages, None, clip_range=1e-4, kl_coef=0.0)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages / 6)
    assert metrics[1:].tolist() == [0, 0, 0, 0]


def test_scale_bias_and_weight_by_hand() -> None:
    # Row 0: (.1 + .1)*2 = .4; row 1: (0 - .3)*1 = -.3. Weights 3 and .5, advantages -1 and 1, wide clip.
    # loss = (3*e^.4 - .5*e^-.3)/2; d/dlog_prob = 3*2*e^.4/2 and -.5*e^-.3/2.
    log_prob = rows(0.1, 0.0).requires_grad_()
    loss, _ = grpo_loss(
        log_prob,
        rows(0, 0),
        rows(-1, 1),
        None,
        clip_range=10.0,
        kl_coef=0.0,
        log_ratio_scale=rows(2, 1),
        log_ratio_bias=rows(0.1, -0.3),
        weight=rows(3, 0.5),
    )
    loss.backward()
    assert loss.item() == pytest.approx((3 * math.exp(0.4) - 0.5 * math.exp(-0.3)) / 2)
    torch.testing.assert_close(log_prob.grad, rows(3 * math.exp(0.4), -0.25 * math.exp(-0.3)))


def case(rows: int, spread: float = 0.3) -> dict[str, Tensor]:
    """Every row argument of the loss, with log-ratios of about `spread`."""
    old, change, advantages, kl, scale, bias, weight = torch.randn(7, rows)
    return {
        "log_prob": old + spread * change,
        "old_log_prob": old,
        "advantages": advantages,
        "kl": kl.abs(),
        "log_ratio_scale": (0.3 * scale).exp(),
        "log_ratio_bias": 0.1 * spread * bias,
        "weight": weight.abs(),
    }


def loss_of(values: dict, implementation: str, clip_range: float = 0.2) -> tuple[Tensor, Tensor]:
    return grpo_loss(**values, clip_range=clip_range, kl_coef=0.04, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(("spread", "clip_range"), [(0.3, 0.2), (1e-3, 1e-3), (3.0, 0.5), (0.3, math.inf)])
@pytest.mark.usefixtures("poisoned_memory")
def test_value_metrics_and_gradients_against_float64(
    implementation: str, rows: int, spread: float, clip_range: float
) -> None:
    values = case(rows, spread)
    exact = {name: value.double() for name, value in values.items()}
    leaves = [values[name].requires_grad_() for name in ("log_prob", "kl")]
    loss, metrics = loss_of(values, implementation, clip_range)
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(2.0))
    expected, expected_metrics, expected_grad = grpo_loss_ref(*exact.values(), clip_range, 0.04)
    # The reference's float32 log-ratios are differences of numbers of size 1, known to 1e-7, which the exponential
    # of a log-ratio of up to 25 multiplies; ours in C++ are double.
    relative = 1e-6 if implementation == "cpu" else 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=relative, atol=2e-6)
    torch.testing.assert_close(metrics.double(), expected_metrics, rtol=relative, atol=1e-9 if spread > 0.01 else 1e-7)
    torch.testing.assert_close(
        gradients[0].double(), 2 * expected_grad, rtol=1e-6 if implementation == "cpu" else 5e-5, atol=1e-9
    )
    torch.testing.assert_close(gradients[1], torch.full((rows,), 0.08 / rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "kl", "weight"])
def test_nan_reaches_the_loss(implementation: str, name: str) -> None:
    values = case(40)
    values[name][17] = torch.nan
    loss, metrics = loss_of(values, implementation)
    assert loss.isnan()
    assert metrics.isnan().any()
    assert metrics[4].isnan() == (name in ("log_prob", "old_log_prob"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_strided_rows_and_left_out_ones(implementation: str) -> None:
    values = case(40)
    strided = {name: torch.stack([value, value], dim=1)[:, 0] for name, value in values.items()}
    first = loss_of(values, implementation)
    for again in (loss_of(values, implementation), loss_of(strided, implementation)):
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
    spelt = values | {"kl": torch.zeros(40), "log_ratio_scale": torch.ones(40), "log_ratio_bias": torch.zeros(40)}
    spelt["weight"] = torch.ones(40)
    left_out = {name: values[name] for name in ("log_prob", "old_log_prob", "advantages")} | {"kl": None}
    for found, expected in zip(loss_of(left_out, implementation), loss_of(spelt, implementation), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.ci
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_kl", [False, True])
def test_it_is_one_node_of_a_compiled_graph(implementation: str, with_kl: bool) -> None:
    values = case(6)
    names = ("log_prob", "kl") if with_kl else ("log_prob",)

    def run(leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        given = {**values, "kl": None} | {name: 2 * leaf for name, leaf in zip(names, leaves, strict=True)}
        return loss_of(given, implementation)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = tuple(values[name].clone().requires_grad_() for name in names)
        loss, metrics = function(leaves)
        results.append((loss, metrics, *torch.autograd.grad(3 * loss, leaves)))
        assert not metrics.requires_grad
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


VALUES = st.lists(
    st.tuples(*[st.floats(-2, 2) for _ in range(3)], st.floats(0, 1), st.floats(0.1, 3), st.floats(-0.5, 0.5)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(values=VALUES, clip_range=st.floats(1e-4, 0.9), kl_coef=st.floats(0, 1))
def test_gradients_equal_autograd_through_the_reference(values, clip_range: float, kl_coef: float) -> None:
    log_prob, old, advantages, kl, scale, bias = torch.tensor(values, dtype=torch.float64).unbind(1)
    weight = scale.flip(0).clone()
    results = []
    for use_op in (True, False):
        leaves = [log_prob.clone().requires_grad_(), kl.clone().requires_grad_()]
        if use_op:
            loss, metrics = grpo_loss(
                leaves[0],
                old,
                advantages,
                leaves[1],
                clip_range=clip_range,
                kl_coef=kl_coef,
                log_ratio_scale=scale,
                log_ratio_bias=bias,
                weight=weight,
            )
        else:
            arguments = (leaves[0], old, advantages, leaves[1], scale, bias, weight, clip_range, kl_coef)
            loss, metrics, _ = grpo_loss_ref(*arguments)
        results.append([loss.detach(), metrics, *torch.autograd.grad(2 * loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_row_without_advantage_changes_only_the_denominator() -> None:
    log_prob, old = torch.randn(2, 4, dtype=torch.float64)
    advantages = rows(1, -1, 0.5, 0)
    loss, _ = grpo_loss(log_prob, old, advantages, None, clip_range=0.2, kl_coef=0)
    without, _ = grpo_loss(log_prob[:3], old[:3], advantages[:3], None, clip_range=0.2, kl_coef=0)
    torch.testing.assert_close(4 * loss, 3 * without)


def test_small_ratios_keep_their_digits() -> None:
    # At log-ratios of 1e-4, (r-1) - log r = x^2/2 is lost in float32 unless it is formed with care.
    log_prob = torch.full((4,), 1e-4)
    _, metrics = grpo_loss(log_prob, torch.zeros(4), torch.ones(4), None, clip_range=1e-3, kl_coef=0)
    assert metrics[3].item() == pytest.approx(5e-9, rel=2e-2)
    assert metrics[4].item() == pytest.approx(1e-4, rel=2e-3)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    log_prob = torch.randn(3).bfloat16().requires_grad_()
    loss, metrics = grpo_loss(log_prob, torch.zeros(3), torch.ones(3), None, clip_range=0.2, kl_coef=0)
    loss.backward()
    assert (loss.dtype, metrics.dtype, log_prob.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(implementation: str, full: bool) -> None:
    required, optional = torch.randn(3, 4), torch.rand(4, 4) if full else [None] * 4
    arguments = (*required, *optional, 0.2, 0.04, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.grpo_loss.default, arguments)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        values = torch.empty(4)
        loss, metrics = grpo_loss(values, values, values, values, clip_range=0.1, kl_coef=0.1)
    assert (loss.shape, metrics.shape) == ((), (5,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_range": 0.0}, "clip_range must be positive, got 0.0"),
        ({"clip_range": math.nan}, "clip_range must be positive, got nan"),
        ({"kl_coef": -1.0}, "kl_coef must be finite and at least 0, got -1.0"),
        ({"kl_coef": math.inf}, "kl_coef must be finite and at least 0, got inf"),
        ({"kl": torch.zeros(3)}, r"kl must have shape \[4\], got \[3\]"),
        ({"weight": torch.zeros(4, 1)}, r"weight must have shape \[4\], got \[4, 1\]"),
        ({"log_prob": torch.zeros(2, 2)}, r"log_prob must have shape \[B\]"),
        ({"log_prob": torch.zeros(0)}, r"log_prob must have shape \[B\] with B >= 1"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    arguments = {
        "log_prob": torch.zeros(4),
        "old_log_prob": torch.zeros(4),
        "advantages": torch.zeros(4),
        "kl": None,
        "clip_range": 0.2,
        "kl_coef": 0.0,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)
