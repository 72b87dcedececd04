"""What one line of metrics.jsonl says of an iteration (docs/metrics.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.credit.consistency import neighbour_correlation
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.meter import PHASES
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.schedule import IterationSteps


def iteration_record(
    done: int,
    steps: IterationSteps,
    reward_batch: RewardBatch,
    advantages: Advantages,
    measured: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl, as docs/metrics.md has it.

    Args:
        done: iterations done.
        steps, reward_batch, advantages: the iteration's.
        measured: metrics of the update and of the costs.
        seconds: by phase.
    """
    rewards, final = reward_batch.rewards, reward_batch.rewards.numel()
    record: dict[str, Any] = {
        "iteration": done,
        "reward": rewards.nanmean().item(),
        "reward_std": _spread(rewards),
        "reward_missing": reward_batch.scores.missing_share,
        "frac_reward_zero_std": advantages.zero_spread,
    }
    for name, values in reward_batch.scores.per_reward.items():
        record[f"rewards/{name}/mean"] = values[-final:].nanmean().item()
        record[f"rewards/{name}/std"] = _spread(values[None, -final:])
    if (branches := reward_batch.branch_rewards) is not None:
        # of a state's branches, by the finest completion; a step's mean over the states
        spread = branches[..., -1] - branches[..., -1].nanmean(2, keepdim=True)
        by_step = spread.square().nanmean(2).sqrt().nanmean((0, 1)).tolist()
        branching = [step for step, injects in enumerate(steps.coefficients.noisy) if injects]
        record |= {f"branch_spread/step_{step}": value for step, value in zip(branching, by_step, strict=True)}
    if reward_batch.gains is not None:
        known, noisy = steps.with_gain, steps.coefficients.noisy
        for step, gain in enumerate(reward_batch.gains.nanmean(dim=(0, 1)).tolist()):
            if step in known:
                record[f"gain/step_{step}"] = gain
                if noisy[step]:
                    own = reward_batch.gains[..., step]
                    record[f"gain_positive/step_{step}"] = (own[~own.isnan()] > 0).float().mean().item()
        # of neighbours among the noisy steps
        if any({*pair} <= {*known} for pair in pairwise(step for step, injects in enumerate(noisy) if injects)):
            record["gain_correlation"] = neighbour_correlation(reward_batch.gains[..., list(noisy)])
    record |= measured
    record["learning_rate"] = record.pop("lr")
    record |= {f"time/{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    return record


def _spread(rewards: Tensor) -> float:
    """Mean over groups of the standard deviation within the group, missing rewards left out."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean().item()


def of_all_processes(world: World, record: dict[str, Any], samples: int) -> dict[str, float]:
    """What an iteration's record says of several processes: their seconds, memory and traffic.

    Args:
        record: of this process, with counts that are those of all together already.
        samples: of the iteration, over all processes.
    """
    names = [*(f"time/{phase}" for phase in PHASES), "cpu_seconds", "memory/peak_gib"]
    own = [*(record[name] for name in names), world.traffic.gathered, world.traffic.reduced]
    table = world.gather(torch.tensor(own, dtype=torch.float64))
    *times, cpu_seconds, memory, gathered, reduced = table.unbind(1)
    seconds = table[:, : len(PHASES)]
    return (
        {f"time/{phase}": values.mean().item() for phase, values in zip(PHASES, times, strict=True)}
        | {f"time_slowest/{phase}": values.max().item() for phase, values in zip(PHASES, times, strict=True)}
        | {"cpu_seconds": cpu_seconds.sum().item(), "memory/peak_gib": memory.max().item()}
        | {"traffic/gathered": gathered.sum().item(), "traffic/reduced": reduced.sum().item()}
        | {"processes": world.size, "images_per_second": samples / seconds.sum(1).max().item()}
    )
