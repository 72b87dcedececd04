"""OCR reward: does the picture show the text that its prompt asks for?

The text is read by rapidocr with the models in its wheel, so nothing is downloaded. The score is Flow-GRPO's (arXiv
2505.05470): with blanks and case left out, 1 if the wanted text is part of what was read, else
max(1 - N_edit / N_wanted, 0), where N_edit is the Levenshtein distance.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from densegrpo_fast.common.pictures import to_bytes

logger = logging.getLogger(__name__)

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')

_QUOTES = str.maketrans({**dict.fromkeys("‘’‚‛′ʼ", "'"), **dict.fromkeys("“”„‟″", '"')})


class Ocr:
    """The OCR reward.

    Args:
        detect: look for text anywhere in the picture; False = take the whole picture for one line of text, which is
            faster and fits small pictures of one word.
        min_side: pictures with a shorter short side are enlarged to this many pixels before text is looked for.
        threads: CPU threads of the recogniser; 0 = as many as there are cores.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed, or comes without models.
        ValueError: min_side or threads is out of range.
    """

    def __init__(self, *, detect: bool = True, min_side: int = 128, threads: int = 0):
        if not 32 <= min_side <= 2000:
            raise ValueError(f"ocr: min_side must lie in 32..2000, got {min_side}")
        if threads < 0:
            raise ValueError(f"ocr: threads must be at least 0, got {threads}")
        self.detect = detect
        self._reader = _reader(min_side, threads)
        self._warned = False
        # the models are loaded on first use, and should fail here if they do
        self.read(np.zeros((1, 64, 64, 3), dtype=np.uint8))

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> list[float | None]:
        """Score pictures.

        Args:
            images: [N, 3, H, W] float in [0, 1].
            prompts: N sentences with the wanted text in double quotes.
            metadata: the wanted text under "text", where a prompt does not quote it.

        Returns:
            N scores in [0, 1]; None (missing) where no text is asked for.
        """
        rows = metadata if metadata is not None else [{}] * len(prompts)
        wanted = [wanted_text(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        if not all(wanted) and not self._warned:
            self._warned = True
            example = prompts[next(index for index, text in enumerate(wanted) if not text)]
            logger.warning('ocr: no text in double quotes in the prompt "%s"; such pictures have no score', example)
        judged = [index for index, text in enumerate(wanted) if text]
        scores: list[float | None] = [None] * len(prompts)
        if judged:
            for index, found in zip(judged, self.read(to_bytes(images[judged])), strict=True):
                scores[index] = similarity(found, wanted[index])
        return scores

    def read(self, pictures: np.ndarray) -> list[str]:
        """The text in each picture [N, H, W, 3] uint8, lines from top to bottom; empty where there is none."""
        texts = []
        for picture in pictures:
            # it takes arrays in OpenCV's order of colours
            output = self._reader(np.ascontiguousarray(picture[..., ::-1]), use_det=self.detect)
            texts.append("".join(output.txts or ()))
        return texts


def wanted_text(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that a picture should show: what the prompt quotes first, else `metadata["text"]`, else nothing."""
    quoted = _QUOTED.search(prompt)
    if quoted is not None:
        return (quoted[1] or quoted[2] or "").strip()
    text = metadata.get("text")
    return text.strip() if isinstance(text, str) else ""


def similarity(found: str, wanted: str) -> float:
    """Flow-GRPO's score in [0, 1] of the text that was read for the text that was wanted (not empty).

    Both are brought to one form of Unicode (NFKC) and of quotation marks first: equal characters may have two codes.
    """
    found, wanted = (_plain(text) for text in (found, wanted))
    if wanted in found:
        return 1.0
    return max(1 - edit_distance(found, wanted) / len(wanted), 0.0)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).translate(_QUOTES).split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of a character that make one the other."""
    above = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (left != right)))
        above = current
    return above[-1]


def _reader(min_side: int, threads: int) -> Any:
    try:
        import onnxruntime  # noqa: F401 - rapidocr looks for it only when it is used
        import rapidocr
    except ImportError as error:
        raise ImportError(
            f"the reward ocr needs rapidocr and onnxruntime ({error}): pip install 'densegrpo-fast[ocr]'"
        ) from None
    models = Path(rapidocr.__file__).parent / "models"
    files = {}
    for task in ("det", "rec"):
        found = sorted(models.glob(f"*_{task}_*.onnx"))
        if not found:
            raise ImportError(
                f"this version of rapidocr comes without its {task} model in {models}: pip install -U rapidocr"
            )
        # a named file is never downloaded
        files[f"{task.capitalize()}.model_path"] = str(found[-1])
    return rapidocr.RapidOCR(
        params={
            **files,
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Det.limit_type": "min",
            "Det.limit_side_len": min_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1,
        }
    )
