"""A CLIP model as the rewards use it: features of pictures and prompts, of unit length, in float32.

Pictures stay tensors on their device. Pipelines that go through 8-bit pictures round before and after the resize; here
nothing is rounded, so small gains between similar pictures are not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densegrpo_fast.common.files import user_path
from densegrpo_fast.common.pretrained import NETWORK_FILES, TOKENIZER_FILES, fetch, load_network, load_tokenizer

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CACHED_PROMPTS = 8192


class Clip:
    """A CLIP model and its tokenizer.

    Args:
        reward: name of the reward it serves, for messages.
        model: hub id or local directory of the model, with safetensors weights.
        processor: hub id or local directory of its tokenizer; None = pictures only, without the text tower.
        device: where to run; None = the current GPU, or the CPU.
        dtype: of the network, a torch.dtype or its name; None = float16 on a GPU, float32 on the CPU.
        chunk: pictures, or new prompts, per forward pass.

    Raises:
        OSError: model or tokenizer cannot be loaded; the message says which, what was expected, and what to do.
        ValueError: chunk is below 1, or dtype is not a floating-point type.
    """

    def __init__(
        self,
        reward: str,
        model: str,
        processor: str | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chunk: int = 32,
    ):
        if chunk < 1:
            raise ValueError(f"{reward}: chunk must be at least 1, got {chunk}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = _dtype(reward, dtype) or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.chunk = chunk
        self._tokenizer = None if processor is None else _load_tokenizer(reward, processor)
        loaded = _load_model(reward, model, self.dtype)
        text, vision = loaded.config.text_config, loaded.config.vision_config
        if self._tokenizer is None:
            loaded.text_model = loaded.text_projection = None
        elif len(self._tokenizer) != text.vocab_size:
            # transformers makes an empty tokenizer of files that it does not understand, and says nothing
            words = f"it has {len(self._tokenizer)} tokens where {model} has {text.vocab_size}"
            raise _cannot_load(reward, "processor", str(processor), words)
        self._model = loaded.to(self.device).requires_grad_(False).eval()
        self._size, self._max_tokens = int(vision.image_size), int(text.max_position_embeddings)
        self._text: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return int(self._model.visual_projection.out_features)

    @torch.no_grad()
    def logits(self, images: Tensor, prompts: list[str]) -> Tensor:
        """CLIP's logits, exp(logit_scale) * cos(text, image), of each picture with its prompt.

        Args:
            images: [N, 3, H, W] float in [0, 1], any size and device.
            prompts: N sentences; what is beyond the model's tokens (77) is ignored.

        Returns:
            [N] float32 on the model's device.
        """
        similarity = (self.text_features(prompts) * self.image_features(images)).sum(-1)
        return self._model.logit_scale.float().exp() * similarity

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """[N, features] float32 of pictures [N, 3, H, W] in [0, 1]."""
        parts = [self._image_features(part) for part in images.split(self.chunk)] if len(images) else []
        return torch.cat(parts) if parts else torch.empty(0, self.width, device=self.device)

    def _image_features(self, images: Tensor) -> Tensor:
        pixels = preprocess(images.to(self.device), self._size).to(self.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """[N, features] float32 of N sentences; a sentence is encoded once and remembered."""
        if not prompts:
            return torch.empty(0, self.width, device=self.device)
        known = {prompt: self._text[prompt] for prompt in prompts if prompt in self._text}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            known |= zip(part, self._encode(part), strict=True)
        self._text |= {prompt: known[prompt] for prompt in new}
        while len(self._text) > _CACHED_PROMPTS:
            del self._text[next(iter(self._text))]
        return torch.stack([known[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Tensor:
        assert self._tokenizer is not None
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self.device)
        return _unit(
            self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's picture preparation on tensors: short side to `size` (bicubic), centre square, normalised.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        size: side of the result in pixels.

    Returns:
        [N, 3, size, size] float32.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    images = images.float()
    if shape != (height, width):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    # bicubic overshoots at edges, where an 8-bit picture would be cut off
    square = images[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (square.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (square - mean) / std


def _unit(output: Any) -> Tensor:
    """Features of length 1 in float32; transformers 5 wraps them in an output object, earlier ones do not."""
    features = getattr(output, "pooler_output", output)
    return F.normalize(features.float(), dim=-1)


def _dtype(reward: str, given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{reward}: dtype must be float32, float16 or bfloat16, got {given!r}")
    return dtype


def _load_tokenizer(reward: str, source: str) -> Any:
    from transformers import CLIPTokenizer

    try:
        return load_tokenizer(CLIPTokenizer, _directory(source, TOKENIZER_FILES))
    except OSError as error:
        raise _cannot_load(reward, "processor", source, str(error)) from None


def _load_model(reward: str, source: str, dtype: torch.dtype) -> Any:
    from transformers import CLIPModel

    try:
        return load_network(CLIPModel, _directory(source, NETWORK_FILES), dtype)
    except OSError as error:
        raise _cannot_load(reward, "model", source, str(error)) from None


def _directory(source: str, files: Sequence[str]) -> Path:
    """The directory that a source names, or to which these files of a hub id were downloaded."""
    path = user_path(source)
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")):
        raise OSError("there is no such directory")
    return fetch(source, files)


def _cannot_load(reward: str, option: str, source: str, problem: str) -> OSError:
    return OSError(
        f"{reward}: cannot load its {option} from {source!r}: {problem}\nWith a network, hub ids are downloaded once. "
        "Without one, copy the repositories to this machine and name the directories:\n"
        f"    --reward.options='{{{reward}: {{{option}: DIRECTORY}}}}'"
    )
