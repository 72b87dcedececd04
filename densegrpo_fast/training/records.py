"""What a run writes: metrics records, sample grids, checkpoints, the adapter and the report."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from densegrpo_fast.common.errors import CheckpointError, NonFiniteError, OutputError, RewardError, UsageError
from densegrpo_fast.common.files import finite, output_errors, read_verified, replace_bytes, replace_text, unused_name
from densegrpo_fast.config import Config
from densegrpo_fast.credit.consistency import neighbour_correlation
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.flow.noise import LAYOUT_VERSION
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import base_fingerprint, save_lora, save_parameters
from densegrpo_fast.rewards.registry import bounds
from densegrpo_fast.run_files.checkpoint import CheckpointManager
from densegrpo_fast.run_files.images import save_grid
from densegrpo_fast.run_files.metrics import MetricsLog
from densegrpo_fast.run_files.model_card import BaseFacts, write_model_card
from densegrpo_fast.run_files.report import write_report
from densegrpo_fast.run_files.run_directory import SAMPLES, STRIPS, auto_record, iteration_name
from densegrpo_fast.run_files.statistics import mean_interval, paired_interval
from densegrpo_fast.run_files.strip import Strip, save_strip
from densegrpo_fast.training.evaluation import Evaluation, HeldOut
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.schedule import IterationSteps

logger = logging.getLogger(__name__)

PHASES = ("calibration", "rollout", "lookahead", "reward", "monitor", "update")
_GRID = 24


def iteration_record(
    done: int,
    steps: IterationSteps,
    reward_batch: RewardBatch,
    advantages: Advantages,
    measured: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl, as docs/metrics.md has it.

    Args:
        done: iterations done.
        steps, reward_batch, advantages: the iteration's.
        measured: metrics of the update and of the costs.
        seconds: by phase.
    """
    rewards, final = reward_batch.rewards, reward_batch.rewards.numel()
    record: dict[str, Any] = {
        "iteration": done,
        "reward": rewards.nanmean().item(),
        "reward_std": _spread(rewards),
        "reward_missing": reward_batch.scores.missing_share,
        "frac_reward_zero_std": advantages.zero_spread,
    }
    for name, values in reward_batch.scores.per_reward.items():
        record[f"rewards/{name}/mean"] = values[-final:].nanmean().item()
        record[f"rewards/{name}/std"] = _spread(values[None, -final:])
    if (branches := reward_batch.branch_rewards) is not None:
        # of a state's branches, by the finest completion; a step's mean over the states
        spread = branches[..., -1] - branches[..., -1].nanmean(2, keepdim=True)
        by_step = spread.square().nanmean(2).sqrt().nanmean((0, 1)).tolist()
        branching = [step for step, injects in enumerate(steps.coefficients.noisy) if injects]
        record |= {f"branch_spread/step_{step}": value for step, value in zip(branching, by_step, strict=True)}
    if reward_batch.gains is not None:
        known, noisy = steps.with_gain, steps.coefficients.noisy
        for step, gain in enumerate(reward_batch.gains.nanmean(dim=(0, 1)).tolist()):
            if step in known:
                record[f"gain/step_{step}"] = gain
                if noisy[step]:
                    own = reward_batch.gains[..., step]
                    record[f"gain_positive/step_{step}"] = (own[~own.isnan()] > 0).float().mean().item()
        # of neighbours among the noisy steps
        if any({*pair} <= {*known} for pair in pairwise(step for step, injects in enumerate(noisy) if injects)):
            record["gain_correlation"] = neighbour_correlation(reward_batch.gains[..., list(noisy)])
    record |= measured
    record["learning_rate"] = record.pop("lr")
    record |= {f"time/{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    return record


def _spread(rewards: Tensor) -> float:
    """Mean over groups of the standard deviation within the group, missing rewards left out."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean().item()


class Resumable(Protocol):
    """What a checkpoint holds the state of: the trainer."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs, by group and name."""

    def state(self) -> dict[str, Any]:
        """The counters that go with `tensors`, as JSON data."""

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continue from them."""


class RunRecords:
    """The files of one run directory."""

    def __init__(self, directory: Path, config: Config, model: FlowModel):
        self.directory, self.config, self.model = directory, config, model
        if not isinstance(getattr(model, "network", None), torch.nn.Module):
            raise UsageError(
                f"Trainer.run: expected {type(model).__name__}.network to be the torch module that is trained "
                "(a loop over Trainer.step does without)"
            )
        settings = config.resume_settings() | {
            "noise_layout": LAYOUT_VERSION,
            "base_weights": base_fingerprint(model.network),
        }
        self.checkpoints = CheckpointManager(directory / "checkpoints", config.run.keep_checkpoints, settings)

    def begin(self, config_yaml: str) -> None:
        """Write the resolved configuration, and start torch's generator (for rewards that draw) from the run's seed.

        What `lookahead.plan auto` measured stands above it as a comment.
        """
        torch.manual_seed(self.config.seed)
        if measured := auto_record(self.directory):
            comment = (f"# {line}".rstrip() for line in measured["text"].splitlines())
            config_yaml = "\n".join([*comment, config_yaml])
        replace_text(self.directory / "config.yaml", config_yaml, digest=True)

    def restore(self, trainer: Resumable, log: MetricsLog) -> int:
        """Continue from the newest good checkpoint; returns the iterations done, 0 if none was saved yet.

        Raises:
            CheckpointError: none is intact, or it belongs to other settings; there is less than the run's records say
                that there was; or what the end of the run needs is lost. UsageError: the run has already gone further
                than `run.iterations`.
        """
        if not self.checkpoints.steps():
            self._begin_again(log)
            return 0
        for needed in ("config.yaml", "evaluation-before.json"):
            try:
                read_verified(self.directory / needed)
                self._evaluation("before")
            except (OSError, OutputError) as error:
                problem = f"{needed}: {error.strerror}" if isinstance(error, OSError) else error
                raise CheckpointError(
                    f"{self.directory} cannot be summed up at the end of the run: {problem}"
                ) from None
        checkpoint = self.checkpoints.load_latest()
        if checkpoint.step > self.config.run.iterations:
            raise UsageError(
                f"run.iterations: expected at least the {checkpoint.step} that the run has done, "
                f"got {self.config.run.iterations}",
            )
        trainer.restore(checkpoint.tensors, checkpoint.state)
        log.truncate(checkpoint.state["metrics_position"])
        return checkpoint.step

    def _begin_again(self, log: MetricsLog) -> None:
        """Start a run that has saved nothing from its beginning; what it recorded is kept beside.

        Raises:
            CheckpointError: it must have saved something, since it went on after that.
        """
        every, recorded = self.config.run.checkpoint_every, len(log.records())
        directory = self.checkpoints.directory
        if directory.is_symlink() and not directory.exists():
            raise CheckpointError(f"{directory} leads nowhere: is what it leads to mounted?")
        if every and recorded > every:
            raise CheckpointError(
                f"{self.directory} has records of {recorded} iterations and no checkpoint, though one was saved every "
                f"{every}: {directory} is gone or empty; bring it back, or choose another run.output_dir"
            )
        if recorded:
            kept = unused_name(log.path, "old")
            replace_bytes(kept, log.path.read_bytes())
            logger.warning(
                "%s: nothing was saved yet, so the run begins again; its %d records are kept in %s",
                self.directory,
                recorded,
                kept,
            )
        log.truncate(0)

    def checkpoint(self, trainer: Resumable, done: int, log: MetricsLog) -> None:
        """Save everything a bit-exact continuation needs."""
        state = trainer.state() | {"metrics_position": log.position()}
        self.checkpoints.save(done, trainer.tensors(), state)

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every so many iterations happens now (not at the very end)."""
        return every > 0 and done % every == 0 and done < self.config.run.iterations

    def _samples(self, name: str, images: Tensor, held_out: HeldOut, log: MetricsLog, done: int) -> None:
        """Write the grid `samples/NAME.png` of the held-out prompts' first pictures, and show it to the loggers."""
        path = self.directory / SAMPLES / f"{name}.png"
        with output_errors(f"cannot write in {self.directory}"):
            count = min(_GRID, len(images))
            save_grid(
                images[:count],
                path,
                columns=6,
                scale=max(1, 128 // images.shape[-1]),
                captions=held_out.prompts[:count],
            )
        log.show_picture("samples", path, done)

    def evaluations_after(self, done: int) -> int:
        """How many evaluations come after so many iterations, the last one included."""
        every, total = self.config.evaluation.every, self.config.run.iterations
        return 1 + (max(total - 1, done) // every - done // every if every else 0)

    def strip(self, strip: Strip, log: MetricsLog, done: int) -> None:
        """Write the strip of an iteration, `strips/iteration-NNNNN.png` and `.webp`, and show it to the loggers."""
        path = self.directory / STRIPS / f"{iteration_name(done)}.png"
        save_strip(strip, path)
        log.show_picture("strip", path, done)

    def evaluated(self, when: str, evaluation: Evaluation, held_out: HeldOut, log: MetricsLog, done: int) -> None:
        """Keep scores and pictures of an evaluation, and show them to the loggers.

        Args:
            when: "before", "after", or the `iteration_name` of one between them.
            done: iterations done.

        Raises:
            RewardError: before or after training, a reward has no score at all; NonFiniteError: since the pictures are
                not finite.
        """
        for name, values in evaluation.scores.items():
            if when in ("before", "after") and values.isnan().all():
                problem = f"the held-out evaluation {when} training has no score of {name!r}: all are missing"
                if not evaluation.images.isfinite().all():
                    raise NonFiniteError(f"{problem}, and pictures of the model hold numbers that are not finite")
                raise RewardError(problem)
        scores = {name: values.tolist() for name, values in evaluation.scores.items()}
        document = {"iteration": done, "prompts": held_out.prompts, "scores": scores}
        replace_text(self.directory / f"evaluation-{when}.json", json.dumps(finite(document)), digest=True)
        self._samples(when, evaluation.images, held_out, log, done)
        if when in ("before", "after"):
            # that of an iteration is in its record
            log.show({"iteration": done} | evaluation.metrics())

    def report(self) -> Path:
        """Write the report anew, from the files as they are."""
        return write_report(self.directory)

    def finish(self, log: MetricsLog) -> str:
        """Write adapter and report (the model must hold the weights to export); returns the closing message."""
        lora = self.config.lora
        with output_errors(f"cannot write in {self.directory}"):
            has_lora = hasattr(self.model.network, "peft_config")
            if has_lora:
                save_lora(self.model.network, self.directory / "adapter", rank=lora.rank, alpha=lora.alpha)
            else:
                save_parameters(self.model.trainable_parameters(), self.directory / "adapter")
            prompts, before = self._evaluation("before")
            _, after = self._evaluation("after")
            metrics = log.records()
            phases = {phase: sum(record.get(f"time/{phase}", 0.0) for record in metrics) for phase in PHASES}
            reward = self.config.reward
            terms = dict.fromkeys(reward.observed, 0.0) | reward.terms
            # a trainer may have been given another reward than the configuration's
            known = bounds(terms, reward.options) if terms.keys() <= after.keys() else {}
            measured = {
                "before": {name: mean_interval(values, bounds=known.get(name)) for name, values in before.items()},
                "after": {name: mean_interval(values, bounds=known.get(name)) for name, values in after.items()},
                "change": {
                    name: paired_interval(before[name], values, bounds=known.get(name))
                    for name, values in after.items()
                },
            }
            report = self.report()
            if has_lora:
                write_model_card(
                    self.directory / "adapter",
                    self.config,
                    base=self._base_facts(),
                    prompt=prompts[0],
                    metrics=metrics,
                    **measured,
                )
        lines = []
        for name in after:
            first, last, moved = (measured[when][name] for when in ("before", "after", "change"))
            lines.append(
                f"held-out {name}: {first.mean:.3f} [{first.low:.3f}, {first.high:.3f}] before, "
                f"{last.mean:.3f} [{last.low:.3f}, {last.high:.3f}] after; "
                f"change {moved.mean:+.3f} [{moved.low:+.3f}, {moved.high:+.3f}] (95%, "
                f"{len(prompts)} prompts)"
            )
        lines.append("seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in phases.items()))
        peaks = [record["memory/peak_gib"] for record in metrics if record.get("memory/peak_gib") is not None]
        if peaks:
            lines.append(f"memory: at most {max(peaks):.1f} GiB in an iteration")
        return "\n".join(
            [*lines, f"report:  {report}", f"adapter: {self.directory / 'adapter'}", f"metrics: {log.path}"]
        )

    def _base_facts(self) -> BaseFacts:
        return BaseFacts(
            has_t5=getattr(self.model, "has_t5", False),
            dtype=str(self.model.network.dtype).removeprefix("torch."),
            device=self.model.device.type,
        )

    def _evaluation(self, when: str) -> tuple[list[str], dict[str, Any]]:
        """Prompts and scores that `evaluated` kept."""
        path = self.directory / f"evaluation-{when}.json"
        try:
            found = json.loads(read_verified(path))
            scores = {
                name: [[math.nan if value is None else float(value) for value in row] for row in rows]
                for name, rows in found["scores"].items()
            }
            return list(found["prompts"]), scores
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{path} is missing or broken, so the run cannot be summed up") from None
