"""Closeness: a step earns something for leading near the states of its group's best sample, less and less over a run.

An analogue, named as such. POSG, policy optimization with smooth guidance from state-only demonstrations (arXiv
2401.00162), adds to a sparse reward a guidance reward for trajectories whose states are near those of demonstrations.
It is made for control, and has no form for flows. Here, and this form is ours, the demonstration is the sample whose
image has the highest reward in its group, its states without its noise, and

    advantage of a step += weight * (1 - progress) * normalised closeness of the state that the step leads to

with closeness = -(root mean square distance to the best sample's state after as many steps), normalised over the
others of the group for each step on its own. The best sample itself gets nothing: it is what the others are measured
by. progress is the share of the run's iterations that are done, so that the guidance fades and the reward remains.
Independent trajectories differ most by their initial noise: with `sampler.shared_noise` the distance is the steps' own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages, normalize_groups


def closeness(states: Tensor, rewards: Tensor) -> Tensor:
    """How near each sample's states are to those of its group's best one.

    Args:
        states: [K, B, ...] float, row b = p*G + g.
        rewards: [P, G] float, of the final images; NaN = missing.

    Returns:
        [P, G, K] float32, at most 0, where the rewards are: minus the root mean square distance to the best sample's
        state of the same index, to the nearest where several are the best. NaN = missing, for the best, for samples
        without a reward, and in groups without one.
    """
    grouped = states.float().flatten(2).unflatten(1, tuple(rewards.shape))
    known = rewards.isfinite()
    best = known & (rewards == rewards.where(known, -math.inf).amax(1, keepdim=True))
    found = rewards.new_full((*rewards.shape, len(states)), math.nan, dtype=torch.float32)
    for prompt in best.any(1).nonzero().flatten().tolist():
        latents = grouped[:, prompt]  # [K, G, D]
        # differences, not squares: near states would lose their distance to rounding
        members = best[prompt].nonzero().flatten().tolist()
        apart = torch.stack([(latents - latents[:, g, None]).square().mean(-1) for g in members])
        found[prompt] = -apart.amin(0).sqrt().mT.to(found)
    return found.where((known & ~best).unsqueeze(-1), math.nan)


def with_closeness(advantages: Advantages, inputs: CreditInputs, *, weight: float, clip: float) -> Advantages:
    """Advantages [P, G, T] of trajectories with what their states' closeness adds at the judged steps.

    Args:
        advantages: by a credit method, 0 at steps without noise.
        inputs: that it judged.
        weight: at the start of the run, at least 0.
        clip: bound on the magnitude of the sum.
    """
    reached = [step + 1 for step in inputs.steps]
    near = normalize_groups(closeness(inputs.latents[reached], inputs.rewards), clip=None, epsilon=1e-6).values
    values = advantages.values.clone()
    values[..., list(inputs.steps)] += weight * (1 - inputs.progress) * near.to(values)
    return replace(advantages, values=values.clamp(-clip, clip))
