"""The README.md of an adapter directory: what it is made for, how to use it, what it was measured to do.

This file makes the values of the page, `templates/model_card.md.j2` words them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densegrpo_fast import __version__
from densegrpo_fast.common.files import replace_text
from densegrpo_fast.common.pretrained import is_hub_id
from densegrpo_fast.config import Config
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.run_files.alarms import alarms_for, iterations_by_alarm
from densegrpo_fast.run_files.provenance import commit, versions
from densegrpo_fast.run_files.rendering import render
from densegrpo_fast.run_files.statistics import Interval

_ROWS = 10
"""Rows of the training curve."""


@dataclass(frozen=True)
class BaseFacts:
    """What the example must know of the base model.

    Attributes:
        pipeline: its class in diffusers; None = it is no pipeline, and the card has no example.
        call: what its call is given besides the prompt, the steps and the size: guidance and the length of the text.
        scheduler: class of the scheduler that takes the place of its own; None = its own.
        scheduler_options: what that is given besides the configuration of the pipeline's own.
        has_t5: whether it comes with a T5 text encoder.
        dtype: of its weights, such as "bfloat16".
        device: where the run computed, "cpu" or "cuda".
        network: class of the network whose weights were all trained; None = an adapter was.
        part: what the pipeline calls it, such as "transformer".
    """

    pipeline: str | None
    call: Mapping[str, Any]
    scheduler: str | None
    has_t5: bool
    dtype: str
    device: str
    network: str | None = None
    part: str | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)


def write_model_card(
    adapter: Path,
    config: Config,
    *,
    base: BaseFacts,
    prompts: Sequence[str],
    before: Mapping[str, Interval],
    after: Mapping[str, Interval],
    change: Mapping[str, Interval],
    metrics: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `README.md` beside the weights.

    Its example draws a picture as the held-out evaluation does, when run in the run directory.

    Args:
        adapter: the adapter directory, inside its run directory, whose name is the title.
        config: the run's settings.
        base: of the model that the adapter belongs to.
        prompts: that were held out; the first is the example's.
        before, after, change: reward -> held-out mean before and after training, and the paired change.
        metrics: the run's records.

    Returns:
        The path written.

    Raises:
        OutputError: if it cannot be written.
    """
    on_hub = is_hub_id(config.model.path)
    text = render(
        "model_card.md.j2",
        name=adapter.resolve().parent.name,
        settings=config.model_dump(mode="json"),
        embedded=config.model.path in EMBEDDED,
        on_hub=on_hub,
        # the hub id, or the name of a local directory: where it lies on one machine helps nobody else
        base_path=config.model.path if on_hub else Path(config.model.path).name,
        base=base,
        reward=", ".join(f"{weight:g} x {name}" for name, weight in config.reward.terms.items()),
        prompt=prompts[0],
        num_held_out=len(prompts),
        guidance_scale=config.evaluation_guidance_scale,
        before=before,
        after=after,
        change=change,
        has_lookahead=config.uses_lookahead or config.uses_branches,
        curve=_curve(metrics),
        alarms=iterations_by_alarm(metrics),
        meaning={alarm.name: alarm.meaning for alarm in alarms_for(config)},
        num_records=len(metrics),
        version=__version__,
        commit=commit(),
        versions={name: version or "unknown" for name, version in versions().items()},
    )
    path = adapter / "README.md"
    replace_text(path, text)
    return path


def _curve(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """At most `_ROWS` rows: the mean training reward of as many iterations, and the evaluation among them if any."""
    rows = []
    size = max(1, -(-len(metrics) // _ROWS))
    for start in range(0, len(metrics), size):
        part = metrics[start : start + size]
        rewards = [record["reward"] for record in part if isinstance(record.get("reward"), float)]
        held_out = [record["eval/reward"] for record in part if isinstance(record.get("eval/reward"), float)]
        first, last = part[0].get("iteration", start + 1), part[-1].get("iteration", start + len(part))
        rows.append(
            {
                "iterations": str(first) if first == last else f"{first}-{last}",
                "training": f"{sum(rewards) / len(rewards):.3f}" if rewards else "-",
                "held_out": f"{held_out[-1]:.3f}" if held_out else "-",
            }
        )
    return rows
