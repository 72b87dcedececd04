"""Options of rewards: checked against what the reward takes, and the way from a configuration to a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.rewards.registry import OptionError, create
from densegrpo_fast.training.rewarding import build_observer, build_reward

OWN = """\
class Level:
    made = 0
    def __init__(self, gain: float = 1.0, *, names: list[str] | None = None, where: "Nowhere" = None):
        type(self).made += 1
        self.gain = gain
    def __call__(self, images, prompts, metadata):
        return self.gain * images.mean((1, 2, 3))

class Open:
    def __init__(self, **anything):
        self.anything = anything
    def __call__(self, images, prompts, metadata):
        return [self.anything["value"]] * len(prompts)

def level(images, prompts, metadata, threshold, gain: float = 1.0):
    return gain * (images.mean((1, 2, 3)) > threshold)
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def config(*arguments: str) -> Config:
    observed = [] if any(word.startswith("reward.observed") for word in arguments) else ["reward.observed=[]"]
    return parse_arguments(["--config=embedded_dense", *observed, *arguments])[0]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("scenes", {"gain": 1}, r"'scenes' has no option 'gain' \(it takes strict\)"),
        ("jpeg_compressibility", {"quality": 1}, r"no option 'quality' \(it takes none\)"),
        ("remote", {"url": "http://h", "time_out": 1.0}, "no option 'time_out'; did you mean 'timeout'?"),
        ("remote", {}, "'remote' needs the option 'url'"),
        ("vlm_judge", {"url": "http://h"}, "'vlm_judge' needs the option 'model'"),
        ("aesthetic", {}, "'aesthetic' needs the option 'head'"),
        ("pickscore", {"chunk": "8"}, "'pickscore' takes int as 'chunk', got '8'"),
        ("pickscore", {"chunk": True}, "takes int as 'chunk', got True"),
        ("pickscore", {"model": 3}, "takes str as 'model', got 3"),
        ("remote", {"url": "http://h", "timeout": "long"}, "takes float as 'timeout', got 'long'"),
        ("remote", {"url": "http://h", "timeout": float("inf")}, "takes float as 'timeout', got inf"),
        ("vlm_judge", {"url": "http://h", "model": "m", "request": [1]}, r"takes dict\[str, typing.Any\] as 'request'"),
    ],
)
def test_wrong_options_of_built_in_rewards_are_named(name: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        create(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("Level", {"gian": 1.0}, "no option 'gian'; did you mean 'gain'?"),
        ("level", {"gain": 1.0}, "needs the option 'threshold'"),
        ("level", {"threshold": 0.5, "images": 1}, r"no option 'images' \(it takes threshold, gain\)"),
        ("level", {"threshold": 0.5, "gain": "x"}, "takes float as 'gain', got 'x'"),
    ],
)
def test_wrong_options_of_ones_own_rewards_are_named(
    own: str, name: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(OptionError, match=problem):
        create(f"{own}:{name}", **options)


def test_what_a_reward_leaves_open_is_taken(own: str) -> None:
    images = torch.full((1, 3, 4, 4), 0.5)
    assert create(f"{own}:Open", value=3)(images, ["p"], [{}]) == [3]
    # a hint that cannot be resolved checks nothing
    assert create(f"{own}:Level", gain=2, where=object())(images, ["p"], [{}]).tolist() == [1.0]
    assert create(f"{own}:level", threshold=0.4, gain=2)(images, ["p"], [{}]).tolist() == [2.0]


def test_names_of_ones_own_stand_for_rewards_with_options(own: str) -> None:
    settings = config(
        "reward.terms={bright: 1.0, jpeg: -0.5}",
        f"reward.options={{bright: {{use: '{own}:Level', gain: 2.0}}, jpeg: {{use: jpeg_incompressibility}}}}",
    )
    mixture = build_reward(settings.reward.terms, settings.reward.options)
    scores = mixture(torch.full((1, 3, 8, 8), 0.25), ["p"])
    assert scores.per_reward["bright"].item() == pytest.approx(0.5)
    expected = 0.5 - 0.5 * scores.per_reward["jpeg"].item()
    assert scores.values.item() == pytest.approx(expected) and scores.per_reward["jpeg"].item() > 0


def test_the_held_out_evaluation_shares_the_rewards_of_the_training(own: str) -> None:
    name = f"{own}:Level"
    settings = config(f"reward.terms={{'{name}': 2.0}}", f"reward.observed=['{name}', scenes]")
    training = build_reward(settings.reward.terms, settings.reward.options)
    observer = build_observer(settings, training)
    assert observer.terms[name] == training.terms[name] and observer.terms[name][1] == 2.0
    assert observer.terms["scenes"][1] == 0.0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["reward.options={scene: {strict: true}}"],
            'reward.options: there is no reward "scene" in reward.terms or reward.observed; did you mean "scenes"?',
        ),
        (["reward.terms={far: 1.0}", "reward.options={far: {use: remot}}"], 'far.use: unknown reward "remot"; did you'),
        (
            ["reward.terms={far: 1.0}", "reward.options={far: {use: 3}}"],
            "far.use: expected the name of a reward, got 3",
        ),
        (["reward.terms={far: 1.0}"], 'reward.terms: unknown reward "far"'),
        (["reward.observed=[pikscore]"], 'reward.observed: unknown reward "pikscore"; did you mean "pickscore"?'),
        (["reward.options={scenes: 3}"], "reward.options.scenes: expected a mapping, got 3"),
        (["reward.options=[1]"], "reward.options: expected a mapping, got [1]"),
        (["reward.options={scenes: {strict: .nan}}"], "reward.options.scenes.strict: "),
    ],
)
def test_a_configuration_with_wrong_rewards_is_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["--config=embedded_dense", *arguments])
    assert exit_code_of(caught.value) == ExitCode.USAGE
    assert problem in str(caught.value)


def test_wrong_options_and_absent_weights_end_a_run_differently(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no option 'x'") as caught:
        build_reward({"scenes": 1.0}, {"scenes": {"x": 1}})
    assert exit_code_of(caught.value) == ExitCode.USAGE
    with pytest.raises(UserError, match="url: expected an address that starts with http:// or https://") as caught:
        build_reward({"remote": 1.0}, {"remote": {"url": "file:///etc/passwd"}})
    assert exit_code_of(caught.value) == ExitCode.USAGE
    absent = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"pickscore: cannot load its processor from .*absent") as caught:
        build_reward({"pickscore": 1.0}, {"pickscore": {"model": absent, "processor": absent}})
    assert exit_code_of(caught.value) == ExitCode.REWARD


def test_where_a_reward_is_computed_does_not_bind_a_continued_run() -> None:
    def fingerprint(own: str) -> str:
        return config("reward.terms={far: 1.0}", f"reward.options={{far: {{{own}}}}}").fingerprint()

    first = fingerprint("use: remote, url: 'http://a:1', timeout: 5")
    assert first == fingerprint("use: remote, url: 'http://b:2', retries: 9, batch: 4")
    assert first != fingerprint("use: vlm_judge, url: 'http://a:1', model: m")
    judge = fingerprint("use: vlm_judge, url: 'http://a:1', model: m")
    assert judge != fingerprint("use: vlm_judge, url: 'http://a:1', model: n")
    # what an option of one's own reward means is not known
    assert fingerprint("use: 'm.py:f', batch: 1") != fingerprint("use: 'm.py:f', batch: 2")
