"""The lookahead's evaluations as CUDA graphs: jump and forward are captured once for each shape, then replayed.

A captured graph repeats the same kernels on the same addresses, and no Python runs. So whatever may differ between two
evaluations is either a *static buffer* that is filled before each replay (latents, noise levels, conditioning,
samples) or part of the *key* that a graph is found by (the model and its mode, guidance, the step index where features
are reused, whether there is a jump, and all shapes). Weights are neither: they may change in place between replays (an
optimiser step, an average, a merge into the lookahead copy). Where they have moved to other addresses, everything
captured is forgotten. Few rows, as of a last chunk, are padded to a captured number that is at most twice theirs.

The policy's own path, rollout and training, is never captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from densegrpo_fast.models.base import Cache, Conditioning, FlowModel
from densegrpo_fast.sampling.step_runner import StepInput, StepOutput, StepRunner

logger = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")
"""A tuple of tensors, some of which may be None."""

_PROMPTS = ("prompts", "negative")
_ROWS = ("latents", "velocity", "sigma", "next_sigma", "samples")
_WARMUP = 3


class Capturer(Protocol):
    """Turns a function of no arguments into something that can be repeated."""

    def why_not(self, device: torch.device) -> str:
        """Reason why nothing can be captured on this device; empty when it can."""

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """What repeats the function's work in place, and the tensors that hold its results afterwards.

        Raises:
            RuntimeError: the function does something that cannot be captured.
        """

    def release(self) -> None:
        """All that was captured is gone; what it shared may go too."""


class CudaCapturer:
    """Captures CUDA graphs that share one memory pool, since they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def why_not(self, device: torch.device) -> str:
        return "" if device.type == "cuda" else f"CUDA graphs need a CUDA device, the model is on {device}"

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        before = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        try:
            # what is set up on first use (kernels, workspaces, caches) is set up outside of the graph
            with torch.cuda.stream(aside):
                for _ in range(_WARMUP):
                    function()
            before.wait_stream(aside)
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            graph = torch.cuda.CUDAGraph()
            # other threads (rewards that are scored meanwhile) may allocate during the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = function()
        finally:
            # a capture that fails leaves its own stream current
            torch.cuda.set_stream(before)
        return graph.replay, outputs

    def release(self) -> None:
        self._pool = None


class Graphs:
    """Functions captured on static buffers, one for each key and set of input shapes.

    Args:
        capturer: how to capture.
    """

    def __init__(self, capturer: Capturer):
        self.capturer = capturer
        self._captured: dict[Hashable, tuple[Callable[[], object], Any]] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._contents: dict[Hashable, tuple[ReferenceType[Tensor], int]] = {}

    def __len__(self) -> int:
        """Number of captured graphs."""
        return len(self._captured)

    def run(
        self,
        key: Hashable,
        function: Callable[[Mapping[str, Tensor]], Outputs],
        inputs: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
    ) -> Outputs:
        """The function's results, computed by the graph of its key, which is captured if there is none.

        Args:
            key: everything but tensors that the function's work depends on.
            function: maps the static buffers, by the names of `inputs` and `constants`, to results.
            inputs: copied into the buffers each time.
            constants: copied only if they are other tensors than last time, or have been written to.

        Returns:
            The graph's own tensors: the next replay overwrites them.

        Raises:
            RuntimeError: the function cannot be captured.
        """
        static = {name: self._filled(name, tensor, keep=False) for name, tensor in inputs.items()}
        static |= {name: self._filled(name, tensor, keep=True) for name, tensor in constants.items()}
        signature = (key, *((name, buffer.shape, buffer.dtype) for name, buffer in static.items()))
        if signature not in self._captured:
            self._captured[signature] = self.capturer.capture(lambda: function(static))
        replay, outputs = self._captured[signature]
        replay()
        return outputs

    def forget(self) -> None:
        """Drop all graphs and buffers."""
        self._captured.clear()
        self._buffers.clear()
        self._contents.clear()
        self.capturer.release()

    def _filled(self, name: str, source: Tensor, *, keep: bool) -> Tensor:
        """The buffer of this name and shape, shared by all graphs, holding the values of `source`."""
        key = (name, source.shape, source.dtype, source.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        buffer = self._buffers[key]
        if keep:
            known = self._contents.get(key)
            if known is not None and known[0]() is source and known[1] == source._version:
                return buffer
            self._contents[key] = (ref(source), source._version)
        return buffer.copy_(source)


class GraphedStepRunner(StepRunner):
    """Evaluations replayed as graphs, where that is possible; else computed as they are, which is logged once.

    Args:
        capturer: how to capture; None = CUDA graphs.
    """

    def __init__(self, capturer: Capturer | None = None):
        self.graphs = Graphs(CudaCapturer() if capturer is None else capturer)
        self._addresses: dict[FlowModel, tuple[int, ...]] = {}
        self._sizes: dict[Hashable, set[int]] = {}
        self._eager = False

    def begin(self, model: FlowModel) -> None:
        addresses = _addresses(model)
        if self._addresses.get(model, addresses) != addresses:
            self._forget()
        self._addresses[model] = addresses

    def __call__(
        self, model: FlowModel, rows: StepInput, step_index: int, scale: float, *, cache: Cache | None
    ) -> StepOutput:
        """As `StepRunner`; in a graph the result's tensors are overwritten by the next call.

        Raises:
            RuntimeError: gradients are enabled, which a graph would not record.
            OutOfMemoryError: as the evaluation by itself does; no graph is left then.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("lookahead.graphs: captured without gradients, call it under no_grad()")
        eager = super().__call__
        reason = "" if self._eager else self.graphs.capturer.why_not(rows.latents.device)
        if self._eager or reason:
            self._give_up(reason)
            return eager(model, rows, step_index, scale, cache=cache)

        def evaluate(static: Mapping[str, Tensor]) -> StepOutput:
            return eager(model, _step_input(static), step_index, scale, cache=cache)

        # without a cache the step index is only a noise level
        key = (model, model.mode, scale, cache, None if cache is None else step_index)
        sizes = self._sizes.setdefault((key, rows.velocity is None), set())
        size = min((size for size in sizes if len(rows) <= size <= 2 * len(rows)), default=len(rows))
        padded = rows.padded(size)
        conditioning = padded.conditioning
        inputs = {name: getattr(padded, name) for name in _ROWS if getattr(padded, name) is not None}
        inputs["rows"] = conditioning.rows
        constants = {
            f"{half}.{name}": tensor for half in _PROMPTS for name, tensor in getattr(conditioning, half).items()
        }
        try:
            # counted here: a capture runs more forwards than the lookahead asked for, a replay calls no velocity
            with model.uncounted():
                output = self.graphs.run(key, evaluate, inputs, constants)
            model.count(len(rows), scale)
            sizes.add(size)
            latents, velocity = output
            return StepOutput(None if latents is None else latents[: len(rows)], velocity[: len(rows)])
        except torch.OutOfMemoryError:
            # the caller goes on with fewer rows, and has the memory of all that was captured for it
            self._forget()
            raise
        except RuntimeError as error:
            self._give_up(f"the evaluation cannot be captured: {error}")
            return eager(model, rows, step_index, scale, cache=cache)

    def _forget(self) -> None:
        self.graphs.forget()
        self._sizes.clear()

    def _give_up(self, reason: str) -> None:
        if not self._eager:
            self._eager = True
            self._forget()
            logger.warning("lookahead.graphs: %s; the lookahead runs without graphs", reason)


def _step_input(static: Mapping[str, Tensor]) -> StepInput:
    prompts, negative = (
        {name.removeprefix(f"{half}."): tensor for name, tensor in static.items() if name.startswith(f"{half}.")}
        for half in _PROMPTS
    )
    conditioning = Conditioning(prompts, negative, static["rows"])
    tensors: dict[str, Any] = {name: static.get(name) for name in _ROWS}
    return StepInput(conditioning=conditioning, **tensors)


def _addresses(model: FlowModel) -> tuple[int, ...]:
    """Where the model's weights lie, in whichever mode it is."""
    network = getattr(model, "network", None)
    if network is None:
        return tuple(parameter.data_ptr() for parameter in model.trainable_parameters().values())
    return tuple(tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))
