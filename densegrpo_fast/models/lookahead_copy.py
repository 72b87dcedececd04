"""A copy of the policy for the lookahead's own evaluations: adapter merged into the weights, lower precision."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from densegrpo_fast.models.attention import use_attention
from densegrpo_fast.models.base import Conditioning
from densegrpo_fast.models.diffusers_model import DiffusersModel

_ADAPTER, _BASE = ".lora_", ".base_layer"


class LookaheadCopy(DiffusersModel):
    """The policy with its LoRA merged, for evaluations that feed nothing but a reward.

    It is a flow model of its own network and, for the rest, of the policy's parts: prompts are encoded and images
    decoded by them. Its velocity differs from the policy's by rounding alone, so it is exact to its precision and still
    never used by rollout or training, where the importance ratio must be 1 to the last digit.

    Args:
        policy: the model to copy; none of its weights is ever written.
        dtype: of the copy's weights; None = the policy's own.

    Raises:
        ValueError: the policy trains something else than plain LoRA matrices.
    """

    def __init__(self, policy: DiffusersModel, dtype: torch.dtype | None = None):
        self.__dict__.update(policy.__dict__)
        self.policy, self.mode, self._compiled = policy, "copy", False
        source = policy.network
        self._adapted = _lora_layers(source)
        with torch.device("meta"):
            # diffusers' own `to` warns about modules to be kept in float32, of which these networks have none
            network = nn.Module.to(type(source).from_config(source.config), dtype or source.dtype)
        self.network = network.to_empty(device=policy.device).requires_grad_(False).eval()
        # tables that are no buffers, such as frequencies of positions
        for name, module in self.network.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor):
                    setattr(module, key, getattr(source.get_submodule(name), key))
        use_attention(self.network, policy.attention)
        self._copy_all()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapter as it is now, by writing the adapted weights in place: a captured graph stays valid."""
        for name, layer in self._adapted.items():
            base = layer.get_base_layer().weight
            exact = torch.promote_types(base.dtype, torch.float32)
            merged = base.to(exact)
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                    merged = merged + layer.scaling[adapter] * (up.to(exact) @ down.to(exact))
            self.network.get_submodule(name).weight.copy_(merged)

    def encode(self, prompts: list[str]) -> Conditioning:
        return self.policy.encode(prompts)

    def reference(self) -> NoReturn:
        raise RuntimeError("the lookahead copy has its adapter merged; ask the policy for the reference")

    def bytes(self) -> int:
        """Memory of the copied weights."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return sum(x.numel() * x.element_size() for x in tensors)

    @torch.no_grad()
    def _copy_all(self) -> None:
        source = self.policy.network
        theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        own = {name.replace(_BASE, ""): tensor for name, tensor in theirs.items() if _ADAPTER not in name}
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            tensor.copy_(own[name])
        self.refresh()


def _lora_layers(network: Any) -> dict[str, Any]:
    """The adapted layers by their names in a network without an adapter."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: m for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        plain = isinstance(layer, Linear) and not (layer.lora_variant or any(layer.lora_bias.values()) or layer.merged)
        if not plain:
            raise ValueError(
                f"lookahead.copy_dtype: {name} carries something else than a plain, unmerged LoRA, which cannot be "
                "followed; set it to null"
            )
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and _ADAPTER not in name:
            raise ValueError(
                f"lookahead.copy_dtype: {name} is trained besides the LoRA, which the copy would not follow; "
                "set it to null"
            )
    return layers
