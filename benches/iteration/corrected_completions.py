"""What cheap completions would cost in variance if exact ones corrected them.

    python -m benches.iteration.corrected_completions    writes results/corrected_completions.json

A reward of a cheap completion plus, for a share q of the states, (exact - cheap) / q has the exact reward's mean, so
gains of it are unbiased however wrong the cheap one is. Measured under the paper's settings (`embedded_paper`), inside
groups: the variance that this adds to the gain of a step, over the variance of the exact gain, (1 - q) / q times the
residuals' of the two states; for the graded scenes reward, and for the smooth size of a picture as JPEG.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benches.common.record import RESULTS, load_average, provenance, write_json
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "data.num_prompts": 1,
    "sampler.group_size": 16,
    "sampler.micro_batch": 16,
    "lookahead.monitor_every": 0,
    "objective.kl_coef": 0.0,
}
EXACT: dict[str, Any] = {"lookahead.plan": "exact"}
CHEAP: dict[str, dict[str, Any]] = {
    "all but the last step": {"lookahead.plan": "exact_but_last"},
    "all but the last step, no guidance": {"lookahead.plan": "exact_but_last", "lookahead.guidance": "cond_only"},
    "nodes {4, 7}": {"lookahead.plan": "nodes", "lookahead.nodes": [4, 7]},
    "one step": {"lookahead.plan": "one_step"},
    "exact, previews": {"lookahead.decoder": "preview"},
}
SHARES = (0.125, 0.5)
"""q."""
REWARDS = ("scenes", "jpeg_compressibility")


def rewards(ways: dict[str, dict[str, Any]], reward: str, groups: int) -> dict[str, Tensor]:
    """Rewards [groups, G, T+1] of the states of the same trajectories, by every way to complete them."""
    own = SETTINGS | {"reward.terms": {reward: 1.0}, "reward.observed": []}
    trainers = {name: Trainer(load_config("embedded_paper", own | way)) for name, way in ways.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    first = next(iter(trainers.values()))
    for group in range(groups):
        batch = first.prompts.batch(group)
        rollout = first.sample(batch, first.schedule.at(group), group)
        for name, trainer in trainers.items():
            by_state = trainer.score(rollout, trainer.complete(rollout), batch).lookahead_rewards
            assert by_state is not None
            found[name].append(by_state[0])
        print(f"{reward}: group {group + 1} of {groups}", flush=True)
    return {name: torch.stack(values) for name, values in found.items()}


def added_variance(exact: Tensor, cheap: Tensor, steps: int) -> Tensor:
    """Variance of the residuals of each step's two states over that of its exact gain, inside groups: [steps].

    Args:
        exact, cheap: rewards [groups, G, T+1].
        steps: the first ones.
    """

    def inside(values: Tensor) -> Tensor:
        return (values - values.mean(1, keepdim=True)).square().mean((0, 1))

    residual, gain = inside(cheap - exact), inside(exact.diff(dim=-1))
    return ((residual[:-1] + residual[1:]) / gain)[:steps]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--groups", type=int, default=16, help="of 16 samples each; default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "corrected_completions.json")
    options = parser.parse_args(arguments)
    document = provenance() | {"load_average": {"start": load_average()}, "groups": options.groups, "rewards": {}}
    with user_errors_exit():
        for reward in REWARDS:
            by_way = rewards({"exact": EXACT} | CHEAP, reward, options.groups)
            exact, found = by_way.pop("exact").double(), {}
            for name, cheap in by_way.items():
                ratio = added_variance(exact, cheap.double(), exact.shape[-1] - 2)
                shares = {str(q): ((1 - q) / q * ratio).tolist() for q in SHARES}
                found[name] = {"added_over_gain_variance": shares}
                print(
                    f"{reward:22} {name:36} q = 1/8: {7 * ratio.mean().item():.2f}  q = 1/2: {ratio.mean().item():.2f}"
                )
            document["rewards"][reward] = found
        document["load_average"]["end"] = load_average()
        write_json(options.output, document)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
