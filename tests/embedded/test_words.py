"""Signs with a word: the closed list, the pictures, and that the OCR reward reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densegrpo_fast.embedded import words


def test_the_list_is_closed_and_a_part_of_it_held_out() -> None:
    assert 100 <= len(words.WORDS) == len(set(words.WORDS)) <= 120
    assert all(word.isalpha() and word.isupper() and 3 <= len(word) <= 5 for word in words.WORDS)
    known, held_out = words.split(held_out=False), words.split(held_out=True)
    assert sorted(known + held_out) == sorted(words.WORDS) and 15 <= len(held_out) <= 30
    # a held-out word has no letter that training never shows
    assert set("".join(held_out)) <= set("".join(known))
    assert words.prompt("RIVER") == 'a sign that says "RIVER"'


@pytest.mark.parametrize("word", ["ICE", "MOON", "WORLD"])
def test_signs_are_repeatable_varied_and_inside_the_frame(word: str) -> None:
    pytest.importorskip("PIL")
    pictures = [words.render(word, np.random.default_rng(seed)) for seed in range(12)]
    assert np.array_equal(pictures[0], words.render(word, np.random.default_rng(0)))
    assert all(p.shape == (3, 64, 64) and p.dtype == np.float32 and 0 <= p.min() <= p.max() <= 1 for p in pictures)
    tops = {int(np.flatnonzero((p[0] > 0.85).any(1))[0]) for p in pictures}
    assert len(tops) > 3
    for picture in pictures:
        # no letter touches the frame
        assert picture[0, :, [0, -1]].min() > 0.3 and picture[0, [0, -1]].min() > 0.3


def test_the_ocr_reward_reads_every_sign() -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("PIL")
    from densegrpo_fast.rewards.ocr import Ocr

    generator = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([words.render(word, generator) for word in words.WORDS[::4]]))
    scores = Ocr(detect=False, threads=1)(images, [words.prompt(word) for word in words.WORDS[::4]])
    assert np.mean([score == 1.0 for score in scores]) >= 0.95
