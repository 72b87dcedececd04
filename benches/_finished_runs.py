"""The finished runs of a study with their directories, held to what the study recorded of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _comparison import Run
from _operations import config_of
from _record import portable
from _study_document import differing

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.runtime.model_refs import ModelRef, locate


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
        UserError: (usage) it is none, or has no run.
    """
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        settings, runs = study["settings"], study["runs"]
        known = [settings[run["variant"]] for run in runs]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--study: {path} is no readable study", ExitCode.USAGE) from None
    if not known:
        raise UserError(f"--study: {path} has no finished run", ExitCode.USAGE)
    return study


def finished(study: Mapping[str, Any], work: Sequence[Path]) -> list[Finished]:
    """The runs of a study with their directories, NAME-SEED in one of `work`.

    Raises:
        UserError: (usage) a directory is not there, has no adapter, or is of other settings or scores than the study's
            run, or the runs were not evaluated alike; the run is named.
    """
    found = [_finished(run, study["settings"][run["variant"]], work) for run in study["runs"]]
    for other in found[1:]:
        for first, own in zip(_evaluated_by(found[0].config), _evaluated_by(other.config), strict=True):
            if first != own:
                raise UserError(
                    f"{other.name} was evaluated by other settings than {found[0].name}: {own} and {first}",
                    ExitCode.USAGE,
                )
    return found


def _finished(run: Run, settings: Mapping[str, Any], work: Sequence[Path]) -> Finished:
    name = f"{run['variant']}-{run['seed']}"
    directory = next((above / name for above in work if (above / name / "config.yaml").is_file()), None)
    if directory is None:
        raise UserError(f"{name}: there is no such run in {', '.join(map(str, work))}", ExitCode.USAGE)
    config, _ = load_config(["--config", str(directory / "config.yaml")])
    wanted = config_of(settings, run["seed"])
    kept = (portable(one.resume_settings() | {"run": {"iterations": one.run.iterations}}) for one in (wanted, config))
    first, second = ({key: value for key, value in one.items() if isinstance(value, dict)} for one in kept)
    others = differing(first, second) + (["seed"] if config.seed != run["seed"] else [])
    if others:
        raise UserError(f"{name}: {directory} is of another {', '.join(others)} than the study's", ExitCode.USAGE)
    after = directory / "evaluation-after.json"
    try:
        scores = json.loads(after.read_text(encoding="utf-8"), parse_constant=lambda _: None)["scores"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{name}: {after} is not there or broken; the run is not finished", ExitCode.USAGE) from None
    if scores != run["after"]:
        raise UserError(
            f"{name}: {directory} is another run than the study's: their last scores differ", ExitCode.USAGE
        )
    subject = locate(str(directory))
    if subject.adapter is None:
        raise UserError(f"{name}: {directory} has no adapter", ExitCode.USAGE)
    return Finished(run, config, subject)


def _evaluated_by(config: Config) -> tuple[Any, ...]:
    kept = config.evaluation.model_dump(exclude={"every"})
    return portable(config.model.path), config.data.eval_prompts, kept, config.evaluation_guidance_scale
