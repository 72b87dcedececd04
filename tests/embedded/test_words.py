"""Signs with a word: the closed list, the pictures, and that the OCR reward reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densegrpo_fast.config.cli import load_config
from densegrpo_fast.embedded import EMBEDDED, card, words
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.loading import load_pipeline
from densegrpo_fast.training.prompts import built_in_prompts


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


def test_the_prompts_of_the_preset_are_the_words() -> None:
    config = load_config("embedded_words")
    assert (config.data.prompts, config.data.eval_prompts, config.model.path) == ("words", "words", "embedded_words")
    held_out = built_in_prompts("words", held_out=True).prompts
    assert list(held_out) == [words.prompt(word) for word in words.split(held_out=True)]
    assert len(held_out) == config.evaluation.num_prompts
    assert not set(held_out) & set(built_in_prompts("words", held_out=False).prompts)


@pytest.fixture(scope="module")
def model() -> DiffusersModel:
    return load_pipeline("embedded_words", device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)


def test_the_weights_are_small(model: DiffusersModel) -> None:
    files = [path for path in EMBEDDED["embedded_words"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 10**6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_held_out_words_are_written(model: DiffusersModel) -> None:
    pytest.importorskip("rapidocr")
    from densegrpo_fast.rewards.ocr import Ocr

    prompts = [words.prompt(word) for word in words.split(held_out=True)]
    latents = card.sample_latents(model.pipeline, prompts, 2.0, seed=0)
    scores = Ocr(detect=False, threads=1)(card.decode(model.pipeline, latents), prompts)
    # the card says .92 of eight pictures each
    assert np.mean([score == 1.0 for score in scores]) >= 0.75


@pytest.mark.ci
def test_both_decoders_draw_the_same_signs(model: DiffusersModel) -> None:
    prompts = [words.prompt(word) for word in words.split(held_out=True)]
    latents = card.sample_latents(model.pipeline, prompts, 2.0, seed=0)
    full, preview = model.decode(latents), model.decode(latents, "preview")
    assert (full - preview).abs().mean() < 0.03
