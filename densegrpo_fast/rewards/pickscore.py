"""PickScore: how much people would prefer a picture for its prompt, as learned from the Pick-a-Pic votes.

A CLIP-H fine-tuned on pairwise choices (arXiv 2305.01569); the score of a picture x and a prompt c is
exp(logit_scale) * cos(text(c), image(x)). It is divided by 26, as Flow-GRPO (arXiv 2505.05470) does for training, which
brings it near 1; published tables quote the undivided number, around 20 to 24.

Pictures stay tensors on their device. Pipelines that go through 8-bit pictures round before and after the resize; here
nothing is rounded, so small gains between similar pictures are not lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIVISOR = 26.0
"""Flow-GRPO's scale."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CACHED_PROMPTS = 8192


class PickScore:
    """The PickScore reward.

    Args:
        model: hub id or local directory of the CLIP model, with safetensors weights.
        processor: hub id or local directory of its tokenizer.
        device: where to score; None = the current GPU, or the CPU.
        dtype: of the network; None = float16 on a GPU, float32 on the CPU. Features are normalised and multiplied in
            float32 in either case.
        chunk: pictures, or new prompts, per forward pass.

    Raises:
        OSError: model or tokenizer cannot be loaded; the message says which and how to name a local directory.
        ValueError: chunk is below 1.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int = 32,
    ):
        from transformers import CLIPModel, CLIPTokenizer

        if chunk < 1:
            raise ValueError(f"PickScore: chunk must be at least 1, got {chunk}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.chunk = chunk
        self._tokenizer = _load(CLIPTokenizer, "processor", processor)
        loaded = _load(CLIPModel, "model", model, dtype=self.dtype, use_safetensors=True)
        if len(self._tokenizer) != loaded.config.text_config.vocab_size:
            # transformers makes an empty tokenizer of a directory without its files, and says nothing
            words = f"it has {len(self._tokenizer)} tokens where {model} has {loaded.config.text_config.vocab_size}"
            raise _cannot_load("processor", processor, words)
        self._model = loaded.to(self.device).requires_grad_(False).eval()
        self._size = int(loaded.config.vision_config.image_size)
        self._max_tokens = int(loaded.config.text_config.max_position_embeddings)
        self._text: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        """Score pictures.

        Args:
            images: [N, 3, H, W] float in [0, 1], any size and device.
            prompts: N sentences; what is beyond the model's 77 tokens is ignored.
            metadata: not used.

        Returns:
            [N] float32 on the model's device, about 0.7 to 0.95 for real pictures.
        """
        if not len(images):
            return torch.empty(0, device=self.device)
        text = self._text_features(list(prompts))
        features = torch.cat([self._image_features(part) for part in images.split(self.chunk)])
        return self._model.logit_scale.float().exp() * (text * features).sum(-1) / DIVISOR

    def _image_features(self, images: Tensor) -> Tensor:
        pixels = preprocess(images.to(self.device), self._size).to(self.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels))

    def _text_features(self, prompts: list[str]) -> Tensor:
        """[N, features] float32; a prompt is encoded once and remembered."""
        known = {prompt: self._text[prompt] for prompt in prompts if prompt in self._text}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            tokens = self._tokenizer(
                part, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self.device)
            output = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            known |= zip(part, _unit(output), strict=True)
        self._text |= {prompt: known[prompt] for prompt in new}
        while len(self._text) > _CACHED_PROMPTS:
            del self._text[next(iter(self._text))]
        return torch.stack([known[prompt] for prompt in prompts])


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


def _load(kind: Any, option: str, source: str, **options: Any) -> Any:
    path = Path(source).expanduser()
    if not path.is_dir() and source.startswith((".", "/", "~")):
        raise _cannot_load(option, source, "there is no such directory")
    try:
        return kind.from_pretrained(str(path) if path.is_dir() else source, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(option, source, str(error).strip()) from None


def _cannot_load(option: str, source: str, problem: str) -> OSError:
    return OSError(
        f"PickScore: cannot load its {option} from {source!r}: {problem}\nWith a network it is downloaded once. "
        "Without one, copy the repositories\n"
        "    yuvalkirstain/PickScore_v1, laion/CLIP-ViT-H-14-laion2B-s32B-b79K\nto this machine, write\n"
        "    from densegrpo_fast.rewards.pickscore import PickScore\n"
        '    score = PickScore(model="DIRECTORY", processor="DIRECTORY")\n'
        "in a file my_reward.py, and give it as the reward: reward.terms='{my_reward.py:score: 1.0}'."
    )
