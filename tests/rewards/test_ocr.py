"""The OCR reward: Flow-GRPO's score, the wanted text, and real reading where rapidocr is installed."""

from __future__ import annotations

import importlib.util
import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.ocr import Ocr, edit_distance, similarity, wanted_text
from densegrpo_fast.rewards.registry import create

INSTALLED = all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime"))
needs_rapidocr = pytest.mark.skipif(not INSTALLED, reason="needs the extra ocr (rapidocr, onnxruntime)")
WORDS = ["CAFE", "HELLO", "OPEN", "TAXI", "BOOK", "Music", "green", "42nd"]


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign that says "Hello World"', {}, "Hello World"),
        ('the words "one" and "two"', {}, "one"),
        ("a mug with “Good day” on it", {}, "Good day"),
        ("a sign", {}, ""),
        ('a sign that says ""', {}, ""),
        ('a sign that says " "', {"text": "ignored, the prompt quotes"}, ""),
        ('half a "quote', {"text": " from the file "}, "from the file"),
        ("a sign", {"text": 3}, ""),
    ],
)
def test_the_wanted_text(prompt, metadata, expected):
    assert wanted_text(prompt, metadata) == expected


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("hello", "Hello", 1.0),
        ("say HELLO world", "hello", 1.0),
        ("HelloWorld", "hello  world", 1.0),
        # one of four letters replaced: 1 - 1/4
        ("cave", "cafe", 0.75),
        # two of five missing: 1 - 2/5
        ("hlo", "hello", 0.6),
        ("", "hello", 0.0),
        # 12 unrelated letters: the distance is capped at the wanted length
        ("unrelatedtxt", "abc", 0.0),
    ],
)
def test_the_score_is_flow_grpos(found, wanted, expected):
    assert similarity(found, wanted) == pytest.approx(expected)


def test_edit_distance_of_known_pairs():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2


@settings(deadline=None, max_examples=60)
@given(st.text("ab ", max_size=7), st.text("ab ", max_size=7), st.text("ab ", max_size=7))
def test_edit_distance_is_a_metric(first, second, third):
    distance = edit_distance(first, second)
    assert (distance == 0) == (first == second)
    assert distance == edit_distance(second, first)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert edit_distance(first, third) <= distance + edit_distance(second, third)


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"the reward ocr needs rapidocr .*pip install 'densegrpo-fast\[ocr\]'"):
        create("ocr")


def drawn(word: str, size: int = 64) -> torch.Tensor:
    """The word in black on white, as large as fits: [3, size, size] in [0, 1]."""
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    points = size // 2
    while True:
        font = ImageFont.load_default(points)
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        if right - left <= size - 8:
            break
        points -= 1
    draw.text(((size - right - left) / 2, (size - bottom - top) / 2), word, fill="black", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def blank_pictures() -> torch.Tensor:
    """Noise of two kinds, and flat pictures: black, white, grey and red. [6, 3, 64, 64]."""
    red = torch.zeros(3, 64, 64)
    red[0] = 1
    flat = [torch.full((3, 64, 64), value) for value in (0.0, 1.0, 0.5)]
    return torch.stack([torch.rand(3, 64, 64), 0.5 + 0.15 * torch.randn(3, 64, 64), *flat, red])


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return create("ocr", threads=1)


@needs_rapidocr
def test_rendered_words_are_read_exactly(ocr):
    images = torch.stack([drawn(word) for word in WORDS])
    assert (
        RewardMixture({"ocr": (ocr, 1.0)})(images, [f'the word "{word}"' for word in WORDS]).values.tolist()
        == [1.0] * 8
    )
    pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert ocr.read(pixels) == WORDS


@needs_rapidocr
@pytest.mark.parametrize("detect", [True, False])
def test_noise_and_flat_pictures_score_0(detect):
    images = blank_pictures()
    assert create("ocr", detect=detect, threads=1)(images, ['a sign "OPEN"'] * len(images)) == [0.0] * len(images)


@needs_rapidocr
def test_a_whole_picture_can_be_taken_for_one_line():
    reader = create("ocr", detect=False, threads=1)
    images = torch.stack([drawn(word) for word in WORDS[:3]])
    assert reader(images, [f'"{word}"' for word in WORDS[:3]]) == [1.0] * 3


@needs_rapidocr
def test_a_wrong_word_scores_by_its_distance(ocr):
    # CAFE for CAVE: one of four letters; for TAXI: the A alone is in place
    assert ocr(drawn("CAFE")[None].expand(2, -1, -1, -1), ['"CAVE"', '"TAXI"']) == [0.75, 0.25]


@needs_rapidocr
def test_prompts_without_a_wanted_text_have_no_score(ocr, caplog):
    images = torch.stack([drawn("OPEN"), drawn("OPEN"), drawn("OPEN")])
    with caplog.at_level(logging.WARNING):
        scores = [ocr(images, ["a sign", 'says "open"', 'empty ""'], [{}, {}, {}]) for _ in range(2)]
    assert scores == [[None, 1.0, None]] * 2
    assert [record.getMessage() for record in caplog.records if "no text in double quotes" in record.getMessage()] == [
        'ocr: no text in double quotes in the prompt "a sign"; such pictures have no score'
    ]
    assert ocr(images[:1], ["a sign"], [{"text": "OPEN"}]) == [1.0]


@needs_rapidocr
def test_it_reads_without_a_network(ocr, monkeypatch):
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert create("ocr", threads=1)(drawn("BOOK")[None], ['"book"']) == [1.0]


@needs_rapidocr
@pytest.mark.parametrize("options", [{"min_side": 8}, {"threads": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create("ocr", **options)
