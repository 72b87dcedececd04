"""The finished runs of a study with their directories, held to what the study recorded of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.common.operations import config_of
from benches.common.record import portable
from benches.learning.comparison import Run
from benches.learning.study_document import differing
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.run_files.model_refs import ModelRef, locate


@dataclass(frozen=True)
class Finished:
    """A run of the study and what its directory holds: `config`, that of the run, and `subject`, its adapter."""

    run: Run
    config: Config
    subject: ModelRef

    @property
    def name(self) -> str:
        return f"{self.run['variant']}-{self.run['seed']}"


def read_study(path: Path) -> dict[str, Any]:
    """A document of `study.py`.

    Raises:
        UsageError: it is none, or has no run.
    """
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        settings, runs = study["settings"], study["runs"]
        known = [settings[run["variant"]] for run in runs]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--study: {path} is no readable study") from None
    if not known:
        raise UsageError(f"--study: {path} has no finished run")
    return study


def finished(study: Mapping[str, Any], work: Sequence[Path]) -> list[Finished]:
    """The runs of a study with their directories, NAME-SEED in one of `work`.

    Raises:
        UsageError: a directory is not there, has no adapter, or is of other settings or scores than the study's
            run, or the runs were not evaluated alike; the run is named.
    """
    found = [_finished(run, study["settings"][run["variant"]], work) for run in study["runs"]]
    for other in found[1:]:
        for first, own in zip(_evaluated_by(found[0].config), _evaluated_by(other.config), strict=True):
            if first != own:
                raise UsageError(
                    f"{other.name} was evaluated by other settings than {found[0].name}: {own} and {first}",
                )
    return found


def _finished(run: Run, settings: Mapping[str, Any], work: Sequence[Path]) -> Finished:
    name = f"{run['variant']}-{run['seed']}"
    directory = next((above / name for above in work if (above / name / "config.yaml").is_file()), None)
    if directory is None:
        raise UsageError(f"{name}: there is no such run in {', '.join(map(str, work))}")
    config, _ = parse_arguments(["--config", str(directory / "config.yaml")])
    wanted = config_of(settings, run["seed"])
    kept = (portable(one.resume_settings() | {"run": {"iterations": one.run.iterations}}) for one in (wanted, config))
    first, second = ({key: value for key, value in one.items() if isinstance(value, dict)} for one in kept)
    others = differing(first, second) + (["seed"] if config.seed != run["seed"] else [])
    if others:
        raise UsageError(f"{name}: {directory} is of another {', '.join(others)} than the study's")
    after = directory / "evaluation-after.json"
    try:
        scores = json.loads(after.read_text(encoding="utf-8"), parse_constant=lambda _: None)["scores"]
    except (OSError, ValueError, KeyError):
        raise UsageError(f"{name}: {after} is not there or broken; the run is not finished") from None
    if scores != run["after"]:
        raise UsageError(f"{name}: {directory} is another run than the study's: their last scores differ")
    subject = locate(str(directory))
    if subject.adapter is None:
        raise UsageError(f"{name}: {directory} has no adapter")
    return Finished(run, config, subject)


def _evaluated_by(config: Config) -> tuple[Any, ...]:
    kept = config.evaluation.model_dump(exclude={"every"})
    return portable(config.model.path), config.data.eval_prompts, kept, config.evaluation_guidance_scale
