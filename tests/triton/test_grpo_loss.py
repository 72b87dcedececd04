from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.ops import grpo_loss
from densegrpo_fast.flow.reference import grpo_loss_ref

METRICS = ("policy loss", "mean kl", "clip fraction", "kl to the old policy", "largest deviation")


def inputs(device: torch.device, rows: int, spread: float) -> dict[str, Tensor]:
    """Every row argument of the loss, with log-ratios of about `spread`."""
    old, change, advantages, kl, scale, bias, weight = torch.randn(7, rows)
    values = {
        "log_prob": old + spread * change,
        "old_log_prob": old,
        "advantages": advantages,
        "kl": kl.abs(),
        "log_ratio_scale": (0.3 * scale).exp(),
        "log_ratio_bias": 0.1 * spread * bias,
        "weight": weight.abs(),
    }
    return {name: value.to(device) for name, value in values.items()}


def loss_of(values: dict[str, Tensor], clip_range: float = 0.2, kl_coef: float = 0.04) -> tuple[Tensor, Tensor]:
    return grpo_loss(**values, clip_range=clip_range, kl_coef=kl_coef, implementation="triton")


@pytest.mark.parametrize("rows", [1, 5, 256, 1000])
@pytest.mark.parametrize(("spread", "clip_range"), [(0.3, 0.2), (1e-3, 1e-3), (3.0, 0.5)])
@pytest.mark.usefixtures("poisoned_memory")
def test_value_and_gradients_against_float64(device, rows: int, spread: float, clip_range: float) -> None:
    values = inputs(device, rows, spread)
    leaves = {name: values[name].requires_grad_() for name in ("log_prob", "kl")}
    loss, metrics = loss_of(values, clip_range)
    loss.backward()
    exact = {name: value.detach().double() for name, value in values.items()}
    expected, expected_metrics, policy_grad = grpo_loss_ref(*exact.values(), clip_range, 0.04)
    # Log-ratios are differences of numbers of size 1, known to 1e-7; the fourth metric squares them. The exponential
    # of a large one has the absolute error of its argument, of up to 25, as relative error.
    relative = {1e-3: 1e-3, 0.3: 2e-5, 3.0: 4e-5}[spread]
    torch.testing.assert_close(loss.double(), expected, rtol=relative, atol=2e-6)
    for name, value, target in zip(METRICS, metrics.tolist(), expected_metrics.tolist(), strict=True):
        assert value == pytest.approx(target, rel=relative, abs=1e-9), name
    torch.testing.assert_close(leaves["log_prob"].grad.double(), policy_grad, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(leaves["kl"].grad, torch.full((rows,), 0.04 / rows, device=device))
    assert not metrics.requires_grad


@pytest.mark.capabilities(80, 100)
def test_the_first_update_is_the_plain_policy_gradient(device) -> None:
    values = inputs(device, 300, 0.0)
    del values["log_ratio_scale"], values["log_ratio_bias"], values["weight"]
    values["log_prob"].requires_grad_()
    loss, metrics = loss_of({**values, "kl": None}, 1e-4, 0.0)
    loss.backward()
    assert torch.equal(values["log_prob"].grad, -values["advantages"] / 300)
    assert metrics[1:].tolist() == [0, 0, 0, 0]


def test_small_ratios_keep_their_digits(device) -> None:
    values = {"log_prob": torch.full((4,), 1e-4), "old_log_prob": torch.zeros(4), "advantages": torch.ones(4)}
    _, metrics = loss_of({**{name: value.to(device) for name, value in values.items()}, "kl": None}, 1e-3)
    # exp(x) - 1 - x = x^2/2 + x^3/6 + ...
    assert metrics[3].item() == pytest.approx(5.000166671e-9, rel=1e-6)
    assert metrics[4].item() == pytest.approx(math.expm1(1e-4), rel=1e-6)


@pytest.mark.capabilities(80, 100)
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(("log_ratio", "ratio"), [(-1e9, 0.0), (-80.0, math.exp(-80.0)), (5.0, math.exp(5.0))])
def test_far_ratios(device, log_ratio: float, ratio: float) -> None:
    # Advantages of both signs: one of the two rows is clipped, whichever side the ratio is on.
    values = {"old_log_prob": torch.zeros(2), "advantages": torch.tensor([1.0, -1.0]), "kl": torch.zeros(2)}
    values = {name: value.to(device) for name, value in {"log_prob": torch.full((2,), log_ratio), **values}.items()}
    loss, metrics = loss_of(values)
    expected = max(-ratio, -min(max(ratio, 0.8), 1.2)) + max(ratio, min(max(ratio, 0.8), 1.2))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)
    assert metrics[4].item() == pytest.approx(abs(ratio - 1), rel=1e-5)


@pytest.mark.capabilities(80, 100)
@pytest.mark.parametrize("name", ["log_prob", "advantages", "kl", "weight"])
def test_nan_reaches_the_loss(device, name: str) -> None:
    values = inputs(device, 300, 0.1)
    values[name][17] = torch.nan
    loss, metrics = loss_of(values)
    assert loss.isnan()
    assert metrics.isnan().any()
    assert metrics[4].isnan() == (name == "log_prob")


def test_rows_without_advantage_get_no_gradient(device) -> None:
    values = inputs(device, 300, 0.3)
    values["advantages"][::2] = 0
    values["log_prob"].requires_grad_()
    loss_of(values)[0].backward()
    assert (values["log_prob"].grad[::2] == 0).all()


def test_two_runs_are_bit_equal(device) -> None:
    values = inputs(device, 1000, 0.3)
    first, second = loss_of(values), loss_of(values)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.capabilities(80, 100)
def test_strided_rows(device) -> None:
    values = inputs(device, 40, 0.3)
    strided = {name: torch.stack([value, value], dim=1)[:, 0] for name, value in values.items()}
    assert torch.equal(loss_of(strided)[0], loss_of(values)[0])


def test_opcheck(device) -> None:
    values = inputs(device, 4, 0.3)
    torch.library.opcheck(torch.ops.densegrpo_fast.grpo_loss.default, (*values.values(), 0.2, 0.04, "triton"))


def test_under_torch_compile(device) -> None:
    values = inputs(device, 6, 0.3)
    names, results = ("log_prob", "kl"), []

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return loss_of(values | {name: 2 * leaf for name, leaf in zip(names, leaves, strict=True)})

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [values[name].clone().requires_grad_() for name in names]
        loss, metrics = function(*leaves)
        results.append((loss, metrics, *torch.autograd.grad(3 * loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
