"""TensorBoard, trackio and Weights & Biases beside metrics.jsonl: optional, imported only when asked for.

metrics.jsonl is the record of a run; these show it. Whatever one of them does, at import, at its start or later, the
run goes on: it is left out from then on, with one warning.
"""

from __future__ import annotations

import importlib
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

_PROJECT = "densegrpo-fast"
_WANDB_ID = "wandb-id.txt"


class Logger(Protocol):
    """Something that shows numbers and pictures over iterations. Any method may raise anything."""

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Take the numbers of one iteration, all of them finite."""

    def log_picture(self, name: str, path: Path, iteration: int) -> None:
        """Take a picture file of one iteration."""

    def close(self) -> None:
        """Write what is not written yet."""


@dataclass(frozen=True)
class RunFacts:
    """What a logger may know of a run.

    Attributes:
        directory: of the run; its name is the run's name.
        settings: the resolved configuration as nested JSON data.
        start: iterations that were done before this process began; 0 for a new run.
    """

    directory: Path
    settings: Mapping[str, Any]
    start: int = 0

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.resolve().name


class TensorBoard:
    """Event files in `RUN/tensorboard`. A resumed run hides what it does again."""

    def __init__(self, run: RunFacts) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.directory / "tensorboard"), purge_step=run.start + 1 if run.start else None)

    def log(self, values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def log_picture(self, name: str, path: Path, iteration: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, iteration, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of the local trackio project `densegrpo-fast`, or wherever trackio's environment variables point."""

    def __init__(self, run: RunFacts) -> None:
        self._trackio = importlib.import_module("trackio")
        resume = "allow" if run.start else "never"
        self._trackio.init(_PROJECT, name=run.name, config=dict(run.settings), resume=resume)

    def log(self, values: dict[str, float], iteration: int) -> None:
        self._trackio.log(values, step=iteration)

    def log_picture(self, name: str, path: Path, iteration: int) -> None:
        self._trackio.log({name: self._trackio.Image(str(path))}, step=iteration)

    def close(self) -> None:
        self._trackio.finish()


class WeightsAndBiases:
    """A run of the wandb project `densegrpo-fast`; a resumed run goes on under the id that its directory holds."""

    def __init__(self, run: RunFacts) -> None:
        self._wandb = wandb = importlib.import_module("wandb")
        known = run.directory / _WANDB_ID
        if not (run.start and known.is_file()):
            known.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
        identity = known.read_text(encoding="ascii").strip()
        self._run = wandb.init(
            project=_PROJECT,
            id=identity,
            name=run.name,
            dir=str(run.directory),
            config=dict(run.settings),
            resume="allow",
        )
        # wandb's own step may only grow, but a resumed run repeats the iterations since its checkpoint
        self._run.define_metric("*", step_metric="iteration")

    def log(self, values: dict[str, float], iteration: int) -> None:
        self._run.log({**values, "iteration": iteration})

    def log_picture(self, name: str, path: Path, iteration: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "iteration": iteration})

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[RunFacts], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}
"""Loggers by their name in `run.loggers`."""


class Loggers:
    """All loggers of a run; none of them can fail it.

    Args:
        names: keys of `KINDS`.
        run: what they may know.
    """

    def __init__(self, names: Iterable[str], run: RunFacts) -> None:
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                self._loggers[name] = KINDS[name](run)
            except (Exception, SystemExit) as error:
                hint = f"; pip install {name}" if isinstance(error, ImportError) else ""
                _warn(name, "cannot start", error, hint)

    def log(self, record: Mapping[str, Any]) -> None:
        """Show the finite numbers of a record, which must hold its `iteration`."""
        values = {name: float(value) for name, value in record.items() if _is_number(value) and name != "iteration"}
        self._each(lambda target: target.log(dict(values), record["iteration"]))

    def log_picture(self, name: str, path: Path, iteration: int) -> None:
        """Show a picture file of an iteration."""
        self._each(lambda target: target.log_picture(name, path, iteration))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, target in list(self._loggers.items()):
            try:
                call(target)
            except (Exception, SystemExit) as error:
                del self._loggers[name]
                _warn(name, "failed", error)

    def close(self) -> None:
        """Close those that are left."""
        for name, target in self._loggers.items():
            try:
                target.close()
            except (Exception, SystemExit) as error:
                _warn(name, "failed to close", error)
        self._loggers.clear()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _warn(name: str, what: str, error: BaseException, hint: str = "") -> None:
    logger.warning(
        "run.loggers: %s %s (%s: %s)%s; the run goes on without it, metrics.jsonl has everything",
        name,
        what,
        type(error).__name__,
        str(error).strip() or "no message",
        hint,
    )
