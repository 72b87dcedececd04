"""What branches go with: refused by name before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.evaluation import HeldOut
from densegrpo_fast.training.models import tiny_config
from densegrpo_fast.training.schedule import Schedule

# 8 steps of flow_sde without windows, 6 prompts x 8 samples: 12 trunks of 4 branches
BASE = [f"--config={Path(__file__).parents[1] / 'data' / 'base.yaml'}", "window.schedule=none", "window.size=null"]
BRANCHES = ["sampler.branches=4", "sampler.micro_batch=6", "credit.method=branch"]
NODES = ["lookahead.plan=nodes"]
PATHS = ["lookahead.plan=paths"]
WINDOW = ["window.schedule=fixed", "window.size=2"]
GRANULAR = [*BRANCHES, "credit.method=granular", "lookahead.plan=exact"]


def config(*argv: str) -> Config:
    """The last of several values of an option counts."""
    given = dict(argument.split("=", 1) for argument in (*BASE, *argv))
    return parse_arguments([f"{key}={value}" for key, value in given.items()])[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["credit.method=branch"], "sampler.branches: credit.method branch compares branches of one state, got null"),
        (["objective.negative_factor=0.5"], "objective.negative_factor: expected 1 without sampler.branches, got 0.5"),
        (
            [*BRANCHES, "credit.method=dense"],
            "credit.method: expected branch or granular with sampler.branches, got dense",
        ),
        ([*BRANCHES, "sampler.branches=3"], "sampler.branches: expected a divisor of sampler.group_size 8, got 3"),
        ([*BRANCHES, "sampler.branches=1"], "sampler.branches: expected a number >= 2, got 1"),
        (
            [*BRANCHES, "sampler.micro_batch=8"],
            "sampler.micro_batch: expected a divisor of the 12 trajectories of an iteration (data.num_prompts x "
            "sampler.group_size / sampler.branches), such as 6, got 8",
        ),
        (
            [*BRANCHES, "optimizer.updates_per_iteration=4"],
            "optimizer.updates_per_iteration: expected a divisor of the 2 micro-batches",
        ),
        ([*BRANCHES, "sampler.shared_noise=true"], "sampler.shared_noise: expected false with sampler.branches, got"),
        ([*BRANCHES, "lookahead.cache=text:own"], "lookahead.cache: expected null with sampler.branches, got text:own"),
        ([*BRANCHES, "lookahead.guidance=reuse"], "lookahead.guidance: expected full or cond_only with sampler.br"),
        (
            [*BRANCHES, "sampler.noise_level=[0.7,0,0.7,0.7,0.7,0,0.7,0.7]"],
            "sampler.branches: branches need noise in every trained step, there is none in [1, 5]",
        ),
        (
            [*BRANCHES, "sampler.dynamics=cps", "objective.trained_steps=[0,7]"],
            "sampler.branches: branches need noise in every trained step, there is none in [7]",
        ),
        (
            [*BRANCHES, "window.schedule=fixed", "window.size=2", "window.remainder=dpm_solver"],
            "window.remainder: expected euler with sampler.branches, got dpm_solver",
        ),
        (
            [*BRANCHES, "credit.method=granular"],
            "lookahead.plan: expected exact, by which the rewards of credit.method",
        ),
        ([*GRANULAR, "credit.granularities=[2,1]"], "credit.granularities: expected increasing step sizes, got [2, 1]"),
        ([*GRANULAR, "credit.granularities=[1,8]"], "credit.granularities: expected at most 7"),
        ([*GRANULAR, "credit.granularities=[0,2]"], "credit.granularities"),
        (  # branches of step 2 lead to state 3
            [*BRANCHES, *NODES, "lookahead.nodes=[1,3]", "objective.trained_steps=[2,3]"],
            "lookahead.nodes: expected a step of 4..7 among them, got [1, 3]: in an iteration whose first completed",
        ),
        (  # the steps 2, 3 and 4 may be drawn, or later ones
            [*BRANCHES, *NODES, "lookahead.nodes=[3]", *WINDOW, "window.size=6", "objective.trained_steps=3"],
            "lookahead.nodes: expected a step of 4..7 among them, got [3]",
        ),
        (  # of the trained steps 1 and 4, whose branches lead to the states 2 and 5, neither has a path
            [*BRANCHES, *PATHS, "lookahead.paths=[[3],[],[],[4],[],[],[],[]]", "objective.trained_steps=[1,4]"],
            "lookahead.paths: expected a step in the path of a state that is completed (2, 5), got",
        ),
        (  # two of the seven steps are drawn, and five of the states that they lead to have no path
            [*BRANCHES, *PATHS, "lookahead.paths=[[],[2],[],[4],[],[],[],[]]", "objective.trained_steps=2"],
            "lookahead.paths: expected a step in the path of a state that is completed (2, 4), got",
        ),
        (
            [*BRANCHES, *NODES, "lookahead.nodes=[7]", "objective.trained_steps=[6]"],
            "lookahead.plan: expected one_step where no state before 7 is completed, got nodes [7]",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*arguments)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_nodes_after_the_first_branches_are_enough() -> None:
    config(*BRANCHES, *NODES, "lookahead.nodes=[2]")
    # one step of 0..6 is drawn: branches of step 5 lead to state 6, where exact_but_last evaluates nothing either
    config(*BRANCHES, *NODES, "lookahead.nodes=[4,6]", "objective.trained_steps=1")
    # of six states one alone has no path, and three are drawn
    config(*BRANCHES, *PATHS, "lookahead.paths=[[],[4],[],[4],[5],[6],[7],[]]", "objective.trained_steps=3")


def test_trajectories_branch_at_the_steps_that_are_trained(mixture_model: FlowModel) -> None:
    def schedule(*options: str) -> Schedule:
        return Schedule(config(*options), mixture_model)

    assert schedule(*BRANCHES).noisy_steps(0) == [0, 1, 2, 3, 4, 5, 6]
    assert schedule(*BRANCHES, "objective.trained_steps=[0, 7]").noisy_steps(0) == [0, 7]
    window = ["window.schedule=random", "window.size=3", "window.last=5"]
    drawn = schedule(*BRANCHES, *window, "objective.trained_steps=1")
    steps = {tuple(drawn.noisy_steps(iteration)) for iteration in range(100)}
    assert steps == {(step,) for step in range(6)}
    assert [drawn.noisy_steps(i) for i in range(9)] == [drawn.trained_steps(i) for i in range(9)]
    # without branches all of a window is noisy, whatever part of it is trained
    plain = schedule(*window, "objective.trained_steps=1")
    assert [plain.noisy_steps(i) for i in range(9)] == [plain.windows.steps(i) for i in range(9)]


def test_a_dry_run_has_one_trajectory_of_two_branches() -> None:
    small = tiny_config(config(*GRANULAR)).sampler
    assert (small.group_size, small.branches, small.micro_batch) == (2, 2, 1)


def test_evaluation_draws_as_many_pictures_at_a_time_as_there_are_branches() -> None:
    assert HeldOut.of(config(*BRANCHES)).rows.rows == 24
