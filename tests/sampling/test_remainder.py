"""Steps after the window by DPM-Solver++: the solver itself, its order, fewer steps, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.flow.dpm_solver import DPMSolver
from densegrpo_fast.flow.dynamics import A, B, C, StepCoefficients, coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import dense_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.sampling.windows import remaining_steps
from densegrpo_fast.training.schedule import Schedule

T, PROMPTS = 8, ["0", "0", "12", "1"]


def sampled(model: Any, table: StepCoefficients, guidance_scale: float = 1.0) -> Trajectory:
    index = torch.arange(len(PROMPTS))
    noise = initial_noise(model, index, seed=3, iteration=0)
    words: dict[str, Any] = {"sample_index": index, "seed": 3, "iteration": 0, "guidance_scale": guidance_scale}
    found = rollout(model, noise, model.encode(PROMPTS), table, **words)
    model.calls.clear()
    return found


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the machine decides."""
    return {key: record[key] for key in record if not key.startswith(("time/", "memory/", "cpu_seconds"))}


def windowed(model: Any, window: range, **options: Any) -> StepCoefficients:
    table = coefficients(model.sigmas(T), 0.7, "flow_sde").only(window)
    return with_remainder(table, window.stop, **options)


def test_fewer_steps_by_hand() -> None:
    # MixGRPO-Flash's count: of 21 steps after the window int(22 * .4) = 8 points, 7 steps; of 4, int(5 * .4) - 1 = 1
    assert [remaining_steps(steps, 0.4) for steps in (21, 8, 4, 1, 0)] == [7, 2, 1, 1, 0]
    assert [remaining_steps(steps, 1.0) for steps in range(5)] == [0, 1, 2, 3, 4]
    # three intervals from .6 to 0 become two: the middle lies halfway between .4 and .1
    grid = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.1, 0.0])
    whole = coefficients(grid, 0.7, "flow_sde").only(range(0, 2))
    table = with_remainder(whole, 2, steps=2)
    assert table.sigmas.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.25, 0.0])
    assert torch.equal(table.table[:2], whole.table[:2])
    assert table.table[2:, [A, B, C]].tolist() == [[1.0, pytest.approx(-0.35), 0.0], [1.0, pytest.approx(-0.25), 0.0]]
    assert table.noisy == (True, True, False, False) and table.noise_level == (0.7, 0.7, 0.0, 0.0)
    assert table.remainder is None and with_remainder(whole, 2) is whole


@settings(deadline=None, max_examples=60)
@given(data=st.data(), share=st.floats(0.01, 1.0))
def test_any_share_gives_a_grid_with_the_same_ends(data: st.DataObject, share: float) -> None:
    steps = data.draw(st.integers(2, 30))
    start = data.draw(st.integers(1, steps))
    grid = torch.linspace(1, 0, steps + 1) ** data.draw(st.floats(0.5, 2.0))
    whole = coefficients(grid, 0.5, "cps").only(range(start))
    count = remaining_steps(steps - start, share)
    table = with_remainder(whole, start, steps=count)
    assert 0 <= count <= steps - start and table.num_steps == start + count == len(table.noisy)
    assert torch.equal(table.sigmas[: start + 1], grid[: start + 1]) and table.sigmas[-1] == grid[-1]
    assert (table.sigmas.diff() < 0).all() and not any(table.noisy[start:])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_rollout_ends_as_the_solver_does(mixture_model: Any, guidance_scale: float) -> None:
    window = range(0, 2)
    table = windowed(mixture_model, window, second_order=True)
    trajectory = sampled(mixture_model, table, guidance_scale)
    plain = sampled(mixture_model, coefficients(mixture_model.sigmas(T), 0.7, "flow_sde").only(window), guidance_scale)
    # up to the window's end, and for the first step after it, nothing differs
    assert torch.equal(trajectory.latents[:4], plain.latents[:4])
    assert torch.equal(trajectory.velocities[:3], plain.velocities[:3])
    assert torch.equal(trajectory.log_probs, plain.log_probs) and (trajectory.log_probs[2:] == 0).all()
    assert not torch.equal(trajectory.latents[4], plain.latents[4])

    solver, x = DPMSolver(table.sigmas[2:]), trajectory.latents[2].double()
    for index in range(T - 2):
        sigma = table.sigmas[2 + index].expand(len(x))
        velocity = mixture_model.velocity(x, sigma, trajectory.conditioning, guidance_scale).combined()
        x = solver.step(x, velocity, index)
        torch.testing.assert_close(trajectory.latents[3 + index].double(), x, rtol=1e-4, atol=1e-4)


def test_second_order_on_the_analytic_flow(mixture_model: Any) -> None:
    """From a common state, twice the steps leave a quarter of the error (Euler: half)."""
    errors: dict[bool, list[float]] = {False: [], True: []}
    index = torch.arange(len(PROMPTS))
    noise = initial_noise(mixture_model, index, seed=3, iteration=0).double()
    flow = mixture_model.flow.condition([0, 1, 2])

    def end(steps: int, second_order: bool) -> Tensor:
        # from sigma .9 to .1; float64 throughout, so that rounding does not show
        grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        table = with_remainder(coefficients(grid.float(), 0.0, "flow_sde"), 0, second_order=second_order)
        x, states, velocities = noise, [noise], []
        for step in range(steps):
            velocities.append(flow.velocity(x, grid[step].float().double()))
            slope = velocities[-1]
            if table.remainder is not None:
                slope = table.remainder.along(torch.stack(states), torch.stack(velocities), step)
            x = x + (table.sigmas[step + 1].double() - table.sigmas[step].double()) * slope
            states.append(x)
        return x

    truth = end(1024, True)
    for second_order, found in errors.items():
        found.extend((end(steps, second_order) - truth).abs().max().item() for steps in (16, 32, 64))
    for order, second_order in ((1, False), (2, True)):
        coarse, middle, fine = errors[second_order]
        assert 0.75 * 2**order < coarse / middle < 1.5 * 2**order
        assert 0.75 * 2**order < middle / fine < 1.5 * 2**order
    assert errors[True][0] < errors[False][2]


@pytest.mark.parametrize("steps", [6, 4, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_completions_follow_the_trajectorys_own_way(mixture_model: Any, steps: int, guidance_scale: float) -> None:
    """Each state by itself: Euler to the window's end, the solver from there, as the trajectory goes."""
    window = range(0, 2)
    table = windowed(mixture_model, window, steps=steps, second_order=True)
    trajectory = sampled(mixture_model, table, guidance_scale)
    total = table.num_steps
    lookahead = Lookahead(mixture_model, plans.exact(T), replan=plans.exact)
    clean = lookahead.complete(trajectory)
    # closed form: state k of the window goes on by the grid's later points
    cost = dense_iteration(plans.exact(total), trained_steps=2, guided=False, kl=False, noisy=table.noisy)
    assert cost.rollout.total == total == 2 + steps
    assert cost.lookahead.total == (total - 1) + (total - 2) == lookahead.evaluations(table.noisy)
    assert mixture_model.evaluated_rows == cost.lookahead.total * len(PROMPTS)

    for state in (0, 1):
        x = trajectory.latents[state].double()
        for k in range(state, 2):
            sigma = table.sigmas[k].expand(len(x))
            velocity = mixture_model.velocity(x, sigma, trajectory.conditioning, guidance_scale).combined()
            x = x + (table.sigmas[k + 1] - table.sigmas[k]) * velocity
        solver = DPMSolver(table.sigmas[2:])
        for index in range(steps):
            sigma = table.sigmas[2 + index].expand(len(x))
            velocity = mixture_model.velocity(x, sigma, trajectory.conditioning, guidance_scale).combined()
            x = solver.step(x, velocity, index)
        torch.testing.assert_close(clean[state].double(), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(clean[2], clean[-1]) and torch.equal(clean[-1], trajectory.latents[-1])


def test_a_noise_free_step_of_the_window_gains_nothing(mixture_model: Any) -> None:
    """The invariant that makes gains gains: without noise, completion and trajectory are the same path."""
    table = coefficients(mixture_model.sigmas(T), [0.7, 1e-6, *[0.0] * 6], "flow_sde")
    trajectory = sampled(mixture_model, with_remainder(table, 2, steps=4, second_order=True))
    clean = Lookahead(mixture_model, plans.exact(6)).complete(trajectory)
    gains = reward_gains(clean.sigmoid().double().mean(-1).T[None])
    assert gains[..., 0].abs().min() > 1e-4
    assert gains[..., 1].abs().max() < 1e-5 and (gains[..., 2:] == 0).all()


def test_a_plan_that_skips_the_remainder_is_eulers(mixture_model: Any) -> None:
    # nodes before the window's end and one after: no completion evaluates twice after it, so none has a memory
    table = windowed(mixture_model, range(0, 2), second_order=True)
    plain = windowed(mixture_model, range(0, 2))
    ends = []
    for coefficients_ in (table, plain):
        trajectory = sampled(mixture_model, coefficients_)
        ends.append(Lookahead(mixture_model, plans.nodes(T, [1, 4])).complete(trajectory)[:2])
    assert torch.equal(ends[0], ends[1])


def test_noise_after_the_start_is_refused(mixture_model: Any) -> None:
    table = coefficients(mixture_model.sigmas(T), 0.7, "flow_sde").only(range(0, 3))
    with pytest.raises(ValueError, match="no step from 2 on may inject noise"):
        with_remainder(table, 2, second_order=True)
    for steps in (0, 6):
        with pytest.raises(ValueError, match=r"steps must lie in 1\.\.5"):
            with_remainder(table, 3, steps=steps)


FLASH = {
    "sampler.num_steps": 8,
    "window.schedule": "progressive",
    "window.size": 2,
    "window.every": 1,
    "window.remainder": "dpm_solver",
    "window.remainder_share": 0.6,
    "lookahead.plan": "exact",
}


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in (FLASH | options).items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window.schedule": "none", "window.size": "null"}, "window.remainder: expected euler without windows"),
        (
            {"window.schedule": "none", "window.size": "null", "window.remainder": "euler"},
            "window.remainder_share: expected 1 without windows, after which no step would come, got 0.6",
        ),
        ({"window.remainder_share": 0.4}, "at least 3 steps after a window, got 1"),
        ({"window.first": 5, "window.remainder_share": 1}, "at least 3 steps after a window, got 1"),
        ({"window.remainder_share": 0}, "window.remainder_share"),
        ({"lookahead.plan": "nodes", "lookahead.nodes": "[3]"}, "lookahead.plan: expected exact, exact_but_last"),
        (
            {"lookahead.plan": "paths", "lookahead.paths": "[[2], [], [], [], [], [], [], []]"},
            "lookahead.plan: expected exact, exact_but_last",
        ),
        ({"lookahead.cache": "text:own"}, "lookahead.cache: expected null with window.remainder_share below 1"),
    ],
)
def test_remainders_that_mean_nothing_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(**options)
    assert expected in str(caught.value)


def test_the_tables_of_a_run(mixture_model: Any) -> None:
    config = configured()
    windows, whole = config.schedule(), coefficients(mixture_model.sigmas(8), 0.3, "cps")
    # windows 0-1 .. 5-6 leave 6..1 steps, of which int((n + 1) * .6) - 1 are taken
    for iteration, steps in enumerate([3, 2, 2, 1, 1, 1]):
        table = Schedule(config, mixture_model).coefficients(windows.steps(iteration))
        assert table.num_steps == iteration + 2 + steps
        # what is trained is the sampler's own row, to the bit
        assert Schedule(config, mixture_model).trained_steps(iteration) == [iteration, iteration + 1]
        assert torch.equal(table.table[iteration : iteration + 2], whole.table[iteration : iteration + 2])
    plain = configured(**{"window.remainder": "euler", "window.remainder_share": 1})
    assert Schedule(plain, mixture_model).coefficients().remainder is None


@pytest.mark.ci
def test_a_run_with_the_solver_goes_on_bit_for_bit(train: Any, tmp_path: Path) -> None:
    shape = FLASH | {"objective.trained_steps": "all_but_last", "evaluation.every": 0}
    shape |= {"lookahead.monitor_every": 1, "lookahead.decoder": "full"}
    assert train(tmp_path / "whole", **shape, **{"run.iterations": 3}) == 0
    assert train(tmp_path / "parts", **shape, **{"run.iterations": 1}) == 0
    assert train(tmp_path / "parts", "--resume", **shape, **{"run.iterations": 3}) == 0
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert measured(one) == measured(other)
    # 4 samples; T' = 5, 5, 6 steps; the states 0, 1 | 1, 2 | 2, 3 of the window go on by T'-1-k evaluations
    assert [record["nfe/rollout"] for record in whole] == [20, 20, 24]
    assert [record["nfe/lookahead"] for record in whole] == [4 * (4 + 3), 4 * (3 + 2), 4 * (3 + 2)]
    assert all(record["first_ratio_deviation"] <= 1e-6 and record["grad_norm"] > 0 for record in whole)
    # the guard completes the same shorter trajectories by the plan that they were completed by
    assert all(record["monitor/spearman_gains"] == pytest.approx(1.0) for record in whole)
