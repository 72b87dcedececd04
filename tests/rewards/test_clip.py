"""Clip on a tiny random model: preparation of pictures, features, memory of prompts, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, PreTrainedTokenizerBase

from densegrpo_fast.embedded.architecture import build_tokenizer
from densegrpo_fast.rewards.clip import Clip, preprocess

PROMPTS = ["a red circle", "two blue squares", "a green cross"]
SIZE = 28


def clip(directory: Path, processor: Path | None = None, **options) -> Clip:
    return Clip("pickscore", str(directory), str(processor or directory), device="cpu", **options)


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


def test_logits_are_those_of_the_model(clip_directory):
    images = pictures(3, 28, 28)
    model = CLIPModel.from_pretrained(clip_directory).eval()
    tokens = build_tokenizer(PROMPTS)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.stack([prepared_by_pillow(image) for image in images])
    with torch.no_grad():
        # CLIP's own forward: exp(logit_scale) * cos, prompts down, pictures across
        expected = model(pixel_values=pixels, **tokens).logits_per_text.diagonal()
    torch.testing.assert_close(clip(clip_directory).logits(images, PROMPTS), expected, rtol=1e-5, atol=2e-5)


def test_features_have_length_1(clip_directory):
    both = clip(clip_directory)
    for features in (both.image_features(pictures(2, 40, 40)), both.text_features(PROMPTS[:2])):
        assert features.shape == (2, both.width) == (2, 8) and features.dtype == torch.float32
        torch.testing.assert_close(features.square().sum(1), torch.ones(2))


def test_chunks_and_order_do_not_change_logits(clip_directory):
    images, prompts = pictures(5, 40, 40), [PROMPTS[i] for i in (0, 1, 0, 2, 1)]
    logits = clip(clip_directory).logits(images, prompts)
    small = clip(clip_directory, chunk=2)
    torch.testing.assert_close(small.logits(images, prompts), logits)
    order = [4, 2, 0, 3, 1]
    torch.testing.assert_close(small.logits(images[order], [prompts[i] for i in order]), logits[order])
    assert logits.unique().numel() == 5


def encoded_by(monkeypatch):
    """The prompts that are tokenized from now on."""
    encoded, call = [], PreTrainedTokenizerBase.__call__

    def counting(tokenizer, prompts, *given, **options):
        encoded.extend(prompts)
        return call(tokenizer, prompts, *given, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counting)
    return encoded


def test_a_prompt_is_encoded_once(clip_directory, monkeypatch):
    model, encoded = clip(clip_directory), encoded_by(monkeypatch)
    first = model.text_features([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = model.text_features([PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    assert encoded == PROMPTS
    torch.testing.assert_close(again[::2], first[::2])


def test_the_memory_of_prompts_is_bounded(clip_directory, monkeypatch):
    monkeypatch.setattr("densegrpo_fast.rewards.clip._CACHED_PROMPTS", 2)
    model, encoded = clip(clip_directory), encoded_by(monkeypatch)
    features = model.text_features(PROMPTS)
    model.text_features(PROMPTS[1:])
    assert encoded == PROMPTS
    torch.testing.assert_close(model.text_features(PROMPTS), features)
    assert encoded == [*PROMPTS, PROMPTS[0]]


def test_long_prompts_are_cut_and_no_pictures_are_fine(clip_directory):
    model = clip(clip_directory)
    long = " ".join(["a red circle"] * 40)
    torch.testing.assert_close(model.text_features([long]), model.text_features([long + " two blue squares"]))
    assert model.logits(torch.empty(0, 3, 28, 28), []).shape == (0,)


def test_half_precision_weights_give_nearly_the_same_logits(clip_directory):
    images = pictures(3, 40, 40)
    half = clip(clip_directory, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; logits lie within +-e^2.6592 = 14.3
    torch.testing.assert_close(
        half.logits(images, PROMPTS), clip(clip_directory).logits(images, PROMPTS), rtol=0, atol=0.5
    )
    assert half.logits(images, PROMPTS).dtype == torch.float32


def test_without_a_tokenizer_the_text_tower_is_dropped(clip_directory):
    images = pictures(2, 28, 28)
    alone = Clip("aesthetic", str(clip_directory), None, device="cpu")
    torch.testing.assert_close(alone.image_features(images), clip(clip_directory).image_features(images))
    assert not any("text" in name for name, _ in alone._model.named_parameters())


@pytest.fixture
def copy(clip_directory: Path, tmp_path: Path) -> Path:
    """A copy of the model's directory, to be damaged."""
    return shutil.copytree(clip_directory, tmp_path / "copy")


def pickled_only(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()


def without_a_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["visual_projection.weight"] = torch.zeros(5, 16)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def cut(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def of_another_kind(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"model_type": "t5"}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (pickled_only, r"expected safetensors weights, found only pytorch_model.bin: a pickle file can run any code"),
        (without_a_tensor, r"lack 1 of the network's tensors, such as visual_projection.weight"),
        (of_another_shape, r"asks for visual_projection.weight of shape \[8, 16\], its weights have \[5, 16\]"),
        (cut, r"Error while deserializing header"),
        (of_another_kind, r"expected a network of the kind clip, its config.json says t5"),
        (lambda copy: (copy / "model.safetensors").unlink(), r"expected safetensors weights, found none"),
        (lambda copy: (copy / "config.json").unlink(), r"expected the file config.json in this directory"),
        (lambda copy: (copy / "config.json").write_text("["), r"its config.json is not a JSON object"),
        (lambda copy: (copy / "config.json").write_text("[]"), r"its config.json is not a JSON object"),
    ],
)
def test_a_wrong_or_partial_model_is_named(
    clip_directory: Path, copy: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(copy)
    with pytest.raises(OSError, match=rf"pickscore: cannot load its model from '{copy}': [\s\S]*{expected}"):
        clip(copy, clip_directory)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda copy: (copy / "tokenizer.json").unlink(), r"expected tokenizer.json, or vocab.json and merges.txt"),
        (lambda copy: (copy / "tokenizer.json").write_text("{"), r""),
        (lambda copy: build_tokenizer(["a"]).save_pretrained(copy), r"it has \d+ tokens where .* has \d+"),
    ],
)
def test_a_wrong_or_partial_tokenizer_is_named(
    clip_directory: Path, copy: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(copy)
    with pytest.raises(OSError, match=rf"pickscore: cannot load its processor from '{copy}': [\s\S]*{expected}"):
        clip(clip_directory, copy)


@pytest.mark.parametrize("option", ["model", "processor"])
def test_a_missing_directory_is_named_with_the_way_out(clip_directory, tmp_path, option):
    sources = {"model": str(clip_directory), "processor": str(clip_directory)}
    expected = (
        rf"cannot load its {option} from '.*absent'[\s\S]*--reward.options='{{pickscore: {{{option}: DIRECTORY}}}}'"
    )
    with pytest.raises(OSError, match=expected):
        Clip("pickscore", **(sources | {option: str(tmp_path / "absent")}), device="cpu")


def test_a_hub_id_is_downloaded_as_safetensors(clip_directory, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(clip_directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Clip("pickscore", "some/model", "another/tokenizer", device="cpu")
    assert [name for name, _ in asked] == ["another/tokenizer", "some/model"]
    assert not any(fnmatch(name, pattern) for _, files in asked for pattern in files for name in ("pytorch_model.bin",))
    assert any(fnmatch("model.safetensors", pattern) for pattern in asked[1][1])


def test_a_hub_id_that_cannot_be_fetched_is_named(clip_directory, monkeypatch):
    def offline(repository, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"model from 'some/model': the hub cannot be reached[\s\S]*{model: DIRECTORY}"):
        Clip("pickscore", "some/model", str(clip_directory), device="cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"chunk": 0}, "chunk must be at least 1, got 0"), ({"dtype": "int8"}, "dtype must be"), ({"dtype": "x"}, "'x'")],
)
def test_options_out_of_range_are_refused(clip_directory, options, expected):
    with pytest.raises(ValueError, match=expected):
        clip(clip_directory, **options)
