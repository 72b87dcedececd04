"""CLIPScore on a tiny random CLIP, against its formula."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from densegrpo_fast.embedded.architecture import build_tokenizer
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.clip import preprocess
from densegrpo_fast.rewards.registry import create

PROMPTS = ["a red circle", "two blue squares", "a green cross"]


def test_scores_follow_the_formula(clip_directory):
    images = torch.rand(3, 3, 40, 56)
    # the tokenizer is the model's unless another is named
    reward = create("clipscore", model=str(clip_directory), device="cpu")
    scores = RewardMixture({"clipscore": (reward, 1.0)})(images, PROMPTS).values
    model = CLIPModel.from_pretrained(clip_directory).eval().double()
    tokens = build_tokenizer(PROMPTS)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        picture = model.get_image_features(pixel_values=preprocess(images, 28).double()).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    cosine = (picture * text).sum(1) / (picture.norm(dim=1) * text.norm(dim=1))
    expected = model.logit_scale.exp().item() * cosine / 30
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert scores.unique().numel() == 3


def test_negative_similarities_stay_apart(clip_directory, monkeypatch):
    reward = create("clipscore", model=str(clip_directory), device="cpu")
    features = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-1.0, 0.0]])
    monkeypatch.setattr(reward.clip, "image_features", lambda images: features)
    monkeypatch.setattr(reward.clip, "text_features", lambda prompts: features[:1].expand(3, 2))
    monkeypatch.setattr(reward.clip._model.logit_scale, "data", torch.tensor(3.0).log())
    # cosines 1, -0.6 and -1, times 3 / 30
    torch.testing.assert_close(reward(torch.zeros(3, 3, 4, 4), PROMPTS), torch.tensor([0.1, -0.06, -0.1]))
