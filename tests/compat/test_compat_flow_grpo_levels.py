"""A calibration's levels in Flow-GRPO's step and pipelines, and what is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402

from densegrpo_fast import launch  # noqa: E402
from densegrpo_fast.calibration.store import FORMAT, read_calibration  # noqa: E402
from densegrpo_fast.common.errors import UserError  # noqa: E402
from densegrpo_fast.compat import flow_grpo  # noqa: E402
from densegrpo_fast.compat.flow_grpo import PerPromptStatTracker, step_function  # noqa: E402
from densegrpo_fast.compat.flow_grpo.pipelines import make_pipeline  # noqa: E402
from densegrpo_fast.compat.flow_grpo.step import step_replacement  # noqa: E402
from densegrpo_fast.compat.probes import Pipeline, sd3_call  # noqa: E402
from densegrpo_fast.credit.dense import dense_advantages  # noqa: E402

LEVELS = [0.5, 0.9, 0.3, 0.7, 0.6]
N = len(LEVELS)


def grid() -> Any:
    """The scheduler of a sampling call of five steps."""
    scheduler = Pipeline().scheduler
    scheduler.set_timesteps(N)
    return scheduler


@pytest.fixture
def levels(tmp_path: Path) -> Any:
    """Writes the file of a calibration for that grid, changed by keywords."""

    def write(**changes: Any) -> Path:
        made = {"format": FORMAT, "dynamics": "flow_sde", "noise_level": LEVELS, "steps": list(range(N))}
        path = tmp_path / "levels.json"
        path.write_text(json.dumps(made | {"sigmas": grid().sigmas.tolist()} | changes))
        return path

    return write


def transition(step: Any, index: int, **options: Any) -> Any:
    scheduler, torch_state = grid(), torch.Generator().manual_seed(3)
    velocity, sample = torch.linspace(-1, 1, 24).view(2, 3, 2, 2), torch.linspace(1, 2, 24).view(2, 3, 2, 2)
    return step(scheduler, velocity, scheduler.timesteps[index][None], sample, generator=torch_state, **options)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("given", [lambda path: path, str, read_calibration], ids=["path", "text", "loaded"])
def test_every_step_has_its_own_level_and_noise_free_steps_stay(levels: Any, given: Any) -> None:
    calibrated, plain = step_function(noise_levels=given(levels())), step_function()
    for index, level in enumerate(LEVELS):
        assert same(transition(calibrated, index), transition(plain, index, noise_level=level))
        assert same(transition(calibrated, index, noise_level=0), transition(plain, index, noise_level=0))
    # rows at different steps, as a script's training has them
    scheduler = grid()
    rows = torch.ones(N, 3, 2, 2)
    stds = calibrated(scheduler, rows, scheduler.timesteps, rows, generator=torch.Generator().manual_seed(0))[3]
    assert stds.flatten().tolist() == [transition(plain, i, noise_level=a)[3].item() for i, a in enumerate(LEVELS)]


def test_a_sampling_call_takes_them(levels: Any) -> None:
    one, calibrated = step_function(), step_function(noise_levels=levels())
    window = {"sde_window_size": 2, "sde_window_range": (1, 4)}
    _, _, log_probs, times = sd3_call(make_pipeline("fast", lambda: calibrated), window)
    start = grid().timesteps.tolist().index(times[0].item())

    def levelled(scheduler: Any, velocity: Any, timestep: Any, *rest: Any, noise_level: float, **options: Any) -> Any:
        place = scheduler.timesteps.tolist().index(timestep.flatten()[0].item())
        return one(scheduler, velocity, timestep, *rest, noise_level=LEVELS[place] if noise_level else 0, **options)

    _, _, expected, _ = sd3_call(make_pipeline("fast", lambda: levelled), window)
    assert same(log_probs, expected) and 1 <= start <= 2
    _, _, constant, _ = sd3_call(make_pipeline("fast", lambda: one), window)
    assert not same(log_probs, constant)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"noise_level": LEVELS[1:], "steps": [0, 1, 2, 3]}, {}, r"made for 4 steps, the scheduler has 5"),
        ({"dynamics": "dance"}, {}, "made for dynamics dance, this step's are flow_sde"),
        ({}, {"sde_type": "cps"}, "made for dynamics flow_sde, this step's are cps"),
        ({"steps": [0, 1]}, {}, r"made with noise in the steps \[0, 1\], this call has it in step 2"),
        ({"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]}, {}, "made for the sigmas 1, 0.8, 0.6, .*, the scheduler's are 1"),
    ],
)
def test_another_sampler_is_refused_by_name(levels: Any, changes: Any, options: Any, message: str) -> None:
    if len(changes.get("noise_level", LEVELS)) != N:
        changes["sigmas"] = [1.0, 0.8, 0.6, 0.4, 0.0]
    step = step_function(noise_levels=levels(**changes))
    with pytest.raises(ValueError, match=rf"noise_levels: .*levels\.json was {message}"):
        transition(step, 2, **options)
    # an evaluation without noise, in as many steps as it likes
    transition(step, 2, noise_level=0, **options)


def test_an_installed_step_says_so_and_a_bad_file_is_refused(levels: Any, tmp_path: Path, capsys: Any) -> None:
    host = host_sd3.load("host_of_levels").sde_step_with_logprob
    step, words = step_replacement(host, noise_levels=read_calibration(levels()))
    assert words.endswith("noise levels of levels.json")
    assert same(transition(step, 1), transition(step_function(), 1, noise_level=LEVELS[1]))
    with pytest.raises(UserError, match=r"noise_levels: .*nowhere\.json"):
        flow_grpo.install(noise_levels=tmp_path / "nowhere.json")
    script = tmp_path / "script.py"
    script.write_text("")
    for options, message in (
        ([], "noise_levels: "),
        (["--host", "dance_grpo"], "--noise-levels is no option of --host dance_grpo"),
    ):
        with pytest.raises(SystemExit) as stop:
            launch.main([*options, "--noise-levels", "nowhere.json", str(script)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_equation_10_is_the_tracker_without_global_std() -> None:
    """Gains [N, T] by `PerPromptStatTracker(global_std=False)`: each prompt's own std per step."""
    gains = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gains *= torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1)
    rewards = torch.cat([torch.zeros(3, 4, 1, dtype=torch.float64), gains.cumsum(-1)], -1)
    prompts = [prompt for prompt in "abc" for _ in range(4)]
    expected = dense_advantages(rewards, clip=None).values.flatten(0, 1).double()
    told = gains.flatten(0, 1).numpy()
    own, common = (torch.from_numpy(PerPromptStatTracker(each).update(prompts, told)) for each in (False, True))
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert (common - expected).abs().max() > 0.5
