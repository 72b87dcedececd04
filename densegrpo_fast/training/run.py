"""A whole run: iterations, evaluations and checkpoints in a run directory, from its start or its newest checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.run_files.run_directory import iteration_name
from densegrpo_fast.run_files.shared_tensors import load_shared, shared_names
from densegrpo_fast.run_files.signals import GracefulStop
from densegrpo_fast.training.evaluation import Evaluation
from densegrpo_fast.training.memory import prepare
from densegrpo_fast.training.records import RunRecords
from densegrpo_fast.training.saver import Saver
from densegrpo_fast.training.sharding import gathered
from densegrpo_fast.training.strategies import Streamed

if TYPE_CHECKING:
    from densegrpo_fast.training.trainer import Trainer


class RunResult(NamedTuple):
    """How a run ended.

    Attributes:
        iterations: done in the whole run.
        summary: what to tell the user; None if a signal stopped the run.
        signal: that stopped it, after a checkpoint; None if it is complete.
    """

    iterations: int
    summary: str | None
    signal: Signals | None


class Run:
    """The loop around `Trainer.step`, and all that it writes.

    Args:
        trainer: that takes the iterations.
        directory: that `records.run_directory` has opened.
    """

    def __init__(self, trainer: Trainer, directory: Path):
        config = trainer.config
        self.trainer, self.world, self.config = trainer, trainer.world, config
        prompts = trainer.prompts.used(config.run.iterations) + trainer.held_out.prompts
        streams = prepare(
            config, trainer.model, trainer.lookahead, prompts, trainer.observed, self.world, trainer.shards
        )
        if isinstance(trainer.strategy, Streamed):
            trainer.strategy.fits = streams
        self.records = RunRecords(directory, config, trainer.model, trainer.held_out, trainer.base_weights)
        self.saver = Saver(trainer, self.records)

    def go(self, *, resume: bool) -> RunResult:
        """Train to the end, or until a signal, early stopping or a callback ends it.

        Args:
            resume: continue the run in the directory.

        Raises:
            UserError: anything the user can act on; the checkpoints so far are kept.
        """
        trainer, records, world, config = self.trainer, self.records, self.world, self.config
        total = config.run.iterations
        if world.main:
            print(
                f"{config.preset}: {total} iterations of {config.data.num_prompts} prompts x "
                f"{config.sampler.group_size} samples, into {records.directory}",
                flush=True,
            )
            if (count := len(trainer.prompts.prompts)) < config.data.num_prompts:
                print(
                    f"data.prompts has {count}, so an iteration has some of them more than once, in groups of their own"
                )
            if not trainer.holds_a_prompt():
                print("no strips: several processes share the samples of the first prompt (distributed.split)")
        with ExitStack() as opened, GracefulStop() as stop:
            opened.callback(self.saver.close)
            world.on_main(lambda: records.open(opened))
            start = self._continue() if resume else 0
            world.on_main(lambda: records.show(start))
            done, trainer.stop_reason = start, None
            if start == 0 and trainer.learner.updates:
                raise UsageError("Trainer.run: this trainer has trained already; make a new one, or run(resume=True)")
            gpus = world.size * int(trainer.model.device.type == "cuda")
            world.on_main(lambda: records.count(start, opened, gpus))
            if start == 0:
                torch.manual_seed(config.seed)  # for rewards that draw
                world.on_main(records.begin)
                with records.pause():
                    before = trainer.held_out.evaluate(
                        trainer.model, trainer.observed, world, "evaluation before training"
                    )
                    self._evaluated("before", before, 0)
                    world.on_main(records.report)
            for iteration in range(start, total):
                done = iteration + 1
                evaluates = records.due(config.evaluation.every, done)
                record = self._step(iteration, evaluates)
                trainer.stop_reason = world.from_main(partial(self._write, record, evaluates))
                signal = int(world.largest(stop.signal or 0))
                if trainer.stop_reason is not None and not signal:
                    break
                self.saver.poll()
                if signal or records.due(config.run.checkpoint_every, done):
                    self.saver.save(done)
                if signal:
                    self.saver.finish()
                    world.on_main(partial(records.stopped, done))
                    return RunResult(done, None, Signals(signal))
            records.close_progress()
            self.saver.save(done)
            self.saver.finish()
            summary = self._finish(done)
        if summary is not None and trainer.stop_reason is not None and done < total:
            summary = f"ended after iteration {done} of {total}: {trainer.stop_reason}\n{summary}"
        return RunResult(done, summary, None)

    def _step(self, iteration: int, evaluates: bool) -> dict[str, Any]:
        """One iteration, and the evaluation that is due after it; its record, shown to the callbacks."""
        trainer, records, world, done = self.trainer, self.records, self.world, iteration + 1
        if evaluates or done in (1, self.config.run.iterations):
            record, strip = trainer.step_with_strip(iteration)
            world.on_main(partial(records.strip, strip, done))
        else:
            record = trainer.step(iteration)
        if evaluates:
            with records.pause():
                evaluation = trainer.evaluate()
                self._evaluated(iteration_name(done), evaluation, done)
            record |= evaluation.metrics()
        record |= world.from_main(partial(records.alarmed, record))
        for callback in trainer.callbacks:
            callback.on_iteration_end(trainer, record)
        return record

    def _finish(self, done: int) -> str | None:
        """Evaluate and export what was trained; what to tell the user, in the main process."""
        trainer, records, world = self.trainer, self.records, self.world
        with trainer.learner.averaged():
            after = trainer.held_out.evaluate(trainer.model, trainer.observed, world, "evaluation after training")
            self._evaluated("after", after, done)
            trained = gathered(trainer.model.trainable_parameters(), world) if trainer.trains_all else None
            return world.on_main(partial(records.finish, trained))

    def _continue(self) -> int:
        """Go on with the newest checkpoint; the iterations done, 0 if none was saved yet."""
        checkpoint = self.world.from_main(self.records.load)
        if checkpoint is None:
            return 0
        tensors = checkpoint.tensors
        if checkpoint.shared is not None:
            trained = self.trainer.learner.room_for(shared_names(checkpoint.shared))
            load_shared(trained, checkpoint.shared)
            tensors = tensors | trained
        self.trainer.restore(tensors, checkpoint.state)
        return checkpoint.step

    def _write(self, record: dict[str, Any], report: bool) -> str | None:
        """Write an iteration's record; why the run ends with it, None if it goes on."""
        return self.records.append(record, report=report) or self.trainer.stop_reason

    def _evaluated(self, when: str, evaluation: Evaluation, done: int) -> None:
        """Keep an evaluation, and tell the callbacks."""
        self.world.on_main(lambda: self.records.evaluated(when, evaluation, done))
        for callback in self.trainer.callbacks:
            callback.on_evaluate(self.trainer, evaluation, done)
