"""What a cache specification means, and which ones and which networks are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.tiny import tiny_sd3


def test_what_is_left_to_compute() -> None:
    spec = CacheSpec(text=True, reuse_blocks=(2, 5), skip_blocks=(0, 6))
    assert spec.name == "text+reuse[2,5)+skip{0,6}"
    assert spec.computed(8) == spec.text_blocks(8) == [1, 5, 7]
    assert spec.records
    assert not CacheSpec(skip_blocks=(1,)).records
    assert CacheSpec(text=True, own_text=True).name == "text:own"


@pytest.mark.parametrize(
    ("text", "alike"), [("text", 6), ("text:own", 1), ("reuse:1-2", 1), ("text+reuse:1-2", 1), ("text+skip:0", 6)]
)
def test_what_the_samples_of_a_prompt_have_in_common(text: str, alike: int) -> None:
    """With a prompt's text alone all of its samples take over the same; a residual is each one's own."""
    assert CacheSpec.parse(text).alike(6) == alike


@pytest.mark.parametrize(
    ("spec", "needed"),
    [
        (CacheSpec(reuse_blocks=(2, 5)), True),
        # nobody reads the text stream after the last block, after blocks that are skipped, or when it is kept itself
        (CacheSpec(reuse_blocks=(2, 8)), False),
        (CacheSpec(reuse_blocks=(2, 6), skip_blocks=(6, 7)), False),
        (CacheSpec(reuse_blocks=(2, 5), text=True), False),
        (CacheSpec(skip_blocks=(2,)), False),
    ],
)
def test_when_the_residual_of_the_text_is_needed(spec: CacheSpec, needed: bool) -> None:
    assert spec.keeps_text_residual(8) == needed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected something to reuse (text, reuse:2-5 or skip:0,6), or null for no cache"),
        (
            {"reuse_blocks": (2, 2)},
            "expected reuse with a first block and a later end (not included), got reuse:2-2",
        ),
        (
            {"reuse_blocks": (-1, 2)},
            "expected reuse with a first block and a later end (not included), got reuse:-1-2",
        ),
        ({"skip_blocks": (2, 1)}, "expected skip with increasing block numbers from 0, got skip:2,1"),
        ({"skip_blocks": (-1,)}, "expected skip with increasing block numbers from 0, got skip:-1"),
        (
            {"skip_blocks": (0, 2), "reuse_blocks": (1, 3)},
            "expected no block in both of reuse:1-3 and skip:0,2, got [2]",
        ),
        ({"skip_blocks": (0,), "own_text": True}, "expected text:own for each sample's own text, got no text"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^lookahead\.cache: {re.escape(message)}$"):
        CacheSpec(**options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            CacheSpec(reuse_blocks=(1, 3)),
            "expected reuse with an end of at most 2, as this model has blocks 0..1, got reuse:1-3",
        ),
        (CacheSpec(skip_blocks=(2,)), "expected skip with blocks of this model, 0..1, got skip:2"),
        (CacheSpec(skip_blocks=(0, 1)), "expected at least one block to be left, got skip:0,1, which is all"),
    ],
)
def test_blocks_that_a_network_lacks(spec: CacheSpec, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^lookahead\.cache: {re.escape(message)}$"):
        spec.check(tiny_sd3().network)


def test_networks_that_are_not_supported() -> None:
    spec, network = CacheSpec(text=True), tiny_sd3().network
    spec.check(network)
    with pytest.raises(
        ValueError, match=r"^lookahead\.cache: only SD3's transformer .* got Linear; set it to null for"
    ):
        spec.check(torch.nn.Linear(1, 1))
    network.transformer_blocks[1].attn.set_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(
        ValueError, match=r"^lookahead\.cache: block 1 has FusedJointAttnProcessor2_0 where plain joint"
    ):
        spec.check(network)
