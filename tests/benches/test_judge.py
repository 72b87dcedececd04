"""The judge of finished runs: its scores by hand, its training, drift against closed forms, and the whole command."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benches.judge import judge as command
from benches.judge import training
from benches.judge.drift import dissimilarity, divergence, held_out_pictures, pixel_distance
from benches.judge.finished_runs import finished as finished_runs
from benches.judge.finished_runs import read_study
from benches.judge.network import KINDS, PAIRS, Judge, Seen, centres, graded, probability, scene_of
from benches.judge.training import (
    NO_RELATION,
    UNKNOWN,
    Recipe,
    _cells,
    augmented,
    draw_scenes,
    loss,
    render,
    train,
    trained,
    weights_fingerprint,
)
from benches.learning import study
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.embedded import architecture, scenes
from densegrpo_fast.embedded.scenes import COLOURS, RELATIONS, SHAPES, Item, Scene
from densegrpo_fast.flow.dynamics import B, C, coefficients
from densegrpo_fast.models.base import Velocity
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import rollout
from densegrpo_fast.train import train as train_run
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.evaluation import HeldOut
from densegrpo_fast.training.models import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from worlds import together  # noqa: E402

SMALL = Recipe(steps=2, batch=6, decoded=4, held_out=12)


CELLS = torch.zeros(1, 64, 5), torch.zeros(1, 64, 6)
"""Of no effect on any score."""


def seen(kinds: dict[tuple[str, str], list[float]], shapes: dict[str, list[float]], relation: float = 0.0) -> Seen:
    """One picture: probabilities of the numbers 0..3 of some kinds and shapes, which the others are surely not; and the
    probability of the first pair's first relation, the rest of which is none."""

    def table(names: Any, given: Any) -> Tensor:
        rows = [given.get(name, [1.0, 0.0, 0.0, 0.0]) for name in names]
        return torch.tensor(rows).log()[None]

    relations = torch.zeros(1, len(PAIRS), len(RELATIONS) + 1)
    relations[0, 0, 0], relations[0, 0, NO_RELATION] = relation, 1 - relation
    return Seen(table(KINDS, kinds), table(SHAPES, shapes), relations.log(), *CELLS)


def score(of: Any, picture: Seen, prompt: str) -> float:
    return of(picture, [scene_of(prompt)]).item()


def test_the_scores_of_a_sentence_by_hand():
    picture = seen(
        {("circle", "red"): [0.2, 0.8, 0.0, 0.0], ("square", "blue"): [0.5, 0.4, 0.1, 0.0]},
        {"circle": [0.1, 0.9, 0.0, 0.0], "square": [0.3, 0.6, 0.1, 0.0]},
        relation=0.5,
    )
    # one red circle, one blue square: .8 * .4; with their relation half of it
    assert score(probability, picture, "a red circle and a blue square") == pytest.approx(0.32)
    assert PAIRS[0] == (SHAPES.index("circle"), SHAPES.index("square"))
    assert score(probability, picture, "a red circle to the left of a blue square") == pytest.approx(0.16)
    # without colours the shapes count: .9 * .6
    assert score(probability, picture, "a circle and a square") == pytest.approx(0.54)
    # at least one circle .9 and red .8; at least one square .7 and blue .5; nothing more: at most one red circle 1, at
    # most one blue square .9. Mean of .85, .6 and .9
    assert score(graded, picture, "a red circle and a blue square") == pytest.approx((0.85 + 0.6 + 0.9) / 3)
    # with the relation: .85 * .6 * .5 beside them
    beside = (0.85 + 0.6 + 0.255 + 0.9) / 4
    assert score(graded, picture, "a red circle to the left of a blue square") == pytest.approx(beside)
    # a red circle alone: no blue square with .5
    assert score(probability, picture, "a red circle") == pytest.approx(0.8 * 0.5)
    assert score(graded, picture, "a red circle") == pytest.approx((0.85 + 0.5) / 2)


def test_a_number_of_objects_is_as_many_statements():
    picture = seen({("cross", "green"): [0.0, 0.4, 0.5, 0.1]}, {"cross": [0.0, 0.4, 0.5, 0.1]})
    assert score(probability, picture, "two green crosses") == pytest.approx(0.5)
    # at least one 1, at least two .6, at most two .9
    assert score(graded, picture, "two green crosses") == pytest.approx((1 + 0.6 + 0.9) / 3)
    with pytest.raises(ValueError, match="got 'two pink crosses'"):
        scene_of("two pink crosses")


def test_all_sentences_of_a_sure_picture_are_sure():
    generator = np.random.default_rng(0)
    for scene in scenes.sample_scenes(30, generator, held_out=True):
        _, truth = render([scene], generator)
        hot = [torch.nn.functional.one_hot(part, 4).float() for part in (truth.kinds, truth.shapes)]
        known = truth.relations.where(truth.relations != UNKNOWN, torch.tensor(NO_RELATION))
        relations = torch.nn.functional.one_hot(known, len(RELATIONS) + 1).float()
        picture = Seen(hot[0].log(), hot[1].log(), relations.log(), *CELLS)
        assert score(probability, picture, scene.prompt) == 1.0, scene.prompt
        assert score(graded, picture, scene.prompt) == pytest.approx(1.0), scene.prompt


def test_centres_are_where_cells_are_filled():
    cells = torch.zeros(1, 64, 1)
    # row 6, column 1 of 8: x = (1.5 / 8) * 2 - 1, y = (6.5 / 8) * 2 - 1
    cells[0, 6 * 8 + 1] = 0.25
    torch.testing.assert_close(centres(cells), torch.tensor([[[-0.625, 0.625]]]))
    # and three times as likely in column 3 of that row: x = (-0.625 + 3 * -0.125) / 4
    cells[0, 6 * 8 + 3] = 0.75
    torch.testing.assert_close(centres(cells), torch.tensor([[[-0.25, 0.625]]]))


def test_the_truth_is_what_the_renderer_drew():
    generator = np.random.default_rng(3)
    scene = Scene("free", (Item("circle", "red"), Item("circle", "green"), Item("cross", "blue")))
    images, truth = render([scene] * 8, generator)
    assert truth.kinds[0].sum() == 3 and truth.shapes[0].tolist() == [2, 0, 0, 1]
    assert truth.objects[0, :, 0].tolist() == [KINDS.index((item.shape, item.colour)) for item in scene.items]
    # no two shapes are there exactly once
    assert (truth.relations == UNKNOWN).all()
    shapes, colours = _cells(truth.objects)
    for image, cross, where, colour in zip(images, truth.objects[:, 2, 1:], shapes, colours, strict=True):
        x, y = ((cross + 1) * 32).int().tolist()
        # the renderer's blue, shaded
        assert image[2, y, x] > 0.75 and image[0, y, x] < 0.2
        cell = (y // 8) * 8 + x // 8
        assert (where < 4).sum() == 3 == (colour != UNKNOWN).sum()
        assert SHAPES[where[cell]] == "cross" and list(COLOURS)[colour[cell]] == "blue"
    told = scene_of("a red circle above a blue square")
    _, truth = render([told], generator)
    pair = (SHAPES.index("circle"), SHAPES.index("square"))
    assert list(RELATIONS)[truth.relations[0, PAIRS.index(pair)]] == "above"
    assert list(RELATIONS)[truth.relations[0, PAIRS.index(pair[::-1])]] == "below"


def test_pictures_and_places_move_together():
    generator = np.random.default_rng(0)
    images, truth = render([scene_of("a red circle")] * 4, generator)
    moved, known = augmented(images, truth, torch.Generator().manual_seed(2))
    kind, x, y = known.objects[0, 0].tolist()
    assert kind == KINDS.index(("circle", "red")) and [x, y] != truth.objects[0, 0, 1:].tolist()
    x, y = 32 * (x + 1), 32 * (y + 1)
    red = moved[0, 0] - moved[0, 1]
    rows, columns = torch.nonzero(red > 0.4, as_tuple=True)
    assert abs(rows.float().mean() + 0.5 - y) < 0.5 and abs(columns.float().mean() + 0.5 - x) < 0.5


@pytest.mark.ci
def test_a_judge_is_a_function_of_its_recipe_and_kept_in_its_file(tmp_path):
    vae = architecture.build_vae().eval()
    first, about = trained(tmp_path / "a.safetensors", vae, SMALL)
    assert {"kinds", "shapes", "relations", "probability", "probability_of_another"} == about["held_out_renders"].keys()
    again, same = trained(tmp_path / "b.safetensors", vae, SMALL)
    assert weights_fingerprint(again) == about["sha256"] == same["sha256"]
    before = (tmp_path / "a.safetensors").stat().st_mtime_ns
    read, found = trained(tmp_path / "a.safetensors", vae, SMALL)
    assert found == about and weights_fingerprint(read) == about["sha256"]
    assert (tmp_path / "a.safetensors").stat().st_mtime_ns == before
    _, other = trained(tmp_path / "a.safetensors", vae, replace(SMALL, seed=1))
    assert other["sha256"] != about["sha256"]


@pytest.mark.ci
def test_training_makes_the_judge_better():
    vae, judge = architecture.build_vae().eval(), Judge()
    pictures, truth = render(draw_scenes(32, np.random.default_rng(9)), np.random.default_rng(9))
    train(judge, vae, replace(SMALL, steps=1))
    start = float(loss(judge(pictures), truth).detach())
    train(judge, vae, replace(SMALL, steps=12, batch=18))
    assert float(loss(judge(pictures), truth).detach()) < 0.75 * start


def test_distances_of_pictures_by_hand():
    base = torch.rand(2, 3, 16, 16)
    assert pixel_distance(base, base).tolist() == [0.0, 0.0]
    torch.testing.assert_close(pixel_distance(base, base + 0.25), torch.full((2,), 0.25))
    torch.testing.assert_close(dissimilarity(base, base), torch.zeros(2), atol=1e-5, rtol=0)
    # plain pictures have no structure to lose: 1 - (2ab + c) / (a^2 + b^2 + c), c = 1e-4
    plain = [torch.full((1, 3, 16, 16), grey) for grey in (0.5, 0.25)]
    expected = 1 - (0.25 + 1e-4) / (0.3125 + 1e-4)
    assert dissimilarity(*plain).item() == pytest.approx(expected, abs=1e-4)
    # the opposite structure at the same mean is further away than noise
    stripes = torch.arange(16).remainder(2).float().expand(1, 3, 16, 16)
    assert dissimilarity(stripes, 1 - stripes).item() > 1.5


def test_the_divergence_of_a_policy_that_is_a_constant_off(mixture_model):
    model = mixture_model

    class Off(type(model)):  # type: ignore[misc]
        def velocity(self, *given: Any) -> Velocity:
            found = super().velocity(*given)
            return replace(found, cond=found.cond + 0.5)

    table = coefficients(model.sigmas(4), [0.0, 0.7, 0.7, 0.7], "flow_sde")
    walk = rollout(
        model,
        torch.randn(3, 4),
        model.encode(["0", "1", "2"]),
        table,
        sample_index=torch.arange(3),
        seed=0,
        iteration=0,
    )
    assert divergence(model, walk, "paper").abs().max() == 0
    found = divergence(Off(), walk, "paper")
    # B^2 * .5^2 / (2 C^2), whatever the state; nothing where no noise is injected
    assert found[0].tolist() == [0.0] * 3
    for step in (1, 2, 3):
        b, c = table.table[step, B].item(), table.table[step, C].item()
        assert found[step].tolist() == pytest.approx([b * b * 0.25 / (2 * c * c)] * 3, rel=1e-4)


def finished(variant: str, seed: int, moved: float, kl: float = 0.0) -> dict[str, Any]:
    """What is recorded of a run, with all measures alike."""
    values = {"mean": moved, "low": 0.0, "high": 0.0}
    return {
        "variant": variant,
        "seed": seed,
        "judge": {name: {"change": values} for name in command.SCORES},
        "drift": {name: values for name in command.DRIFTS},
        "kl": {"paper": {"per_trajectory": kl, "per_noisy_step": kl / 4}},
    }


def test_variants_are_compared_over_their_common_seeds():
    runs = [finished("a", 1, 0.3), finished("b", 1, 0.1), finished("b", 2, 0.2), finished("a", 2, 0.6, kl=2.0)]
    runs.append(finished("a", 3, 9.0))
    (found,) = command.comparisons(runs, "b")
    assert (found["first"], found["second"], found["seeds"]) == ("a", "b", [1, 2])
    # .2 and .4: mean .3, error .1, t(0.975, 1) = 12.706
    change = found["measures"]["judge/graded"]
    assert change["mean"] == pytest.approx(0.3) and change["high"] == pytest.approx(0.3 + 1.2706, abs=1e-4)
    assert found["measures"]["kl/paper"]["mean"] == pytest.approx(1.0)
    assert found["measures"]["kl_per_noisy_step/paper"]["mean"] == pytest.approx(0.25)
    assert command.variants(runs)["a"]["drift/pixel_distance"]["mean"] == pytest.approx(3.3)


def test_agreement_is_a_rank_correlation_over_pictures():
    before = {"graded": [[0.1, 0.2], [0.3, 0.4]], "probability": [[0.4, 0.3], [0.2, 0.1]]}
    # the study has a prompt more, a third picture of each, and no score of one
    found = command.agreement(before, [[1.0, 2.0, 9.0], [None, 4.0, -9.0], [0.0, 0.0, 0.0]])
    assert found == {"graded": pytest.approx(1.0), "probability": pytest.approx(-1.0), "pictures": 3}


@pytest.mark.parametrize("samples", [1, 2])
def test_pictures_are_those_that_the_study_drew(tiny_policy, samples):
    model = tiny_policy()
    held_out = HeldOut(
        ["a cat", "the moon", "a tree"],
        [{}] * 3,
        samples_per_prompt=2,
        num_steps=3,
        guidance_scale=2.0,
        seed=0,
        chunk=4,
    )
    drawn = []

    def keep(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        drawn.append(images)
        return [0.0] * len(images)

    held_out.evaluate(model, RewardMixture({"keep": (keep, 1.0)}))
    theirs = torch.cat(drawn).unflatten(0, (3, 2))[:, :samples].flatten(0, 1)
    # other batches, other rounding
    torch.testing.assert_close(held_out_pictures(model, held_out, samples), theirs, atol=1e-4, rtol=0)


def test_the_kl_is_taken_on_one_kind_of_trajectory():
    levels = "[0.7, 0.6, 0.5, 0.4, 0.3, 0.2]"
    config = parse_arguments(["--config", "embedded_fast", "--sampler.noise_level", levels])[0]
    assert command.kl_settings(config) == {
        "num_steps": 6,
        "dynamics": "cps",
        "noise_levels": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
        # windows of two in steps 0 to 2: not the first window alone
        "noisy_steps": [0, 1, 2],
        "guidance_scale": 1.0,
    }


VARIANTS = ("embedded_sparse", "embedded_fast")
"""The second one's own trajectories have noise in two steps."""
OVERRIDES = (
    "run.iterations=1",
    "data.num_prompts=1",
    "sampler.group_size=2",
    "sampler.micro_batch=2",
    "optimizer.lr=0.02",
    "evaluation.num_prompts=4",
    "reward.observed=[]",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the study of two variants, one seed each, and its run directories."""
    here = tmp_path_factory.mktemp("judged")
    plan = study.Plan(VARIANTS, (3,), 0, OVERRIDES)
    assert study.conduct(plan, here / "study.json", here / "work", train_run) == ExitCode.OK
    return here


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Recipe", lambda: SMALL)


def judged(here: Path, output: Path, *arguments: str, work: Path | None = None) -> int:
    options = ["--study", here / "study.json", "--work", here / "work" if work is None else work, "--output", output]
    try:
        given = [*map(str, options), "--against", VARIANTS[0], "--prompts", "3", "--trajectories", "2", *arguments]
        return command.main(given)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.ci
def test_finished_runs_are_judged_and_not_twice(recorded, tmp_path, quick, monkeypatch, capsys):
    assert judged(recorded, tmp_path / "judge.json") == ExitCode.OK
    document = json.loads((tmp_path / "judge.json").read_text())
    assert f"{VARIANTS[1]} minus {VARIANTS[0]}, 1 seeds" in capsys.readouterr().out
    assert document["judge"]["recipe"]["steps"] == 2 and {"commit", "hardware", "command"} <= document.keys()
    assert (recorded / "work" / "judge.safetensors").is_file()
    assert document["agreement"]["pictures"] == 3 * 2
    assert document["measures"].keys() == document["variants"][VARIANTS[0]].keys()
    assert document["settings"]["kl"]["noisy_steps"] == [0, 1, 2]
    for run in document["runs"]:
        for name in command.SCORES:
            assert np.shape(run["after"][name]) == np.shape(document["before"][name]) == (3, 2)
            change = np.mean(run["after"][name]) - np.mean(document["before"][name])
            assert run["judge"][name]["change"]["mean"] == pytest.approx(change, abs=1e-9)
        # one update at a rate of .02, of which the running average keeps a part
        assert 0 < run["drift"]["pixel_distance"]["mean"] < 0.5
        for scale in ("flow_grpo", "paper"):
            steps = run["kl"][scale]["per_step"]
            assert len(steps) == 6 and max(steps) > 0
            # noise in the first three steps
            total = math.fsum(steps[:3])
            assert run["kl"][scale]["per_trajectory"] == pytest.approx(total) and steps[3:] == [0.0] * 3
            assert run["kl"][scale]["per_noisy_step"] == pytest.approx(total / 3)
    monkeypatch.setattr(command.Bench, "judged", None)
    assert judged(recorded, tmp_path / "judge.json") == ExitCode.OK
    assert json.loads((tmp_path / "judge.json").read_text())["runs"] == document["runs"]
    # other pictures are another measurement
    assert judged(recorded, tmp_path / "judge.json", "--samples", "1") == ExitCode.OUTPUT
    assert "was judged in another way" in capsys.readouterr().err


def judged_together(world: World, here: Path, output: Path) -> None:
    config, _ = parse_arguments(["--config", "embedded_sparse", *OVERRIDES])
    runs = finished_runs(read_study(here / "study.json"), [here / "work"])
    model = load_model(config.model, torch.device("cpu"))
    judge, about = trained(here / "work" / "judge.safetensors", model.pipeline.vae, SMALL)
    settings = json.loads((here / "judge.json").read_text())["settings"]
    held_out = HeldOut.of(
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_prompts": 3})})
    )
    command.judged(command.Bench(model, held_out, judge, config, settings), about, runs, output, world)


@pytest.mark.ci
def test_several_processes_judge_what_one_does(recorded, tmp_path, quick):
    assert judged(recorded, recorded / "judge.json") == ExitCode.OK
    together(2, judged_together, recorded, tmp_path / "judge.json")
    own, other = (json.loads((place / "judge.json").read_text()) for place in (recorded, tmp_path))
    for one, two in zip(own["runs"], other["runs"], strict=True):
        assert {**one, "cpu_seconds": 0} == {**two, "cpu_seconds": 0}


@pytest.mark.ci
def test_runs_that_are_not_the_study_s_are_refused_by_name(recorded, tmp_path, capsys):
    name, work = f"{VARIANTS[1]}-3", tmp_path / "work"

    def refused(message: str) -> None:
        assert judged(recorded, tmp_path / "judge.json", work=work) == ExitCode.USAGE
        assert message in capsys.readouterr().err

    for variant in VARIANTS:
        (work / f"{variant}-3" / "adapter").mkdir(parents=True)
        for file in ("config.yaml", "evaluation-after.json", "adapter/pytorch_lora_weights.safetensors"):
            (work / f"{variant}-3" / file).write_bytes((recorded / "work" / f"{variant}-3" / file).read_bytes())
    (work / name / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    assert judged(recorded, tmp_path / "judge.json", work=work) == ExitCode.ENVIRONMENT
    assert f"{name}: this run has no adapter" in capsys.readouterr().err
    after = work / name / "evaluation-after.json"
    after.write_text(after.read_text().replace("0.", "0.1", 1))
    refused(f"{name}: {work / name} is another run than the study's")
    after.unlink()
    refused(f"{name}: {after} is not there or broken")
    config = work / name / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.02", "lr: 0.01").replace("seed: 3", "seed: 4"))
    refused(f"{name}: {work / name} is of another optimizer.lr, seed than the study's")
    config.unlink()
    refused(f"{name}: there is no such run in {work}")


@pytest.mark.ci
def test_bad_options_are_refused(recorded, tmp_path, capsys):
    assert judged(recorded, tmp_path / "judge.json", "--against", "dense") == ExitCode.USAGE
    assert "--against: expected one of embedded_sparse, embedded_fast, got dense" in capsys.readouterr().err
    assert judged(recorded, tmp_path / "judge.json", "--samples", "3") == ExitCode.USAGE
    assert (
        "--samples: expected at most the 2 pictures that the study drew for a prompt, got 3" in capsys.readouterr().err
    )
    (tmp_path / "study.json").write_text("{}")
    assert judged(tmp_path, tmp_path / "judge.json") == ExitCode.USAGE
    assert "is no readable study" in capsys.readouterr().err
