"""Prompts: where a run takes them from, reading a file of them, and the order in which iterations use them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from densegrpo_fast.common.errors import RewardError, UsageError
from densegrpo_fast.common.files import read_plainly
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.rewards.registry import check_prompts, check_sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densegrpo_fast.config import Config

logger = logging.getLogger(__name__)

_DIRECTORY = Path(__file__).resolve().parents[1] / "prompts"
BUILT_IN = ("general", "geneval", "ocr", "scenes", "words")
"""Prompt sets that come with the package, each with training and held-out prompts.

`scenes` and `words` are the embedded models' and generated; the others are files.
"""

_SENTENCES = 600
"""Training (and at most held-out) sentences of `scenes`; the six categories take turns until each runs out."""

_TABLES = {".tsv": "\t", ".csv": ","}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what their file says about each.

    Attributes:
        prompts: the texts, in file order, duplicates kept.
        metadata: one mapping per prompt for the rewards: the whole record of a .jsonl line, else empty.
    """

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("PromptSet: expected at least one prompt, got none")
        if len(self.prompts) != len(self.metadata):
            raise ValueError(
                f"PromptSet: expected one metadata mapping per prompt, got {len(self.metadata)} for {len(self.prompts)}"
            )

    def __len__(self) -> int:
        return len(self.prompts)


def built_in_prompts(name: str, held_out: bool) -> PromptSet:
    """A prompt set of the package: the training prompts, or the held-out ones.

    Args:
        name: a start of a few dozen prompts: `general` (all kinds of pictures), `ocr` (a text to be written, in double
            quotes), or `geneval` (objects, numbers, colours and places, with what to look for as metadata); or the
            sentences of an embedded model, `scenes` or `words`.
        held_out: the held-out prompts, none of which is among the training ones.
    """
    if name in ("scenes", "words"):
        from densegrpo_fast.embedded import scenes, words  # bring numpy, which reading a file does not need

        sentences = (
            scenes.prompts(held_out=held_out, count=_SENTENCES)
            if name == "scenes"
            else [words.prompt(word) for word in words.split(held_out)]
        )
        return PromptSet(tuple(sentences), tuple({} for _ in sentences))
    suffix = ".jsonl" if name == "geneval" else ".txt"
    return load_prompts(_DIRECTORY / name / f"{'test' if held_out else 'train'}{suffix}")


def load_prompts(path: Path | str, *, max_chars: int = 2000) -> PromptSet:
    """Read a prompt file.

    Args:
        path: a `.txt` file with one prompt per line; a `.jsonl` file with one object per line whose `prompt` is the
            text (GenEval's format); or a `.tsv` or `.csv` table with a column of that name (PartiPrompts, DrawBench).
            UTF-8, with or without a byte order mark, lines ended in any way. Blanks around a prompt are dropped.
        max_chars: longest prompt accepted, in characters.

    Raises:
        UsageError: if the file cannot be read, holds no prompt, or has a line that is empty, too
            long, not UTF-8, holds a NUL, or is not the expected JSON; the message gives the line numbers.
    """
    path = Path(path)
    kind = path.suffix.lower()
    read_line = {".txt": _text_record, ".jsonl": _json_record}.get(kind)
    if read_line is None and kind not in _TABLES:
        raise UsageError(
            f"{path}: expected a prompt file that ends in .txt, .jsonl, .tsv or .csv, or one of {', '.join(BUILT_IN)}"
            f"{did_you_mean(str(path), BUILT_IN)}",
        )
    try:
        content = read_plainly(path).removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read this prompt file: {error.strerror}; name your own, one prompt per line, or a set of "
            f"the package: {', '.join(BUILT_IN)}",
        ) from None
    if b"\n" not in content:
        content = content.replace(b"\r", b"\n")  # as old programs end lines
    if read_line is None:
        return _table(path, content, _TABLES[kind], max_chars)
    # Split at line feeds only: a prompt may hold other characters that str.splitlines would split at.
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UsageError(f"{path}: this prompt file is empty")
    records: list[tuple[str, dict[str, Any]]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt, metadata = read_line(_decoded(line))
            _check_prompt(prompt, max_chars)
            records.append((prompt, metadata))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise UsageError(f"{path}: {_joined(problems)}")
    return PromptSet(tuple(prompt for prompt, _ in records), tuple(metadata for _, metadata in records))


def _table(path: Path, content: bytes, delimiter: str, max_chars: int) -> PromptSet:
    """The prompts of a table, each with its row as metadata."""
    try:
        text = content.decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: this table cannot be read: {error}") from None
    column = next((name for name in (rows[0] if rows else ()) if str(name).strip().lower() == "prompt"), None)
    if column is None:
        raise UsageError(f"{path}: expected a table whose first line names a column prompt, and at least one row")
    problems = []
    prompts: list[str] = []
    for number, row in enumerate(rows, start=1):
        prompts.append(str(row[column] or "").strip())
        try:
            _check_prompt(prompts[-1], max_chars)
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise UsageError(f"{path}: {_joined(problems)}")
    metadata = [{str(key): value for key, value in row.items()} for row in rows]
    return PromptSet(tuple(prompts), tuple(row | {"prompt": p} for row, p in zip(metadata, prompts, strict=True)))


def _decoded(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text.strip()


def _text_record(line: str) -> tuple[str, dict[str, Any]]:
    return line, {}


def _json_record(line: str) -> tuple[str, dict[str, Any]]:
    if not line:
        raise ValueError("empty")
    try:
        record = json.loads(line, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError('expected an object with the text "prompt"')
    return record["prompt"].strip(), record


def _no_number(name: str) -> None:
    raise ValueError(f"not JSON: {name} is no number")


def _check_prompt(prompt: str, max_chars: int) -> None:
    if not prompt:
        raise ValueError("empty")
    if len(prompt) > max_chars:
        raise ValueError(f"{len(prompt)} characters, longer than {max_chars}")
    if "\0" in prompt:
        raise ValueError("holds a NUL character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None


def _joined(problems: list[str]) -> str:
    rest = len(problems) - _SHOWN_PROBLEMS
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {rest} more lines" if rest > 0 else "")


class PromptSampler:
    """The prompts of every iteration, as a pure function of its number.

    All prompts are used once, in random order, before any is used again (an epoch); the orders of the epochs
    are joined and cut into batches. So a resumed run needs no state but the iteration, and a run on any
    number of machines sees the same prompts.

    Args:
        num_items: how many prompts there are, at least 1.
        num_prompts: prompts per iteration (P), at least 1; may exceed `num_items`.
        seed: seed of the order.
    """

    def __init__(self, num_items: int, num_prompts: int, seed: int) -> None:
        if num_items < 1 or num_prompts < 1:
            raise ValueError(
                f"PromptSampler: num_items and num_prompts must be at least 1, got {num_items} and {num_prompts}"
            )
        self.num_items = num_items
        self.num_prompts = num_prompts
        self.seed = seed

    def batch(self, iteration: int) -> list[int]:
        """Indices in `0..num_items-1` of the prompts of an iteration (0, 1, ...). P numbers."""
        if iteration < 0:
            raise ValueError(f"PromptSampler.batch: iteration must be at least 0, got {iteration}")
        first = iteration * self.num_prompts
        positions = (divmod(position, self.num_items) for position in range(first, first + self.num_prompts))
        return [_permutation(self.num_items, self.seed, epoch)[place] for epoch, place in positions]


@lru_cache(maxsize=2)
def _permutation(num_items: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Sorting by a hash gives the same order in every version of Python and torch; their shuffles do not
    # promise that.
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode("ascii"), digest_size=16).digest()

    return tuple(sorted(range(num_items), key=key))


class PromptBatch(NamedTuple):
    """The prompts of an iteration's B = P*G samples, row p*G + g being sample g of prompt p.

    Attributes:
        prompts: B texts.
        metadata: B mappings for the rewards.
        group_size: G.
    """

    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_size: int

    def select(self, rows: slice | Sequence[int]) -> PromptBatch:
        """Some of the rows."""
        chosen = range(len(self.prompts))[rows] if isinstance(rows, slice) else rows
        return PromptBatch([self.prompts[i] for i in chosen], [self.metadata[i] for i in chosen], self.group_size)


@dataclass(frozen=True)
class TrainingPrompts:
    """The training prompts and the order in which iterations use them."""

    prompts: PromptSet
    sampler: PromptSampler
    group_size: int

    @classmethod
    def of(cls, config: Config) -> TrainingPrompts:
        """The embedded model's sentences, a set of the package, or a file.

        Raises:
            UsageError: the file cannot be read or holds something else than prompts.
        """
        prompts = prompt_set(config.data.prompts, held_out=False)
        sampler = PromptSampler(len(prompts), config.data.num_prompts, config.seed)
        return cls(prompts, sampler, config.sampler.group_size)

    def batch(self, iteration: int) -> PromptBatch:
        """The prompts of an iteration's samples."""
        chosen = [index for index in self.sampler.batch(iteration) for _ in range(self.group_size)]
        prompts, metadata = self.prompts.prompts, self.prompts.metadata
        return PromptBatch([prompts[i] for i in chosen], [metadata[i] for i in chosen], self.group_size)

    def used(self, iterations: int) -> list[str]:
        """The prompts that so many iterations use, each once."""
        # no prompt is used twice before all are used once
        rounds = min(iterations, -(-self.sampler.num_items // self.sampler.num_prompts))
        indices = {index for iteration in range(rounds) for index in self.sampler.batch(iteration)}
        return [self.prompts.prompts[index] for index in sorted(indices)]


def is_there(source: str) -> bool:
    """Whether what an option names is a set of the package or a file, whatever is in it."""
    return source in BUILT_IN or Path(source).is_file()


def prompt_set(source: str, held_out: bool) -> PromptSet:
    """The prompts that `data.prompts` or, held out, `data.eval_prompts` names.

    Raises:
        UsageError: the file cannot be read or holds something else than prompts.
    """
    if source in BUILT_IN:
        return built_in_prompts(source, held_out)
    try:
        return load_prompts(source)
    except UsageError as error:
        raise UsageError(f"data.{'eval_prompts' if held_out else 'prompts'}: {error}") from None


def check_inputs(config: Config) -> None:
    """Check what can be told of a run's prompts and rewards in a moment, before torch or a model is loaded.

    Raises:
        UsageError: a prompt file cannot be read, or a reward's file is not there; RewardError: a reward cannot read
            the prompts.
    """
    training, held_out = prompt_set(config.data.prompts, False), prompt_set(config.data.eval_prompts, True)
    rewards, options = config.reward, config.reward.options
    used = held_out.prompts[: config.evaluation.num_prompts]
    for key, names, prompts, source in (
        ("reward.terms", rewards.terms, training.prompts, "data.prompts"),
        ("reward.terms", rewards.terms, used, "data.eval_prompts"),
        ("reward.observed", rewards.observed, used, "data.eval_prompts"),
    ):
        try:
            check_sources(names, options)
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from None
        try:
            check_prompts(names, options, prompts)
        except ValueError as error:
            way_out = "give --reward.observed '[]'" if key == "reward.observed" else "choose another reward"
            raise RewardError(f"{key}: {error}, in {source}; {way_out}, or other prompts") from None
    if config.data.eval_prompts != config.data.prompts and config.data.eval_prompts in BUILT_IN:
        _mention_held_out(config.data.prompts, config.data.eval_prompts)


@lru_cache
def _mention_held_out(prompts: str, held_out: str) -> None:
    """Say, once, that held-out pictures are of other prompts than the training ones."""
    logger.warning(
        "data.eval_prompts: held-out pictures are of the built-in prompts %r, while data.prompts is %s; name held-out "
        "prompts like those with --data.eval_prompts",
        held_out,
        prompts,
    )
