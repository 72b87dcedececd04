"""What a lookahead forward may take over from another forward for the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheSpec:
    """Which parts of a joint-attention transformer are reused or left out; static, so it can be part of a CUDA graph.

    Features are recorded in one evaluation and reused in another one, which has the same prompt but other image
    tokens: the rollout's at the same sigma, with another history of noise, or the completion's own last one, at another
    sigma. Hence everything here is an **approximation**, exact only for the very latents that were recorded:

    text          The text stream's keys and values of every block are the recorded ones, so no block projects the text
                  or runs its MLP, and only image tokens ask. In a joint-attention transformer the text tokens attend to
                  the image tokens, so from the second block on their keys and values depend on the latents, and in
                  every block on sigma; at the same sigma those of the first block are exact. They are kept once for
                  each prompt: those of its first sample stand for all of them.
    own_text      The same with each sample's own text features, which saw the image tokens that it started from: nearer
                  to what is computed without a cache, for as many times the memory as a prompt has samples.
    reuse_blocks  The blocks [first, last) are replaced by what they added to each stream when they were recorded.
    skip_blocks   The blocks are left out; nothing replaces them. Not even exact for the same latents.

    Attributes:
        text: reuse the text stream, that of the prompt's first sample.
        reuse_blocks: (first, last) of a half-open range of blocks, or None.
        skip_blocks: increasing block indices outside that range.
        own_text: with `text`, that of each sample itself.

    Raises:
        ValueError: the spec asks for nothing, or contradicts itself.
    """

    text: bool = False
    reuse_blocks: tuple[int, int] | None = None
    skip_blocks: tuple[int, ...] = ()
    own_text: bool = False

    def __post_init__(self) -> None:
        if not (self.text or self.reuse_blocks or self.skip_blocks):
            raise ValueError(
                "lookahead.cache: expected something to reuse (text, reuse:2-5 or skip:0,6), or null for no cache"
            )
        if self.own_text and not self.text:
            raise ValueError("lookahead.cache: expected text:own for each sample's own text, got no text")
        if self.reuse_blocks is not None and not 0 <= self.reuse_blocks[0] < self.reuse_blocks[1]:
            raise ValueError(
                f"lookahead.cache: expected reuse with a first block and a later end (not included), got {self._reuse}"
            )
        if any(block < 0 for block in self.skip_blocks) or list(self.skip_blocks) != sorted(set(self.skip_blocks)):
            raise ValueError(f"lookahead.cache: expected skip with increasing block numbers from 0, got {self._skip}")
        both = [block for block in self.skip_blocks if block in self.reused]
        if both:
            raise ValueError(
                f"lookahead.cache: expected no block in both of {self._reuse} and {self._skip}, got {both}"
            )

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """A spec as it is written in a configuration, parts joined by "+".

        "text" or "text:own", "reuse:2-5" (blocks 2, 3, 4), "skip:0,6".

        Raises:
            ValueError: the text is none, or the spec contradicts itself.
        """
        found: dict[str, Any] = {}
        for part in text.split("+"):
            kind, _, numbers = part.partition(":")
            separator = "-" if kind == "reuse" else ","
            values = tuple(int(n) for n in numbers.split(separator) if n.isascii() and n.isdecimal())
            complete = len(values) == len(numbers.split(separator)) and (kind != "reuse" or len(values) == 2)
            key = {"text": "text", "reuse": "reuse_blocks", "skip": "skip_blocks"}.get(kind)
            if key is None or key in found or not (part in ("text", "text:own") or (kind != "text" and complete)):
                raise ValueError(
                    "lookahead.cache: expected text (or text:own), reuse:2-5 or skip:0,6, joined by + and each at most "
                    f"once, got {text!r}"
                )
            found |= {"text": True, "own_text": part == "text:own"} if kind == "text" else {key: values}
        return cls(**found)

    @property
    def name(self) -> str:
        """Such as "text:own+reuse[2,5)+skip{0,6}"."""
        parts = ["text:own" if self.own_text else "text"] if self.text else []
        if self.reuse_blocks is not None:
            parts.append(f"reuse[{self.reuse_blocks[0]},{self.reuse_blocks[1]})")
        if self.skip_blocks:
            parts.append(f"skip{{{','.join(map(str, self.skip_blocks))}}}")
        return "+".join(parts)

    @property
    def _reuse(self) -> str:
        """The blocks that are reused, as `parse` takes them."""
        return f"reuse:{'-'.join(map(str, self.reuse_blocks or ()))}"

    @property
    def _skip(self) -> str:
        """The blocks that are left out, as `parse` takes them."""
        return f"skip:{','.join(map(str, self.skip_blocks))}"

    @property
    def reused(self) -> range:
        """Blocks that a recorded residual replaces."""
        return range(*(self.reuse_blocks or (0, 0)))

    @property
    def records(self) -> bool:
        """Whether anything has to be recorded."""
        return self.text or self.reuse_blocks is not None

    def alike(self, group: int) -> int:
        """Of `group` rows with one prompt, how many in a row take over the very same features: all, or 1."""
        return 1 if self.own_text or self.reused else group

    def computed(self, num_blocks: int) -> list[int]:
        """Blocks that a lookahead row still runs through."""
        return [block for block in range(num_blocks) if block not in self.reused and block not in self.skip_blocks]

    def text_blocks(self, num_blocks: int) -> list[int]:
        """Blocks whose text keys and values are kept."""
        return self.computed(num_blocks) if self.text else []

    def keeps_text_residual(self, num_blocks: int) -> bool:
        """Whether the text stream's residual is needed too: a later block still computes with it."""
        return not self.text and bool(self.reused) and any(b >= self.reused.stop for b in self.computed(num_blocks))

    def check(self, network: Any) -> None:
        """Refuse a network that this spec does not fit.

        Raises:
            ValueError: it is no SD3 transformer with its own attention, or has too few blocks.
        """
        from diffusers import SD3Transformer2DModel
        from diffusers.models.attention import JointTransformerBlock
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        from densegrpo_fast.models.attention import DispatchedJointAttention

        way_out = "; set it to null for this model"
        if not isinstance(network, SD3Transformer2DModel):
            raise ValueError(
                f"lookahead.cache: only SD3's transformer (SD3Transformer2DModel) is supported, got "
                f"{type(network).__name__}{way_out}"
            )
        for number, block in enumerate(network.transformer_blocks):
            processor = type(block.attn.processor) if isinstance(block, JointTransformerBlock) else type(block)
            if processor not in (JointAttnProcessor2_0, DispatchedJointAttention):
                raise ValueError(
                    f"lookahead.cache: block {number} has {processor.__name__} where plain joint attention "
                    f"(JointAttnProcessor2_0) is needed{way_out}"
                )
        count = len(network.transformer_blocks)
        if self.reused.stop > count:
            raise ValueError(
                f"lookahead.cache: expected reuse with an end of at most {count}, as this model has blocks "
                f"0..{count - 1}, got {self._reuse}"
            )
        if self.skip_blocks and self.skip_blocks[-1] >= count:
            raise ValueError(
                f"lookahead.cache: expected skip with blocks of this model, 0..{count - 1}, got {self._skip}"
            )
        if len(self.skip_blocks) == count:
            raise ValueError(f"lookahead.cache: expected at least one block to be left, got {self._skip}, which is all")
