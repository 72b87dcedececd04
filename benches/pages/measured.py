"""Recorded measurements as Markdown: of drop-in steps, of the step ops on the CPU, and of dense against sparse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
HOSTS = ("flow_grpo", "dance_grpo", "mix_grpo", "flow_factory")
KINDS = {host: ("sample", "philox", "score") for host in HOSTS} | {"turning_point": ("mixed", "batched", "shared")}
"""For each host what was measured."""
WORDS = {
    "sample": "a step of the rollout, the host's random numbers",
    "philox": 'the same, `rng="philox"`',
    "score": "a step of training: log_prob of a stored state, and its gradient",
    "mixed": "mixed sampling, ten steps, nine noisy, guided",
    "batched": "the same, `chunk=8 * B`",
    "shared": "mixed sampling and the noise-free image, `shared_noise`",
}
STEPS = {
    "sde_step": "`sde_step`, its noise included",
    "sde_log_prob": "`sde_log_prob`, forward and backward",
    "sde_log_prob_kl": "`sde_log_prob_kl`, forward and backward",
    "euler_jump": "`euler_jump`",
    "grpo_loss": "`grpo_loss`, forward and backward",
}
REWARDED = {
    "embedded_branched": "each branch of each step (the default)",
    "branched_full": "the same, every picture decoded in full",
    "turning_point": "each step of a trajectory, as TP-GRPO adds them up",
    "branched_calibrated": "the default at calibrated noise",
    "dense": "each step of a trajectory (DenseGRPO's gains), all steps but the last, previews",
    "dense_exact": "the same, exact completions, decoded in full",
    "dense_calibrated": "the same, previews, calibrated noise",
    "sparse": "each picture (Flow-GRPO)",
}
"""Variants of the recorded study of dense against sparse, and what a reward is for in each."""


def dropin_result(host: str) -> dict[str, Any]:
    """What was recorded for a host."""
    stem = "dropin" if host in HOSTS else host
    return json.loads((RESULTS / f"{stem}_cpu.json").read_text(encoding="utf-8"))


def dropin(host: str) -> str:
    """What was measured for a host."""
    document = dropin_result(host)
    settings, machine = document["settings"], document["hardware"]
    rows = [f"| {machine['cpu']}, {settings['threads']} thread, float32 | host | here | |", "|---|---|---|---|"]
    for kind in KINDS[host]:
        own = document["variants"][f"{host}.{kind}"]
        rows.append(
            f"| {WORDS[kind]} | {_time(own['eager_median_seconds'])} | {_time(own['median_seconds'])} "
            f"| {own['times_faster_than_eager']:.2f}x |"
        )
    return "\n".join(rows)


def step_result(op: str) -> dict[str, Any]:
    """What was recorded for a step op on the CPU."""
    return json.loads((RESULTS / f"{op}_cpu.json").read_text(encoding="utf-8"))


def steps() -> str:
    """What was measured for the step ops."""
    documents = {op: step_result(op) for op in STEPS}
    machine = documents["sde_step"]["hardware"]["cpu"]
    rows = [
        f"| {machine}, float32 | shape | threads | csrc | eager | compiled | over eager | over compiled | spread |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, words in STEPS.items():
        settings, variants = documents[op]["settings"], documents[op]["variants"]
        own, eager, compiled = (variants[name] for name in ("csrc", "eager", "eager_compiled"))
        cells = [words, str(settings["shape"]), settings["threads"]]
        cells += [_time(variant["median_seconds"]) for variant in (own, eager, compiled)]
        cells += [f"{own[f'times_faster_than_{name}']:.1f}x" for name in ("eager", "eager_compiled")]
        cells += [f"{max(variant['spread'] for variant in (own, eager, compiled)):.0%}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def study_result() -> dict[str, Any]:
    """What was recorded of dense against sparse."""
    return json.loads((RESULTS / "study_branched.json").read_text(encoding="utf-8"))


def against_sparse(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a study found of the reward of each variant minus sparse's, by variant."""
    return {one["first"]: one["scores"]["reward"] for one in document["comparisons"] if one["second"] == "sparse"}


def study() -> str:
    """Dense against sparse: changes of the held-out reward, and paired differences over seeds."""
    document = study_result()
    runs = document["runs"]
    rows = [
        "| a reward for | held-out reward | strict | minus sparse, 95% | with the same operations | TFLOP | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, words in REWARDED.items():
        own = [run["points"] for run in runs if run["variant"] == variant]
        change = {
            score: mean(points[-1]["held_out"][score] - points[0]["held_out"][score] for points in own)
            for score in ("reward", "scenes_strict")
        }
        cells = [words, f"{change['reward']:+.3f}", f"{change['scenes_strict']:+.0%}"]
        if variant == "sparse":
            cells += ["", ""]
        else:
            found = against_sparse(document)[variant]
            cells += [_interval(found["equal_iterations"][-1]), _interval(found["equal_compute"])]
        cells += [f"{mean(points[-1]['operations'] for points in own):.1f}", str(len(own))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
