"""The contract between a flow model and everything that samples from it or trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Decoder = Literal["full", "preview"]
GuidanceGradient = Literal["full", "conditional"]
"""Which halves of a guided velocity have a gradient: both, or the one given the prompt alone."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: every different prompt once, and which of them each row of a batch uses.

    Attributes:
        prompts: what the model is given of a prompt, by names of its own: [U, ...] each, of the U different prompts.
        negative: the same of the negative (as a rule empty) prompt, for guidance: [1, ...] each.
        rows: [B] int64, index of each row's prompt.
    """

    prompts: dict[str, Tensor]
    negative: dict[str, Tensor]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor | slice) -> Conditioning:
        """The conditioning of some rows; encoded prompts are shared, not copied."""
        return replace(self, rows=self.rows[index])

    def repeat(self, times: int) -> Conditioning:
        """Rows repeated as a whole, `times` after one another: [times * B]."""
        return replace(self, rows=self.rows.repeat(times))

    def conditional(self) -> dict[str, Tensor]:
        """Each row's prompt: [B, ...] each, copied."""
        return {name: tensor[self.rows] for name, tensor in self.prompts.items()}

    def unconditional(self) -> dict[str, Tensor]:
        """The negative prompt for each row: [B, ...] each, views."""
        batch = len(self)
        return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self.negative.items()}


@dataclass(frozen=True)
class Velocity:
    """Model output before guidance: velocity = noise - data.

    Attributes:
        cond: [B, ...] float32 given the prompt.
        uncond: [B, ...] float32 given the negative prompt; None without guidance.
        guidance_scale: 1 for no guidance.
        keeps_norm: whether the guided velocity is rescaled to the conditional one's norm over the last dimension, as
            Qwen-Image does; guidance is then not linear in the halves.
    """

    cond: Tensor
    uncond: Tensor | None
    guidance_scale: float
    keeps_norm: bool = False

    @property
    def guidance_term(self) -> Tensor:
        """What guidance adds to the conditional velocity, such as (scale - 1) * (cond - uncond); zeros without."""
        if self.uncond is None:
            return torch.zeros_like(self.cond)
        if self.keeps_norm:
            return self.combined() - self.cond
        return (self.guidance_scale - 1) * (self.cond - self.uncond)

    def combined(self) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): uncond + scale * (cond - uncond). [B, ...] float32."""
        if self.uncond is None:
            return self.cond
        guided = self.uncond + self.guidance_scale * (self.cond - self.uncond)
        if not self.keeps_norm:
            return guided
        return guided * (self.cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Recorder(Protocol):
    """What keeps features of the rollout's forwards."""

    def clear(self) -> None:
        """Forget the last rollout's."""

    def record(self, step_index: int, rows: slice) -> AbstractContextManager[None]:
        """Within the context, one velocity leaves its features for these rows of a grid index."""


class Cache(Recorder, Protocol):
    """Features of the rollout's forwards that lookahead forwards take over: `models/feature_cache.py`."""

    def reuse(self, step_index: int, rows: Tensor) -> AbstractContextManager[None]:
        """Within the context, one velocity reuses what the rows [B] of a grid index hold."""


class FlowModel(ABC):
    """A flow model of pictures or videos with a trainable adapter.

    The conditional and the unconditional half of a guided velocity are always two forwards of B rows, in rollout and
    in training alike, so that both phases compute the very same numbers and either half can go without a gradient.
    """

    latent_shape: tuple[int, ...]
    """Shape of one sample's latents: a picture (C, H, W), tokens (N, D), a video (C, F, H, W) or any other."""

    device: torch.device

    mode: str = "policy"
    """Which weights a velocity is computed with: "policy", "reference" within `reference()`, or "copy"."""

    network: Any
    """The diffusers model that evaluates the velocity and carries the adapter, or is trained as a whole."""

    reference_network: Any = None
    """The network of the reference policy, if it is none that leaves out the adapter of `network`."""

    computed_in: torch.dtype | None = None
    """Half precision that the network computes in while its weights are float32 masters; None = that of its weights."""

    sharded: bool = False
    """Whether the network's weights are spread over several processes, which then evaluate it together."""

    awaits_weights: bool = False
    """Whether the network's weights are still to be handed out by the process that has read them, to all."""

    def blocks(self) -> list[torch.nn.Module]:
        """The network's blocks in the order of evaluation, each of which may be sharded; [] = it cannot be."""
        return []

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype to which the network rounds the latents of `velocity`; given in it, they save it that work."""
        return torch.float32

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts, each different one once; row b of the result stands for `prompts[b]`."""

    @abstractmethod
    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        """Velocity at `latents` [B, ...] and `sigma` [B] float32 (1 = noise); differentiable in the adapter.

        Latents are float32, or `input_dtype`, for the very same velocity.

        Args:
            guidance_gradient: "conditional" computes the unconditional half without a graph: the same numbers, but
                neither its memory nor its backward, and only a part of the gradient.
        """

    def reference(self) -> AbstractContextManager[None]:
        """Within the context the model is the reference policy: without its adapter, or by `reference_network`."""
        return _without_adapter(self) if self.reference_network is None else _by_reference(self)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, the adapter's parameters or all, by name in a fixed order."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @abstractmethod
    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        """Images [B, 3, H, W], or videos [B, 3, F, H, W], float32 in [0, 1] of clean latents [B, ...]."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """The model's own noise levels for `num_steps` steps: [num_steps + 1] float32, decreasing within [0, 1]."""

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Latents [B, ...] at the first level of a grid [T+1], made of standard normal noise; as a rule that itself."""
        return noise

    def compile(self, mode: str | None, backend: str = "inductor") -> None:
        """Compile the network's forward with `torch.compile`, of which `mode` and `backend` are options.

        Raises:
            ValueError: the model has no network that can be compiled.
        """
        raise ValueError(f"{type(self).__name__} has no network to compile")

    def refresh(self) -> None:  # noqa: B027 - most models have nothing to do
        """Take over what has changed in the model that this one follows; a model of its own follows none."""

    def count(self, rows: int, guidance_scale: float) -> None:  # noqa: B027 - only a model that counts does anything
        """Count a velocity of so many rows that was computed without calling `velocity`, by a captured graph."""

    def uncounted(self) -> AbstractContextManager[None]:
        """Within the context no velocity is counted, by a model that counts."""
        return nullcontext()

    def forwards(self, guidance_scale: float) -> int:
        """Network forwards that one evaluated row costs (NFE): 2 where guidance takes a second one."""
        return 1 if guidance_scale == 1.0 else 2


def network_class(network: Any) -> Any:
    """The class that a network was made of: FSDP2 gives those that it holds another one, derived from it."""
    kind = type(network)
    return kind.__mro__[2] if kind.__mro__[1].__name__ == "FSDPModule" else kind


@contextmanager
def _by_reference(model: FlowModel) -> Iterator[None]:
    before, network, model.mode, model.network = model.mode, model.network, "reference", model.reference_network
    try:
        yield
    finally:
        model.network, model.mode = network, before


@contextmanager
def _without_adapter(model: FlowModel) -> Iterator[None]:
    before, model.mode = model.mode, "reference"
    model.network.disable_adapters()
    try:
        yield
    finally:
        model.network.enable_adapters()
        model.mode = before
