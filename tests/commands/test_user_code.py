"""Code of one's own may do anything: the message names it, the exit status is 5, and a run keeps what it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from densegrpo_fast.common.errors import PluginError, RewardError, UsageError
from densegrpo_fast.common.exit_codes import exit_code_of
from densegrpo_fast.common.plugins import load
from densegrpo_fast.credit import registry
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.objective.policy import Objective, ObjectiveSettings
from densegrpo_fast.objective.registry import POLICIES, PolicyLoss
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.training.rewarding import build_reward

INPUTS = CreditInputs(
    rewards=torch.rand(2, 4),
    noisy=(True,) * 3,
    latents=torch.zeros(4, 8, 1),
    velocities=torch.zeros(3, 8, 1),
    sigmas=sd3_sigmas(3),
)
pytestmark = pytest.mark.usefixtures("registries")
SPREAD = {"std": "group", "spread_floor": 0.0, "clip": 5.0}


class Odd:
    def __repr__(self) -> str:
        raise ValueError("no words")


def credit_by(method: Callable[..., object]) -> Advantages:
    registry.register("mine", registry.CreditMethod(method, needs=("rewards",)))  # type: ignore[arg-type]
    return registry.advantages("mine", INPUTS, SPREAD)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda rewards, **_: exit(0), "credit method mine raised SystemExit: 0"),
        (lambda rewards, **_: 1 / 0, "credit method mine raised ZeroDivisionError"),
        (lambda rewards: None, "credit method mine raised TypeError"),
        (lambda rewards, **_: None, r"expected Advantages .*, got NoneType"),
        (lambda rewards, **_: Odd(), r"expected Advantages .*, got Odd"),
        (lambda rewards, **_: rewards[..., None].repeat(1, 1, 3), r"expected Advantages .*, got Tensor"),
        (lambda rewards, **_: Advantages([1.0], 0.0, 0.0), r"expected Advantages .*, got Advantages"),
        (lambda rewards, **_: Advantages(rewards, 0.0, 0.0), r"expected advantages \[2, 4, 3\], got \[2, 4\]"),
        (lambda rewards, **_: Advantages(torch.full((2, 4, 3), torch.nan), 0.0, 0.0), "expected finite advantages"),
    ],
)
def test_a_credit_method(method: Callable[..., object], message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        credit_by(method)
    assert exit_code_of(caught.value) == 5


def test_a_credit_method_may_write_into_its_inputs() -> None:
    before = INPUTS.rewards.clone()

    def greedy(rewards: torch.Tensor, **_: object) -> Advantages:
        return Advantages(rewards.zero_()[..., None].repeat(1, 1, 3), 0.0, 0.0)

    assert not credit_by(greedy).values.any() and torch.equal(INPUTS.rewards, before)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda c, steps: exit(0), "policy mine raised SystemExit: 0"),
        (lambda c, steps: lambda pairs: exit(0), "policy mine raised SystemExit: 0"),
        (lambda c, steps: lambda pairs: pairs.nothing, "policy mine raised AttributeError"),
        (lambda c, steps: lambda pairs: None, "policy mine raised TypeError"),
        (lambda c, steps: lambda pairs: (0.5, {}), "expected a loss without dimensions, got float"),
        (lambda c, steps: lambda pairs: (pairs.log_prob, {}), r"expected a loss without dimensions, got shape \[6\]"),
        (
            lambda c, steps: lambda pairs: (pairs.advantages.mean(), {}),
            "expected a loss that depends",
        ),
        (lambda c, steps: lambda pairs: (pairs.log_prob.mean(), None), "policy mine raised AttributeError"),
        (lambda c, steps: lambda pairs: (pairs.log_prob.mean(), {"x": pairs.kl}), "policy mine raised"),
        (
            lambda c, steps: lambda pairs: (pairs.log_prob.mean(), {"x": pairs.log_prob}),
            "expected metrics without dimensions, got some in 'x'",
        ),
    ],
)
def test_a_policy_loss(prepare: Callable[..., object], message: str) -> None:
    POLICIES.register("mine", PolicyLoss(prepare))  # type: ignore[arg-type]
    settings = ObjectiveSettings("mine", 0.1, "none", 0.0, "none", 0.0, "paper")
    rows, velocity = torch.zeros(6), torch.zeros(6, 2)
    with pytest.raises(PluginError, match=message):
        Objective(settings, coefficients(sd3_sigmas(3), 0.7, "flow_sde"), [0, 1]).loss(
            0,
            log_prob=rows.clone().requires_grad_(),
            old_log_prob=rows,
            advantages=rows + 1,
            velocity=velocity,
            old_velocity=velocity,
            kl=None,
        )


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import sys; sys.exit(0)", PluginError, "mine.py raised SystemExit: 0"),
        ("raise KeyboardInterrupt2", UsageError, "cannot load .*NameError"),
        ("f = 1", UsageError, "expected a function or class, got int"),
        (
            "class f:\n    def __init__(self): raise SystemExit(0)",
            RewardError,
            "making the reward .* raised SystemExit: 0",
        ),
        (
            "class f:\n    def __init__(self): raise ValueError('no')",
            RewardError,
            "making the reward .* raised ValueError: no",
        ),
    ],
)
def test_a_reward_that_cannot_be_made(tmp_path: Path, source: str, error: type[Exception], message: str) -> None:
    (tmp_path / "mine.py").write_text(source + "\n")
    with pytest.raises(error, match=message):
        build_reward({f"{tmp_path}/mine.py:f": 1.0})
    with pytest.raises(PluginError, match="exits.py raised SystemExit"):
        (tmp_path / "exits.py").write_text("raise SystemExit\n")
        load(f"{tmp_path}/exits.py:f")


@pytest.mark.ci
def test_a_run_keeps_what_it_has(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward that exits in the second iteration: the first one's record and checkpoint stay, and the run goes on."""
    own, calls = tmp_path / "own.py", tmp_path / "calls"
    # an evaluation, then the completions of an iteration in one call
    own.write_text(
        "import os, sys\n"
        "def score(images, prompts, metadata):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n        file.write('x')\n"
        f"    if os.path.getsize({str(calls)!r}) == 3:\n        sys.exit(0)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    options = {
        "reward.terms": f"{{{own}:score: 1.0}}",
        "reward.observed": "[]",
        "lookahead.decoder": "full",
        "evaluation.every": 0,
        "run.iterations": 2,
    }
    assert train(tmp_path / "run", **options) == 5
    assert f"error: reward '{own}:score' raised SystemExit: 0" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert train(tmp_path / "run", "--resume", **options) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
