"""What a run writes: metrics records, sample grids, checkpoints, the adapter and the report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.flow.noise import LAYOUT_VERSION
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.runtime.checkpoint import CheckpointManager
from densegrpo_fast.runtime.evaluation import Evaluation, HeldOut
from densegrpo_fast.runtime.experience import Outcome
from densegrpo_fast.runtime.files import output_errors, write_durably
from densegrpo_fast.runtime.images import save_grid
from densegrpo_fast.runtime.intervals import mean_interval, paired_interval
from densegrpo_fast.runtime.learner import Learner
from densegrpo_fast.runtime.lora import save_lora
from densegrpo_fast.runtime.metrics import MetricsLog, read_metrics
from densegrpo_fast.runtime.report import write_report
from densegrpo_fast.sampling.trajectory import Trajectory

PHASES = ("rollout", "lookahead", "reward", "guard", "update")
_GRID = 24


def iteration_record(
    done: int,
    trajectory: Trajectory,
    outcome: Outcome,
    update: dict[str, float],
    forwards: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl. `forwards` is the network forwards of one evaluated row."""
    rewards, batch = outcome.rewards, trajectory.batch
    record: dict[str, Any] = {
        "iteration": done,
        "reward/mean": rewards.nanmean().item(),
        "reward/std": _spread(rewards),
        "reward/missing": outcome.advantages.missing,
        "zero_spread": outcome.advantages.zero_spread,
    }
    for name, values in outcome.scores.per_reward.items():
        record[f"reward/{name}"] = values[-batch:].nanmean().item()
    if outcome.gains is not None:
        for step, gain in enumerate(outcome.gains.nanmean(dim=(0, 1)).tolist()):
            record[f"gain/step_{step}"] = gain
    record |= update
    record["nfe/rollout"] = forwards * batch * trajectory.num_steps
    record["nfe/lookahead"] = outcome.forwards * batch
    record["nfe/update"] = record.pop("nfe")
    record |= {f"time/{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    return record


def _spread(rewards: Tensor) -> float:
    """Mean over groups of the standard deviation within the group, missing rewards left out."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt().nanmean().item()


def base_fingerprint(network: Any) -> str:
    """SHA-256 over names, shapes and 64 values of each frozen weight: tells one base model from another in no time."""
    digest = hashlib.sha256()
    for name, weight in network.state_dict().items():
        if ".lora_" not in name:
            values = weight.detach().flatten()
            picked = values[:: max(1, len(values) // 64)].double().cpu()
            digest.update(f"{name}{tuple(weight.shape)}{picked.tolist()}".encode())
    return digest.hexdigest()


class RunRecords:
    """The files of one run directory."""

    def __init__(self, directory: Path, config: Config, model: FlowModel, learner: Learner):
        self.directory, self.config, self.model, self.learner = directory, config, model, learner
        settings = config.resume_settings() | {
            "noise_layout": LAYOUT_VERSION,
            "base_weights": base_fingerprint(model.network),
        }
        self.checkpoints = CheckpointManager(directory / "checkpoints", config.run.keep_checkpoints, settings)

    def begin(self, config_yaml: str) -> None:
        """Write the resolved configuration, and start torch's generator (for rewards that draw) from the run's seed."""
        torch.manual_seed(self.config.seed)
        with output_errors(f"cannot write in {self.directory}"):
            write_durably(self.directory / "config.yaml", config_yaml.encode())

    def restore(self, log: MetricsLog) -> int:
        """Continue from the newest good checkpoint; returns the iterations done, 0 if none was saved yet.

        Raises:
            UserError: (checkpoint) none is intact, or it belongs to other settings; (usage) the run has already gone
                further than `run.iterations`.
        """
        if not self.checkpoints.steps():
            log.truncate(0)
            return 0
        checkpoint = self.checkpoints.load_latest()
        if checkpoint.step > self.config.run.iterations:
            raise UserError(
                f"run.iterations: expected at least the {checkpoint.step} that the run has done, "
                f"got {self.config.run.iterations}",
                ExitCode.USAGE,
            )
        self.learner.restore(checkpoint.tensors, checkpoint.state["learner"])
        torch.set_rng_state(checkpoint.tensors["rng"]["torch"])
        log.truncate(checkpoint.state["metrics_position"])
        return checkpoint.step

    def checkpoint(self, done: int, log: MetricsLog) -> None:
        """Save everything a bit-exact continuation needs."""
        tensors = self.learner.tensors() | {"rng": {"torch": torch.get_rng_state()}}
        self.checkpoints.save(done, tensors, {"learner": self.learner.state(), "metrics_position": log.position()})

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every so many iterations happens now (not at the very end)."""
        return every > 0 and done % every == 0 and done < self.config.run.iterations

    def samples(self, name: str, images: Tensor, held_out: HeldOut) -> None:
        """Write the grid `samples/NAME.png` of the held-out prompts' first pictures."""
        with output_errors(f"cannot write in {self.directory}"):
            count = min(_GRID, len(images))
            save_grid(
                images[:count],
                self.directory / "samples" / f"{name}.png",
                columns=6,
                scale=max(1, 128 // images.shape[-1]),
                captions=held_out.prompts[:count],
            )

    def evaluated(self, when: str, evaluation: Evaluation, held_out: HeldOut) -> None:
        """Keep the scores and pictures of the evaluation `when` ("before" or "after")."""
        scores = {name: values.tolist() for name, values in evaluation.scores.items()}
        with output_errors(f"cannot write in {self.directory}"):
            text = json.dumps({"prompts": held_out.prompts, "scores": scores})
            write_durably(self.directory / f"evaluation-{when}.json", text.encode())
        self.samples(when, evaluation.images, held_out)

    def finish(self, log: MetricsLog) -> str:
        """Write adapter and report (the model must hold the weights to export); returns the closing message."""
        lora = self.config.lora
        with output_errors(f"cannot write in {self.directory}"):
            save_lora(self.model.network, self.directory / "adapter", rank=lora.rank, alpha=lora.alpha)
            before, after = self._scores("before"), self._scores("after")
            metrics = read_metrics(log.path)
            phases = {phase: sum(record.get(f"time/{phase}", 0.0) for record in metrics) for phase in PHASES}
            change = {name: paired_interval(before[name], after[name]) for name in after}
            report = write_report(
                self.directory,
                config_yaml=(self.directory / "config.yaml").read_text(),
                metrics=metrics,
                before={name: mean_interval(values) for name, values in before.items()},
                after={name: mean_interval(values) for name, values in after.items()},
                change=change,
                images={when: self.directory / "samples" / f"{when}.png" for when in ("before", "after")},
                phases=phases,
            )
        lines = []
        for name in after:
            first, last, moved = mean_interval(before[name]), mean_interval(after[name]), change[name]
            lines.append(
                f"held-out {name}: {first.mean:.3f} [{first.low:.3f}, {first.high:.3f}] before, "
                f"{last.mean:.3f} [{last.low:.3f}, {last.high:.3f}] after; "
                f"change {moved.mean:+.3f} [{moved.low:+.3f}, {moved.high:+.3f}] (95%)"
            )
        lines.append("seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in phases.items()))
        return "\n".join(
            [*lines, f"report:  {report}", f"adapter: {self.directory / 'adapter'}", f"metrics: {log.path}"]
        )

    def _scores(self, when: str) -> dict[str, Any]:
        path = self.directory / f"evaluation-{when}.json"
        try:
            scores = json.loads(path.read_text())["scores"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"{path} is missing or broken, so the run cannot be summed up", ExitCode.OUTPUT) from None
        return {name: [[_number(v) for v in row] for row in rows] for name, rows in scores.items()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
