"""PickScore on a tiny random CLIP, against its formula."""

from __future__ import annotations

import math

import torch
from transformers import CLIPModel

from densegrpo_fast.embedded.architecture import build_tokenizer
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.clip import preprocess
from densegrpo_fast.rewards.registry import create

PROMPTS = ["a red circle", "two blue squares", "a green cross"]


def test_scores_follow_the_formula(clip_directory):
    images = torch.rand(3, 3, 28, 28)
    reward = create("pickscore", model=str(clip_directory), processor=str(clip_directory), device="cpu")
    model = CLIPModel.from_pretrained(clip_directory).eval()
    tokens = build_tokenizer(PROMPTS)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=preprocess(images, 28), **tokens).logits_per_text
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, logits.diagonal() / 26, rtol=1e-5, atol=1e-6)
    # the initial logit scale of CLIP is 2.6592, so |score| <= e^2.6592 / 26 = 0.549
    assert scores.abs().max() <= math.exp(2.6592) / 26


def test_it_keeps_the_contract(clip_directory):
    reward = create("pickscore", model=str(clip_directory), processor=str(clip_directory), device="cpu")
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    scores = RewardMixture({"pickscore": (reward, 26.0)})(images, PROMPTS[:2])
    assert scores.values.dtype == torch.float32 and not scores.values.requires_grad
    torch.testing.assert_close(scores.values, 26 * scores.per_reward["pickscore"])
    assert scores.missing_share == 0
