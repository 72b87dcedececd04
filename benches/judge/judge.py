"""Judges a study's finished runs by a network that no method trained on, and measures how far they drifted.

    python -m benches.judge.judge --study runs/study.json --work runs/study --output runs/judge.json

Every run's adapter draws the study's held-out pictures, the first --samples of each prompt, from the same noise as the
base model. Written are, for each run and for each variant minus the one of --against over seeds, with 95% intervals,
what `MEASURES` names: the judge's scores (`network.py`), the distance of the pictures from the base's, and the KL of
the policy from the base (`drift.py`). The KL is that of a whole trajectory, the sum of its steps, with the mean of the
noisy steps beside it; the trajectories of every policy have the noise levels, noisy steps and guidance with which the
variant of --against trains, or the numbers could not be compared. The judge is trained on renders alone, in some
minutes, and kept in a file. A command that was stopped goes on where it was. Under torchrun each process judges some
of the runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import TYPE_CHECKING, Any

from benches.common.record import provenance, write_json
from benches.judge.finished_runs import Finished, finished, read_study
from benches.learning.comparison import Run, pairs
from densegrpo_fast.common.errors import OutputError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.run_files.model_refs import read_weights, with_adapter
from densegrpo_fast.run_files.statistics import mean_interval, paired_interval

if TYPE_CHECKING:
    from torch import Tensor

    from benches.judge.network import Judge
    from densegrpo_fast.config import Config
    from densegrpo_fast.models.diffusers_model import DiffusersModel
    from densegrpo_fast.training.distributed import World
    from densegrpo_fast.training.evaluation import HeldOut

SCORES = ("graded", "probability")
DRIFTS = ("pixel_distance", "dissimilarity")
MEASURES = {
    "judge/graded": "change of the judge's graded score",
    "judge/probability": "change of the probability, by the judge, that a picture is right",
    "drift/pixel_distance": "root mean square difference from the base's pictures of the same noise",
    "drift/dissimilarity": "1 - SSIM with them",
    "kl/flow_grpo": "KL from the base, sum over a trajectory's noisy steps, in the scale of Flow-GRPO's code",
    "kl/paper": "the same in the scale of its paper",
    "kl_per_noisy_step/flow_grpo": "mean over the noisy steps instead, in the scale of Flow-GRPO's code",
    "kl_per_noisy_step/paper": "the same in the scale of its paper",
}
"""What a run is compared by."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options = _parser().parse_args(arguments)
    with user_errors_exit():
        from densegrpo_fast.training.evaluation import HeldOut
        from densegrpo_fast.training.models import default_device, load_model
        from densegrpo_fast.training.processes import joined

        study = read_study(options.study)
        runs = finished(study, options.work)
        names = [found.run["variant"] for found in runs]
        if options.against not in names:
            raise UsageError(f"--against: expected one of {', '.join(dict.fromkeys(names))}, got {options.against}")
        evaluation = runs[0].config.evaluation.model_copy(update={"num_prompts": options.prompts})
        if options.samples > evaluation.samples_per_prompt:
            raise UsageError(
                f"--samples: expected at most the {evaluation.samples_per_prompt} pictures that the study drew for a "
                f"prompt, got {options.samples}",
            )
        walk = next(found.config for found in runs if found.run["variant"] == options.against)
        held_out = HeldOut.of(runs[0].config.model_copy(update={"evaluation": evaluation}))
        settings = {
            "study": options.study.name,
            "prompts": len(held_out.prompts),
            "samples": options.samples,
            "num_steps": held_out.num_steps,
            "guidance_scale": held_out.guidance_scale,
            "trajectories": min(options.trajectories, len(held_out.prompts)),
            "kl": kl_settings(walk),
            "against": options.against,
        }
        with joined(walk) as world:
            model = load_model(runs[0].config.model, default_device())
            file = options.judge or options.work[0] / "judge.safetensors"
            world.on_main(lambda: _judge(file, model))
            judge, about = _judge(file, model)
            if world.main:
                print(f"judge: {about['held_out_renders']}", file=sys.stderr)
            document = judged(Bench(model, held_out, judge, walk, settings), about, runs, options.output, world)
        if world.main:
            print(summary(document))
    return ExitCode.OK


@dataclass(frozen=True)
class Bench:
    """What all runs are judged with.

    Attributes:
        model: the base.
        held_out: the study's pictures, of which the first S of each of N prompts are drawn.
        judge: the network.
        walk: configuration whose sampler draws the trajectories of every policy for the KL.
        settings: what is recorded of all that; `samples` is S.
    """

    model: DiffusersModel
    held_out: HeldOut
    judge: Judge
    walk: Config
    settings: dict[str, Any]

    def pictures(self) -> Tensor:
        """The pictures [N*S, 3, H, W] of the model as it stands."""
        from benches.judge.drift import held_out_pictures

        return held_out_pictures(self.model, self.held_out, self.settings["samples"])

    def scores(self, pictures: Tensor) -> dict[str, list[list[float]]]:
        """Scores by name, [N, S]."""
        from benches.judge.network import graded, probability, scene_of
        from benches.judge.training import look

        scenes = [scene_of(prompt) for prompt in self.held_out.prompts for _ in range(self.settings["samples"])]
        seen = look(self.judge, pictures)
        return {name: self._table(of(seen, scenes)) for name, of in (("graded", graded), ("probability", probability))}

    def drift(self, pictures: Tensor, base: Tensor) -> dict[str, list[list[float]]]:
        """Distances of pictures from the base's by name, [N, S]."""
        from benches.judge.drift import dissimilarity, pixel_distance

        found = {"pixel_distance": pixel_distance, "dissimilarity": dissimilarity}
        return {name: self._table(of(pictures, base)) for name, of in found.items()}

    def judged(self, found: Finished, base: Tensor, before: Mapping[str, Any]) -> dict[str, Any]:
        """What is recorded of a run; `base` are the base model's pictures, and `before` their scores.

        Raises:
            UserError: its adapter cannot be read, or does not fit the model.
        """
        from benches.judge.drift import divergence_record, stochastic_trajectories
        from densegrpo_fast.training.schedule import Schedule

        start, weights = process_time(), read_weights(found.subject)
        coefficients = Schedule(self.walk, self.model).coefficients(self.settings["kl"]["noisy_steps"])
        with with_adapter(self.model, found.subject, weights):
            pictures = self.pictures()
            walked = stochastic_trajectories(
                self.model,
                coefficients,
                self.held_out,
                self.settings["trajectories"],
                guidance_scale=self.walk.sampler.guidance_scale,
            )
        after, moved = self.scores(pictures), self.drift(pictures, base)
        return {
            "variant": found.run["variant"],
            "seed": found.run["seed"],
            "adapter": weights.fingerprint(),
            "judge": {
                name: {
                    "before": mean_interval(before[name])._asdict(),
                    "after": mean_interval(after[name])._asdict(),
                    "change": paired_interval(before[name], after[name])._asdict(),
                }
                for name in SCORES
            },
            "drift": {name: mean_interval(values)._asdict() for name, values in moved.items()},
            "kl": divergence_record(self.model, walked),
            "after": after,
            "cpu_seconds": process_time() - start,
        }

    def _table(self, values: Tensor) -> list[list[float]]:
        return [[round(value, 5) for value in row] for row in values.view(-1, self.settings["samples"]).tolist()]


def kl_settings(config: Config) -> dict[str, Any]:
    """The trajectories on which the KL of every policy is measured: those of a configuration's sampler.

    They have noise in every step of every window that an iteration may have.
    """
    sampler = config.sampler
    return {
        "num_steps": sampler.num_steps,
        "dynamics": sampler.dynamics,
        "noise_levels": list(config.noise_levels),
        "noisy_steps": sorted({step for window in config.windows() for step in window}),
        "guidance_scale": sampler.guidance_scale,
    }


def judged(
    bench: Bench, about: Mapping[str, Any], runs: Sequence[Finished], output: Path, world: World
) -> dict[str, Any]:
    """Judge the runs that `output` does not hold yet, one in each process at a time, writing it after these; returns
    the document.

    Raises:
        OutputError: it holds what was judged in another way.
    """
    document = world.from_main(lambda: _opened(output, bench.settings, about))
    base = bench.pictures()
    before = bench.scores(base)
    document["before"] = before
    document["agreement"] = agreement(before, runs[0].run["before"]["reward"])
    known = [(run["variant"], run["seed"]) for run in document["runs"]]
    waiting = [found for found in runs if (found.run["variant"], found.run["seed"]) not in known]
    for start in range(0, len(waiting), world.size):
        own = None
        for found in waiting[start : start + world.size][world.rank :][:1]:
            print(f"judge: {found.name}", file=sys.stderr)
            own = bench.judged(found, base, before)
        document["runs"] += [run for run in world.collect(own) if run is not None]
        document |= provenance()
        world.on_main(partial(write_json, output, _compared(document, bench.settings["against"])))
    document = _compared(document, bench.settings["against"])
    world.on_main(partial(write_json, output, document))
    return document


def _compared(document: dict[str, Any], against: str) -> dict[str, Any]:
    runs = document["runs"]
    return document | {"variants": variants(runs), "comparisons": comparisons(runs, against)}


def agreement(before: Mapping[str, Any], reward: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Rank correlation of the judge's scores with the training reward, over the base's pictures that both scored.

    Args:
        before: the judge's scores, [N, S] each: of the first S pictures of N prompts.
        reward: the study's, of at least as many pictures for each of its prompts; None = missing.

    Returns:
        one for each score, and `pictures`, how many they are over.
    """
    from scipy import stats

    found: dict[str, float] = {}
    for name in SCORES:
        both = [
            (one, other)
            for own, theirs in zip(before[name], reward, strict=False)
            for one, other in zip(own, theirs, strict=False)
            if other is not None
        ]
        found |= {name: float(stats.spearmanr(both).statistic), "pictures": len(both)}
    return found


def measures(run: Mapping[str, Any]) -> dict[str, float]:
    """What a run is compared by (`MEASURES`), one number each."""
    found = {f"judge/{name}": run["judge"][name]["change"]["mean"] for name in SCORES}
    found |= {f"drift/{name}": run["drift"][name]["mean"] for name in DRIFTS}
    for key, part in (("kl", "per_trajectory"), ("kl_per_noisy_step", "per_noisy_step")):
        found |= {f"{key}/{scale}": value[part] for scale, value in run["kl"].items()}
    return found


def variants(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean of each measure over a variant's seeds, with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [measures(run) for run in runs if run["variant"] == name]
        found[name] = {key: mean_interval([one[key] for one in own])._asdict() for key in own[0]}
    return found


def comparisons(runs: Sequence[Run], against: str) -> list[dict[str, Any]]:
    """Each variant minus one, over the seeds that both have, with an interval for each measure."""
    found = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        paired = [(measures(one), measures(other)) for one, other in pairs(runs, name, against)]
        if name == against or not paired:
            continue
        values = {
            key: paired_interval([other[key] for _, other in paired], [one[key] for one, _ in paired])._asdict()
            for key in paired[0][0]
        }
        seeds = [one["seed"] for one, _ in pairs(runs, name, against)]
        found.append({"first": name, "second": against, "seeds": seeds, "measures": values})
    return found


def summary(document: Mapping[str, Any]) -> str:
    """The variants and the comparisons in words."""
    lines = [f"agreement with the training reward on the base's pictures, rank correlation: {document['agreement']}"]
    for name, values in document["variants"].items():
        lines.append(f"{name}, mean over seeds, 95%:")
        lines += [_line(key, value) for key, value in values.items()]
    for one in document["comparisons"]:
        lines.append(f"{one['first']} minus {one['second']}, {len(one['seeds'])} seeds, 95%:")
        lines += [_line(key, value) for key, value in one["measures"].items()]
    return "\n".join(lines)


def _line(key: str, value: Mapping[str, float | None]) -> str:
    mean, low, high = (float("nan") if value[part] is None else value[part] for part in ("mean", "low", "high"))
    return f"  {key:28} {mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def _opened(output: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """A new document, or the one in `output` if its runs were judged alike."""
    fresh = provenance() | {"measures": MEASURES, "settings": dict(settings), "judge": dict(about), "runs": []}
    if not output.exists():
        return fresh
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        known, judge = document["settings"] | {"against": settings["against"]}, document["judge"]["sha256"]
        list(document["runs"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{output} is no readable result; move it away or give another --output") from None
    if known != settings or judge != about["sha256"]:
        raise OutputError(f"{output} was judged in another way; give another --output")
    return fresh | {"runs": document["runs"]}


def _judge(file: Path, model: DiffusersModel) -> tuple[Judge, dict[str, Any]]:
    from benches.judge.training import Recipe, trained

    return trained(file, model.pipeline.vae, Recipe())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", type=Path, required=True, help="result of study.py")
    parser.add_argument("--work", type=Path, nargs="+", required=True, help="directories of its run directories")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--judge", type=Path, help="the judge's file; if not given, judge.safetensors in the first --work"
    )
    parser.add_argument(
        "--against",
        default="sparse",
        help="variant that the others are compared with, whose noise the KL is measured under",
    )
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=2, help="pictures per prompt, at most the study's")
    parser.add_argument("--trajectories", type=int, default=48, help="of each policy, for the KL")
    return parser


if __name__ == "__main__":
    sys.exit(main())
