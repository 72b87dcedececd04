"""Which credit methods and objectives a configuration may combine: refused by name before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments, validate
from densegrpo_fast.credit import registry

BASE = ["--config", str(Path(__file__).parents[1] / "data" / "base.yaml")]  # 8 steps of flow_sde, plan exact_but_last
OWN = (
    "from densegrpo_fast.credit.registry import CreditMethod\n"
    "OWN = CreditMethod('somewhere:else', needs=('lookahead_rewards',), options=('discount', 'sharpness'))\n"
)


def config(*argv: str) -> Config:
    return parse_arguments([*BASE, *argv])[0]


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        config(*argv)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    return str(caught.value)


@pytest.mark.parametrize("name", registry.names())
def test_every_registered_method_is_an_option(name: str) -> None:
    method = registry.find(name)
    plan = () if method.plan is None else (f"lookahead.plan={method.plan}",)
    branches = ("sampler.branches=4", "sampler.micro_batch=6") if method.uses_branches else ()
    loaded = config(f"credit.method={name}", *plan, *branches, "window.schedule=none", "window.size=null")
    assert loaded.credit.method == name
    assert loaded.uses_lookahead == (name not in ("sparse", "coca", "branch", "granular"))
    assert loaded.uses_branches == (name in ("branch", "granular"))
    # every option that it takes has a value
    assert {*method.options, *registry.COMMON} <= loaded.credit.method_options().keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("credit.method=dense", "local"),
        ("credit.method=dense credit.normalize=joint", "whole"),
        ("credit.method=dense credit.smoothing=0.5", "whole"),
        ("credit.method=return_to_go", "whole"),
        ("credit.method=return_to_go credit.discount=0", "local"),
        ("credit.method=sparse", "whole"),
    ],
)
def test_whether_a_step_can_be_credited_before_the_trajectories_end(arguments: str, expected: str) -> None:
    assert config(*arguments.split()).credit_scope == expected


@pytest.mark.parametrize("policy", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("weight", ["none", "noise_aware", "flash", "proportionate"])
def test_every_policy_loss_goes_with_every_step_weight(policy: str, weight: str) -> None:
    objective = config(f"objective.policy={policy}", f"objective.step_weight={weight}").objective
    assert (objective.policy, objective.step_weight) == (policy, weight)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("credit.method=turning_pont", 'credit.method: unknown method "turning_pont"; did you mean "turning_point"?'),
        ("credit.method=vgpo", "lookahead.plan: expected one_step, by which the rewards of credit.method vgpo are"),
        ("credit.method=coca credit.window=3", "credit.window: expected a divisor of the 8 steps, got 3"),
        (  # floor((5 + 1) * .6) - 1 = 2 steps after the window of 3
            "credit.method=coca credit.window=4 window.remainder_share=0.6",
            "credit.window: expected a divisor of the 5 steps that window.remainder_share leaves, got 4",
        ),
        (  # floor(7 * .6) - 1 = 3 steps after 0..1, floor(4 * .6) - 1 = 1 after 3..4: 5 and 6 in all
            "credit.method=coca credit.window=5 window.schedule=random window.size=2 window.last=4 "
            "window.remainder_share=0.6",
            "credit.window: expected a divisor of the 6 steps that window.remainder_share leaves, got 5",
        ),
        (
            "credit.method=mixture credit.terminal_coef=0 credit.dense_coef=0",
            "credit.terminal_coef, credit.dense_coef: expected one above 0, got 0 and 0",
        ),
        (
            "lookahead.plan=nodes lookahead.nodes=[1,2] window.schedule=fixed window.size=3 window.first=2",
            "lookahead.nodes: expected a step of 3..7 among them, got [1, 2]: in an iteration whose first completed "
            "state is 2 the plan would be one_step",
        ),
        (  # one of the windows that may be drawn begins at state 3
            "lookahead.plan=nodes lookahead.nodes=[3] window.schedule=random window.size=2 window.last=4",
            "lookahead.nodes: expected a step of 4..7 among them, got [3]",
        ),
        (  # a window that slides from 0 by 2 and stays where it begins at 4
            "lookahead.plan=nodes lookahead.nodes=[1,4] window.schedule=progressive window.size=2 window.stride=2 "
            "window.last=5",
            "lookahead.nodes: expected a step of 5..7 among them, got [1, 4]",
        ),
        (  # noise in step 3 of the window alone
            "lookahead.plan=nodes lookahead.nodes=[3] window.schedule=fixed window.size=4 "
            "sampler.noise_level=[0,0,0,0.7,0,0,0,0]",
            "lookahead.nodes: expected a step of 4..7 among them, got [3]",
        ),
        (  # nothing but the last window's state, which no node is ahead of
            "lookahead.plan=nodes lookahead.nodes=[6] window.schedule=fixed window.size=1 window.first=6",
            "lookahead.nodes: expected a step of 7..7 among them, got [6]",
        ),
        (
            "lookahead.plan=paths lookahead.paths=[[],[],[],[],[],[],[],[]]",
            "lookahead.paths: expected a step in the path of a state that is completed (0, 1, 2), got [[], [], [], [], "
            "[], [], [], []]: in an iteration whose first completed state is 0 the plan would be one_step",
        ),
        (  # a path of state 3 alone, which the window of the steps 0 and 1 does not complete
            "lookahead.plan=paths lookahead.paths=[[],[],[],[5],[],[],[],[]] window.schedule=random window.size=2",
            "lookahead.paths: expected a step in the path of a state that is completed (0, 1), got",
        ),
        ("credit.discount=1.5", "credit.discount: expected a number <= 1.0, got 1.5"),
        ("credit.terminal_coef=-1", "credit.terminal_coef: expected a number >= 0.0, got -1"),
        ("credit.alpha=2", "credit.alpha: expected a number <= 1.0, got 2"),
        ("credit.similarity_floor=0", "credit.similarity_floor: expected a number > 0.0, got 0"),
        ("credit.window=0", "credit.window: expected a number >= 1, got 0"),
        ("credit.absolute_steps=-1", "credit.absolute_steps: expected a number >= 0, got -1"),
        ("credit.step_value=gian", 'credit.step_value: expected "gain", "value" or "return_to_go"'),
        ("credit.consistent=1", "credit.consistent: expected true or false, got 1"),
        ("credit.arguments={x:1}", 'credit.arguments: method dense has no argument "x:1"; it takes none'),
        ("credit.arguments={clip:}", "credit.arguments: clip is an option of its own, credit.clip"),
        (
            "objective.policy=cilp",
            'objective.policy: unknown policy "cilp"; did you mean "clip"? (known: clip, guard, ',
        ),
        ("objective.step_weight=flas", 'objective.step_weight: unknown step weight "flas"; did you mean "flash"?'),
        ("objective.arguments={x:1}", "objective.arguments: policy clip with step_weight noise_aware has no argument"),
        ("objective.arguments={kl_coef:}", "objective.arguments: kl_coef is an option of its own, objective.kl_coef"),
        ("objective.dppo_threshold=-1", "objective.dppo_threshold: expected a number >= 0.0, got -1"),
        ("objective.kl_scale=papr", 'did you mean "paper"?'),
        (
            "objective.policy=guard sampler.dynamics=cps",
            "objective.policy: guard needs a log-probability with a variance, sampler.dynamics cps has none",
        ),
        (
            "objective.policy=guard sampler.dynamics=precise",
            "objective.guard_weight: paper is defined for sampler.dynamics flow_sde and dance, expected jacobian or "
            "none with precise",
        ),
        (
            "objective.policy=guard window.schedule=none window.size=null "
            "sampler.noise_level=[0.7,0.7,0,0.7,0.7,0,0.7,0]",
            "objective.policy: guard needs noise in every trained step, flow_sde injects none in [2, 5]",
        ),
        (
            "objective.policy=guard objective.guard_weight=jacobian sampler.dynamics=precise "
            "objective.trained_steps=[0,7] window.schedule=none window.size=null",
            "objective.policy: guard needs noise in every trained step, precise injects none in [7]",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(arguments: str, expected: str) -> None:
    message = refused(*arguments.split(" "))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        "objective.policy=guard objective.trained_steps=[0,1] sampler.noise_level=[0.7,0.7,0,0,0,0,0,0] "
        "window.schedule=none window.size=null",
        "objective.policy=guard sampler.noise_level=[0,0.7,0.7,0,0,0,0,0] window.schedule=fixed window.size=2 "
        "window.first=1",
        "objective.policy=guard sampler.dynamics=wan objective.guard_weight=none objective.trained_steps=[0,7] "
        "window.schedule=none window.size=null",
        "objective.policy=dppo sampler.dynamics=cps sampler.noise_level=[0.7,0,0.7,0.7,0.7,0.7,0.7,0]",
        "credit.method=dense credit.window=3 credit.terminal_coef=0 credit.dense_coef=0",
        "credit.method=vgpo lookahead.plan=one_step",
        # 3 + 2 steps
        "credit.method=coca credit.window=5 window.remainder_share=0.6",
        "credit.method=coca credit.window=8 window.remainder=dpm_solver",
        # noise in one step of the first window, in two of the second
        "credit.smoothing=0.5 window.schedule=random window.size=2 window.last=2 "
        "sampler.noise_level=[0,0.7,0.7,0,0,0,0,0]",
        "lookahead.plan=nodes lookahead.nodes=[1] window.schedule=fixed window.size=3",
        # starts at 1, 3, 5: not at 2 and 4
        "lookahead.plan=nodes lookahead.nodes=[2,4,6] window.schedule=progressive window.size=1 window.stride=2 "
        "window.first=1 window.last=5",
        # from the last of the windows, state 6, exact_but_last would evaluate nothing either
        "lookahead.plan=nodes lookahead.nodes=[3,6] window.schedule=random window.size=1",
        # one path is enough
        "lookahead.plan=paths lookahead.paths=[[],[5],[],[],[],[],[],[]]",
        "lookahead.plan=paths lookahead.paths=[[],[],[],[],[],[6],[],[]] window.schedule=fixed window.size=2 "
        "window.first=5",
        "credit.method=sparse lookahead.plan=paths lookahead.paths=[[],[],[],[],[],[],[],[]]",
        # without a lookahead nobody asks for nodes
        "credit.method=sparse lookahead.plan=nodes lookahead.nodes=[1] window.schedule=fixed window.size=3 "
        "window.first=3",
    ],
)
def test_what_does_go_together_is_not(arguments: str) -> None:
    config(*arguments.split())


def test_a_credit_with_a_lookahead_cannot_be_without_a_plan() -> None:
    assert "lookahead.plan: expected " in (message := refused("credit.method=dense", "lookahead.plan=null"))
    assert "got null; presets with credit.method dense: embedded_dense, " in message
    settings = config("credit.method=dense").model_dump()
    del settings["lookahead"]["plan"]
    with pytest.raises(UserError, match="lookahead.plan: is required"):
        validate(settings)


@pytest.mark.ci
def test_a_method_of_ones_own_and_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    named = f"credit.method={path}:OWN"
    loaded = config(named, "credit.arguments={sharpness: [1, 2]}")
    assert loaded.uses_lookahead
    values = loaded.credit.method_options()
    assert (values["sharpness"], values["discount"]) == ([1, 2], 1.0)
    assert "credit.arguments: method" in refused(named) and "needs sharpness" in refused(named)
    wrong = refused(named, "credit.arguments={sharpnes: 1}")
    assert 'has no argument "sharpnes"; did you mean "sharpness"?' in wrong
    own_key = refused(named, "credit.arguments={discount: 1}")
    assert "credit.arguments: discount is an option of its own, credit.discount" in own_key
    assert f"credit.method: {path}:NONE: {path} holds no 'NONE'" in refused(f"credit.method={path}:NONE")
    path.with_name("worse.py").write_text("raise KeyError('boom')\n")
    assert "worse.py: KeyError: 'boom'" in refused(f"credit.method={path.with_name('worse.py')}:OWN")


OBJECTIVE = """
from densegrpo_fast.objective.registry import PolicyLoss, StepWeighting
HINGE = PolicyLoss('somewhere:else', options=('margin', 'clip_range'), variance=True, noise=True)
LATE = StepWeighting('somewhere:else', options=('power',))
"""


def test_a_policy_and_step_weights_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OBJECTIVE)
    named = (f"objective.policy={path}:HINGE", f"objective.step_weight={path}:LATE")
    objective = config(*named, "objective.arguments={margin: 0.1, power: 2}").objective
    assert (objective.policy, objective.arguments) == (f"{path}:HINGE", {"margin": 0.1, "power": 2})
    assert "needs margin, power" in refused(*named)
    assert "needs power" in refused(*named, "objective.arguments={margin: 0.1}")
    wrong = refused(*named, "objective.arguments={margn: 0.1, power: 2}")
    assert 'has no argument "margn"; did you mean "margin"?' in wrong
    # what it says that it needs of the sampler is held against it, as Guard's needs are
    given = (*named, "objective.arguments={margin: 0.1, power: 2}")
    assert (
        "HINGE needs a log-probability with a variance, sampler.dynamics cps has none; expected clip or dppo"
        in refused(*given, "sampler.dynamics=cps")
    )
    quiet = ("window.schedule=none", "window.size=null", "sampler.noise_level=[0.7,0.7,0,0.7,0.7,0.7,0.7,0.7]")
    assert "HINGE needs noise in every trained step, flow_sde injects none in [2]" in refused(*given, *quiet)
    swapped = refused(f"objective.policy={path}:LATE")
    assert f"objective.policy: {path}:LATE: expected a PolicyLoss (densegrpo_fast.objective.registry)" in swapped
    assert "objective.step_weight: " in (nowhere := refused(f"objective.step_weight={path}:NONE"))
    assert "holds no 'NONE'" in nowhere


@pytest.mark.usefixtures("registries")
def test_a_method_that_was_registered_is_an_option_like_the_packages() -> None:
    registry.register("mine", registry.CreditMethod("somewhere:else", needs=("rewards",), options=("alpha",)))
    assert not config("credit.method=mine").uses_lookahead
    assert 'did you mean "mine"?' in refused("credit.method=minee")
