"""Which implementation computes a transformer's attention, through diffusers' dispatcher.

diffusers' own processor of SD3's joint attention calls PyTorch's attention directly, so `set_attention_backend` on such
a transformer changes nothing. The processor here computes the same and asks the dispatcher.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.models.cached_blocks import split_heads

Attention = Literal["auto", "native", "xformers", "flash"]
"""auto = the processors that the model comes with, which leave the kernel to PyTorch; native = the same through the
dispatcher; the others are packages."""

_PACKAGES = {"xformers": "xformers", "flash": "flash-attn"}


class DispatchedJointAttention:
    """Joint attention of image and text tokens (SD3, arXiv 2403.03206, section 4) by a backend of the dispatcher.

    Also serves the image-only second attention of SD3.5's dual blocks.

    Args:
        backend: a backend's name in diffusers' `AttentionBackendName`.
    """

    def __init__(self, backend: str):
        from diffusers.models.attention_dispatch import AttentionBackendName

        self._attention_backend = AttentionBackendName(backend)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one block.

        Args:
            attn: the block's diffusers `Attention`, whose modules project and normalise.
            hidden_states: [B, N, D] image tokens.
            encoder_hidden_states: [B, L, D] text tokens, or None.
            attention_mask: must be None, as it is in SD3.

        Returns:
            Image tokens [B, N, D], with text tokens given also those [B, L, D].
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        assert attention_mask is None
        image, text = hidden_states, encoder_hidden_states
        query, key, value = _heads(attn, image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if text is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            also = _heads(attn, text, *projections)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), also, strict=True))
        # the dispatcher takes and returns [B, N, H, D/H]
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mixed = dispatch_attention_fn(*turned, backend=self._attention_backend).flatten(2).to(query.dtype)
        to_out, dropout = attn.to_out
        if text is None:
            return dropout(to_out(mixed))
        image, text = mixed[:, : image.shape[1]], mixed[:, image.shape[1] :]
        return dropout(to_out(image)), text if attn.context_pre_only else attn.to_add_out(text)


def _heads(
    attn: Any, tokens: Tensor, to_query: Any, to_key: Any, to_value: Any, norm_query: Any, norm_key: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, H, N, D/H] of tokens [B, N, D]: the layout in which a feature cache reads the keys."""
    query, key, value = (split_heads(project(tokens), attn.heads) for project in (to_query, to_key, to_value))
    return (
        query if norm_query is None else norm_query(query),
        key if norm_key is None else norm_key(key),
        value,
    )


def use_attention(transformer: Any, name: Attention) -> None:
    """Let a transformer compute attention so.

    Raises:
        SetupError: the package is missing or too old; UsageError: it does not serve this device, precision or network.
        ValueError: there is no such choice.
    """
    if name not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {name!r}")
    if name == "auto":
        return
    check_attention(name, transformer.device, transformer.dtype)
    joint = [module for module in transformer.modules() if _is_joint(module)]
    for module in joint:
        module.set_processor(DispatchedJointAttention(name))
    if joint:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    processors: list[Any] = [getattr(module, "processor", None) for module in transformer.modules()]
    dispatching = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if not dispatching:
        raise UsageError(
            f"model.attention: {type(transformer).__name__} does not compute attention through diffusers' dispatcher; "
            "set it to auto"
        )
    for processor in dispatching:
        processor._attention_backend = AttentionBackendName(name)


def check_attention(name: Attention, device: torch.device, dtype: torch.dtype) -> None:
    """Raise the `UserError` that `use_attention` documents, if this choice cannot serve here."""
    from diffusers.models import attention_dispatch

    if name not in _PACKAGES:
        return
    package = _PACKAGES[name]
    usable = {"xformers": attention_dispatch._CAN_USE_XFORMERS_ATTN, "flash": attention_dispatch._CAN_USE_FLASH_ATTN}
    if not usable[name]:
        raise SetupError(
            f"model.attention: {name} needs the package {package}, which is missing, broken or too old here; install "
            "it, or set model.attention to native",
        )
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or (name == "flash" and not half):
        expected = "a CUDA device" + (" and model.dtype bfloat16 or float16" if name == "flash" else "")
        found = f"{str(dtype).removeprefix('torch.')} on {device.type}"
        raise UsageError(f"model.attention: {name} needs {expected}, the model is {found}; set it to native")


def _is_joint(module: Any) -> bool:
    from diffusers.models.attention_processor import Attention as Module
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    ours = (JointAttnProcessor2_0, DispatchedJointAttention)
    return isinstance(module, Module) and isinstance(module.processor, ours)
