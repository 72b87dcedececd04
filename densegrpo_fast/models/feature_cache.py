"""Text features of the rollout's forwards, reused by the lookahead's forwards of the same sample.

A forward that reuses them (`lookahead.cache: text:own`) projects no text and runs none of its MLPs: in every block the
image tokens attend to the keys and values that the sample's own text had in the rollout, at the same sigma. It leaves
out .19 of the operations of the embedded model's forward, .14 of SD3.5-Medium's at 512 px with 205 text tokens
(`flops.cached_forward`).

It is an **approximation**: in a joint-attention transformer the text tokens attend to the image tokens, so from the
second block on their keys and values depend on the latents, and only for the recorded ones is it exact. What that costs
in fidelity is measured by `python -m densegrpo_fast.fidelity --cache text:own`. Recording only reads: the policy's
numbers are the same to the bit, and its gradient never sees any of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.cached_blocks import recording, reusing, streams

Rows = slice | Tensor
"""Rows of a node: a slice of consecutive ones, or int64 indices [n] on the model's device."""


class FeatureCache:
    """Records text features of the policy's forwards and lends them to the lookahead's.

    A `record` or `reuse` context holds one velocity. Its forwards are told apart by their order: with guidance the
    conditional half comes first and the unconditional one second, as in `FlowModel.velocity`. Rows are the rollout's
    samples, nodes its grid indices. Buffers are allocated when a node is first recorded and written in place from then
    on, so a captured graph stays valid. The host never looks at a tensor's values.

    Args:
        network: the policy's transformer, with or without an adapter.
        nodes: what is kept apart, as a rule the grid indices at which the lookahead evaluates; others are not recorded.
        rows: how many rows each node has.
        halves: forwards per velocity that the lookahead asks for: 2 if its own evaluations are guided, else 1.
        reader: the transformer that reuses, of the same architecture; None = `network`. Features are kept in its dtype.

    Raises:
        ValueError: a network is no SD3 transformer with its own attention, or a number is below 1.
    """

    def __init__(self, network: Any, *, nodes: Sequence[int], rows: int, halves: int = 1, reader: Any = None):
        reader = network if reader is None else reader
        for transformer in (network, reader):
            check_cacheable(transformer)
        if rows < 1 or halves < 1:
            raise ValueError(f"feature cache: expected at least 1 row and 1 half, got {rows} and {halves}")
        self.reader = reader
        self._networks = (network,) if reader is network else (network, reader)
        self.nodes, self.rows, self.halves = tuple(nodes), rows, halves
        self._kept: dict[tuple[int, int], _Features] = {}
        self._busy = False

    @contextmanager
    def record(self, step_index: int, rows: slice) -> Iterator[None]:
        """Within the context, a velocity of either network leaves its features in the rows `rows` of `step_index`.

        At a step index that the lookahead does not evaluate, nothing happens.

        Raises:
            ValueError: (by the forward) the batch is not that of `rows`, or the number of tokens has changed.
            RuntimeError: the network is compiled, or another context of this cache is open.
        """
        if step_index not in self.nodes:
            yield
            return
        count, half = len(range(self.rows)[rows]), -1
        features: _Features | None = None

        def before(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            nonlocal half, features
            half += 1
            image, text = streams(args, inputs)
            _check_batch(len(image), count)
            features = self._buffers(step_index, half, text.shape[1]) if half < self.halves else None

        def keep(block: int, which: int, values: Tensor) -> None:
            if features is not None:
                features.text[block, which, rows].copy_(values.detach())

        def after(*_: Any) -> None:
            if features is not None:
                features.recorded[rows] = [True] * count

        with self._opened(*self._networks), ExitStack() as hooks:
            for network in self._networks:
                hooks.enter_context(network.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(network.register_forward_hook(after))
                hooks.enter_context(recording(network, keep))
            yield

    @contextmanager
    def reuse(self, step_index: int, rows: Rows) -> Iterator[None]:
        """Within the context, a velocity of `reader` reuses what the rows `rows` of `step_index` hold.

        Row i of its forwards reuses row `rows[i]`; the same row may be named any number of times.

        Raises:
            ValueError: (by the forward) the batch is not that of `rows`.
            RuntimeError: the network is compiled, another context of this cache is open, or (by the forward) features
                are missing or a gradient is asked for.
        """
        count, half = len(range(self.rows)[rows]) if isinstance(rows, slice) else len(rows), -1
        features: _Features | None = None

        def before(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            nonlocal half, features
            half += 1
            if torch.is_grad_enabled():
                raise RuntimeError("feature cache: reused features are approximate, so only under torch.no_grad()")
            _check_batch(len(streams(args, inputs)[0]), count)
            features = self._recorded(step_index, half, rows)

        def text_at(block: int) -> tuple[Tensor, Tensor]:
            assert features is not None
            key, value = features.text[block].unbind()
            if isinstance(rows, slice):
                return key[rows], value[rows]
            return key.index_select(0, rows), value.index_select(0, rows)

        with self._opened(self.reader), ExitStack() as hooks:
            hooks.enter_context(self.reader.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(reusing(self.reader, text_at))
            yield

    def clear(self) -> None:
        """Forget what was recorded, before a new rollout; the buffers stay where they are."""
        for features in self._kept.values():
            features.recorded = [False] * self.rows

    def bytes(self) -> int:
        """Memory held: none until something is recorded, then as much as `capacity` says."""
        return sum(features.text.nbytes for features in self._kept.values())

    def capacity(self, text_tokens: int) -> int:
        """Bytes held once every node is recorded: of each node, half, row and block 2 L D elements (L text tokens,
        width D)."""
        blocks, width = len(self.reader.transformer_blocks), self.reader.inner_dim
        elements = blocks * 2 * self.rows * text_tokens * width
        return len(self.nodes) * self.halves * elements * self.reader.dtype.itemsize

    @contextmanager
    def _opened(self, *networks: Any) -> Iterator[None]:
        if self._busy:
            raise RuntimeError("feature cache: a record or reuse context is open already")
        modules = [module for network in networks for module in (network, *network.transformer_blocks)]
        if any(module._compiled_call_impl for module in modules):
            # a compiled forward does not see hooks that come later, and traced anew it may round differently
            raise RuntimeError("lookahead.cache: a compiled network hides its blocks; leave the cache or compiling out")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _buffers(self, step_index: int, half: int, text_tokens: int) -> _Features:
        features = self._kept.get((step_index, half))
        if features is None:
            features = self._kept[step_index, half] = _Features(self.reader, self.rows, text_tokens)
        if features.text.shape[-2] != text_tokens:
            raise ValueError(f"feature cache: made for {features.text.shape[-2]} text tokens, got {text_tokens}")
        return features

    def _recorded(self, step_index: int, half: int, rows: Rows) -> _Features:
        if half >= self.halves:
            raise RuntimeError(
                f"feature cache: forward {half + 1} of a velocity, but features of {self.halves} are kept; "
                "build it with halves=2 for a guided lookahead"
            )
        features = self._kept.get((step_index, half))
        # of indices, which only the device knows, all rows must be there
        if features is None or not all(features.recorded[rows] if isinstance(rows, slice) else features.recorded):
            raise RuntimeError(
                f"feature cache: not every row asked for is recorded at node {step_index}; record the rollout first "
                f"(nodes of this cache: {', '.join(map(str, self.nodes))})"
            )
        return features


class _Features:
    """Of one forward of all rows: `text` [blocks, 2, rows, H, L, D/H] keys, normalised as the block does it, and values
    of the text stream; `recorded`, for each row whether it has been written."""

    def __init__(self, network: Any, rows: int, text_tokens: int):
        heads = network.config.num_attention_heads
        shape = (len(network.transformer_blocks), 2, rows, heads, text_tokens, network.inner_dim // heads)
        self.text = torch.empty(shape, dtype=network.dtype, device=network.device)
        self.recorded = [False] * rows


def check_cacheable(network: Any) -> None:
    """Refuse a network whose text features cannot be kept.

    Raises:
        ValueError: it is no SD3 transformer with its own attention.
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


def _check_batch(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"feature cache: the forward has {found} rows, its context names {expected}")
