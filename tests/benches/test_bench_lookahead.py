"""The bench of the lookahead alone: its ways, what they evaluate, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benches.iteration import bench_lookahead
from benches.iteration.protocol import Protocol
from densegrpo_fast.models.diffusers_model import DiffusersModel

pytestmark = pytest.mark.ci

ARGUMENTS = ("--model", "embedded_random", "--prompts", "1", "--group-size", "2", "--rounds", "1", "--warmup", "0")


def test_every_way_is_timed_against_the_serial_and_the_exact_one(
    tiny_policy: Callable[..., DiffusersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_policy(spread=0.2)
    monkeypatch.setattr(bench_lookahead, "load", lambda config, device: made)
    arguments = [*ARGUMENTS, "--output", str(tmp_path / "a.json")]
    assert bench_lookahead.main(arguments) == 0
    document = json.loads((tmp_path / "a.json").read_text())
    # guided, ten steps: 10 + 9 + ... + 1 serially, one less for each of ten states where the rollout's velocity is
    # reused; by nodes {4, 7} four states meet at 4 and seven at 7
    exact = 2 * 45
    nfe = {"serial": 2 * 55, "exact": exact, "nodes": 2 * (4 + 7), "one_step": 0, "copy": exact, "cached": exact}
    assert document["nfe"] == nfe
    others = {f"{name}/exact" for name in nfe} | {f"{name}/serial" for name in nfe}
    assert document["ratios"].keys() == others - {"exact/exact", "serial/serial"}
    assert "cached/exact" in capsys.readouterr().out
    settings = document["settings"]
    asked = {name: settings[name]["lookahead"] for name in ("exact", "nodes", "copy", "cached")}
    assert {name: own["copy_dtype"] for name, own in asked.items()} == dict.fromkeys(asked) | {"copy": "float32"}
    assert {name: own["plan"] for name, own in asked.items()} == dict.fromkeys(asked, "exact") | {"nodes": "nodes"}
    assert asked["nodes"]["nodes"] == [4, 7] and asked["cached"]["cache"] == "text:own"


class Repeats:
    """In place of CUDA graphs: a replay computes again, into the memory of the first results."""

    captured = 0

    def why_not(self, device: torch.device) -> str:
        return ""

    def capture(self, function: Callable[[], tuple]) -> tuple[Callable[[], object], tuple]:
        self.captured += 1
        outputs = function()

        def replay() -> None:
            for old, new in zip(outputs, function(), strict=True):
                if old is not None:
                    old.copy_(new)

        return replay, outputs

    def release(self) -> None:
        pass


def test_the_graphed_way_agrees_with_the_exact_one(
    tiny_policy: Callable[..., DiffusersModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_policy(spread=0.2)
    monkeypatch.setattr(bench_lookahead, "load", lambda config, device: made)
    protocol = Protocol(**bench_lookahead.DEFAULTS | {"model": "embedded_random", "prompts": 1, "group_size": 2})
    capturer = Repeats()
    found = bench_lookahead.ways(protocol, capturer)
    assert capturer.captured and found["graphed"].evaluations == found["exact"].evaluations
    wrong = found | {"graphed": replace(found["graphed"], complete=found["one_step"].complete)}
    with pytest.raises(AssertionError, match="not close"):
        bench_lookahead.check(wrong, 2)


def test_what_the_ways_are_without_options() -> None:
    asked = bench_lookahead.configurations(Protocol(**bench_lookahead.DEFAULTS))
    assert {name: config.lookahead.cache for name, config in asked.items()} == {
        "exact": None,
        "nodes": None,
        "copy": None,
        "cached": "text:own",
    }
    assert all(config.sampler.group_size == 8 for config in asked.values())
    # a copy that is asked for is that of the nodes, too
    narrow = bench_lookahead.configurations(Protocol(plan="nodes:3,6", copy_dtype="bfloat16"))
    found = {name: config.lookahead.copy_dtype for name, config in narrow.items()}
    assert found == {"exact": None, "nodes": "bfloat16", "copy": "bfloat16", "cached": None}


def test_a_way_that_does_other_work_is_noticed(
    tiny_policy: Callable[..., DiffusersModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_policy()
    monkeypatch.setattr(bench_lookahead, "load", lambda config, device: made)
    protocol = Protocol(**bench_lookahead.DEFAULTS | {"model": "embedded_random", "prompts": 1, "group_size": 2})
    found = bench_lookahead.ways(protocol)
    other = found | {"nodes": replace(found["nodes"], evaluations=found["exact"].evaluations)}
    # two samples of 22 forwards each, not of 90
    with pytest.raises(AssertionError, match="nodes took 44 forwards, expected 180"):
        bench_lookahead.check(other, 2)
