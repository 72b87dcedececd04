"""How many rows the lookahead evaluates and decodes at a time: as many as `lookahead.memory_gb` allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.models.sd3 import SD3

GB = 1e9
"""Bytes of one unit of `lookahead.memory_gb`."""


@dataclass(frozen=True)
class Chunks:
    """Rows at a time.

    Attributes:
        forward: of a network forward.
        decode: of a decode.
    """

    forward: int
    decode: int


def lookahead_chunks(config: Config, model: FlowModel, decoder: Decoder) -> Chunks:
    """`lookahead.chunk`, or as many rows less as the memory budget demands.

    What rows need is counted on the model's own architecture (`models/memory.py`): the tensors of a forward or decode
    that are alive at the same time, without the workspaces of kernels. What is kept between forwards is not in the
    budget: trajectories, where completions stand, the features of `lookahead.cache`, and the hidden tokens of
    `lookahead.head`; it is in the estimate that a run begins with (`training/memory.py`).

    Args:
        config: the run's.
        model: that the lookahead evaluates.
        decoder: of its images.

    Raises:
        UsageError: the budget is too small for one row, or the model's memory cannot be counted.
    """
    most, budget = config.lookahead.chunk, config.lookahead.memory_gb
    if budget is None:
        return Chunks(most, most)
    if not isinstance(model, SD3):
        raise UsageError("lookahead.memory_gb: expected null, this model's memory cannot be counted")
    # peft and diffusers: not before they are needed
    from densegrpo_fast.models.flops import architecture_of
    from densegrpo_fast.models.memory import ModelMemory, tensor_bytes

    memory = ModelMemory(
        architecture_of(model),
        dtype=model.transformer.dtype,
        vae_dtype=model.pipeline.vae.dtype,
        preview_dtype=model.preview_dtype,
        lora_rank=config.lora.rank,
        lora_targets=tuple(config.lora.targets),
    )
    how, prompt = config.model.vae_decode, model.encode([""])
    # the prompt's embeddings are copied for every row
    row = tensor_bytes([prompt.embeds[0].to(model.transformer.dtype), prompt.pooled[0].to(model.transformer.dtype)])
    parts = {
        "a forward": Linear.through(lambda rows: memory.forward(rows) + rows * row),
        "a decode": Linear.through(lambda rows: memory.decode(rows, decoder, how)),
    }
    if any(part.at(1) > budget * GB for part in parts.values()):
        single = " and ".join(f"{name} {part.at(1) / GB:.3g} GB" for name, part in parts.items())
        enough = 1.01 * max(part.at(1) for part in parts.values()) / GB
        raise UsageError(
            f"lookahead.memory_gb: {budget:g} is too small for one row, for which {single} are needed; "
            f"expected at least {enough:.3g}, or null and lookahead.chunk 1",
        )
    forward, decode = (min(most, part.largest(budget * GB)) for part in parts.values())
    return Chunks(forward, decode)


@dataclass(frozen=True)
class Linear:
    """Bytes as a function of the number of rows: `fixed + rows * slope`."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, measure: Callable[[int], int]) -> Linear:
        """The line through the measured bytes of one and of two rows."""
        one, two = measure(1), measure(2)
        return cls(2 * one - two, two - one)

    def at(self, rows: int) -> float:
        """Bytes of so many rows."""
        return self.fixed + rows * self.slope

    def largest(self, limit: float) -> int:
        """Most rows within `limit` bytes, at least 1."""
        return max(1, int((limit - self.fixed) // self.slope)) if self.slope > 0 else 2**31 - 1
