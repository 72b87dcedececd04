"""What a training iteration asks of the model, per trajectory, by formulas: evaluations, decodes and rewards.

A run counts what really happens (`training/meter.py`), and tests hold the two together; the formulas tell beforehand
what settings would cost (`fidelity --cost`).

An *evaluation* is the velocity of one row. Under classifier-free guidance it takes two network forwards, else one; NFE
counts forwards. With T steps, all of them stochastic, a plan's lookahead evaluates

    exact            T (T-1) / 2           exact_but_last   (T-1) (T-2) / 2
    nodes S          sum of S              one_step         0

times per trajectory: every state's first velocity is the rollout's own, so k states meet at step index k.

With noise in a window of w steps from step l alone, the states before l share the completion of state l, and those
after the window lie on the trajectory's own way to its image. So only the w states l..l+w-1 are completed: by `exact`
with the sum of T-1-k over them, by `nodes S` with the number of pairs of a state k and a later node, and w+1 images are
decoded and scored.

Where fewer steps are trained and credited each by its own gain, the states at their ends alone are completed, and the
image is decoded and scored.

Where these are previews, the final image is decoded in full and scored besides: one full decode and one reward more.

Where all G samples of a prompt start from one noise, they are one sample up to the first noisy step, and its completion
is the group's: a trajectory's share of it is 1/G, so that counts need not be whole numbers.

Where C branches leave each state of one noise-free trajectory (`sampling/branches.py`), they share its evaluations and
the replay of its states: a sample's share is 1/C. What each branch takes for itself is the velocity of the state that
it leads to and its completion, one image per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from densegrpo_fast.models.base import Decoder, GuidanceGradient
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Guidance
from densegrpo_fast.sampling.plan import Plan


class UnitFlops(Protocol):
    """Floating-point operations (a multiply-add is two) of one row through each part of a model."""

    @property
    def forward(self) -> float:
        """One network forward, adapter on."""

    @property
    def reference_forward(self) -> float:
        """One network forward, adapter off."""

    @property
    def backward(self) -> float:
        """One backward to the adapter, without the forward before it."""

    @property
    def full_decode(self) -> float:
        """One image through the pipeline's autoencoder."""

    @property
    def preview_decode(self) -> float:
        """One image through the preview decoder; NaN without one."""

    @property
    def reward(self) -> float:
        """One image through the reward model."""


@dataclass(frozen=True)
class Evaluations:
    """Velocities asked of the model per trajectory.

    Attributes:
        guided: with classifier-free guidance, two forwards each.
        unguided: one forward each.
    """

    guided: int | float = 0
    unguided: int | float = 0

    @classmethod
    def of(cls, count: int | float, guided: bool) -> Evaluations:
        """`count` evaluations, all of one kind."""
        return cls(guided=count) if guided else cls(unguided=count)

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(self.guided + other.guided, self.unguided + other.unguided)

    @property
    def total(self) -> int | float:
        """Evaluations of both kinds."""
        return self.guided + self.unguided

    @property
    def forwards(self) -> int | float:
        """Network forwards (NFE)."""
        return 2 * self.guided + self.unguided


@dataclass(frozen=True)
class IterationCost:
    """One trajectory's share of a training iteration with one update per sample.

    Attributes:
        rollout: evaluations without gradient, of the policy.
        lookahead: the same, of the completions.
        policy: evaluations with gradient, which are the replay's unless the update is streamed.
        reference: evaluations without the adapter, for the KL term.
        full_decodes: images through the pipeline's autoencoder.
        preview_decodes: images through the preview decoder.
        rewards: images scored.
        guidance_gradient: the halves of guided evaluations that the replay's backward goes through.
        streamed: whether the backward goes through the rollout's own evaluations, so that none is repeated.
    """

    rollout: Evaluations
    lookahead: Evaluations
    policy: Evaluations
    reference: Evaluations
    full_decodes: int | float
    preview_decodes: int | float
    rewards: int | float
    guidance_gradient: GuidanceGradient = "full"
    streamed: bool = False

    @property
    def backwards(self) -> int | float:
        """Backward passes of the replay: one per forward, or per evaluation if the conditional half alone has one."""
        return self.policy.forwards if self.guidance_gradient == "full" else self.policy.total

    @property
    def forwards(self) -> int | float:
        """Network forwards of all phases (NFE)."""
        return sum(part.forwards for part in self.phases.values())

    @property
    def phases(self) -> dict[str, Evaluations]:
        """The evaluations by phase of the iteration, "update" being the replay with its reference."""
        update = self.reference if self.streamed else self.policy + self.reference
        return {"rollout": self.rollout, "lookahead": self.lookahead, "update": update}

    def flops(self, unit: UnitFlops, lookahead_forward: float | None = None) -> float:
        """Floating-point operations, given those of each part of the model.

        Args:
            unit: operations of each part.
            lookahead_forward: of one network forward of the lookahead, if it is not `unit.forward`.
        """
        total = self.rollout.forwards * unit.forward + self.backwards * unit.backward
        total += 0 if self.streamed else self.policy.forwards * unit.forward
        total += self.lookahead.forwards * (unit.forward if lookahead_forward is None else lookahead_forward)
        total += self.reference.forwards * unit.reference_forward + self.rewards * unit.reward
        if self.full_decodes:
            total += self.full_decodes * unit.full_decode
        if self.preview_decodes:
            total += self.preview_decodes * unit.preview_decode
        return total


def lookahead_evaluations(
    plan: Plan,
    *,
    guided: bool,
    guidance: Guidance = "full",
    noisy: tuple[bool, ...] | None = None,
    shared: int = 1,
    completed: tuple[int, ...] | None = None,
) -> Evaluations:
    """Evaluations that a plan's completions take per trajectory.

    Args:
        plan: the plan.
        guided: whether the rollout has classifier-free guidance.
        guidance: of the completions after their first velocity.
        noisy: [T] whether each step injects noise, None = all; states that a noise-free step joins are completed once.
        shared: samples that start from one noise, and share what they are before the first noisy step.
        completed: the states that are completed, T being the image itself; None = all of 0..T.

    Raises:
        ValueError: `noisy` is for another number of steps.
    """
    sharing = _sharing(plan.num_steps, noisy, shared, completed)
    count = sharing.per_trajectory(lambda state: len(plan.paths[state]) if state < plan.num_steps else 0)
    return Evaluations.of(count, guided and guidance == "full")


def sparse_iteration(
    num_steps: int, *, trained_steps: int, guided: bool, kl: bool, guidance_gradient: GuidanceGradient = "full"
) -> IterationCost:
    """Cost of an iteration with one reward per image (Flow-GRPO): T evaluations, one full decode, one reward.

    Args:
        num_steps: T.
        trained_steps: steps that are replayed, at most T.
        guided: whether rollout and replay have classifier-free guidance.
        kl: whether the loss has a KL term to the reference policy.
        guidance_gradient: the halves of guided evaluations that the replay's backward goes through.

    Raises:
        ValueError: `trained_steps` is out of range.
    """
    return IterationCost(
        **_policy_path(num_steps, trained_steps, guided, kl),
        lookahead=Evaluations(),
        full_decodes=1,
        preview_decodes=0,
        rewards=1,
        guidance_gradient=guidance_gradient,
    )


def dense_iteration(
    plan: Plan,
    *,
    trained_steps: int,
    guided: bool,
    kl: bool,
    guidance_gradient: GuidanceGradient = "full",
    guidance: Guidance = "full",
    decoder: Decoder = "full",
    noisy: tuple[bool, ...] | None = None,
    shared: int = 1,
    completed: tuple[int, ...] | None = None,
) -> IterationCost:
    """Cost of an iteration with a reward per state (DenseGRPO): the lookahead, and T+1 decodes and rewards.

    All images that gains compare go through the same decoder; with previews the final image is decoded in full and
    scored once more, for the final reward. States that a noise-free step joins are evaluated, decoded and scored once.

    Args:
        plan: the lookahead's.
        trained_steps, guided, kl, guidance_gradient: as in `sparse_iteration`.
        guidance, noisy, shared, completed: as in `lookahead_evaluations`.
        decoder: of the images that gains compare.

    Raises:
        ValueError: `trained_steps` or `noisy` does not fit the plan's number of steps.
    """
    sharing = _sharing(plan.num_steps, noisy, shared, completed)
    images = sharing.per_trajectory(lambda state: 1)
    finals = sharing.per_trajectory(lambda state: int(state == plan.num_steps))
    return IterationCost(
        **_policy_path(plan.num_steps, trained_steps, guided, kl),
        lookahead=lookahead_evaluations(
            plan, guided=guided, guidance=guidance, noisy=noisy, shared=shared, completed=completed
        ),
        full_decodes=images if decoder == "full" else finals,
        preview_decodes=images if decoder == "preview" else 0,
        rewards=images if decoder == "full" else images + finals,
        guidance_gradient=guidance_gradient,
    )


def branched_iteration(
    plan: Plan,
    *,
    branches: int,
    trained_steps: int,
    guided: bool,
    kl: bool,
    guidance_gradient: GuidanceGradient = "full",
    guidance: Guidance = "full",
    decoder: Decoder = "full",
    noisy: tuple[bool, ...] | None = None,
    others: Sequence[Plan] = (),
) -> IterationCost:
    """Cost of an iteration with a reward per branch (`sampling/branches.py`), for one of the samples of a trajectory.

    Args:
        plan: the lookahead's, for the states that branches lead to.
        branches: C samples that share a trajectory, each with a branch at every noisy step.
        trained_steps, guided, kl, guidance_gradient: as in `sparse_iteration`.
        guidance, noisy: as in `lookahead_evaluations`.
        decoder: of the images.
        others: further plans, by each of which every branch is completed and scored besides (Granular-GRPO).

    Raises:
        ValueError: `noisy` is for another number of steps or has no step with noise, branches is below 1, or
            `trained_steps` is not in 0..T.
    """
    num_steps = plan.num_steps
    if noisy is not None and len(noisy) != num_steps:
        raise ValueError(f"noisy must have one entry per step ({num_steps}), got {len(noisy)}")
    steps = [step for step in range(num_steps) if noisy is None or noisy[step]]
    if not steps or branches < 1:
        raise ValueError(f"expected a step with noise and at least one branch, got {len(steps)} and {branches}")
    inner = [step + 1 for step in steps if step + 1 < num_steps]
    own = _policy_path(num_steps, trained_steps, guided, kl)
    shared: dict[str, Any] = {key: _share(own[key], branches) for key in ("policy", "reference")}
    first = Evaluations.of(len(inner), guided)
    ways = (plan, *others)
    completed = sum(len(way.paths[state]) for way in ways for state in inner)
    images = len(steps) * len(ways)
    return IterationCost(
        **shared,
        rollout=Evaluations.of((steps[-1] + 1) / branches, guided),
        lookahead=first + Evaluations.of(completed, guided and guidance == "full"),
        full_decodes=images if decoder == "full" else 0,
        preview_decodes=images if decoder == "preview" else 0,
        rewards=images,
        guidance_gradient=guidance_gradient,
    )


def mean_cost(costs: Sequence[IterationCost]) -> IterationCost:
    """The mean of several iterations' costs, at least one: of all draws of the trained steps, say."""
    means: dict[str, Any] = {}
    for part in fields(costs[0]):
        values = [getattr(cost, part.name) for cost in costs]
        if isinstance(values[0], Evaluations):
            means[part.name] = _share(sum(values, Evaluations()), len(values))
        elif part.name not in ("guidance_gradient", "streamed"):
            means[part.name] = sum(values) / len(values)
    return replace(costs[0], **means)


def _share(evaluations: Evaluations, samples: int) -> Evaluations:
    return Evaluations(evaluations.guided / samples, evaluations.unguided / samples)


def _policy_path(num_steps: int, trained_steps: int, guided: bool, kl: bool) -> dict[str, Any]:
    if not 0 <= trained_steps <= num_steps:
        raise ValueError(f"trained_steps must lie in 0..{num_steps} for {num_steps} steps, got {trained_steps}")
    return {
        "rollout": Evaluations.of(num_steps, guided),
        "policy": Evaluations.of(trained_steps, guided),
        "reference": Evaluations.of(trained_steps if kl else 0, guided),
    }


def _sharing(
    num_steps: int, noisy: tuple[bool, ...] | None, shared: int, completed: tuple[int, ...] | None
) -> CompletionDedup:
    if noisy is not None and len(noisy) != num_steps:
        raise ValueError(f"noisy must have one entry per step ({num_steps}), got {len(noisy)}")
    return CompletionDedup((True,) * num_steps if noisy is None else noisy, shared, completed)
