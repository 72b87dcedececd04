"""What an iteration knows about its trajectories when credit is due."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from densegrpo_fast.credit.coca import latent_similarity


@dataclass(frozen=True)
class CreditInputs:
    """Everything that advantages may be computed from.

    Only the K of the T steps that inject noise are judged: a noise-free step leaves nothing to choose. Row b = p*G + g
    of a batch is sample g of prompt p.

    Attributes:
        rewards: [P, G] float, of the final images by the full decoder; NaN = missing.
        noisy: whether each step injects noise, length T.
        latents: [T+1, B, ...] float; index = steps done.
        velocities: [T, B, ...] float, at each state; v = noise - data.
        sigmas: [T+1] float, the grid.
        lookahead_rewards: [P, G, K+1] float, of the completions that differ: entry k belongs to the state before the
            k-th judged step, the last to the real final image. All by one decoder, maybe not the full one: a gain must
            not compare two, so where there are previews the last is not `rewards`. NaN = missing, or not completed
            as a local method does not need it; None where no lookahead was run.
        branch_rewards: [P, N, C, K, L] float, of the images that branches end in: N trajectories of each prompt, C
            branches of each trajectory's state (N*C = G), L ways to complete them, the finest last. Then `rewards` are
            the finest ones' means over the K steps, and latents and velocities are the trajectories'. NaN = missing;
            None without branches.
        progress: share of the run's iterations that are done, in [0, 1).
    """

    rewards: Tensor
    noisy: tuple[bool, ...]
    latents: Tensor
    velocities: Tensor
    sigmas: Tensor
    lookahead_rewards: Tensor | None = None
    branch_rewards: Tensor | None = None
    progress: float = 0.0

    @property
    def steps(self) -> tuple[int, ...]:
        """Indices of the judged steps, increasing, length K."""
        return tuple(step for step, noisy in enumerate(self.noisy) if noisy)

    @property
    def num_steps(self) -> int:
        """K, how many steps are judged."""
        return sum(self.noisy)

    @cached_property
    def similarity(self) -> Tensor:
        """[P, G, T+1] cosine of each state's predicted clean latents with the final ones, where the rewards are."""
        similarity = latent_similarity(self.latents, self.velocities, self.sigmas)
        return similarity.view(*self.rewards.shape, -1).to(self.rewards.device)
