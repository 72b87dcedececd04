"""What a rollout leaves behind: every state, velocity and log-probability of a batch of trajectories."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.models.base import Conditioning
from densegrpo_fast.sampling.dedup import CompletionDedup


@dataclass(frozen=True)
class Trajectory:
    """T steps of B samples from noise to image.

    Attributes:
        latents: [T+1, B, ...] float32; index = steps done, so `latents[0]` is noise and `latents[T]` the end.
        velocities: [T, B, ...] float32, the guided velocity at each state.
        log_probs: [T, B] float32 of each step, mean over the latent's elements; 0 for a noise-free step.
        coefficients: the steps' coefficients and sigmas.
        conditioning: the prompts of the B rows.
        guidance_scale: of `velocities`.
        guidance_terms: [T, B, ...] float32, `velocities` minus the conditional ones; None if they were not kept.
        hidden: [T, B, N, D] the network's last hidden tokens at each state, in its dtype; None if they were not kept.
        shared: rows, in consecutive blocks, that have prompt and initial noise in common; 1 = each row its own.
    """

    latents: Tensor
    velocities: Tensor
    log_probs: Tensor
    coefficients: StepCoefficients
    conditioning: Conditioning
    guidance_scale: float
    guidance_terms: Tensor | None = None
    hidden: Tensor | None = None
    shared: int = 1

    def select(self, rows: slice) -> Trajectory:
        """The trajectories of some rows; tensors are shared, not copied."""
        latents = self.latents[:, rows]
        batch = latents.shape[1]
        return replace(
            self,
            latents=latents,
            velocities=self.velocities[:, rows],
            log_probs=self.log_probs[:, rows],
            conditioning=self.conditioning.select(rows),
            guidance_terms=None if self.guidance_terms is None else self.guidance_terms[:, rows],
            hidden=None if self.hidden is None else self.hidden[:, rows],
            # only of whole blocks is it known
            shared=self.shared if not (rows.start or 0) % self.shared and not batch % self.shared else 1,
        )

    @property
    def sharing(self) -> CompletionDedup:
        """Which of the states' completions are one and the same."""
        return CompletionDedup(self.coefficients.noisy, self.shared)

    @property
    def num_steps(self) -> int:
        return len(self.velocities)

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def branches(self) -> int:
        """Steps taken from each state: 1. A `tree.BranchedRollout`, which has the members below too, takes several."""
        return 1

    def taken(self, rows: slice) -> slice:
        """The rows of `log_probs` that belong to some rows of states: the same."""
        return rows

    def arrivals(self, step: int, rows: slice) -> Tensor:
        """[m, ...] float32, where a step leads from the states of m rows."""
        return self.latents[step + 1, rows]
