"""SDE windows: which steps they hold, and that the lookahead completes and credits those steps alone, exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import PluginError, UserError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.sampling.windows import Windows
from densegrpo_fast.training.schedule import Schedule

T, PROMPTS = 6, ["0", "0", "12", "1"]


def windows(schedule: Any, **options: int) -> Windows:
    return Windows(schedule, 10, **{"size": 3, "first": 1, "last": 8, **options})


def test_without_windows_every_step_is_stochastic() -> None:
    assert windows("none").steps(7) == range(10)
    assert windows("none").reached() == [range(10)]


def test_a_fixed_window_stays() -> None:
    assert {windows("fixed").steps(iteration) for iteration in range(50)} == {range(1, 4)}


def test_a_progressive_window_slides_and_stays_at_the_end() -> None:
    # from step 1 by 2 steps every 4 iterations: 1, 3, 5, and then 6..8, the last that fits
    sliding = windows("progressive", stride=2, every=4)
    starts = [sliding.steps(iteration).start for iteration in range(20)]
    assert starts == [1] * 4 + [3] * 4 + [5] * 4 + [6] * 8
    assert sliding.reached() == [range(1, 4), range(3, 6), range(5, 8), range(6, 9)]
    assert windows("progressive", size=8).reached() == [range(1, 9)]


def test_mixgrpo_covers_all_trained_steps() -> None:
    # its script: windows of 4, by 1 step every 25 iterations; of 10 steps the last one is not trained
    mix = Windows("progressive", 10, size=4, first=0, last=8, stride=1, every=25)
    assert [mix.steps(i).start for i in (0, 24, 25, 49, 50, 124, 125, 9999)] == [0, 0, 1, 1, 2, 4, 5, 5]


def test_a_drawn_window_depends_on_seed_and_iteration_alone() -> None:
    one, two, other = windows("random", seed=3), windows("random", seed=3), windows("random", seed=4)
    drawn = [one.steps(iteration) for iteration in range(300)]
    assert [two.steps(iteration) for iteration in reversed(range(300))] == drawn[::-1]
    assert [other.steps(iteration) for iteration in range(300)] != drawn
    # a value that another version or process must draw too
    assert [window.start for window in drawn[:8]] == [1, 3, 2, 6, 1, 1, 1, 6]
    # 6 starts, 50 each on average with a standard deviation of 6.5
    counts = Counter(window.start for window in drawn)
    assert sorted(counts) == [1, 2, 3, 4, 5, 6] and all(20 < count < 80 for count in counts.values())


@settings(deadline=None, max_examples=60)
@given(data=st.data(), schedule=st.sampled_from(["fixed", "random", "progressive"]), iteration=st.integers(0, 10**6))
def test_windows_lie_where_they_may(data: st.DataObject, schedule: Any, iteration: int) -> None:
    steps = data.draw(st.integers(1, 50))
    first = data.draw(st.integers(0, steps - 1))
    last = data.draw(st.integers(first, steps - 1))
    size = data.draw(st.integers(1, last - first + 1))
    stride, every = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 99))
    made = Windows(schedule, steps, size=size, first=first, last=last, stride=stride, every=every, seed=1)
    window = made.steps(iteration)
    assert len(window) == size and window.start >= first and window.stop - 1 <= last
    assert window in made.reached()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 9}, "a window of 9 steps does not fit the steps 1..8"),
        ({"size": 0}, "a window of 0 steps does not fit"),
        ({"last": 10}, r"must lie within the steps 0\.\.9, got 1\.\.10"),
        ({"first": -1}, r"must lie within the steps 0\.\.9, got -1\.\.8"),
        ({"stride": 0}, "stride and iterations must be at least 1, got 0 and 1"),
    ],
)
def test_windows_that_cannot_be_are_refused(options: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        windows("progressive", **options)
    with pytest.raises(ValueError, match="window schedule must be one of none, fixed, random, progressive"):
        windows("sliding")


@pytest.mark.parametrize("family", ["flow_sde", "cps", "dance", "precise", "wan"])
def test_outside_a_window_the_table_is_eulers(mixture_model: FlowModel, family: Any) -> None:
    sigmas = mixture_model.sigmas(T)
    levels = [0.5, 0.6, 0.7, 0.5, 0.6, 0.7]
    windowed = coefficients(sigmas, levels, family).only(range(1, 3))
    expected = coefficients(sigmas, [0.0, 0.6, 0.7, 0.0, 0.0, 0.0], family)
    assert torch.equal(windowed.table, expected.table)
    assert (windowed.noise_level, windowed.noisy) == (expected.noise_level, expected.noisy)
    with pytest.raises(ValueError, match=r"steps must lie in 0\.\.5, got \[4, 6\]"):
        windowed.only([4, 6])


def sampled(model: Any, table: StepCoefficients, guidance_scale: float) -> Trajectory:
    index = torch.arange(len(PROMPTS))
    noise = initial_noise(model, index, seed=3, iteration=0)
    found = rollout(
        model,
        noise,
        model.encode(PROMPTS),
        table,
        sample_index=index,
        seed=3,
        iteration=0,
        guidance_scale=guidance_scale,
    )
    model.calls.clear()
    return found


def lookahead_rewards(lookahead: Lookahead, trajectory: Trajectory) -> Tensor:
    """[1, B, T+1] of a nonlinear reward."""
    images = lookahead.images(trajectory, lookahead.complete(trajectory), "full")
    return images.double().square().mean(dim=(2, 3, 4)).T[None]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("window", [range(1, 3), range(0, 1), range(3, 5), range(2, 3)])
def test_gains_of_a_window_are_exact_inside_and_zero_outside(
    mixture_model: Any, window: range, guidance_scale: float
) -> None:
    sigmas = mixture_model.sigmas(T)
    table = coefficients(sigmas, 0.7, "flow_sde").only(window)
    trajectory = sampled(mixture_model, table, guidance_scale)
    assert (trajectory.log_probs[[step for step in range(T) if step not in window]] == 0).all()
    assert (trajectory.log_probs[list(window)] != 0).all()

    lookahead = Lookahead(mixture_model, plans.exact(T))
    rewards = lookahead_rewards(lookahead, trajectory)
    # only the window's states are completed: state k goes on by the T-1-k later grid points
    assert mixture_model.evaluated_rows == sum(T - 1 - k for k in window) * len(PROMPTS)
    assert mixture_model.decoded == [(len(window) + 1) * len(PROMPTS)]

    gains = reward_gains(rewards)
    outside = [step for step in range(T) if step not in window]
    assert (gains[..., outside] == 0).all() and (gains[..., list(window)] != 0).all()

    # every state completed by itself, the first velocity too, gives the same gains
    alone = []
    for state in range(T + 1):
        latents = trajectory.latents[state]
        for k in range(state, T):
            sigma = sigmas[k].expand(len(latents))
            velocity = mixture_model.velocity(latents, sigma, trajectory.conditioning, guidance_scale).combined()
            latents = latents + (sigmas[k + 1] - sigmas[k]) * velocity
        alone.append(lookahead_reward_of(latents))
    torch.testing.assert_close(gains, reward_gains(torch.stack(alone, -1)[None]), rtol=0, atol=2e-6)


def lookahead_reward_of(clean: Tensor) -> Tensor:
    return clean.sigmoid().double().square().mean(1)


def windowed(*overrides: str) -> Config:
    settings = {"sampler.num_steps": "8", "window.schedule": "none", "window.size": "null"}
    settings |= dict(override.split("=", 1) for override in overrides)
    return parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in settings.items())])[0]


FAST = ("window.schedule=random", "window.size=2", "window.last=3")


def test_only_the_windows_steps_are_trained(mixture_model: Any) -> None:
    config = windowed(*FAST)
    schedule = config.schedule()
    trained = [Schedule(config, mixture_model).trained_steps(iteration) for iteration in range(40)]
    assert trained == [list(schedule.steps(iteration)) for iteration in range(40)]
    assert {tuple(steps) for steps in trained} == {(0, 1), (1, 2), (2, 3)}
    drawn = windowed("window.schedule=fixed", "window.size=4", "window.first=2", "objective.trained_steps=2")
    picked = {tuple(Schedule(drawn, mixture_model).trained_steps(iteration)) for iteration in range(100)}
    # all 6 pairs of the steps 2..5
    assert picked == {(a, b) for a in range(2, 6) for b in range(a + 1, 6)}


def test_without_windows_training_draws_what_it_always_drew(mixture_model: Any) -> None:
    assert Schedule(windowed(), mixture_model).trained_steps(3) == [0, 1, 2, 3, 4, 5, 6]
    generator = torch.Generator().manual_seed(3)
    expected = sorted(torch.randperm(7, generator=generator)[:3].tolist())
    assert Schedule(windowed("objective.trained_steps=3"), mixture_model).trained_steps(3) == expected
    assert Schedule(windowed("objective.trained_steps=[0, 7]"), mixture_model).trained_steps(3) == [0, 7]


IMPORTANCE = ("objective.step_sampling=importance", "sampler.dynamics=flow_sde")


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.step_weight=none", "objective.trained_steps=3"),
        ("objective.step_weight=flash", "objective.trained_steps=2"),
        ("objective.policy=guard", "objective.clip_range=2e-6", "objective.trained_steps=3"),
        ("sampler.noise_level=[0.7, 0, 0.5, 0.7, 0.9, 0.7, 0.2, 0.3]", "objective.trained_steps=4"),
        ("sampler.noise_level=[0, 0, 0, 0, 0.9, 0.7, 0.2, 0]", "objective.trained_steps=2"),
        ("window.schedule=random", "window.size=4", "window.last=6", "objective.trained_steps=2"),
    ],
)
def test_the_loss_of_drawn_steps_is_on_average_that_of_all(mixture_model: Any, overrides: tuple[str, ...]) -> None:
    schedule = Schedule(windowed(*IMPORTANCE, *overrides), mixture_model)
    losses = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    differences = []
    for iteration in range(300):
        trained, weights = schedule.trained_steps(iteration), schedule.draw_weights(iteration)
        candidates = schedule.candidates(iteration)
        noisy = [step for step in candidates if schedule.config.noise_levels[step]]
        assert {*trained} <= {*noisy}
        differences.append((weights.double() * losses)[trained].mean() - losses[noisy].sum() / len(candidates))
    difference = torch.stack(differences)
    assert difference.mean().abs() < 3 * difference.std() / len(difference) ** 0.5


def weighting(directory: Path, returned: str) -> str:
    """The option that names step weights of one's own."""
    own = directory / "own.py"
    own.write_text(
        "import math, sys\nimport torch\nfrom densegrpo_fast.objective.registry import StepWeighting\n"
        f"WEIGHTS = StepWeighting(lambda coefficients: {returned})\n"
    )
    return f"objective.step_weight={own}:WEIGHTS"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("torch.tensor([math.nan] * 8)", "8 finite weights of at least 0, got [nan"),
        ("torch.tensor([math.inf] + [1.0] * 7)", "8 finite weights of at least 0, got [inf"),
        ("torch.tensor([-1.0] + [1.0] * 7)", "8 finite weights of at least 0, got [-1.0"),
        ("torch.ones(7)", "8 finite weights of at least 0, got shape [7]"),
        ("torch.ones(8, dtype=torch.complex64)", "8 finite weights of at least 0, got torch.complex64"),
        ("[1.0] * 8", "8 finite weights of at least 0, got list"),
        ("1 / 0", "own.py:WEIGHTS raised ZeroDivisionError: division by zero"),
        ("sys.exit(0)", "own.py:WEIGHTS raised SystemExit: 0"),
    ],
)
@pytest.mark.parametrize("how", ["uniform", "importance"])
def test_step_weights_of_ones_own_that_are_none(
    mixture_model: Any, tmp_path: Path, how: str, returned: str, expected: str
) -> None:
    options = (f"objective.step_sampling={how}", "objective.trained_steps=4", weighting(tmp_path, returned))
    with pytest.raises(PluginError) as caught:
        Schedule(windowed(*options), mixture_model)
    assert str(caught.value).startswith("objective.step_weight: ") and expected in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (IMPORTANCE, "importance draws 4 of them"),
        (("objective.step_sampling=uniform",), "gives the steps [3, 4, 5, 6] the weight 0, so an iteration of"),
    ],
)
def test_step_weights_that_leave_too_little_to_draw_are_refused_at_once(
    mixture_model: Any, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    own = weighting(tmp_path, "torch.tensor([1.0] * 3 + [0.0] * 5)")
    with pytest.raises(UserError) as caught:
        Schedule(windowed(*options, "objective.trained_steps=4", own), mixture_model)
    assert f"objective.step_weight: {own.partition('=')[2]}" in str(caught.value) and expected in str(caught.value)


def test_a_step_without_weight_is_named_and_drawn_for_its_kl_alone(
    mixture_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = weighting(tmp_path, "1 - coefficients.sigmas[:-1]")
    drawn = {}
    for coef in (0, 0.1):
        options = (*IMPORTANCE, "objective.trained_steps=3", f"objective.kl_coef={coef}", own)
        schedule = Schedule(windowed(*options), mixture_model)
        assert "gives the steps [0] the weight 0" in caplog.text
        caplog.clear()
        drawn[coef] = [step for iteration in range(300) for step in schedule.trained_steps(iteration)]
        losses = torch.arange(1.0, 9.0)
        means = torch.stack(
            [
                (schedule.draw_weights(iteration) * losses)[schedule.trained_steps(iteration)].mean()
                for iteration in range(300)
            ]
        )
    assert 0 not in drawn[0] and 0 in drawn[0.1]
    # with a KL term all seven steps count, also on average
    assert (means.mean() - losses[:7].mean()).abs() < 3 * means.std() / 300**0.5
    assert schedule.draw_weights(0).max() <= 20


def test_steps_of_larger_gradients_are_drawn_more_often(mixture_model: Any) -> None:
    schedule = Schedule(windowed(*IMPORTANCE, "objective.step_weight=none", "objective.trained_steps=3"), mixture_model)
    counts = Counter(step for iteration in range(300) for step in schedule.trained_steps(iteration))
    # the gradient of a log-probability grows with every step (`objective/weights.py`)
    assert [counts[step] for step in range(7)] == sorted(counts[step] for step in range(7))
    assert counts[0] < counts[6] / 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objective.step_sampling=importance"],
            "objective.step_sampling: expected uniform where no number of steps is drawn",
        ),
        (
            [*IMPORTANCE, "objective.trained_steps=3", "sampler.noise_level=[0.7, 0, 0, 0, 0.7, 0, 0, 0]"],
            "objective.trained_steps: expected at most the 2 steps of 0..6 that inject noise, got 3",
        ),
        (["window.schedule=random"], 'window.size: expected a number of steps with schedule "random", got null'),
        (["window.size=2"], 'window.size: expected null with schedule "none", got 2'),
        (["window.schedule=fixed", "window.size=8"], "window.size: expected a window that fits the steps 0..6, got 8"),
        ([*FAST, "window.first=3"], "window.size: expected a window that fits the steps 3..3, got 2"),
        ([*FAST[:2], "window.last=7"], "window.last: expected at most 6, got 7"),
        ([*FAST, "window.first=4"], "window.first: expected at most 3, got 4"),
        ([*FAST, "objective.trained_steps=3"], "objective.trained_steps: expected at most 2 steps to draw, got 3"),
        ([*FAST, "objective.trained_steps=[1]"], "expected all_but_last or a number with a window, got [1]"),
        (
            [*FAST, "sampler.noise_level=[0.7, 0, 0, 0.7, 0.7, 0.7, 0.7, 0]"],
            "sampler.noise_level: expected noise in at least one trained step of the window 1..2, got 0 in all",
        ),
    ],
)
def test_windows_that_train_nothing_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        windowed(*overrides)
    assert expected in str(caught.value)


@pytest.mark.ci
def test_a_run_with_windows(train: Any, tmp_path: Path) -> None:
    window = {"window.schedule": "progressive", "window.size": 1, "window.every": 1}
    shape = {"sampler.num_steps": 4, "objective.trained_steps": "all_but_last", "evaluation.every": 0}
    assert train(tmp_path / "run", **window, **shape, **{"run.iterations": 4}) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # the window moves over the steps 0, 1, 2 and stays; of 4 samples, state k goes on by 3 - k evaluations
    for record, step in zip(records, [0, 1, 2, 2], strict=True):
        gains = [record[f"gain/step_{k}"] for k in range(4)]
        assert [gain != 0 for gain in gains] == [k == step for k in range(4)]
        assert (record["nfe/rollout"], record["nfe/lookahead"], record["nfe/update"]) == (16, 4 * (3 - step), 4)
        assert record["grad_norm"] > 0


@pytest.mark.ci
def test_a_run_judges_the_windows_steps_alone(train: Any, tmp_path: Path) -> None:
    """With one noisy step, joint statistics are that step's own: the zeros of the others do not shrink the spread."""
    options = {"window.schedule": "fixed", "window.size": 1, "window.first": 1, "sampler.num_steps": 4}
    shape = {"objective.trained_steps": 1, "evaluation.every": 0, "run.iterations": 1}
    records = []
    for normalize in ("step", "joint"):
        assert train(tmp_path / normalize, **options, **shape, **{"credit.normalize": normalize}) == 0
        (record,) = read_metrics(tmp_path / normalize / "metrics.jsonl")
        records.append(
            {key: value for key, value in record.items() if not key.startswith(("time/", "memory/", "cpu_seconds"))}
        )
    assert records[0] == records[1] and records[0]["grad_norm"] > 0
