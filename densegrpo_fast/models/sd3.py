"""Stable Diffusion 3 and 3.5 behind the `FlowModel` contract: an adapter over a diffusers pipeline.

The embedded model is loaded by the same code as SD3.5: it *is* such a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.pictures import to_unit
from densegrpo_fast.common.pretrained import silence_loading
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.attention import Attention, use_attention
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

_RECOMPILE_LIMIT = 64
_PROMPTS_TOGETHER = 16
_CACHED_PLACES = 4096
"""Places of latents (height times width) that a CPU decodes together: what more of them make falls out of its caches.
Sixteen pictures of 64 x 64, which then take half the time that they take in one batch of 64."""

VaeDecode = Literal["whole", "sliced", "tiled"]
"""How the full decoder decodes: all pictures together, one by one, or also in tiles."""


class PromptStore(Protocol):
    """Encoded prompts that outlive the encoders, such as `models/prompt_cache.py`."""

    def holds(self, prompt: str) -> bool:
        """Whether the prompt is there, as far as can be told without reading it."""

    def find(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """Embeddings [L, D] and pooled embeddings [D'] on the CPU, or None."""

    def keep(self, prompt: str, embeds: Tensor, pooled: Tensor) -> None:
        """Store a prompt's embeddings."""


@dataclass(frozen=True)
class StoredPrompts:
    """In place of text encoders in memory: encoded prompts, and how to get encoders for the others.

    Attributes:
        store: where encoded prompts are kept.
        encoders: for a transformer, a context with a pipeline that holds it and the text encoders.
    """

    store: PromptStore
    encoders: Callable[[Any], AbstractContextManager[Any]]


class SD3(FlowModel):
    """A `StableDiffusion3Pipeline` as a flow model.

    Args:
        pipeline: the loaded pipeline; its transformer may carry a LoRA adapter.
        preview_decoder: an `AutoencoderTiny` for the same latents, or None.
        max_sequence_length: length of the T5 block; 0 leaves it out (only for pipelines without T5).
        height, width: image size in pixels; 0 means the transformer's native size.
        stored_prompts: for a pipeline without its text encoders; None = the pipeline encodes.
        has_t5: whether the model has a T5 encoder; None = whether this pipeline holds one.

    Raises:
        UsageError: the size is not a multiple of what autoencoder and patches need, or larger than the model knows.
    """

    attention: Attention = "auto"
    """What computes the network's attention; see `set_attention`."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        preview_decoder: AutoencoderTiny | None = None,
        *,
        max_sequence_length: int = 256,
        height: int = 0,
        width: int = 0,
        stored_prompts: StoredPrompts | None = None,
        has_t5: bool | None = None,
    ):
        self.pipeline = pipeline
        self.network = self.transformer = pipeline.transformer
        self.preview_decoder = preview_decoder
        self.max_sequence_length = max_sequence_length
        self.stored_prompts = stored_prompts
        self.has_t5 = pipeline.text_encoder_3 is not None if has_t5 is None else has_t5
        scale = pipeline.vae_scale_factor
        native = self.transformer.config.sample_size * scale
        height, width = height or native, width or native
        unit = scale * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % unit:
                raise UsageError(f"model.{name}: expected a multiple of {unit} for this model, got {size}")
            if size // unit > (most := self.transformer.config.pos_embed_max_size):
                raise UsageError(f"model.{name}: expected at most {most * unit} for this model, got {size}")
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

    @torch.no_grad()
    def prepare(self, prompts: list[str]) -> int:
        """With stored prompts: encode those that are not there yet, and the empty one, with one load of the encoders.

        Returns:
            How many were encoded; without stored prompts 0.
        """
        if self.stored_prompts is None:
            return 0
        missing = [p for p in dict.fromkeys(["", *prompts]) if not self.stored_prompts.store.holds(p)]
        for _ in self._store(self.stored_prompts, missing):
            pass
        return len(missing)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        if self.stored_prompts is None:
            return self._encode_by(self.pipeline, prompts)
        found = {prompt: self.stored_prompts.store.find(prompt) for prompt in prompts}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        ready = {prompt: encoded for prompt, encoded in found.items() if encoded is not None}
        ready |= self._store(self.stored_prompts, missing)
        embeds, pooled = zip(*(ready[prompt] for prompt in prompts), strict=True)
        return torch.stack(embeds).to(self.device), torch.stack(pooled).to(self.device)

    def _store(self, stored: StoredPrompts, prompts: list[str]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Encode prompts, a few at a time, and store each."""
        with stored.encoders(self.transformer) if prompts else nullcontext() as pipeline:
            for start in range(0, len(prompts), _PROMPTS_TOGETHER):
                part = prompts[start : start + _PROMPTS_TOGETHER]
                for prompt, *encoded in zip(part, *self._encode_by(pipeline, part), strict=True):
                    embeds, pooled = (tensor.cpu() for tensor in encoded)
                    stored.store.keep(prompt, embeds, pooled)
                    yield prompt, (embeds, pooled)

    def _encode_by(self, pipeline: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        # a prompt longer than CLIP's 77 tokens is cut there, and T5 reads on: nothing to warn of each time
        with silence_loading():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                device=self.device,
            )
        return embeds.to(self.transformer.dtype), pooled.to(self.transformer.dtype)

    @property
    def input_dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def preview_dtype(self) -> torch.dtype:
        """Precision of the preview decoder; float32 without one."""
        return torch.float32 if self.preview_decoder is None else self.preview_decoder.dtype

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        rows = conditioning.rows
        cond = self._forward(latents, sigma, conditioning.embeds[rows], conditioning.pooled[rows])
        if guidance_scale == 1.0:
            return Velocity(cond, None, 1.0)
        batch = len(latents)
        with torch.no_grad() if guidance_gradient == "conditional" else nullcontext():
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

    def set_attention(self, name: Attention) -> None:
        """Let the network compute attention by a backend of diffusers' dispatcher (`models/attention.py`).

        Raises:
            SetupError: its package is missing; UsageError: it does not serve this device or precision.
        """
        use_attention(self.transformer, name)
        self.attention = name

    def checkpoint_gradients(self) -> None:
        """Keep only the blocks' inputs for a backward, which computes the rest again (arXiv 1604.06174).

        The forward is the same operation by operation, so an unchanged policy's importance ratio stays 1.
        """
        self.transformer.enable_gradient_checkpointing()

    def decode_by(self, how: VaeDecode) -> None:
        """Choose how the full decoder decodes; the pictures differ by rounding, and at the seams of tiles."""
        vae: Any = self.pipeline.vae
        (vae.disable_slicing if how == "whole" else vae.enable_slicing)()
        (vae.enable_tiling if how == "tiled" else vae.disable_tiling)()

    def decoding_in(self, dtype: torch.dtype) -> SD3:
        """The same model, with a copy of its full decoder in another precision."""
        other = copy(self)
        other.pipeline = copy(self.pipeline)
        # diffusers' own `to` warns about modules to be kept in float32, of which there are none
        other.pipeline.vae = torch.nn.Module.to(deepcopy(self.pipeline.vae), dtype)
        return other

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
        if decoder == "preview" and self.preview_decoder is None:
            raise ValueError("this model has no preview decoder: set lookahead.decoder to full")
        together = len(latents) if latents.device.type != "cpu" else _CACHED_PLACES // latents.shape[2:].numel()
        return torch.cat([self._decode(part, decoder) for part in latents.split(max(1, together))])

    def _decode(self, latents: Tensor, decoder: Decoder) -> Tensor:
        if decoder == "preview":
            assert self.preview_decoder is not None
            decoded = self.preview_decoder.decode(latents.to(self.preview_decoder.dtype)).sample
        else:
            vae: Any = self.pipeline.vae
            shifted = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            decoded = vae.decode(shifted.to(vae.dtype)).sample
        return to_unit(decoded.float() / 2 + 0.5)

    def sigmas(self, num_steps: int) -> Tensor:
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError("SD3 models with dynamic shifting are not supported: use a scheduler with a fixed shift")
        return sd3_sigmas(num_steps, shift=config.shift, num_train_timesteps=config.num_train_timesteps)
