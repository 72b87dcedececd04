"""The score with the divergence from a reference policy: value, gradients by name, every form, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, coefficients
from densegrpo_fast.flow.ops import sde_log_prob, sde_log_prob_kl
from densegrpo_fast.flow.reference import gaussian_kl_ref, guided_velocity_ref, sde_log_prob_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(sd3_sigmas(10), LEVELS, "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])
SCALE = torch.tensor([1.0, 4.5, 7.0, 0.0])
UPSTREAM = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 2.0, -0.5, 0.7]])
"""Gradients arriving at log_prob and at kl."""

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]


class Case:
    """A transition, the policy's two velocities, and the reference policy's, in float64."""

    def __init__(self, *shape: int) -> None:
        drawn = torch.randn(6, 4, *shape, dtype=torch.float64)
        self.latents, self.velocity, self.uncond, self.reference, self.reference_uncond, noise = drawn
        rows = TABLE.double()[STEPS].reshape(4, 6, *([1] * len(shape)))
        self.next_latents = rows[:, A] * self.latents + rows[:, B] * self.velocity + rows[:, C] * noise

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: getattr(self, name).to(dtype).requires_grad_() for name in ("velocity", "uncond")}

    def score(self, leaves: dict[str, Tensor], guided: bool, implementation: str = "auto", scale: str = "paper"):
        dtype = leaves["velocity"].dtype
        states = (getattr(self, name).to(dtype) for name in ("latents", "reference", "next_latents"))
        latents, reference, next_latents = states
        guidance = {"uncond": leaves["uncond"], "reference_uncond": self.reference_uncond.to(dtype)}
        options = {**guidance, "guidance_scale": SCALE} if guided else {}
        arguments = (latents, leaves["velocity"], reference, next_latents, TABLE, STEPS)
        return sde_log_prob_kl(*arguments, scale=scale, implementation=implementation, **options)

    def expected(self, leaves: dict[str, Tensor], guided: bool, kl_std: int = C) -> tuple[Tensor, Tensor]:
        velocity, reference = leaves["velocity"], self.reference
        if guided:
            velocity = guided_velocity_ref(velocity, leaves["uncond"], SCALE)
            reference = guided_velocity_ref(reference, self.reference_uncond, SCALE)
        log_prob = sde_log_prob_ref(self.latents, velocity, self.next_latents, TABLE, STEPS)
        return log_prob, gaussian_kl_ref(velocity, reference, TABLE, STEPS, kl_std)


def test_value_by_hand() -> None:
    # mean = 2*1 - 1*3 = -1, residuals 1 and -2: log_prob = -.5*2.5 + .25 = -1. Velocities differ by 2 and 4, so
    # kl = 1/(2*.5^2) * (4 + 16)/2 = 20, and in units of std_dev = 2: 1/(2*2^2) * 10 = 1.25.
    table = torch.tensor([[2.0, -1.0, 0.5, 2.0, 0.5, 0.25]])
    velocity, reference = torch.full((1, 2), 3.0), torch.tensor([[1.0, 7.0]])
    transition = (torch.ones(1, 2), velocity, reference, torch.tensor([[0.0, -3.0]]), table, 0)
    for scale, expected in (("paper", 20.0), ("flow_grpo", 1.25)):
        log_prob, kl = sde_log_prob_kl(*transition, scale=scale)
        torch.testing.assert_close((log_prob, kl), (torch.tensor([-1.0]), torch.tensor([expected])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(1,), (3,), (1021,), (4096,), (4, 33, 65)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_against_float64(implementation: str, guided: bool, shape: tuple[int, ...]) -> None:
    case = Case(*shape)
    leaves, exact = case.leaves(torch.float32), case.leaves(torch.float64)
    found, expected = case.score(leaves, guided, implementation), case.expected(exact, guided)
    names = ("velocity", "uncond") if guided else ("velocity",)
    gradients, exact_gradients = (
        torch.autograd.grad(results, [of[name] for name in names], list(UPSTREAM.to(results[0].dtype)))
        for results, of in ((found, leaves), (expected, exact))
    )
    # a guided velocity is about 8 in size, and one rounding of it, divided by C, counts on single elements
    tolerance = 3e-6 if latent_size(shape) > 1000 else 3e-3
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-9)
    assert found[0][1] == found[1][1] == 0, "a noise-free row"
    for name, gradient, target in zip(names, gradients, exact_gradients, strict=True):
        slope = target.flatten(1).abs().amax(1).reshape(-1, *[1] * len(shape))
        assert ((gradient - target).abs() <= 3e-4 * slope).all(), name
        assert gradient[1].count_nonzero() == 0, name


def latent_size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("scale", ["paper", "flow_grpo"])
def test_closed_form_gradients_equal_autograd(guided: bool, scale: str) -> None:
    case = Case(4, 7)
    results = []
    for through_op in (True, False):
        leaves = case.leaves(torch.float64)
        if through_op:
            found = case.score(leaves, guided, scale=scale)
        else:
            found = case.expected(leaves, guided, C if scale == "paper" else STD_DEV)
        sum(((1 + i) * part).sum() for i, part in enumerate(found)).backward()
        results.append((*found, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_gradcheck(guided: bool) -> None:
    case = Case(3)
    leaves = case.leaves(torch.float64)
    names = list(leaves) if guided else ["velocity"]
    inputs = [leaves[name] for name in names]
    score = lambda *values: case.score({**leaves, **dict(zip(names, values, strict=True))}, guided)  # noqa: E731
    assert torch.autograd.gradcheck(score, inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_log_prob_is_the_plain_ops(implementation: str) -> None:
    case = Case(3, 700)
    leaves = case.leaves(torch.float32)
    log_prob, _ = case.score(leaves, False, implementation)
    states = [getattr(case, name).float() for name in ("latents", "velocity", "next_latents")]
    plain = sde_log_prob(*states, TABLE, STEPS, implementation=implementation)
    assert torch.equal(log_prob, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_output_may_go_unused(implementation: str) -> None:
    case, parts = Case(50), []
    for use in ((1, 0), (0, 1), (1, 1)):
        leaves = case.leaves(torch.float32)
        found = case.score(leaves, True, implementation)
        sum(part.sum() for part, used in zip(found, use, strict=True) if used).backward()
        parts.append(leaves["velocity"].grad)
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_unchanged_policy_has_no_divergence(implementation: str) -> None:
    latents, velocity, next_latents = torch.randn(3, 4, 99)
    leaf = velocity.clone().requires_grad_()
    rest = (velocity, next_latents, TABLE, STEPS)
    log_prob, kl = sde_log_prob_kl(latents, leaf, *rest, implementation=implementation)
    assert kl.count_nonzero() == 0
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    assert gradient.count_nonzero() == 0


def test_half_precision_velocities_are_compared_in_float32() -> None:
    latents, velocity, reference, next_latents = torch.randn(4, 4, 300)
    halves = velocity.bfloat16().requires_grad_(), reference.bfloat16()
    exact = halves[0].detach().float().requires_grad_(), halves[1].float()
    results = []
    for mine, other in (halves, exact):
        log_prob, kl = sde_log_prob_kl(latents, mine, other, next_latents, TABLE, STEPS, implementation="reference")
        (log_prob + kl).sum().backward()
        results.append((log_prob, kl, mine.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2].bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs_and_two_runs(implementation: str) -> None:
    packed = torch.randn(4, 4, 6, 50)
    strided = packed.transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for latents, velocity, reference, next_latents in (packed, packed, strided):
        leaf = velocity.detach().requires_grad_()
        rest = (reference, next_latents, TABLE, STEPS)
        found = sde_log_prob_kl(latents, leaf, *rest, implementation=implementation)
        sum(part.sum() for part in found).backward()
        results.append((*found, leaf.grad))
    assert all(torch.equal(*pair) for pair in zip(results[0], results[1], strict=True))
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.ci
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_opcheck(implementation: str, guided: bool) -> None:
    latents, velocity, uncond, reference, other = torch.randn(5, 4, 3, 5)
    guidance = (uncond.requires_grad_(), SCALE, reference, other) if guided else (None, None, reference, None)
    arguments = (latents, velocity.requires_grad_(), *guidance, latents, TABLE, STEPS, C, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, arguments)
    detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments[:-1]]
    backward = (*UPSTREAM, *detached, guided, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob_backward.default, backward)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_one_node_of_a_compiled_graph(implementation: str) -> None:
    latents, velocity, reference, next_latents = torch.randn(4, 4, 3, 5)

    def loss(leaf: Tensor) -> Tensor:
        rest = (reference, next_latents, TABLE, STEPS)
        log_prob, kl = sde_log_prob_kl(latents, 2 * leaf, *rest, implementation=implementation)
        return log_prob.sum() + kl.square().sum()

    leaves = [velocity.clone().requires_grad_() for _ in range(2)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves[0]).backward()
    loss(leaves[1]).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "code"}, ValueError, "sde_log_prob_kl: scale must be 'paper' or 'flow_grpo', got 'code'"),
        (
            {"reference_velocity": torch.zeros(4, 7)},
            ValueError,
            r"reference_velocity must have shape \[4, 8\] like",
        ),
        ({"reference_velocity": None}, TypeError, "reference_velocity must be a tensor, got NoneType"),
        ({"reference_velocity": torch.zeros(4, 8).long()}, TypeError, "reference_velocity must be float32"),
        ({"uncond": torch.zeros(4, 8)}, ValueError, "uncond and reference_uncond go together, got no reference_uncond"),
        ({"reference_uncond": torch.zeros(4, 8)}, ValueError, "reference_uncond go together, got no uncond"),
        ({"guidance_scale": 4.5}, ValueError, "guidance_scale 4.5 needs uncond, got None"),
        (
            {"table": TABLE * torch.inf},
            ValueError,
            "table must be finite, got inf in column 0 of step 0",
        ),
        ({"implementation": "triton"}, RuntimeError, "sde_log_prob_kl: implementation 'triton' cannot serve this call"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    zeros = torch.zeros(4, 8)
    arguments = {"reference_velocity": zeros, "table": TABLE, **options}
    with pytest.raises(error, match=message):
        sde_log_prob_kl(zeros, zeros, next_latents=zeros, step_index=STEPS, **arguments)
