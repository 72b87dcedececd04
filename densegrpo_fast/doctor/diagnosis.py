"""Finding out why the ratio is off: causes are switched off one at a time, and then all but one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from densegrpo_fast.doctor.ablations import tiny_steps
from densegrpo_fast.doctor.causes import AMPLIFIER, CAUSES, Cause
from densegrpo_fast.doctor.loop import Loop

RESOLUTION = 1e-6
"""Smallest |ratio - 1| that counts: a few units in the last place of a float32 log-probability."""

CLIP_SHARE = 0.01
"""Share of the clip range below which |ratio - 1| does no harm."""


@dataclass(frozen=True)
class Trial:
    """What was left of the deviation with some causes switched off.

    Attributes:
        deviation: largest |ratio - 1| over samples and steps; NaN if it could not be tried.
        failure: why it could not be tried; else empty.
    """

    deviation: float
    failure: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The ratio of an unchanged policy, and who is to blame if it is not 1.

    Attributes:
        deviations: largest |ratio - 1| of each replayed step, as the loop is.
        tolerance: what is allowed of it.
        alone: what was left with one cause switched off, by its name; empty if nothing was wrong.
        together: what was left with all causes switched off; None if that was not needed.
        all_but: with all but one switched off, by that one's name; empty if that was not needed.
        unsteady: largest difference between the log-probabilities of two replays; 0 if nothing was wrong.
        causes: names of the guilty causes.
        amplified: steps that inject so little noise that they show differences which otherwise would not count.
    """

    deviations: tuple[float, ...]
    tolerance: float
    alone: dict[str, Trial] = field(default_factory=dict)
    together: Trial | None = None
    all_but: dict[str, Trial] = field(default_factory=dict)
    unsteady: float = 0.0
    causes: tuple[str, ...] = ()
    amplified: tuple[int, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the ratio is 1 to the tolerance, in every step."""
        return within(self.deviations, self.tolerance)


def default_tolerance(clip_range: float) -> float:
    """Largest harmless |ratio - 1|: 1% of the clip range, but not less than float32 can tell."""
    return max(CLIP_SHARE * clip_range, RESOLUTION)


def within(deviations: Sequence[float], tolerance: float) -> bool:
    """Whether all are at most the tolerance; NaN is not."""
    return all(deviation <= tolerance for deviation in deviations)


def diagnose(loop: Loop, tolerance: float) -> Diagnosis:
    """Measure the loop, and where its ratio is off find the causes without which it is not.

    A candidate is a cause if switching it off alone restores the ratio. If none does, but all together do, the
    causes are those which spoil it again when they alone are left on. If not even that restores it, none is named.
    """
    deviations = loop.deviations()
    if within(deviations, tolerance):
        return Diagnosis(deviations, tolerance)
    candidates = [cause for cause in CAUSES if cause.applies(loop)]
    alone = {cause.name: _without(loop, [cause]) for cause in candidates}
    causes = tuple(name for name, trial in alone.items() if trial.deviation <= tolerance)
    together, all_but = None, {}
    if not causes:
        usable = [cause for cause in candidates if not alone[cause.name].failure]
        together = _without(loop, usable)
        if together.deviation <= tolerance:
            all_but = {kept.name: _without(loop, [other for other in usable if other is not kept]) for kept in usable}
            causes = tuple(name for name, trial in all_but.items() if not trial.deviation <= tolerance)
    amplified: tuple[int, ...] = ()
    if AMPLIFIER.applies(loop):
        alone[AMPLIFIER.name] = _without(loop, [AMPLIFIER])
        if alone[AMPLIFIER.name].deviation <= tolerance:
            amplified = tiny_steps(loop)
    return Diagnosis(deviations, tolerance, alone, together, all_but, loop.unsteadiness(), causes, amplified)


def _without(loop: Loop, causes: Sequence[Cause]) -> Trial:
    """The largest deviation with some causes switched off."""
    try:
        with ExitStack() as stack:
            for cause in causes:
                loop = stack.enter_context(cause.ablation(loop))
            deviations = loop.deviations()
    except RuntimeError as error:
        # out of memory, for one: unfused attention needs much
        return Trial(float("nan"), str(error).splitlines()[0])
    # a NaN anywhere is not to get lost in a maximum
    return Trial(max(deviations) if within(deviations, float("inf")) else float("nan"))
