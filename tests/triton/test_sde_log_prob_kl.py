from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import STD_DEV, C
from densegrpo_fast.flow.ops import sde_log_prob, sde_log_prob_kl
from densegrpo_fast.flow.reference import gaussian_kl_ref, guided_velocity_ref, sde_log_prob_ref

SHAPES = [(1,), (5, 7, 9), (33, 65)]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
SCALES = (1.0, 4.5, 7.0, 0.0, 4.5)


def states(batch, *shape: int, dtypes=DTYPES[0]) -> dict[str, Tensor]:
    """A transition that the sampler could have made, and the velocities of both policies, by name."""
    names = ("latents", "velocity", "uncond", "reference_velocity", "reference_uncond", "next_latents")
    found = dict(zip(names, torch.randn(6, 5, *shape, dtype=torch.float64), strict=True))
    rows = batch.table.cpu().double()[batch.steps.cpu()].reshape(5, 6, *([1] * len(shape)))
    found["next_latents"] = (
        rows[:, 0] * found["latents"] + rows[:, 1] * found["velocity"] + rows[:, 2] * (found["next_latents"])
    )
    device = batch.table.device
    return {name: value.to(device, dtypes["latents" not in name]) for name, value in found.items()}


def score(batch, given: dict[str, Tensor], guided: bool, scale: str = "paper") -> tuple[Tensor, Tensor]:
    given = {name: value for name, value in given.items() if guided or "uncond" not in name}
    guidance = {"guidance_scale": torch.tensor(SCALES, device=batch.table.device)} if guided else {}
    options = {"table": batch.table, "step_index": batch.steps, "scale": scale, "implementation": "triton"}
    return sde_log_prob_kl(**given, **guidance, **options)


def exact(batch, given: dict[str, Tensor], guided: bool, kl_std: int = C) -> tuple[Tensor, Tensor]:
    velocity, reference = given["velocity"], given["reference_velocity"]
    if guided:
        scale = torch.tensor(SCALES, device=batch.table.device)
        velocity = guided_velocity_ref(velocity, given["uncond"], scale)
        reference = guided_velocity_ref(reference, given["reference_uncond"], scale)
    log_prob = sde_log_prob_ref(given["latents"], velocity, given["next_latents"], batch.table, batch.steps)
    return log_prob, gaussian_kl_ref(velocity, reference, batch.table, batch.steps, kl_std)


@pytest.mark.ci
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_against_float64(batch, storage_error, shape, dtypes, guided: bool) -> None:
    given = states(batch, *shape, dtypes=dtypes)
    double = {name: value.double() for name, value in given.items()}
    names = ("velocity", "uncond") if guided else ("velocity",)
    for of in (given, double):
        of |= {name: of[name].requires_grad_() for name in names}
    found, expected = score(batch, given, guided), exact(batch, double, guided)
    upstream = torch.tensor([[0.3, -1.0, 2.0, 0.5, 1.0], [1.0, 2.0, -0.5, 0.7, 1.0]], device=batch.table.device)
    gradients = torch.autograd.grad(found, [given[name] for name in names], list(upstream))
    targets = torch.autograd.grad(expected, [double[name] for name in names], list(upstream.double()))

    error = (found[0] - expected[0]).abs() / expected[0].abs().clamp(min=1)
    # One rounding of a guided velocity, about 8 in size, divided by C: visible on single elements only.
    assert error.max() < (3e-6 if given["latents"][0].numel() > 1000 else 1e-3)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-9)
    assert (found[0][[1, 4]] == 0).all() and (found[1][[1, 4]] == 0).all()
    for name, gradient, target in zip(names, gradients, targets, strict=True):
        assert gradient.dtype == dtypes[1], name
        allowed = 2e-5 * target.abs().amax().item() + (2.0**-25 if dtypes[1] == torch.float16 else 0)
        error = (gradient.double() - target).abs() - storage_error[dtypes[1]] * target.abs()
        assert error.max() <= allowed, name


@pytest.mark.capabilities(80, 100)
def test_both_scales_and_the_plain_log_prob(batch) -> None:
    given = states(batch, 3, 700)
    for scale, column in (("paper", C), ("flow_grpo", STD_DEV)):
        log_prob, kl = score(batch, given, False, scale)
        expected = exact(batch, {name: value.double() for name, value in given.items()}, False, column)[1]
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)
        transition = (given["next_latents"], batch.table, batch.steps)
        plain = sde_log_prob(given["latents"], given["velocity"], *transition, implementation="triton")
        assert torch.equal(log_prob, plain)


@pytest.mark.capabilities(80, 100)
def test_a_step_outside_the_table_is_nan(batch) -> None:
    given = states(batch, 10)
    steps = torch.tensor([0, 10, 8, -1, 7], device=batch.table.device)
    found = score(batch._replace(steps=steps), given, False)
    for part in found:
        assert part.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.ci
def test_opcheck(batch) -> None:
    given = states(batch, 3, 4)
    scale = torch.tensor(SCALES, device=batch.table.device)
    velocities = (given["velocity"].requires_grad_(), given["uncond"].requires_grad_(), scale)
    references = (given["reference_velocity"], given["reference_uncond"])
    rest = (given["next_latents"], batch.table, batch.steps, C, "triton")
    arguments = (given["latents"], *velocities, *references, *rest)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, arguments)
