"""A Gaussian-mixture flow behind the `FlowModel` contract: exact velocities, guidance and decoders, and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from densegrpo_fast.flow.analytic import GaussianMixtureFlow
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity


class AnalyticModel(FlowModel):
    """The flow onto a mixture whose components play the part of concepts.

    A prompt is the space-separated numbers of the components it allows, e.g. "0 7 12"; the empty prompt allows all.
    Latents are small pictures of three channels, and a decoder squashes them into [0, 1]: the full one by the logistic
    function, the preview by an algebraic curve of the same slope at 0, so that the two rank images alike but not
    equally.

    Args:
        flow: the mixture, of as many dimensions as the latents have elements.
        latent_shape: (3, H, W).

    Raises:
        ValueError: the latent shape does not fit the mixture, or has no three channels.
    """

    network = None

    def __init__(self, flow: GaussianMixtureFlow, latent_shape: tuple[int, int, int]):
        components, dimension = flow.means.shape
        if latent_shape[0] != 3 or torch.Size(latent_shape).numel() != dimension:
            raise ValueError(f"latent_shape must be (3, H, W) with {dimension} elements, got {latent_shape}")
        self.flow, self.components, self.latent_shape = flow, components, latent_shape
        self.device = flow.means.device

    def encode(self, prompts: list[str]) -> Conditioning:
        unique = list(dict.fromkeys(prompts))
        index = {prompt: number for number, prompt in enumerate(unique)}
        allowed = torch.stack([self._allowed(prompt) for prompt in unique])
        rows = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        everything = self._allowed("")[None]
        return Conditioning({"allowed": allowed}, {"allowed": everything}, rows)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        cond = torch.empty_like(latents)
        for prompt in conditioning.rows.unique().tolist():
            rows = conditioning.rows == prompt
            flow = self.flow.condition(conditioning.prompts["allowed"][prompt].nonzero().flatten().tolist())
            cond[rows] = flow.velocity(latents[rows], sigma[rows]).to(latents.dtype)
        if guidance_scale == 1.0:
            return Velocity(cond, None, 1.0)
        return Velocity(cond, self.flow.velocity(latents, sigma).to(latents.dtype), guidance_scale)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        if decoder == "full":
            return latents.sigmoid()
        return 0.5 + 0.25 * latents / (1 + 0.25 * latents.square()).sqrt()

    def sigmas(self, num_steps: int) -> Tensor:
        return sd3_sigmas(num_steps)

    def _allowed(self, prompt: str) -> Tensor:
        """[K] float32, 1 for each component that the prompt allows."""
        numbers = _numbers(prompt) or range(self.components)
        if max(numbers) >= self.components:
            raise ValueError(f"prompt {prompt!r} names a component beyond the {self.components} of the mixture")
        allowed = torch.zeros(self.components, device=self.device)
        allowed[list(numbers)] = 1.0
        return allowed


def _numbers(prompt: str) -> Sequence[int]:
    words = prompt.split()
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError(f"expected a prompt of component numbers such as '0 7 12', got {prompt!r}")
    return [int(word) for word in words]
