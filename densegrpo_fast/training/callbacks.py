"""What user code can do while a run goes on: `Trainer(config, callbacks=[MyCallback()])`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densegrpo_fast.training.evaluation import Evaluation
    from densegrpo_fast.training.trainer import Trainer


class Callback:
    """Base of callbacks: each method does nothing until it is overridden. They are called by `Trainer.run` alone.

    What a callback raises ends the run; its checkpoints stay. Of several processes each calls its own callbacks, with
    equal records and scores: what that of the main one (`trainer.world.main`) adds is written, and its `stop` counts.
    """

    def on_iteration_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an iteration, and after its evaluation if it has one.

        Args:
            trainer: its `stop` ends the run in good order.
            record: the iteration's metrics (docs/metrics.md). Numbers that are added are written and shown with them.
        """

    def on_evaluate(self, trainer: Trainer, evaluation: Evaluation, iteration: int) -> None:
        """After each evaluation of the held-out prompts, those before and after the training included.

        Args:
            evaluation: scores [N, S] float32 by reward, and pictures [N, 3, H, W] in [0, 1].
            iteration: iterations done, from 0.
        """
