"""The adapter's product in the precision of the half-precision weights that it adapts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def lora_config(**settings: Any) -> LoraConfig:
    """peft's configuration of a LoRA whose linear layers are `LoraLinear`; `settings` are `LoraConfig`'s own."""
    config = LoraConfig(**settings)
    config._register_custom_module({nn.Linear: LoraLinear})
    return config


class LoraLinear(Linear):
    """peft's LoRA layer, with the products of a half-precision layer computed by `lora_linear`.

    The adapter stays float32: names, values, files, merging and switching off are peft's. Every other case (a float32
    layer, dropout, several adapters, variants such as DoRA, a quantised or trained base) is peft's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if args or kwargs or type(base) is not nn.Linear or not x.dtype == base.weight.dtype in _HALF:
            return super().forward(x, *args, **kwargs)
        # of strided tokens PyTorch adds the bias in a pass of its own, rounding twice
        x = x.contiguous()
        name = self._plain_adapter()
        if name is None:
            return super().forward(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, down, up, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """The one adapter in use, if it is two matrices and nothing else on a frozen layer."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or self.base_layer.weight.requires_grad:
            return None
        (name,) = active
        plain = isinstance(self.lora_dropout[name], nn.Identity) and name not in self.lora_variant
        return name if plain and not self.lora_bias[name] else None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T (LoRA, arXiv 2106.09685), all products in the precision of `weight`.

    What mixed precision does to a LoRA (`torch.autocast`), with the sum in the matrix product. Of SD3.5-Medium an eager
    forward moves 12.7 GB a row in place of 18.7 with products in float32, its backward 20.6 in place of 27.4, and the
    graph keeps 2.0 in place of 2.6 (`benches/iteration/bench_lora.py`). The same operations with and without a graph.

    Args:
        x: [..., in] in the dtype of `weight`.
        weight, bias: [out, in] and [out], frozen.
        down, up: A [rank, in] and B [out, rank], of any floating dtype, in which their gradients are.

    Returns:
        [..., out] in the dtype of `weight`; differentiable in `x`, `down` and `up`.
    """
    output: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scale)
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, scale: float) -> Tensor:
        low, high = down.to(weight.dtype), up.to(weight.dtype)
        output, hidden = F.linear(x, weight, bias), F.linear(x, low)
        output.flatten(0, -2).addmm_(hidden.flatten(0, -2), high.t(), alpha=scale)
        ctx.save_for_backward(x, weight, low, high, hidden)
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, high, hidden = ctx.saved_tensors
        x_grad = low_grad = high_grad = None
        rows = grad.flatten(0, -2)
        hidden_grad = rows @ high
        if ctx.needs_input_grad[0]:
            x_grad = (rows @ weight).addmm_(hidden_grad, low, alpha=ctx.scale).view(x.shape)
        if ctx.needs_input_grad[3]:
            low_grad = ctx.scale * (hidden_grad.t() @ x.flatten(0, -2)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            high_grad = ctx.scale * (rows.t() @ hidden.flatten(0, -2)).to(ctx.dtypes[1])
        return x_grad, None, None, low_grad, high_grad, None
