"""Memory of a model, counted on its real configuration without its weights.

Every part is built on the meta device, where a forward or backward only propagates shapes, and the tensors that are
alive at the same time are added up. What is not in these numbers: the workspaces of kernels, the allocator's rounding
and fragments, and CUDA's own few hundred megabytes; a compiled network needs less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densegrpo_fast.models.base import Decoder
from densegrpo_fast.models.flops import ATTENTION_TARGETS, Architecture, first_output


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def module_bytes(module: nn.Module | None) -> int:
    """Bytes of a module's parameters and buffers; 0 for None."""
    return 0 if module is None else tensor_bytes([*module.parameters(), *module.buffers()])


class PeakBytes(TorchDispatchMode):
    """Within the context, adds up the storages that operations make, for as long as they live.

    Attributes:
        live: bytes of those that are alive.
        peak: largest value that `live` had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)
        output = func(*args, **kwargs)
        for storage in _storages(output):
            self._watch(storage, storage.nbytes())
        return output

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # torch keeps a storage's Python object for as long as the storage itself
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as one kernel that keeps no matrix of scores, which on the meta device torch would not choose.

    It takes the function's own place rather than a mode's, which a backward that computes a block again would not see.
    """
    own = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return own(query, key, value, *arguments, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of the tensors that `call` makes and that are alive at the same time, its result included."""
    with fused_attention(), PeakBytes() as memory:
        call()
    return memory.peak


class ModelMemory:
    """Bytes of an architecture's weights, and the most that each kind of work with them needs beside them.

    Args:
        architecture: what to count.
        dtype: that the network computes in; what is trained is float32.
        vae_dtype: of the full decoder.
        preview_dtype: of the preview decoder.
        lora_rank: of the adapter; 0 = there is none, and all weights are trained.
        lora_targets: suffixes of the names of the adapted projections.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype = torch.float32,
        preview_dtype: torch.dtype = torch.float32,
        lora_rank: int = 32,
        lora_targets: tuple[str, ...] = ATTENTION_TARGETS,
    ):
        from densegrpo_fast.models.lora_linear import lora_config

        self.architecture = architecture
        with torch.device("meta"):
            self.network = nn.Module.to(architecture.network(), dtype).requires_grad_(False)
            self.transformer = module_bytes(self.network)
            if lora_rank:
                adapter = lora_config(r=lora_rank, lora_alpha=lora_rank, target_modules=list(lora_targets))
                self.network.add_adapter(adapter)
            else:
                self.network.requires_grad_(True)
            self.vae = nn.Module.to(architecture.full_decoder(), vae_dtype)
            make = architecture.preview_decoder
            self.preview = None if make is None else nn.Module.to(make(), preview_dtype)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if lora_rank:
            for parameter in self.parameters:
                parameter.data = parameter.data.float()

    @property
    def trained(self) -> int:
        """Bytes of what is trained, in float32."""
        return 4 * sum(parameter.numel() for parameter in self.parameters)

    @property
    def full_decoder(self) -> int:
        """Bytes of the full autoencoder, encoder included."""
        return module_bytes(self.vae)

    @property
    def preview_decoder(self) -> int:
        """Bytes of the preview autoencoder, encoder included; 0 without one."""
        return module_bytes(self.preview)

    @cached_property
    def picture(self) -> int:
        """Bytes of one float32 picture, or of a video's frames."""
        latents = torch.empty(1, *self.architecture.latent_shape, device="meta", dtype=self.vae.dtype)
        with torch.no_grad():
            return 4 * self.architecture.decode(self.vae, latents).numel()

    @property
    def text_tokens(self) -> int:
        """Text tokens of one row."""
        return self._inputs(1)["encoder_hidden_states"].shape[1]

    def forward(self, rows: int) -> int:
        """One velocity of `rows` rows without gradient, the result included."""
        inputs = self._inputs(rows)
        with torch.no_grad():
            return peak_bytes(lambda: self.network(**inputs))

    def graph(self, rows: int, *, checkpointing: bool) -> int:
        """What one forward of `rows` rows keeps for its backward, the result included.

        Args:
            checkpointing: keep the blocks' inputs alone.
        """
        self._checkpoint(checkpointing)
        inputs = self._inputs(rows)
        with fused_attention(), PeakBytes() as memory:
            output = first_output(self.network, inputs)
            kept = memory.live
            del output
        return kept

    def update(self, rows: int, *, forwards: int, checkpointing: bool, graphs: int = 1) -> int:
        """Forward and backward of a micro-batch, the adapter's gradients included.

        Args:
            rows: of the micro-batch.
            forwards: further forwards without gradient between them: the reference, and the unconditional half if it
                has none.
            checkpointing: keep the blocks' inputs alone, and compute the rest again.
            graphs: forwards with gradient, whose graphs live until the one backward: 2 for both halves of guidance.
        """
        self._checkpoint(checkpointing)
        inputs = self._inputs(rows)

        def step() -> object:
            halves: list[Any] = [first_output(self.network, inputs).float() for _ in range(graphs)]
            loss = sum(halves).square().mean()
            with torch.no_grad():
                for _ in range(forwards):
                    self.network(**inputs)
            # the last block of some networks computes text that nobody reads
            return torch.autograd.grad(loss, self.parameters, allow_unused=True)

        return peak_bytes(step)

    def decode(self, rows: int, decoder: Decoder, how: str = "whole") -> int:
        """Decoding `rows` pictures at once, the pictures included; `how` of the full decoder as in the options."""
        together = rows if decoder == "preview" or how == "whole" else 1
        part = self._preview() if decoder == "preview" else self.vae
        (self.vae.enable_tiling if how == "tiled" else self.vae.disable_tiling)()
        latents = torch.empty(together, *self.architecture.latent_shape, device="meta", dtype=part.dtype)
        with torch.no_grad():
            decode = (
                self.architecture.decode if decoder == "full" else lambda part, latents: part.decode(latents).sample
            )
            return peak_bytes(lambda: decode(part, latents).float()) + (rows - together) * self.picture

    def _checkpoint(self, on: bool) -> None:
        (self.network.enable_gradient_checkpointing if on else self.network.disable_gradient_checkpointing)()

    def _preview(self) -> Any:
        if self.preview is None:
            raise ValueError("this architecture has no preview decoder")
        return self.preview

    def _inputs(self, rows: int) -> dict[str, Any]:
        with torch.device("meta"):
            return self.architecture.inputs(self.network, rows)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
