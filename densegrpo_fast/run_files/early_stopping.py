"""When a run ends before its last iteration: its held-out reward has stopped rising, or the policy has gone too far.

Nothing but the records decides, so a resumed run ends where it would have ended without the pause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from densegrpo_fast.config import Config

Record = Mapping[str, Any]


class EarlyStopping:
    """Watches the records of a run (`run.early_stopping_patience`, `run.early_stopping_threshold`, `run.max_kl`).

    Args:
        config: the run's.
        past: the records of the iterations that are already done, oldest first.
    """

    def __init__(self, config: Config, past: Iterable[Record] = ()) -> None:
        self._options = config.run
        self._best, self._waited = -math.inf, 0
        for record in past:
            self.check(record)

    def check(self, record: Record) -> str | None:
        """Why the run should end with this record, the next one; None if it should go on."""
        options, kl, reward = self._options, record.get("kl"), record.get("eval/reward")
        if reward is not None and not math.isnan(reward):
            better = reward > self._best + options.early_stopping_threshold
            self._best, self._waited = (reward, 0) if better else (self._best, self._waited + 1)
            if 0 < options.early_stopping_patience <= self._waited:
                return f"the held-out reward has not been better than {self._best:.4g} in {self._waited} evaluations"
        if options.max_kl is not None and kl is not None and kl > options.max_kl:
            return f"kl {kl:.4g} is above run.max_kl {options.max_kl:g}"
        return None
