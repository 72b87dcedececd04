"""Reading a transformer's features as they pass, and running its blocks on features read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.features import CachedView, Features, gather_rows


@contextmanager
def recording(network: Any, spec: CacheSpec, current: Callable[[], tuple[Features, slice] | None]) -> Iterator[None]:
    """Within the context, every forward of `network` copies what `spec` names into `current()`, unless that is None.

    Hooks that only read: no number of the network changes.
    """
    blocks = network.transformer_blocks
    entered: list[Tensor] = []

    def keep_text(slot: int, which: int, heads: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            target = current()
            if target is not None:
                features, rows = target
                features.keep_text(slot, which, rows, output if output.ndim == 4 else split_heads(output, heads))

        return hook

    def keep_entry(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        entered[:] = streams(args, inputs)

    def keep_residual(_: Any, args: Any, output: tuple[Tensor | None, Tensor]) -> None:
        target, (text, image) = current(), output
        image_before, text_before = entered
        entered.clear()
        if target is None:
            return
        features, rows = target
        if features.image_residual is not None:
            features.image_residual[rows].copy_((image - image_before).detach())
        if features.text_residual is not None and text is not None:
            features.text_residual[rows].copy_((text - text_before).detach())

    with ExitStack() as hooks:
        for slot, number in enumerate(spec.text_blocks(len(blocks))):
            attention = blocks[number].attn
            norm, heads = attention.norm_added_k, attention.heads
            key = attention.add_k_proj if norm is None else norm
            hooks.enter_context(key.register_forward_hook(keep_text(slot, 0, heads)))
            hooks.enter_context(attention.add_v_proj.register_forward_hook(keep_text(slot, 1, heads)))
        if spec.reused:
            first, last = blocks[spec.reused.start], blocks[spec.reused.stop - 1]
            hooks.enter_context(first.register_forward_pre_hook(keep_entry, with_kwargs=True))
            hooks.enter_context(last.register_forward_hook(keep_residual))
        yield


@contextmanager
def reusing(network: Any, spec: CacheSpec, current: Callable[[], CachedView]) -> Iterator[None]:
    """Within the context, blocks of `network` run on the features that `current()` names, as `spec` says."""
    blocks = network.transformer_blocks
    computed = spec.computed(len(blocks))

    def with_text(slot: int, block: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            taken = current()
            text = taken.features.text_at(slot, taken.groups)
            return encoder_hidden_states, image_block(block, hidden_states, temb, *text)

        return forward

    def with_residual(
        hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        taken = current()
        if taken.features.text_residual is not None:
            encoder_hidden_states = encoder_hidden_states + gather_rows(taken.features.text_residual, taken.rows)
        return encoder_hidden_states, hidden_states + gather_rows(taken.features.image_residual, taken.rows)

    with ExitStack() as replacements:
        for slot, number in enumerate(spec.text_blocks(len(blocks))):
            replacements.enter_context(replaced_forward(blocks[number], with_text(slot, blocks[number])))
        for number, block in enumerate(blocks):
            if number not in computed:
                first = spec.reused and number == spec.reused.start
                replacements.enter_context(replaced_forward(block, with_residual if first else _pass_on))
        if spec.text or not computed:
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


def _pass_on(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return encoder_hidden_states, hidden_states
