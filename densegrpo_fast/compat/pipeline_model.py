"""A host's SD3 pipeline behind the `FlowModel` contract, so that the lookahead can complete the host's trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.schedule import schedule_of
from densegrpo_fast.compat.flow_grpo.sd3 import Prompts, decode, forward
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity
from densegrpo_fast.sampling.plan import Plan, make_plan
from densegrpo_fast.sampling.rollout import Trajectory


class PipelineModel(FlowModel):
    """The network and autoencoder of a pipeline, called as the hosts call them: one forward with both halves.

    Args:
        pipeline: duck-typed `StableDiffusion3Pipeline`; its scheduler holds the grid.
        dtype: of the states that the network sees; None leaves them as they are.
        decoder: clean latents [n, ...] -> images [n, 3, H, W] in [0, 1]; None is the pipeline's autoencoder.
    """

    def __init__(
        self, pipeline: Any, *, dtype: torch.dtype | None = None, decoder: Callable[[Tensor], Tensor] | None = None
    ):
        self.pipeline, self.dtype, self.decoder = pipeline, dtype, decoder

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        rows, guided = conditioning.rows, guidance_scale != 1.0
        prompts = {name: tensor[rows] for name, tensor in conditioning.prompts.items()}
        if guided:
            prompts = {name: torch.cat([conditioning.negative[name][rows], own]) for name, own in prompts.items()}
            latents, sigma = torch.cat([latents, latents]), torch.cat([sigma, sigma])
        time = sigma * getattr(self.pipeline.scheduler.config, "num_train_timesteps", 1000)
        output = forward(self.pipeline, latents.to(self.dtype or latents.dtype), time, **prompts).float()
        if not guided:
            return Velocity(output, None, 1.0)
        uncond, cond = output.chunk(2)
        return Velocity(cond, uncond, guidance_scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        return decode(self.pipeline, latents) if self.decoder is None else self.decoder(latents)

    def sigmas(self, num_steps: int) -> Tensor:
        """The scheduler's grid as it is set.

        Raises:
            ValueError: it has another number of steps.
        """
        grid = schedule_of(self.pipeline.scheduler).sigmas
        if len(grid) != num_steps + 1:
            raise ValueError(f"the pipeline's scheduler is set to {len(grid) - 1} steps, not {num_steps}")
        return torch.tensor(grid)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Raises: NotImplementedError, since the hosts encode their prompts themselves."""
        raise NotImplementedError("a host's pipeline gets its prompts encoded; see conditioning_of")

    def reference(self) -> AbstractContextManager[None]:
        """Does nothing: the hosts switch their adapters themselves."""
        return nullcontext()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.pipeline.transformer.named_parameters() if p.requires_grad}


def conditioning_of(prompts: Prompts) -> Conditioning:
    """One entry per row; without negative prompts, the positive ones stand in their place unused."""
    rows = torch.arange(len(prompts.embeds), device=prompts.embeds.device)
    own = {"embeds": prompts.embeds, "pooled": prompts.pooled}
    given = {"embeds": prompts.negative_embeds, "pooled": prompts.negative_pooled}
    negative = {name: own[name] if t is None else t.expand_as(own[name]) for name, t in given.items()}
    return Conditioning(own, negative, rows)


def trajectory_from(
    start: int,
    grid: Sequence[float],
    noisy: Sequence[bool],
    latents: Tensor,
    velocities: Tensor,
    guidance_terms: Tensor | None,
    conditioning: Conditioning,
    guidance_scale: float,
) -> Trajectory:
    """The part of a host's trajectory from grid index `start` to the end, as the lookahead takes it.

    Args:
        start: first grid index, in 0..N-1.
        grid: the N+1 sigmas.
        noisy: for the n = N - start steps, whether each injects noise.
        latents: states start..N, [n+1, B, ...]; those whose completion is another state's are not read.
        velocities: [n, B, ...]; likewise.
        guidance_terms: [n, B, ...], or None.
        conditioning: of the B rows.
        guidance_scale: of the velocities.
    """
    device = latents.device
    # the lookahead reads the grid and the flags; its own steps are Euler's
    table = coefficients(torch.tensor(list(grid[start:])), 0.0, "ode").to(device)
    return Trajectory(
        latents.float(),
        velocities.float(),
        latents.new_zeros(len(velocities), latents.shape[1], dtype=torch.float32),
        replace(table, noisy=tuple(noisy)),
        conditioning,
        guidance_scale,
        guidance_terms,
    )


def plan_from(start: int, num_steps: int, plan: str | Plan, nodes: Sequence[int] = (), n: int = 1) -> Plan:
    """The part of a plan for N steps that concerns the states from grid index `start` on, counted from there.

    Args:
        start: first grid index.
        num_steps: N.
        plan: a `Plan` for N steps, or a name and parameters for `sampling.plan.make_plan`.
        nodes: grid indices of "nodes".
        n: of "n_step".

    Raises:
        ValueError: the plan is unknown, or for another number of steps.
    """
    whole = plan if isinstance(plan, Plan) else make_plan(plan, num_steps, nodes, n)
    if whole.num_steps != num_steps:
        raise ValueError(f"the plan is for {whole.num_steps} steps, the scheduler is set to {num_steps}")
    return Plan(whole.name, tuple(tuple(step_index - start for step_index in path) for path in whole.paths[start:]))
