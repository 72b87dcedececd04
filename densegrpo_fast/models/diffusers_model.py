"""A diffusers pipeline behind the `FlowModel` contract: what all families have in common.

What distinguishes them is in one file each, a `Family` (`models/family.py`). The embedded model is loaded by the same
code as SD3.5: it *is* such a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.pictures import to_unit
from densegrpo_fast.common.pretrained import silence_loading
from densegrpo_fast.models.attention import Attention, use_attention
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity
from densegrpo_fast.models.families import family_of
from densegrpo_fast.models.family import Family, Prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DiffusionPipeline

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

    def find(self, prompt: str) -> Prompts | None:
        """The tensors of a prompt on the CPU, without the first dimension, or None."""

    def keep(self, prompt: str, tensors: Prompts) -> None:
        """Store a prompt's tensors."""


@dataclass(frozen=True)
class StoredPrompts:
    """In place of text encoders in memory: encoded prompts, and how to get encoders for the others.

    Attributes:
        store: where encoded prompts are kept.
        encoders: for a network, a context with a pipeline that holds it and the text encoders.
    """

    store: PromptStore
    encoders: Callable[[Any], AbstractContextManager[Any]]


class DiffusersModel(FlowModel):
    """A pipeline of diffusers as a flow model.

    Args:
        pipeline: the loaded pipeline; its network may carry a LoRA adapter.
        preview_decoder: an `AutoencoderTiny` for the same latents, or None.
        max_sequence_length: of the text encoder in tokens, where the family lets one choose.
        height, width: image size in pixels; 0 means the network's native size.
        frames: of a video; 1 = a picture.
        stored_prompts: for a pipeline without its text encoders; None = the pipeline encodes.
        has_t5: whether the model has a T5 encoder in the third place; None = whether this pipeline holds one.
        family: what kind of pipeline it is; None = the one of its class (`models/families.py`).

    Raises:
        UsageError: the size is none of the network's.
        ValueError: the schedule or a setting of the network is none that the family computes.
    """

    attention: Attention = "auto"
    """What computes the network's attention; see `set_attention`."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        preview_decoder: AutoencoderTiny | None = None,
        *,
        max_sequence_length: int = 256,
        height: int = 0,
        width: int = 0,
        frames: int = 1,
        stored_prompts: StoredPrompts | None = None,
        has_t5: bool | None = None,
        family: type[Family] | None = None,
    ):
        kind = family_of(type(pipeline).__name__) if family is None else family
        self.family = kind(pipeline, height=height, width=width, max_sequence_length=max_sequence_length, frames=frames)
        if preview_decoder is not None and kind.video:
            raise UsageError("model.preview_decoder: expected null for a video model, previews are of pictures alone")
        self.pipeline: Any = pipeline
        self.network = getattr(pipeline, kind.network_part)
        self.preview_decoder = preview_decoder
        self.stored_prompts = stored_prompts
        self.has_t5 = getattr(pipeline, "text_encoder_3", None) is not None if has_t5 is None else has_t5
        self.latent_shape = self.family.latent_shape
        self.device = self.network.device
        # a schedule that cannot be computed is refused now
        self.sigmas(2)
        self._negative: Prompts | None = None
        self._compiled = False

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        unique = list(dict.fromkeys(prompts))
        index = {prompt: number for number, prompt in enumerate(unique)}
        encoded = self.family.batched(self._encode(unique))
        if self._negative is None:
            negative = self.family.batched(self._encode([self.family.negative_prompt]))
            self._negative = self.family.negative(negative)
        rows = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        return Conditioning(encoded, self._negative, rows)

    @torch.no_grad()
    def prepare(self, prompts: list[str]) -> int:
        """With stored prompts: encode those that are not there yet, and the negative one, with one load of the
        encoders.

        Returns:
            How many were encoded; without stored prompts 0.
        """
        if self.stored_prompts is None:
            return 0
        wanted = dict.fromkeys([self.family.negative_prompt, *prompts])
        missing = [prompt for prompt in wanted if not self.stored_prompts.store.holds(prompt)]
        for _ in self._store(self.stored_prompts, missing):
            pass
        return len(missing)

    def _encode(self, prompts: list[str]) -> Prompts:
        if self.stored_prompts is None:
            return self._encode_by(self.pipeline, prompts)
        found = {prompt: self.stored_prompts.store.find(prompt) for prompt in prompts}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        ready = {prompt: encoded for prompt, encoded in found.items() if encoded is not None}
        ready |= self._store(self.stored_prompts, missing)
        return {name: tensor.to(self.device) for name, tensor in _stack([ready[prompt] for prompt in prompts]).items()}

    def _store(self, stored: StoredPrompts, prompts: list[str]) -> Iterator[tuple[str, Prompts]]:
        """Encode prompts, a few at a time, and store each."""
        with stored.encoders(self.network) if prompts else nullcontext() as pipeline:
            for start in range(0, len(prompts), _PROMPTS_TOGETHER):
                part = prompts[start : start + _PROMPTS_TOGETHER]
                encoded = {name: tensor.cpu() for name, tensor in self._encode_by(pipeline, part).items()}
                for number, prompt in enumerate(part):
                    own = {name: tensor[number] for name, tensor in encoded.items()}
                    stored.store.keep(prompt, own)
                    yield prompt, own

    def _encode_by(self, pipeline: Any, prompts: list[str]) -> Prompts:
        # a prompt longer than CLIP's 77 tokens is cut there, and T5 reads on: nothing to warn of each time
        with silence_loading():
            encoded = self.family.encode(pipeline, prompts, self.device)
        dtype = self.dtype
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in encoded.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the network computes in."""
        return self.network.dtype if self.computed_in is None else self.computed_in

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float32 if self.family.scales_input else self.dtype

    @property
    def preview_dtype(self) -> torch.dtype:
        """Precision of the preview decoder; float32 without one."""
        return torch.float32 if self.preview_decoder is None else self.preview_decoder.dtype

    def forwards(self, guidance_scale: float) -> int:
        return 2 if self.family.guided and self.family.is_guided(guidance_scale) else 1

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
        with torch.no_grad() if guidance_gradient == "conditional" else nullcontext():
            uncond = self._forward(latents, sigma, conditioning.unconditional(), guidance_scale)
        return self.family.guide(cond, uncond, guidance_scale)

    def _forward(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float = 1.0) -> Tensor:
        dtype = self.dtype
        seen = self.family.scaled(latents, sigma).to(dtype)
        prompts = {name: t.to(dtype) if t.is_floating_point() else t for name, t in prompts.items()}
        inputs = self.family.inputs(seen, sigma, prompts, guidance_scale)
        # with and without gradient torch.compile makes two forwards that round differently: one serves both
        with torch.enable_grad() if self._compiled else nullcontext():
            output = self.network(**inputs, return_dict=False)[0]
        output = self.family.velocity(output, latents, sigma)
        return output if torch.is_grad_enabled() else output.detach()

    def compile(self, mode: str | None, backend: str = "inductor") -> None:
        """Compile the network's forward with `torch.compile`, at the first call of each batch size and mode.

        An unchanged policy's importance ratio stays 1: rollout and replay run the same compiled forward, the one that
        keeps what a backward needs, so a forward without gradient takes that memory for as long as it lasts.

        Args:
            mode, backend: of `torch.compile`; a mode that makes CUDA graphs of its own does not work here, as their
                outputs are overwritten while the replay still needs them.
        """
        import torch._dynamo

        # one for each batch size, with and without adapter; past the limit torch would run without compiling
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
        for network in (self.network, self.reference_network):
            if network is not None:
                network.compile(mode=mode, backend=backend, dynamic=False)
        self._compiled = True

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks: of diffusers' repeated kinds, in lists of its own. A UNet has none there."""
        kinds = set(getattr(self.network, "_repeated_blocks", None) or getattr(self.network, "_no_split_modules", []))
        lists = [child for child in self.network.children() if isinstance(child, nn.ModuleList)]
        return [block for blocks in lists for block in blocks if type(block).__name__ in kinds]

    def set_attention(self, name: Attention) -> None:
        """Let the network compute attention by a backend of diffusers' dispatcher (`models/attention.py`).

        PyTorch's own attention leaves out cuDNN from then on, in the whole process: it may run other kernels with a
        gradient than without, and rollout and update would differ.

        Raises:
            SetupError: its package is missing; UsageError: it does not serve this device, precision or network.
        """
        torch.backends.cuda.enable_cudnn_sdp(False)
        use_attention(self.network, name)
        self.attention = name

    def checkpoint_gradients(self) -> None:
        """Keep only the blocks' inputs for a backward, which computes the rest again (arXiv 1604.06174).

        The forward is the same operation by operation, so an unchanged policy's importance ratio stays 1.
        """
        self.network.enable_gradient_checkpointing()

    def decode_by(self, how: VaeDecode) -> None:
        """Choose how the full decoder decodes; the pictures differ by rounding, and at the seams of tiles."""
        vae: Any = self.pipeline.vae
        (vae.disable_slicing if how == "whole" else vae.enable_slicing)()
        (vae.enable_tiling if how == "tiled" else vae.disable_tiling)()

    def decoding_in(self, dtype: torch.dtype) -> DiffusersModel:
        """The same model, with a copy of its full decoder in another precision."""
        other = copy(self)
        other.pipeline = copy(self.pipeline)
        # diffusers' own `to` warns about modules to be kept in float32, of which there are none
        other.pipeline.vae = nn.Module.to(deepcopy(self.pipeline.vae), dtype)
        return other

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        if decoder == "preview" and self.preview_decoder is None:
            raise ValueError("this model has no preview decoder: set lookahead.decoder to full")
        grid = self.family.grid(latents)
        together = len(grid) if grid.device.type != "cpu" else _CACHED_PLACES // grid.shape[2:].numel()
        return torch.cat([self._decode(part, decoder) for part in grid.split(max(1, together))])

    def _decode(self, grid: Tensor, decoder: Decoder) -> Tensor:
        if decoder == "preview":
            assert self.preview_decoder is not None
            decoded = self.preview_decoder.decode(grid.to(self.preview_decoder.dtype)).sample
        else:
            decoded = self.family.decode(self.pipeline.vae, grid)
        return to_unit(decoded.float() / 2 + 0.5)

    def sigmas(self, num_steps: int) -> Tensor:
        return self.family.sigmas(num_steps)

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self.family.start(noise, sigmas)


def _stack(prompts: list[Prompts]) -> Prompts:
    """Prompts of one or several lengths, together: shorter ones, and their masks, are filled up with zeros."""
    stacked = {}
    for name in prompts[0]:
        tensors = [prompt[name] for prompt in prompts]
        longest = max(len(tensor) for tensor in tensors)
        stacked[name] = torch.stack(
            [pad(t, (0, 0) * (t.ndim - 1) + (0, longest - len(t))) if len(t) < longest else t for t in tensors]
        )
    return stacked
