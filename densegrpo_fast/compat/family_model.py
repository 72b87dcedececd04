"""A host's FLUX.1, Qwen-Image or Stable Diffusion 1.x pipeline behind the `FlowModel` contract, by its family here.

How the network is called, how guidance combines and how latents are decoded is the family's (`models/`). What a host
does in another way is here: negative prompts row by row, states in a dtype of the host's choice, and, of Stable
Diffusion, states x of a variance-preserving path, which the family takes as z (`models/stable_diffusion.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densegrpo_fast.models.base import Conditioning, Decoder, GuidanceGradient, Velocity
from densegrpo_fast.models.diffusers_model import DiffusersModel

SD3 = "StableDiffusion3Pipeline"


class Kind(NamedTuple):
    """What a host hands over of one kind of pipeline.

    Attributes:
        prompts: names of the encoded prompts in the family, and of the arguments that hold them.
        halves: whether the host runs two forwards above guidance scale 1 ("above"), at every other scale ("other"), or
            never, as the network takes the scale itself ("inside").
    """

    prompts: Mapping[str, str]
    halves: str


_TEXT, _POOLED = {"embeds": "prompt_embeds"}, {"pooled": "pooled_prompt_embeds"}
KINDS: Mapping[str, Kind] = {
    SD3: Kind({**_TEXT, **_POOLED}, "above"),
    "FluxPipeline": Kind({**_TEXT, **_POOLED}, "inside"),
    "QwenImagePipeline": Kind({**_TEXT, "mask": "prompt_embeds_mask"}, "other"),
    "StableDiffusionPipeline": Kind(_TEXT, "above"),
}
"""By pipeline class: those that hosts train and whose samples can be completed."""


def kind_of(pipeline: Any) -> str:
    """The entry of `KINDS` that a pipeline's class is, or derives from.

    Raises:
        ValueError: there is none.
    """
    for kind in type(pipeline).__mro__:
        if kind.__name__ in KINDS:
            return kind.__name__
    raise ValueError(f"dense_rewards serves {', '.join(KINDS)}; got a {type(pipeline).__name__}")


class FamilyModel(DiffusersModel):
    """A host's pipeline as a flow model.

    Args:
        pipeline: `FluxPipeline`, `QwenImagePipeline` or `StableDiffusionPipeline`, its scheduler set by sampling.
        shape: of one state, tokens (N, D) or (C, H, W).
        dtype: of the states that the network sees.
        height, width: of the images in pixels; 0 = what `shape` says, square if it is tokens.
        decoder: images [m, 3, H, W] in [0, 1] of clean latents [m, C, H, W]; None = the pipeline's autoencoder.

    Raises:
        ValueError: states of this shape are none of such images, or the scheduler is none that is computed here.
    """

    def __init__(
        self,
        pipeline: Any,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        height: int = 0,
        width: int = 0,
        decoder: Callable[[Tensor], Tensor] | None = None,
    ):
        from densegrpo_fast.models.families import family_of

        unit, tokens = int(pipeline.vae_scale_factor), len(shape) == 2
        sides = (2 * math.isqrt(shape[0]),) * 2 if tokens else shape[-2:]
        size = height or unit * sides[0], width or unit * sides[1]
        kind = kind_of(pipeline)
        if kind == "StableDiffusionPipeline":
            _check_ddim(pipeline.scheduler)
        super().__init__(pipeline, height=size[0], width=size[1], family=family_of(kind))
        if self.latent_shape != tuple(shape):
            raise ValueError(
                f"latents of {list(shape)} are none of {kind} for images of {size[0]} x {size[1]} pixels, which are "
                f"{list(self.latent_shape)}: give dense_rewards the height and width that sampling had"
            )
        self.computed_in, self.decoder = dtype, decoder

    def host_grid(self) -> tuple[tuple[float, ...], Tensor]:
        """Noise levels [N+1] and timesteps [N] of the scheduler as it is set, levels as a flow has them.

        Raises:
            ValueError: the scheduler is not set.
        """
        scheduler, timesteps = self.pipeline.scheduler, self.pipeline.scheduler.timesteps
        if self.family.scales_input:
            if scheduler.num_inference_steps is None:
                raise ValueError("the scheduler is not set: call dense_rewards after sampling")
            return tuple(self.sigmas(len(timesteps)).tolist()), timesteps
        return tuple(scheduler.sigmas.float().tolist()), timesteps

    def states(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        """A host's states [n, B, ...] at noise levels [n], as states of a flow; what `family.scaled` undoes."""
        if not self.family.scales_input:
            return latents
        factors = self.family.scaled(torch.ones_like(sigmas), sigmas)
        return latents.float() / factors.view(-1, *[1] * (latents.ndim - 1))

    def conditioning(self, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> Conditioning:
        """Encoded prompts of the rows, [B, ...] each, and negative ones, [B, ...] or [1, ...] each, or none."""
        own = self.family.batched(dict(prompts))
        batch = len(own["embeds"])
        other = self.family.batched(dict(negative)) if negative else own
        other = {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in other.items()}
        return Conditioning(own, other, torch.arange(batch, device=own["embeds"].device))

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        cond = self._forward(latents, sigma, conditioning.conditional(), guidance_scale)
        if self.forwards(guidance_scale) == 1:
            return Velocity(cond, None, 1.0)
        negative = {name: tensor[conditioning.rows] for name, tensor in conditioning.negative.items()}
        return self.family.guide(cond, self._forward(latents, sigma, negative, guidance_scale), guidance_scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        return super().decode(latents, decoder) if self.decoder is None else self.decoder(self.family.grid(latents))


def _check_ddim(scheduler: Any) -> None:
    """Refuse a scheduler whose steps are not those of the hosts' `ddim_step_with_logprob`."""
    if type(scheduler).__name__ != "DDIMScheduler":
        raise ValueError(f"Stable Diffusion is served with a DDIMScheduler, got a {type(scheduler).__name__}")
    if scheduler.config.set_alpha_to_one:
        raise ValueError(
            "DDIMScheduler: set_alpha_to_one must be false, as in Stable Diffusion 1.x: the host's last step ends at "
            "the noise of timestep 0"
        )
