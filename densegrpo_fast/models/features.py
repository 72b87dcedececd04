"""What one forward leaves behind for others: text keys and values, and residuals of blocks."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densegrpo_fast.models.cache_spec import CacheSpec

Rows = slice | Tensor
"""Rows of a node: a slice of consecutive ones, or int64 indices [n] on the model's device."""


class Layout(NamedTuple):
    """What is kept of one forward of all rows.

    Attributes:
        rows: how many rows.
        group: rows, in consecutive blocks, that share one text; it divides `rows`.
        image_tokens, text_tokens: N and L.
    """

    rows: int
    group: int
    image_tokens: int
    text_tokens: int

    def shapes(self, network: Any, spec: CacheSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers of `Features`, by name, for those that the spec needs."""
        rows, group, image, text = self
        count, width, heads = len(network.transformer_blocks), network.inner_dim, network.config.num_attention_heads
        found: dict[str, tuple[int, ...]] = {}
        if blocks := spec.text_blocks(count):
            found["text"] = (len(blocks), 2, rows // group, heads, text, width // heads)
        if spec.reused:
            found["image_residual"] = (rows, image, width)
        if spec.keeps_text_residual(count):
            found["text_residual"] = (rows, text, width)
        return found

    def bytes(self, network: Any, spec: CacheSpec) -> int:
        """Memory of those buffers in the network's dtype."""
        return sum(map(prod, self.shapes(network, spec).values())) * network.dtype.itemsize


class Features:
    """Buffers for one forward of all rows; written in place, so their addresses never change.

    Attributes:
        layout: rows and tokens.
        text: [blocks, 2, rows / group, H, L, D/H] keys, normalised as the block does it, and values of the text stream
            of the first row of each group; None if the spec keeps none.
        image_residual: [rows, N, D] what the reused blocks added to the image stream, or None.
        text_residual: [rows, L, D] the same of the text stream, or None.
        recorded: for each row whether it has been written since the last `forget`.

    Args:
        network: the transformer that will read them; gives dtype and device.
        spec: what to keep.
        layout: of how many rows and tokens.
    """

    def __init__(self, network: Any, spec: CacheSpec, layout: Layout):
        self.layout = layout
        buffers = {
            name: torch.empty(shape, dtype=network.dtype, device=network.device)
            for name, shape in layout.shapes(network, spec).items()
        }
        self.text, self.image_residual, self.text_residual = (
            buffers.get(name) for name in ("text", "image_residual", "text_residual")
        )
        self.recorded = [False] * layout.rows

    def forget(self) -> None:
        """From now on nothing counts as recorded."""
        self.recorded = [False] * len(self.recorded)

    def has(self, rows: Rows) -> bool:
        """Whether these rows and the first ones of their groups are recorded; for indices, which only the device
        knows: whether all rows are."""
        if not isinstance(rows, slice):
            return all(self.recorded)
        return all(self.recorded[row] and self.recorded[row - row % self.layout.group] for row in self._range(rows))

    def keep_text(self, slot: int, which: int, rows: slice, values: Tensor) -> None:
        """Write keys (`which` 0) or values (1) [n, H, L, D/H] of `rows`, as far as they are the first of a group."""
        if self.text is None:
            return
        group, start = self.layout.group, self._range(rows).start
        first = values[-start % group :: group]
        place = -(-start // group)
        self.text[slot, which, place : place + len(first)].copy_(first.detach())

    def text_at(self, slot: int, groups: Rows) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, L, D/H] of the `slot`-th block with kept text, for `groups_of` some rows."""
        if self.text is None:
            raise RuntimeError("feature cache: no text is kept")
        return gather_rows(self.text[slot, 0], groups), gather_rows(self.text[slot, 1], groups)

    def groups_of(self, rows: Rows) -> Rows:
        """Whose text these rows take over."""
        if self.layout.group == 1:
            return rows
        if isinstance(rows, slice):
            within = self._range(rows)
            assert self.text is not None
            rows = torch.arange(within.start, within.stop, device=self.text.device)
        return rows.div(self.layout.group, rounding_mode="floor")

    def bytes(self) -> int:
        """Memory of the buffers."""
        buffers = (self.text, self.image_residual, self.text_residual)
        return sum(x.numel() * x.element_size() for x in buffers if x is not None)

    def _range(self, rows: slice) -> range:
        return range(self.layout.rows)[rows]


class CachedView(NamedTuple):
    """What a forward reuses.

    Attributes:
        features: from where.
        rows: of each row of the forward.
        groups: whose text.
    """

    features: Features
    rows: Rows
    groups: Rows


def gather_rows(buffer: Tensor | None, rows: Rows) -> Tensor:
    """The rows of a buffer [rows, ...]; a view for a slice, a copy for indices."""
    if buffer is None:
        raise RuntimeError("feature cache: not among what its spec keeps")
    return buffer[rows] if isinstance(rows, slice) else buffer.index_select(0, rows)
