"""Stable Diffusion 3 and 3.5 behind the `FlowModel` contract: an adapter over a diffusers pipeline.

The embedded model is loaded by the same code as SD3.5: it *is* such a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, Velocity

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

_RECOMPILE_LIMIT = 64


class SD3(FlowModel):
    """A `StableDiffusion3Pipeline` as a flow model.

    Args:
        pipeline: the loaded pipeline; its transformer may carry a LoRA adapter.
        preview_decoder: an `AutoencoderTiny` for the same latents, or None.
        max_sequence_length: length of the T5 block; 0 leaves it out (only for pipelines without T5).
        height, width: image size in pixels; 0 means the transformer's native size.

    Raises:
        ValueError: the size is not a multiple of what autoencoder and patches need.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        preview_decoder: AutoencoderTiny | None = None,
        *,
        max_sequence_length: int = 256,
        height: int = 0,
        width: int = 0,
    ):
        self.pipeline = pipeline
        self.network = self.transformer = pipeline.transformer
        self.preview_decoder = preview_decoder
        self.max_sequence_length = max_sequence_length
        scale = pipeline.vae_scale_factor
        native = self.transformer.config.sample_size * scale
        height, width = height or native, width or native
        unit = scale * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % unit:
                raise ValueError(f"{name} must be a multiple of {unit} for this model, got {size}")
        self.latent_shape = (self.transformer.config.in_channels, height // scale, width // scale)
        self.device = self.transformer.device
        self._negative: tuple[Tensor, Tensor] | None = None
        self._compiled = False

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        unique = list(dict.fromkeys(prompts))
        index = {prompt: number for number, prompt in enumerate(unique)}
        embeds, pooled = self._encode(unique)
        if self._negative is None:
            self._negative = self._encode([""])
        rows = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        return Conditioning(embeds, pooled, *self._negative, rows)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return embeds.to(self.transformer.dtype), pooled.to(self.transformer.dtype)

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Velocity:
        rows = conditioning.rows
        cond = self._forward(latents, sigma, conditioning.embeds[rows], conditioning.pooled[rows])
        if guidance_scale == 1.0:
            return Velocity(cond, None, 1.0)
        batch = len(latents)
        with torch.no_grad():
            uncond = self._forward(
                latents,
                sigma,
                conditioning.negative_embeds.expand(batch, -1, -1),
                conditioning.negative_pooled.expand(batch, -1),
            )
        return Velocity(cond, uncond, guidance_scale)

    def _forward(self, latents: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        # with and without gradient torch.compile makes two forwards that round differently: one serves both
        with torch.enable_grad() if self._compiled else nullcontext():
            (output,) = self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=1000.0 * sigma,
                return_dict=False,
            )
        return output.float() if torch.is_grad_enabled() else output.detach().float()

    def compile(self, mode: str | None, backend: str = "inductor") -> None:
        """Compile the transformer's forward with `torch.compile`, at the first call of each batch size and mode.

        An unchanged policy's importance ratio stays 1: rollout and replay run the same compiled forward, the one that
        keeps what a backward needs, so a forward without gradient takes that memory for as long as it lasts.

        Args:
            mode, backend: of `torch.compile`; a mode that makes CUDA graphs of its own does not work here, as their
                outputs are overwritten while the replay still needs them.
        """
        import torch._dynamo

        # one for each batch size, with and without adapter; past the limit torch would run without compiling
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
        self.transformer.compile(mode=mode, backend=backend, dynamic=False)
        self._compiled = True

    @contextmanager
    def tap(self) -> Iterator[list[Tensor]]:
        if self._compiled:
            raise ValueError("a compiled network hides its hidden tokens; set model.compile to null")
        tokens: list[Tensor] = []
        # what enters the final modulation and projection
        handle = self.transformer.norm_out.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
        try:
            yield tokens
        finally:
            handle.remove()

    @contextmanager
    def reference(self) -> Iterator[None]:
        before, self.mode = self.mode, "reference"
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()
            self.mode = before

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        if decoder == "preview":
            if self.preview_decoder is None:
                raise ValueError("this model has no preview decoder: set lookahead.decoder to full")
            decoded = self.preview_decoder.decode(latents.to(self.preview_decoder.dtype)).sample
        else:
            vae: Any = self.pipeline.vae
            shifted = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            decoded = vae.decode(shifted.to(vae.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, num_steps: int) -> Tensor:
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError("SD3 models with dynamic shifting are not supported: use a scheduler with a fixed shift")
        return sd3_sigmas(num_steps, shift=config.shift, num_train_timesteps=config.num_train_timesteps)
