"""PickScore on a tiny random CLIP, against its formula on pictures prepared by Pillow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from densegrpo_fast.embedded.architecture import build_tokenizer
from densegrpo_fast.rewards.base import RewardMixture, create
from densegrpo_fast.rewards.pickscore import PickScore, preprocess

PROMPTS = ["a red circle", "two blue squares", "a green cross"]
SIZE = 28


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(PROMPTS)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small | {"image_size": SIZE, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def reward(directory: Path) -> PickScore:
    return PickScore(str(directory), str(directory), device="cpu")


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth random pictures whose values are exact in 8 bits."""
    coarse = torch.rand(count, 3, 5, 5)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine.mul(255).round() / 255


def prepared_by_pillow(image: torch.Tensor) -> torch.Tensor:
    """CLIP's preparation the usual way: an 8-bit picture, resized by Pillow, cropped, normalised."""
    picture = Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    width, height = picture.size
    scale = SIZE / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
    values = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    return torch.from_numpy((values - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(64, 64), (56, 84), (84, 56), (28, 28), (20, 20)])
def test_pictures_are_prepared_as_pillow_does(shape):
    images = pictures(2, *shape)
    expected = torch.stack([prepared_by_pillow(image) for image in images])
    # Pillow rounds to 8 bits after each of its two passes: half a level each, over the smallest std
    torch.testing.assert_close(preprocess(images, SIZE), expected, rtol=0, atol=1.1 / 255 / 0.26)


def test_overshoot_of_the_resize_is_cut_off():
    checks = (torch.arange(64).view(1, -1) // 8 + torch.arange(64).view(-1, 1) // 8).remainder(2).float()
    prepared = preprocess(checks.expand(1, 3, 64, 64), SIZE)
    # black and white in the first channel: (0 - mean) / std and (1 - mean) / std
    assert prepared[0, 0].min().item() == pytest.approx(-0.48145466 / 0.26862954, abs=1e-5)
    assert prepared[0, 0].max().item() == pytest.approx((1 - 0.48145466) / 0.26862954, abs=1e-5)


def test_scores_follow_the_formula(reward, directory):
    images = pictures(3, 28, 28)
    model = CLIPModel.from_pretrained(directory).eval()
    tokens = build_tokenizer(PROMPTS)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.stack([prepared_by_pillow(image) for image in images])
    with torch.no_grad():
        # CLIP's own forward: exp(logit_scale) * cos, prompts down, pictures across
        logits = model(pixel_values=pixels, **tokens).logits_per_text
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, logits.diagonal() / 26, rtol=1e-5, atol=1e-6)
    # the initial logit scale of CLIP is 2.6592, so |score| <= e^2.6592 / 26 = 0.549
    assert scores.abs().max() <= math.exp(2.6592) / 26


def test_chunks_and_order_do_not_change_scores(reward, directory):
    images, prompts = pictures(5, 40, 40), [PROMPTS[i] for i in (0, 1, 0, 2, 1)]
    scores = reward(images, prompts)
    small = PickScore(str(directory), str(directory), device="cpu", chunk=2)
    torch.testing.assert_close(small(images, prompts), scores)
    order = [4, 2, 0, 3, 1]
    torch.testing.assert_close(small(images[order], [prompts[i] for i in order]), scores[order])
    assert scores.unique().numel() == 5


def test_a_prompt_is_encoded_once(reward, monkeypatch):
    encoded = []
    tokenizer = reward._tokenizer

    def counting(prompts, **options):
        encoded.extend(prompts)
        return tokenizer(prompts, **options)

    monkeypatch.setattr(reward, "_tokenizer", counting)
    images = pictures(4, 28, 28)
    first = reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = reward(images, [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    assert encoded == PROMPTS
    torch.testing.assert_close(again[::2], first[::2])


def test_the_memory_of_prompts_is_bounded(reward, monkeypatch):
    monkeypatch.setattr("densegrpo_fast.rewards.pickscore._CACHED_PROMPTS", 2)
    images = pictures(3, 28, 28)
    scores = reward(images, PROMPTS)
    assert list(reward._text) == PROMPTS[1:]
    torch.testing.assert_close(reward(images, PROMPTS), scores)


def test_long_prompts_are_cut_and_no_pictures_are_fine(reward):
    image = pictures(1, 28, 28)
    long = " ".join(["a red circle"] * 40)
    torch.testing.assert_close(reward(image, [long]), reward(image, [long + " two blue squares"]))
    assert reward(image[:0], []).shape == (0,)


def test_it_is_registered_and_keeps_the_contract(directory):
    reward = create("pickscore", model=str(directory), processor=str(directory), device="cpu")
    images = pictures(2, 64, 64).requires_grad_()
    scores = RewardMixture({"pickscore": (reward, 26.0)})(images, PROMPTS[:2])
    assert scores.values.dtype == torch.float32 and not scores.values.requires_grad
    torch.testing.assert_close(scores.values, 26 * scores.per_reward["pickscore"])
    assert scores.missing_share == 0


def test_half_precision_weights_give_nearly_the_same_scores(reward, directory):
    images = pictures(3, 40, 40)
    half = PickScore(str(directory), str(directory), device="cpu", dtype=torch.bfloat16)
    # bfloat16 keeps 8 bits; scores lie within +-0.55
    torch.testing.assert_close(half(images, PROMPTS), reward(images, PROMPTS), rtol=0, atol=0.02)
    assert half(images, PROMPTS).dtype == torch.float32


@pytest.mark.parametrize("option", ["model", "processor"])
def test_missing_weights_are_named_with_the_way_out(directory, tmp_path, option):
    sources = {"model": str(directory), "processor": str(directory)}
    for source in (tmp_path / "absent", tmp_path):
        with pytest.raises(OSError, match=rf"cannot load its {option} from '{source}'[\s\S]*my_reward.py:score"):
            PickScore(**(sources | {option: str(source)}), device="cpu")


def test_a_hub_id_that_cannot_be_fetched_is_named(directory, monkeypatch):
    def offline(source, **options):
        assert options["use_safetensors"] is True, "weights in pickle form are never loaded"
        raise OSError("no connection")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"model from 'yuvalkirstain/PickScore_v1': no connection"):
        PickScore(processor=str(directory), device="cpu")


def test_a_chunk_below_one_is_refused(directory):
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        PickScore(str(directory), str(directory), chunk=0)
