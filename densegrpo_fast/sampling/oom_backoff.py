"""Going on with fewer rows per forward when a GPU's memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from densegrpo_fast.common.errors import SetupError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class OomBackoff:
    """Rows per forward of one kind of work: lowered, with a warning, whenever its memory runs out.

    Work that is given to it must be without effect if `torch.OutOfMemoryError` leaves it: it is done again.

    Args:
        rows: at first.
        option: where the number comes from, for messages.
        advice: what else would save memory, for the message when one row is too many.
    """

    def __init__(self, rows: int, option: str, advice: str = ""):
        self.rows, self.option, self.advice = rows, option, advice

    def fitting(self, work: Callable[[int], Result]) -> Result:
        """`work(rows)` with the most rows that the memory allows.

        Raises:
            SetupError: one row is too many.
        """
        while True:
            done = _attempt(lambda: work(self.rows))
            if done:
                return done[0]
            self.lower()

    def each(self, rows: slice, work: Callable[[slice], Result]) -> Iterator[Result]:
        """`work` on all rows from `rows.start` to `rows.stop`, a piece of at most the budget after another.

        Raises:
            SetupError: one row is too many.
        """
        start = rows.start
        while start < rows.stop:
            piece = slice(start, min(start + self.rows, rows.stop))
            done = _attempt(lambda piece=piece: work(piece))  # type: ignore[misc]
            if done:
                start = piece.stop
                yield done[0]
            else:
                self.lower()

    def lower(self) -> None:
        """Go on with the largest proper divisor of the rows (half of an even number), and say so.

        Raises:
            SetupError: there is only one row.
        """
        before = self.rows
        if before == 1:
            way_out = f": {self.advice}" if self.advice else ""
            raise SetupError(
                f"the memory ran out with one row per forward ({self.option} is down to 1){way_out}",
            )
        self.rows = before // next(factor for factor in range(2, before + 1) if before % factor == 0)
        logger.warning(
            "the memory ran out with %d rows per forward (%s); going on with %d", before, self.option, self.rows
        )


def _attempt(work: Callable[[], Result]) -> tuple[Result] | None:
    """The result in a tuple, or None if the memory ran out; what the attempt held is let go of."""
    try:
        return (work(),)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        # so the CPU's allocator says it
        if "not enough memory" not in str(error):
            raise
    # only here, where the error and the frames that it kept alive are gone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
