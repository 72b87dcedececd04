"""What a run writes: metrics, sample grids, checkpoints, the adapter and the report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import CheckpointError, NonFiniteError, OutputError, RewardError, UsageError
from densegrpo_fast.common.files import finite, output_errors, read_verified, replace_bytes, replace_text, unused_name
from densegrpo_fast.config import Config
from densegrpo_fast.config.yaml_files import dump_yaml
from densegrpo_fast.flow.noise import LAYOUT_VERSION
from densegrpo_fast.models.base import FlowModel, network_class
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.lora import base_fingerprint, save_lora, save_parameters
from densegrpo_fast.models.whole_network import save_network
from densegrpo_fast.rewards.registry import bounds
from densegrpo_fast.run_files.alarms import Alarms, alarms_for
from densegrpo_fast.run_files.checkpoint import Checkpoint, CheckpointManager
from densegrpo_fast.run_files.early_stopping import EarlyStopping
from densegrpo_fast.run_files.images import save_grid
from densegrpo_fast.run_files.loggers import Loggers, RunFacts
from densegrpo_fast.run_files.metrics import MetricsLog, Progress
from densegrpo_fast.run_files.model_card import BaseFacts, write_model_card
from densegrpo_fast.run_files.report import write_report
from densegrpo_fast.run_files.run_directory import (
    ADAPTER,
    NETWORK,
    SAMPLES,
    STRIPS,
    auto_record,
    iteration_name,
    open_run_directory,
)
from densegrpo_fast.run_files.statistics import mean_interval, paired_interval
from densegrpo_fast.run_files.strip import Strip, save_strip
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.evaluation import Evaluation, HeldOut
from densegrpo_fast.training.meter import PHASES

logger = logging.getLogger(__name__)

_GRID = 24


@contextmanager
def run_directory(config: Config, world: World, *, resume: bool) -> Iterator[Path]:
    """The directory of a run, opened and locked by the process that writes in it.

    Raises:
        UserError: as `open_run_directory`, in every process.
    """
    path = config.output_dir
    with ExitStack() as opened:
        opening = partial(open_run_directory, path, resume=resume, overwrite=config.run.overwrite)
        world.on_main(lambda: opened.enter_context(opening()))
        yield path


class RunRecords:
    """The files of one run directory, and what is shown of it. Of several processes one opens and writes them.

    Args:
        directory: of the run.
        config: the run's.
        model: with the adapter that is trained.
        held_out: the held-out prompts.
        base_weights: fingerprint of the base model; None = it is taken here, of a model that is not sharded.

    Raises:
        UsageError: the model has no torch module as its network.
    """

    log: MetricsLog
    alarms: Alarms
    stopping: EarlyStopping
    progress: Progress | None = None

    def __init__(
        self, directory: Path, config: Config, model: FlowModel, held_out: HeldOut, base_weights: str | None = None
    ):
        self.directory, self.config, self.model, self.held_out = directory, config, model, held_out
        if not isinstance(getattr(model, "network", None), torch.nn.Module):
            raise UsageError(
                f"Trainer.run: expected {type(model).__name__}.network to be the torch module that is trained "
                "(a loop over Trainer.step does without)"
            )
        settings = config.resume_settings() | {
            "noise_layout": LAYOUT_VERSION,
            "base_weights": base_fingerprint(model.network) if base_weights is None else base_weights,
        }
        self.checkpoints = CheckpointManager(directory / "checkpoints", config.run.keep_checkpoints, settings)

    def open(self, opened: ExitStack) -> None:
        """Open the metrics, to be closed with `opened`."""
        self.log = opened.enter_context(MetricsLog(self.directory / "metrics.jsonl"))

    def show(self, start: int) -> None:
        """Start loggers, alarms and early stopping of a run with so many iterations behind it."""
        settings = self.config.model_dump(mode="json")
        self.log.also(Loggers(self.config.run.loggers, RunFacts(self.directory, settings, start)))
        past = self.log.records()
        self.alarms, self.stopping = Alarms(alarms_for(self.config), past=past), EarlyStopping(self.config, past)

    def begin(self) -> None:
        """Write the resolved configuration; what `lookahead.plan auto` measured stands above it as a comment."""
        config_yaml = dump_yaml(self.config.self_contained())
        if measured := auto_record(self.directory):
            comment = (f"# {line}".rstrip() for line in measured["text"].splitlines())
            config_yaml = "\n".join([*comment, config_yaml])
        replace_text(self.directory / "config.yaml", config_yaml, digest=True)

    def count(self, start: int, opened: ExitStack, gpus: int) -> None:
        """Show how far the run has come from here on, on so many GPUs."""
        total, images = self.config.run.iterations, self.config.data.num_prompts * self.config.sampler.group_size
        progress = Progress(total, start, images=images, gpus=gpus, pauses=self.evaluations_after)
        self.progress = opened.enter_context(progress)

    def pause(self) -> AbstractContextManager[None]:
        """Within the context there is an evaluation, whose seconds are no iteration's."""
        return nullcontext() if self.progress is None else self.progress.pause()

    def close_progress(self) -> None:
        """Leave the progress as it is: no iteration is to come."""
        if self.progress is not None:
            self.progress.close()

    def alarmed(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the alarms add to an iteration's record."""
        found = self.alarms.check(record)
        return {"alarms": found} if found else {}

    def append(self, record: dict[str, Any], *, report: bool) -> str | None:
        """Write and show an iteration's record, and the report anew if it is due.

        Returns:
            Why the run should end with it; None if it should go on.
        """
        self.log.append(record)
        if report:
            self.report()
        if self.progress is not None:
            self.progress.update(record["iteration"], reward=record["reward"])
        return self.stopping.check(record)

    def load(self) -> Checkpoint | None:
        """The newest good checkpoint, to whose metrics the log goes back; None if none was saved yet.

        Raises:
            CheckpointError: none is intact, or it belongs to other settings; there is less than the run's records say
                that there was; or what the end of the run needs is lost. UsageError: the run has already gone further
                than `run.iterations`.
        """
        if not self.checkpoints.steps():
            self._begin_again(self.log)
            return None
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
        self.log.truncate(checkpoint.state["metrics_position"], checkpoint.state.get("metrics_digest"))
        return checkpoint

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

    def position(self) -> dict[str, Any]:
        """Where the metrics have come to: what a checkpoint keeps of them."""
        return {"metrics_position": self.log.position(), "metrics_digest": self.log.digest()}

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every so many iterations happens now (not at the very end)."""
        return every > 0 and done % every == 0 and done < self.config.run.iterations

    def _samples(self, name: str, images: Tensor, done: int) -> None:
        """Write the grid `samples/NAME.png` of the held-out prompts' first pictures, and show it to the loggers."""
        path = self.directory / SAMPLES / f"{name}.png"
        with output_errors(f"cannot write in {self.directory}"):
            count = min(_GRID, len(images))
            save_grid(
                images[:count],
                path,
                columns=6,
                scale=max(1, 128 // images.shape[-1]),
                captions=self.held_out.prompts[:count],
            )
        self.log.show_picture("samples", path, done)

    def evaluations_after(self, done: int) -> int:
        """How many evaluations come after so many iterations, the last one included."""
        every, total = self.config.evaluation.every, self.config.run.iterations
        return 1 + (max(total - 1, done) // every - done // every if every else 0)

    def strip(self, strip: Strip | None, done: int) -> None:
        """Write the strip of an iteration, `strips/iteration-NNNNN.png` and `.webp`, and show it to the loggers."""
        if strip is None:
            return
        path = self.directory / STRIPS / f"{iteration_name(done)}.png"
        save_strip(strip, path)
        self.log.show_picture("strip", path, done)

    def evaluated(self, when: str, evaluation: Evaluation, done: int) -> None:
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
        document = {"iteration": done, "prompts": self.held_out.prompts, "scores": scores}
        replace_text(self.directory / f"evaluation-{when}.json", json.dumps(finite(document)), digest=True)
        self._samples(when, evaluation.images, done)
        if when in ("before", "after"):
            # that of an iteration is in its record
            self.log.show({"iteration": done} | evaluation.metrics())

    def report(self) -> Path:
        """Write the report anew, from the files as they are."""
        return write_report(self.directory)

    def stopped(self, done: int) -> None:
        """Say that a signal has stopped the run."""
        assert self.progress is not None
        self.progress.write(f"stopped after iteration {done}; continue with --resume {self.directory}")

    def finish(self, trained: dict[str, Tensor] | None = None) -> str:
        """Write what was trained, and the report; returns the closing message.

        Args:
            trained: the network's weights as they are to be exported, whole; None = the model's adapter as it is.
        """
        lora = self.config.lora
        with output_errors(f"cannot write in {self.directory}"):
            has_lora, network = hasattr(self.model.network, "peft_config"), self.model.network
            if trained is not None and hasattr(network, "save_pretrained"):
                exported = save_network(network, trained, self.directory / NETWORK, self._dtype())
            elif has_lora:
                exported = self.directory / ADAPTER
                save_lora(network, exported, rank=lora.rank, alpha=lora.alpha)
            else:
                exported = self.directory / ADAPTER
                save_parameters(self.model.trainable_parameters() if trained is None else trained, exported)
            prompts, before = self._evaluation("before")
            _, after = self._evaluation("after")
            metrics = self.log.records()
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
            if has_lora or exported.name == NETWORK:
                write_model_card(
                    exported,
                    self.config,
                    base=self._base_facts(),
                    prompts=prompts,
                    metrics=metrics,
                    **measured,
                )
        lines = []
        alike = [name for name in after if name != "reward" and after[name] == after.get("reward")]
        for name in after:
            if name in alike:
                continue
            shown = f"reward ({', '.join(alike)})" if alike and name == "reward" else name
            first, last, moved = (measured[when][name] for when in ("before", "after", "change"))
            lines.append(
                f"held-out {shown}: {first.mean:.3f} [{first.low:.3f}, {first.high:.3f}] before, "
                f"{last.mean:.3f} [{last.low:.3f}, {last.high:.3f}] after; "
                f"change {moved.mean:+.3f} [{moved.low:+.3f}, {moved.high:+.3f}] (95%, "
                f"{len(prompts)} prompts)"
            )
        lines.append("seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in phases.items()))
        peaks = [record["memory/peak_gib"] for record in metrics if record.get("memory/peak_gib") is not None]
        if peaks:
            lines.append(f"memory: at most {max(peaks):.1f} GiB in an iteration")
        return "\n".join([*lines, f"report:  {report}", f"{exported.name}: {exported}", f"metrics: {self.log.path}"])

    def _base_facts(self) -> BaseFacts:
        family = self.model.family if isinstance(self.model, DiffusersModel) else None
        return BaseFacts(
            pipeline=None if family is None else family.pipeline_class,
            call={} if family is None else family.call_options(self.config.evaluation_guidance_scale),
            scheduler=None if family is None else family.sampler,
            scheduler_options={} if family is None else family.sampler_options,
            has_t5=getattr(self.model, "has_t5", False),
            dtype=str(self._dtype()).removeprefix("torch."),
            network=None if self.config.model.train == "lora" else network_class(self.model.network).__name__,
            part=None if family is None else family.network_part,
            device=self.model.device.type,
        )

    def _dtype(self) -> torch.dtype:
        return self.model.network.dtype if self.model.computed_in is None else self.model.computed_in

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
