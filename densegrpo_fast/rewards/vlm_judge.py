"""A vision-language model as judge, behind any OpenAI-compatible server (vLLM, SGLang, llama.cpp, hosted ones).

Each picture is shown with a question about its prompt, and the score is the last number in the answer that follows the
words "Final Score:". An answer without one, or outside the scale, is no score at all: missing, not 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from densegrpo_fast.common.pictures import encode_png, to_bytes
from densegrpo_fast.rewards.http import HttpFailure
from densegrpo_fast.rewards.remote import HttpReward, Pending, Reply

QUESTION = (
    "This picture was made for the following description:\n{prompt}\n\n"
    "Judge how well it shows what is described (objects, number, colours, places, written text), and how good it "
    "looks (sharpness, plausible details, composition). Explain in one or two sentences, then end with a line\n"
    "Final Score: X\nwhere X is a number from {lowest} (bad) to {highest} (excellent)."
)


@dataclass(kw_only=True, eq=False)
class VlmJudge(HttpReward):
    """The judge. Its further options are those of `http.Endpoint`; `url` ends where `/chat/completions` follows (/v1).

    Args:
        model: name of the model on the server.
        question: text shown with the picture; {prompt}, {lowest} and {highest} are filled in.
        pattern: regular expression whose first group is the score; its last match in the answer counts.
        lowest, highest: ends of the scale; the reward is score / highest, as Flow-GRPO divides UnifiedReward's.
        request: further fields of the request.

    Raises:
        OSError: the server does not answer, refuses the token, or does not have the model.
        ValueError: an option is out of range.
    """

    model: str
    question: str = QUESTION
    pattern: str = r"(?i)final score\W*?(-?\d+(?:\.\d+)?)"
    lowest: float = 1.0
    highest: float = 5.0
    request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -math.inf < self.lowest < self.highest < math.inf or self.highest <= 0:
            raise ValueError(f"lowest, highest: expected lowest < highest, above 0, got {self.lowest}, {self.highest}")
        if "{prompt}" not in self.question:
            raise ValueError("question: expected the place of the prompt, {prompt}, in it")
        try:
            self._pattern = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: not a regular expression: {error}") from None
        if self._pattern.groups < 1:
            raise ValueError(f"pattern: expected a group around the score, got {self.pattern!r}")
        self._find_model()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Pending:
        """Start judging pictures, a request each; awaiting the result gives the scores.

        Args:
            images: [N, 3, H, W] float in [0, 1]; sent in 8 bits.
            prompts: N sentences.
            metadata: not used.
        """
        pictures = to_bytes(images)
        return self.submit(self._ask, [(pictures[i : i + 1], prompt) for i, prompt in enumerate(prompts)])

    def read(self, answer: str) -> float | None:
        """The reward that an answer gives, or None."""
        matches = list(self._pattern.finditer(answer))
        try:
            score = float(matches[-1][1]) if matches else math.nan
        except (TypeError, ValueError):
            return None
        return score / self.highest if self.lowest <= score <= self.highest else None

    def _ask(self, pictures: np.ndarray, prompt: str) -> Reply:
        words = {"{prompt}": prompt, "{lowest}": f"{self.lowest:g}", "{highest}": f"{self.highest:g}"}
        # in one pass: a prompt may hold braces of its own
        question = re.sub("|".join(map(re.escape, words)), lambda match: words[match[0]], self.question)
        picture = {"url": f"data:image/png;base64,{encode_png(pictures[0])}"}
        content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": question}]
        payload = {**self.request, "model": self.model, "messages": [{"role": "user", "content": content}]}
        return [self.read(self.call("POST", "/chat/completions", payload, parse=_answer))]

    def _find_model(self) -> None:
        def known(data: Any) -> None:
            entries = data.get("data") if isinstance(data, dict) else None
            names = [entry.get("id") for entry in entries or [] if isinstance(entry, dict)]
            if names and self.model not in names:
                raise ValueError(f"expected the model {self.model!r} there, found {', '.join(map(str, names[:10]))}")

        try:
            self.call("GET", "/models", parse=known)
        except HttpFailure as failure:
            # not every server lists its models
            if failure.status not in (404, 405, 501):
                raise OSError(f"the VLM server at {self.address} does not answer as it should: {failure}") from None


def _answer(data: Any) -> str:
    try:
        text = data["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"expected a chat completion, got {str(data)[:200]}") from None
    if not isinstance(text, str):
        raise ValueError(f"expected an answer in words, got {str(text)[:200]}")
    return text
