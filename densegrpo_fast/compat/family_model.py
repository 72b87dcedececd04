"""A host's pipeline of FLUX.1, Qwen-Image or Stable Diffusion 1.x and 2.x as a flow model, for `dense_rewards`.

The networks are called as `models/` calls them, which equals the pipelines' own calls; the prompts are those that the
host has encoded. Unlike the rest of `compat` this needs diffusers, which such a host has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.schedule import schedule_of
from densegrpo_fast.models.base import Conditioning, Decoder, GuidanceGradient, Velocity
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.family import Family
from densegrpo_fast.models.qwen_image import QwenImage
from densegrpo_fast.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Grid:
    """The steps of a sampling call.

    Attributes:
        num_steps: T.
        sigmas: the T+1 noise levels, as numbers.
        timesteps: the scheduler's own tensor, [T].
    """

    num_steps: int
    sigmas: tuple[float, ...]
    timesteps: Tensor


class FamilyModel(DiffusersModel):
    """The network and autoencoder of a host's pipeline.

    Args:
        pipeline: its scheduler as sampling left it.
        kind: of FLUX.1, Qwen-Image or Stable Diffusion 1.x.
        states: [T+1, B, ...] of the sampling, for their dtype and size.
        height, width: of the pictures in pixels; 0 = the states' own, and square where they are tokens.
        decoder: clean latents of the host [n, ...] -> images [n, 3, H, W] in [0, 1]; None is the pipeline's own.

    Raises:
        ValueError: the size is not that of the states, or Stable Diffusion's scheduler takes other steps than the host.
    """

    def __init__(
        self,
        pipeline: Any,
        kind: type[Family],
        *,
        states: Tensor,
        height: int = 0,
        width: int = 0,
        decoder: Callable[[Tensor], Tensor] | None = None,
    ):
        if not height and not width:
            native = kind(pipeline)
            tokens = isqrt(states.shape[2]) if states.ndim == 4 else 0
            height, width = (
                (tokens * native.unit(),) * 2 if tokens else (side * native.vae_scale for side in states.shape[-2:])
            )
        super().__init__(pipeline, height=height, width=width, family=kind)
        if tuple(states.shape[2:]) != self.latent_shape:
            raise ValueError(
                f"latents of {list(states.shape[2:])} are not those of {self.family.height} x {self.family.width} "
                f"pixels, {list(self.latent_shape)}: give height and width as sampling had them"
            )
        self.state_dtype, self.decoder = states.dtype, decoder
        # x = z / sqrt((1 - t)^2 + t^2) is the host's state (models/stable_diffusion.py)
        self._preserving = self.family if isinstance(self.family, StableDiffusion) else None
        if self._preserving is not None:
            _check_ddim(pipeline.scheduler)

    def grid(self) -> Grid:
        """The steps that the pipeline's scheduler is set to.

        Raises:
            ValueError: they are not those that its configuration makes.
        """
        family, scheduler = self._preserving, self.pipeline.scheduler
        if family is None:
            schedule = schedule_of(scheduler)
            return Grid(schedule.num_steps, schedule.sigmas, schedule.timesteps)
        timesteps = scheduler.timesteps
        sigmas = family.sigmas(len(timesteps))
        if not torch.equal(family.levels[timesteps.cpu().long()], sigmas[:-1]):
            raise ValueError(f"the scheduler's timesteps {timesteps.tolist()} are not those of its configuration")
        return Grid(len(timesteps), tuple(sigmas.tolist()), timesteps)

    def flow_states(self, states: Tensor, sigmas: tuple[float, ...], start: Tensor) -> Tensor:
        """The host's states [T+1, B, ...] in the variables of a flow.

        Args:
            states: of the host.
            sigmas: of the grid.
            start: [B] int64, grid index of each row's first state.
        """
        if self._preserving is None:
            return states
        index = start[None] + torch.arange(len(states), device=start.device)[:, None]
        level = torch.tensor(sigmas)[index.cpu()].to(states.device)
        norm = ((1 - level).square() + level.square()).sqrt()
        return states.float() * norm.view(*norm.shape, *[1] * (states.ndim - 2))

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        rows = conditioning.rows
        if self._preserving is None:
            # as the hosts round their timesteps
            sigma = ((sigma * 1000).to(self.state_dtype) / 1000).float()
        cond = self._forward(latents, sigma, _rows(conditioning.prompts, rows), guidance_scale)
        if self.forwards(guidance_scale) == 1:
            return Velocity(cond, None, 1.0)
        uncond = self._forward(latents, sigma, _rows(conditioning.negative, rows), guidance_scale)
        return self.family.guide(cond, uncond, guidance_scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        if self.decoder is None:
            return super().decode(latents)
        return self.decoder(latents if self._preserving is None else self.family.grid(latents))

    def conditioning(
        self, embeds: Tensor, pooled: Tensor | None, mask: Tensor | None, negative: dict[str, Tensor | None]
    ) -> Conditioning:
        """One entry per row of what the host has encoded; without negative prompts they stand in their own place."""
        if mask is None and isinstance(self.family, QwenImage):
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        own = {"embeds": embeds, "pooled": pooled, "mask": mask}
        given = {name: tensor for name, tensor in own.items() if tensor is not None}
        other = {
            name: tensor if (found := negative.get(name)) is None else found.expand(len(embeds), *found.shape[1:])
            for name, tensor in given.items()
        }
        rows = torch.arange(len(embeds), device=embeds.device)
        return Conditioning(self.family.batched(given), self.family.batched(other), rows)


def _check_ddim(scheduler: Any) -> None:
    """Refuse other variables than DDIM's, and another end than that of DanceGRPO's `ddim_step_with_logprob`."""
    if (kind := type(scheduler).__name__) != "DDIMScheduler":
        raise ValueError(f"dense_rewards knows Stable Diffusion with a DDIMScheduler, got a {kind}")
    if scheduler.config["set_alpha_to_one"]:
        raise ValueError(
            "scheduler: set_alpha_to_one of DDIMScheduler must be false, as in Stable Diffusion 1.x: the host's last "
            "step ends at the noise of timestep 0"
        )


def _rows(prompts: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in prompts.items()}
