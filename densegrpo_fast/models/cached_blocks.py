"""Reading a transformer's text features as they pass, and running its blocks on features read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def recording(network: Any, keep: Callable[[int, int, Tensor], None]) -> Iterator[None]:
    """Within the context, every forward of `network` hands the text's features of each block to `keep`.

    Hooks that only read: no number of the network changes.

    Args:
        keep: takes the block, 0 for keys or 1 for values, and them as [B, H, L, D/H].
    """

    def hook(number: int, which: int, heads: int) -> Callable[..., None]:
        return lambda _, __, output: keep(number, which, output if output.ndim == 4 else split_heads(output, heads))

    with ExitStack() as hooks:
        for number, block in enumerate(network.transformer_blocks):
            attention = block.attn
            key = attention.add_k_proj if attention.norm_added_k is None else attention.norm_added_k
            for which, module in enumerate((key, attention.add_v_proj)):
                hooks.enter_context(module.register_forward_hook(hook(number, which, attention.heads)))
        yield


@contextmanager
def reusing(network: Any, text_at: Callable[[int], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the context, no block of `network` computes its text stream: `text_at` names a block's keys and values."""

    def with_text(number: int, block: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            return encoder_hidden_states, image_block(block, hidden_states, temb, *text_at(number))

        return forward

    with ExitStack() as replacements:
        for number, block in enumerate(network.transformer_blocks):
            replacements.enter_context(replaced_forward(block, with_text(number, block)))
        # nobody reads the text stream
        replacements.enter_context(replaced_forward(network.context_embedder, lambda text: text))
        yield


def image_block(block: Any, image: Tensor, embedding: Tensor, text_key: Tensor, text_value: Tensor) -> Tensor:
    """The image stream of a diffusers `JointTransformerBlock`, given the text stream's keys and values.

    Image tokens attend to image and text as they always do; the text stream itself is not computed. Projections are
    called as the block's own modules, so an adapter on them has its say.

    Args:
        block: the block; dual attention (SD3.5) and the last block (no text output) included.
        image: [B, N, D] image tokens.
        embedding: [B, D] of time and pooled text.
        text_key: [B, H, L, D/H], normalised as the block does it.
        text_value: [B, H, L, D/H].

    Returns:
        [B, N, D]
    """
    modulated, gate, shift_mlp, scale_mlp, gate_mlp, *second = block.norm1(image, emb=embedding)
    image = image + gate[:, None] * _attention(block.attn, modulated, text_key, text_value)
    if second:
        modulated, gate = second
        image = image + gate[:, None] * _attention(block.attn2, modulated)
    modulated = block.norm2(image) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    return image + gate_mlp[:, None] * block.ff(modulated)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, D/H], a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def streams(args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Image and text tensor among the arguments of a block or of the whole transformer, which name them alike."""
    image, text = (
        inputs[name] if name in inputs else args[place]
        for place, name in enumerate(("hidden_states", "encoder_hidden_states"))
    )
    return image, text


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `module` runs `forward` instead of its own; afterwards it is as it was."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _attention(attention: Any, tokens: Tensor, *text: Tensor) -> Tensor:
    """Queries of `tokens` [B, N, D] over their own keys and values and, if given, the text's."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (split_heads(project(tokens), attention.heads) for project in projections)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    if attention.norm_k is not None:
        key = attention.norm_k(key)
    if text:
        key, value = torch.cat([key, text[0]], dim=2), torch.cat([value, text[1]], dim=2)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))
