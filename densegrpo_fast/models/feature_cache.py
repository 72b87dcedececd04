"""Features of one forward, reused by the lookahead's forwards for the same prompt.

Recording only reads: the policy's numbers are the same to the bit. Reusing replaces the forwards of some blocks for as
long as its context lasts, and is an **approximation** with every option; why is said at `CacheSpec`. The policy's
gradient never sees any of it. What is saved, as a share of the operations of a forward with the adapter
(`flops.cached_forward`; the embedded model has 6 blocks, SD3.5-Medium at 512 px with 205 text tokens has 24):

    lookahead.cache                       exact only for                 embedded  SD3.5-Medium
    text                                  the prompt's first sample      .19       .14
    text:own                              the sample as it was recorded  .19       .14
    reuse:1-5 (SD3.5: 4-20)               the sample as it was recorded  .68       .67
    text+reuse:1-5 (SD3.5: 4-20)          the prompt's first sample      .73       .72
    skip:3                                nothing                        .17       .05

What it costs in fidelity is measured by `python -m densegrpo_fast.fidelity --cache`, how much the text's keys and
values depend on latents and sigma by `benches/bench_text_features.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.cached_blocks import recording, reusing, streams
from densegrpo_fast.models.features import CachedView, Features, Layout, Rows


class FeatureCache:
    """Records features of the policy's forwards and lends them to the lookahead's.

    A `record` or `reuse` context holds one velocity. Its forwards are told apart by their order: with guidance the
    conditional half comes first and the unconditional one second, as in `FlowModel.velocity`. Buffers are allocated
    when a node is first recorded and written in place from then on, so a captured graph stays valid. The host never
    looks at a tensor's values.

    Rows are the rollout's samples, nodes its grid indices: a completion that comes to a node reuses the residuals
    that its own sample left there. Text features are kept once per prompt, of whose samples (`group` rows one after
    another) the first one's are recorded and serve all: in each half, at each node and in each block. Its text tokens
    attended to its own image tokens, so for the other samples, and for any completion that has come to the node by
    another way, they are an approximation; `CacheSpec.own_text` keeps each sample's own. With guidance that goes for
    the text of the unconditional half too, the empty prompt: one for the samples of a prompt.

    Args:
        network: the policy's transformer, with or without an adapter.
        spec: what to reuse.
        nodes: what is kept apart, as a rule the grid indices at which the lookahead evaluates; others are not recorded.
        rows: how many rows each node has.
        group: rows, in consecutive blocks, that have the prompt in common; 1 = each row has a prompt of its own.
        halves: forwards per velocity that the lookahead asks for: 2 if its own evaluations are guided, else 1.
        reader: the transformer that reuses, of the same architecture; None = `network`. Features are kept in its dtype.

    Raises:
        ValueError: the spec does not fit the network, a number is below 1, or the rows are no whole groups.
    """

    def __init__(
        self,
        network: Any,
        spec: CacheSpec,
        *,
        nodes: Sequence[int],
        rows: int,
        group: int = 1,
        halves: int = 1,
        reader: Any = None,
    ):
        reader = network if reader is None else reader
        for transformer in (network, reader):
            spec.check(transformer)
        if rows < 1 or halves < 1:
            raise ValueError(f"feature cache: expected at least 1 row and 1 half, got {rows} and {halves}")
        if group < 1 or rows % group:
            raise ValueError(f"feature cache: expected whole groups, got {rows} rows in groups of {group}")
        self.reader, self.spec = reader, spec
        self._networks = (network,) if reader is network else (network, reader)
        self.nodes, self.rows, self.halves = tuple(nodes), rows, halves
        self.alike = spec.alike(group)
        self._texts = group if spec.text and not spec.own_text else 1
        self._kept: dict[tuple[int, int], Features] = {}
        self._now: Features | None = None
        self._busy = False

    @contextmanager
    def record(self, step_index: int, rows: slice) -> Iterator[None]:
        """Within the context, a velocity of either network leaves its features in the rows `rows` of `step_index`.

        At a step index that the lookahead does not evaluate, nothing happens.

        Raises:
            ValueError: (by the forward) the batch is not that of `rows`, or the number of tokens has changed.
            RuntimeError: the network is compiled, or another context of this cache is open.
        """
        if step_index not in self.nodes or not self.spec.records:
            yield
            return
        count, half = len(range(self.rows)[rows]), -1

        def before(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            nonlocal half
            half += 1
            image, text = streams(args, inputs)
            _check_batch(len(image), count)
            if half < self.halves:
                tokens = image.shape[-2] * image.shape[-1] // self.reader.config.patch_size**2
                self._now = self._buffers(step_index, half, tokens, text.shape[1])

        def after(*_: Any) -> None:
            if self._now is not None:
                self._now.recorded[rows] = [True] * count
            self._now = None

        def current() -> tuple[Features, slice] | None:
            return None if self._now is None else (self._now, rows)

        with self._opened(*self._networks), ExitStack() as hooks:
            for network in self._networks:
                hooks.enter_context(network.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(network.register_forward_hook(after))
                hooks.enter_context(recording(network, self.spec, current))
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
        count = len(range(self.rows)[rows]) if isinstance(rows, slice) else len(rows)
        half, groups = -1, rows

        def before(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            nonlocal half, groups
            half += 1
            if torch.is_grad_enabled():
                raise RuntimeError("feature cache: reused features are approximate, so only under torch.no_grad()")
            _check_batch(len(streams(args, inputs)[0]), count)
            if self.spec.records:
                self._now = self._recorded(step_index, half, rows)
                groups = self._now.groups_of(rows)

        def current() -> CachedView:
            if self._now is None:
                raise RuntimeError("feature cache: a block was called outside of its transformer")
            return CachedView(self._now, rows, groups)

        with self._opened(self.reader), ExitStack() as hooks:
            hooks.enter_context(self.reader.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(reusing(self.reader, self.spec, current))
            yield

    def clear(self) -> None:
        """Forget what was recorded, before a new rollout; the buffers stay where they are."""
        for features in self._kept.values():
            features.forget()

    def bytes(self) -> int:
        """Memory held: none until something is recorded, then as much as `capacity` says."""
        return sum(features.bytes() for features in self._kept.values())

    def capacity(self, image_tokens: int, text_tokens: int) -> int:
        """Bytes held once every node is recorded.

        In elements, per node and half: 2 L D for each prompt (with `own_text` each row) and block that is computed with
        kept text; N D for each row if blocks are reused, and L D more if a later block still computes the text stream
        (N image tokens, L text tokens, width D).
        """
        layout = Layout(self.rows, self._texts, image_tokens, text_tokens)
        return len(self.nodes) * self.halves * layout.bytes(self.reader, self.spec)

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
            self._busy, self._now = False, None

    def _buffers(self, step_index: int, half: int, image_tokens: int, text_tokens: int) -> Features:
        layout = Layout(self.rows, self._texts, image_tokens, text_tokens)
        features = self._kept.get((step_index, half))
        if features is None:
            self._kept[step_index, half] = features = Features(self.reader, self.spec, layout)
        if features.layout != layout:
            made = features.layout.image_tokens, features.layout.text_tokens
            raise ValueError(f"feature cache: made for {made} image and text tokens, got {(image_tokens, text_tokens)}")
        return features

    def _recorded(self, step_index: int, half: int, rows: Rows) -> Features:
        if half >= self.halves:
            raise RuntimeError(
                f"feature cache: forward {half + 1} of a velocity, but features of {self.halves} are kept; "
                "build it with halves=2 for a guided lookahead"
            )
        features = self._kept.get((step_index, half))
        if features is None or not features.has(rows):
            raise RuntimeError(
                f"feature cache: not every row asked for is recorded at node {step_index}; record the rollout first "
                f"(nodes of this cache: {', '.join(map(str, self.nodes))})"
            )
        return features


def _check_batch(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"feature cache: the forward has {found} rows, its context names {expected}")
