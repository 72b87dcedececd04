"""Checkpoints of a run: an adapter's is written at once, a whole network's beside the iterations that follow.

What all processes hold of a network takes minutes to write. So each process copies its part into the machine's memory,
and a thread writes the copies while training goes on (what PyTorch's DCP calls an asynchronous save). A checkpoint is
there once all processes have written their parts; until then the run has the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from densegrpo_fast.common.errors import NonFiniteError
from densegrpo_fast.run_files.shared_tensors import copies, finite_parts, save_shared
from densegrpo_fast.training.records import RunRecords

if TYPE_CHECKING:
    from densegrpo_fast.training.trainer import Trainer


class Saver:
    """Saves a trainer's checkpoints. All processes must call its methods, in the same order.

    Args:
        trainer: of the run.
        records: that keep the checkpoints.
    """

    def __init__(self, trainer: Trainer, records: RunRecords):
        self.trainer, self.records, self.world = trainer, records, trainer.world
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # what the thread sends must not meet what the iterations send
        together = trainer.trains_all and dist.is_initialized()
        self._group: Any = dist.new_group(backend="gloo") if together else None

    def save(self, done: int) -> None:
        """Save what a bit-exact continuation after so many iterations needs; of a whole network, begin to.

        Raises:
            OutputError: it, or the one before it, cannot be written; NonFiniteError: a tensor is not finite. In every
                process; the checkpoints so far are kept.
        """
        self.finish()
        trainer, world = self.trainer, self.world
        tensors = trainer.tensors()
        state = trainer.state() | (world.on_main(self.records.position) or {})
        write = partial(self.records.checkpoints.save, done, state=state)
        if not trainer.trains_all:
            world.on_main(partial(write, tensors))
            return
        stage = world.from_main(partial(self.records.checkpoints.stage, done))
        if stage is None:
            return
        own = {"rng": tensors.pop("rng")}
        broken = finite_parts(tensors)
        if world.largest(broken is not None):
            raise NonFiniteError(f"not saved: {broken or 'what another process holds'} is not finite")
        complete = partial(write, own, shared=stage)
        self._pending = self._thread.submit(self._write, copies(tensors), stage, complete)

    def poll(self) -> None:
        """See whether a save that was begun is complete, without waiting for it.

        Raises:
            OutputError: as `save`.
        """
        pending = self._pending
        if pending is not None and self.world.from_main(pending.done):
            self.finish()

    def finish(self) -> None:
        """Wait until a save that was begun is complete.

        Raises:
            OutputError: as `save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self.world.on_main(pending.result)
            pending.result()

    def close(self) -> None:
        """Leave no thread behind: a process by itself waits for a save that was begun, whatever has ended the run."""
        # of several, another may be lost, and with it what the thread waits for
        self._thread.shutdown(wait=self.world.size == 1)

    def _write(self, tensors: Any, stage: Path, complete: Callable[[], object]) -> None:
        save_shared(tensors, stage, self._group)
        if self.world.main:
            complete()
