"""What distinguishes one family of models from another: the contract between a pipeline class and `DiffusersModel`.

A family says how a diffusers pipeline's own `__call__` encodes prompts, calls its network, reads the schedule and
decodes; `DiffusersModel` does the rest, alike for all. A family is one file here and one line in `families.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.flow.schedule import check_sigmas
from densegrpo_fast.models.base import Velocity

JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The attention projections of joint-attention transformers, which Flow-GRPO adapts."""

Prompts = dict[str, Tensor]
"""Encoded prompts by name, each tensor [U, ...] for U prompts."""


class Family(ABC):
    """A loaded pipeline, seen as a flow model of one size of picture.

    Args:
        pipeline: the diffusers pipeline, or anything with its network, `vae` and `scheduler`; weights are not read.
        height, width: of the pictures, in pixels; 0 means the model's native size.
        max_sequence_length: of the text encoder, in tokens, where the family lets one choose.
        frames: of a video; 1 = a picture.

    Raises:
        UsageError: the size is none of the network's, or it makes no videos.
        ValueError: the schedule or a setting of the network is none that this family computes.
    """

    pipeline_class: ClassVar[str]
    """The pipeline's class in diffusers, as model_index.json names it."""

    parts: ClassVar[Mapping[str, str | tuple[str, ...]]]
    """Class of each part that a directory must have, or several possible ones; of transformers where its name says it
    is a text encoder or tokenizer."""

    optional: ClassVar[Mapping[str, str]] = {}
    """Parts that a directory may lack."""

    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline class that are neither loaded nor needed, such as a safety checker."""

    network_part: ClassVar[str] = "transformer"
    """Name of the part that evaluates the velocity."""

    negative_prompt: ClassVar[str] = ""
    """Prompt of the unconditional half of guidance."""

    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    """Projections that published recipes adapt."""

    scales_input: ClassVar[bool] = False
    """Whether `scaled` is something else than the latents themselves."""

    video: ClassVar[bool] = False
    """Whether several frames can be asked for."""

    sampler: str | None = None
    """Scheduler class that a pipeline needs in place of its own to draw what is trained here; None = its own."""

    sampler_options: Mapping[str, Any] = {}
    """What `sampler` is given besides the configuration of the pipeline's own scheduler."""

    guided: bool = True
    """Whether guidance takes a second forward; False where it is a number that the network is given, or nothing."""

    latent_shape: tuple[int, ...]
    """Shape of one sample's latents, as the pipeline's own loop has them."""

    def __init__(
        self, pipeline: Any, *, height: int = 0, width: int = 0, max_sequence_length: int = 0, frames: int = 1
    ):
        self.config = getattr(pipeline, self.network_part).config
        self.vae, self.scheduler = pipeline.vae.config, pipeline.scheduler
        self.max_sequence_length, self.frames = max_sequence_length, frames
        if frames != 1 and not self.video:
            raise UsageError(f"model.frames: expected 1 for {self.pipeline_class}, which makes pictures, got {frames}")
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            _check_numbers(f"vae: {name}", self.vae.get(name))
        native = self.native_size()
        self.height, self.width = height or native, width or native
        unit = self.unit()
        for name, size in (("height", self.height), ("width", self.width)):
            if size % unit:
                raise UsageError(f"model.{name}: expected a multiple of {unit} for this model, got {size}")

    @property
    def vae_scale(self) -> int:
        """Pixels along the side of one latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def native_size(self) -> int:
        """Side of the model's own pictures, in pixels."""
        return int(self.config["sample_size"]) * self.vae_scale

    def unit(self) -> int:
        """What height and width must be multiples of, in pixels."""
        return self.vae_scale

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        """Prompts by the pipeline's text encoders; floating tensors are cast to the network's dtype afterwards."""

    def negative(self, encoded: Prompts) -> Prompts:
        """What the unconditional half is given, of the encoded negative prompt, [1, ...] each."""
        return encoded

    def batched(self, encoded: Prompts) -> Prompts:
        """What the network is given of prompts [U, ...] encoded together: a mask that masks nothing can go, say."""
        return encoded

    @abstractmethod
    def example(self, rows: int, text_tokens: int) -> Prompts:
        """Tensors of the shapes that encoded prompts have, on torch's default device: what memory and operations are
        counted with."""

    def scaled(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees of latents [B, ...] float32 at `sigma` [B], before it is rounded to its dtype."""
        return latents

    @abstractmethod
    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        """The network's keyword arguments.

        Args:
            latents: [B, ...] as `scaled` returns them, in the network's dtype.
            sigma: [B] float32.
            prompts: [B, ...] each.
            guidance_scale: for networks that take it as an input.
        """

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        """Keyword arguments of the pipeline's own call that stand for a guidance scale and the length of the text."""
        return {"guidance_scale": guidance_scale, "max_sequence_length": self.max_sequence_length}

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity [B, ...] float32 of the network's first output, given `latents` [B, ...] and `sigma` [B]."""
        return torch.as_tensor(output).float()

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether the pipeline runs a second forward at this scale, if the family is guided at all."""
        return guidance_scale != 1.0

    def guide(self, cond: Tensor, uncond: Tensor, guidance_scale: float) -> Velocity:
        """Both halves as the pipeline combines them."""
        return Velocity(cond, uncond, guidance_scale)

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Latents of a grid's first noise level, of standard normal ones."""
        return noise

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline gives its scheduler's `set_timesteps` beside the number of steps."""
        return {}

    def sigmas(self, num_steps: int) -> Tensor:
        """The grid that the pipeline's scheduler makes: [T+1] float32, from 1 down to 0.

        Raises:
            ValueError: its configuration asks for something that is no flow of decreasing noise.
        """
        kind, config = type(self.scheduler), self.scheduler.config
        for name in ("stochastic_sampling", "invert_sigmas"):
            if config.get(name):
                raise ValueError(f"scheduler: {name} of {kind.__name__} is not supported, set it to false")
        scheduler = kind.from_config(config)
        options = self.grid_options(num_steps)
        scheduler.set_timesteps(**({"num_inference_steps": num_steps} if "sigmas" not in options else {}), **options)
        grid = scheduler.sigmas.float().cpu().clone()
        # some shifts take 1 to 1 + 1e-7, and steps divide by 1 - sigma unless it is 0
        grid[0] = 1.0
        try:
            check_sigmas(grid)
        except ValueError as error:
            raise ValueError(f"scheduler: {kind.__name__} with these settings makes no grid: {error}") from None
        return grid

    def grid(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as the autoencoder's architecture has them, before its own scale; video adds F."""
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], videos [B, 3, F, H, W], in [-1, 1] by the full autoencoder, of what `grid` returns."""
        shifted = latents / self.vae["scaling_factor"] + (self.vae.get("shift_factor") or 0.0)
        return torch.as_tensor(vae.decode(shifted.to(vae.dtype)).sample)


def _check_numbers(name: str, value: Any) -> None:
    """Refuse what is neither a finite number, nor a list of them, nor absent."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and (not isinstance(number, int | float) or not math.isfinite(number)):
            raise ValueError(f"{name}: expected finite numbers, got {value!r}"[:200])


def dynamic_shift(scheduler: Any, image_tokens: int) -> float:
    """Log-shift `mu` that diffusers' pipelines give a scheduler with `use_dynamic_shifting`, linear in the tokens."""
    config = scheduler.config
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(image_tokens * slope + (base_shift - slope * base_tokens))


def linear_sigmas(num_steps: int) -> Sequence[float]:
    """1 ... 1/T at equal distances, as the pipelines with dynamic shift start from."""
    import numpy

    return list(numpy.linspace(1.0, 1 / num_steps, num_steps))


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, H/2 * W/2, 4 C], as FLUX.1 and Qwen-Image have them, -> [B, C, H, W] of `height` H and `width` W."""
    split = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(len(tokens), -1, height, width)
