"""What a fidelity run measures: the configuration's own lookahead among it, as training completes by it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration, parse_arguments
from densegrpo_fast.fidelity import __main__ as fidelity
from densegrpo_fast.fidelity.costs import STEPS
from densegrpo_fast.fidelity.measure import agreement_of, measure
from densegrpo_fast.fidelity.options import parse, plans_of
from densegrpo_fast.fidelity.search import longest_path, search
from densegrpo_fast.fidelity.variants import Choice, choose, configured_variants, reference
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.training.lookahead import build_lookahead
from densegrpo_fast.training.schedule import Schedule

G = 4
JPEG = "--reward.terms={jpeg_incompressibility: 1.0}"


def loaded(*overrides: str, preset: str = "embedded_dense") -> Config:
    return parse_arguments(["--config", preset, *overrides])[0]


def chosen(directory: Path, arguments: list[str], *overrides: str, preset: str = "embedded_dense") -> Choice:
    """For four steps, a group or two, and a random model."""
    own = [f"--model.path={directory}", "--sampler.num_steps=4", "--lora.rank=2", JPEG]
    options, _ = parse(["--groups", "2", *arguments])
    return choose(options, loaded(*own, *overrides, preset=preset))


@pytest.mark.parametrize(
    ("preset", "overrides", "names"),
    [
        ("embedded_dense", [], ["exact_but_last/full/full"]),
        ("embedded_branched", [], ["exact_but_last/full/preview"]),
        ("embedded_g2rpo", [], ["strided{1}/full/full", "strided{2}/full/full"]),
        ("embedded_sparse", [], []),
        (
            "embedded_dense",
            ["--lookahead.plan=n_step", "--lookahead.n=2", "--lookahead.guidance=cond_only"],
            # without guidance there is none to leave out
            ["n_step{2}/full/full"],
        ),
        (
            "embedded_dense",
            [
                "--sampler.guidance_scale=2",
                "--lookahead.guidance=reuse",
                "--lookahead.copy_dtype=bfloat16",
                "--lookahead.cache=text:own",
            ],
            ["exact_but_last+copy(bfloat16)+cache(text:own)/reuse/full"],
        ),
    ],
)
def test_the_lookahead_of_a_configuration(preset: str, overrides: list[str], names: list[str]) -> None:
    assert [variant.name for variant in configured_variants(loaded(*overrides, preset=preset))] == names


@pytest.mark.ci
def test_it_is_measured_as_training_completes(pipeline_directory: Path) -> None:
    """With a copy, a cache and guidance of its own, beside the plans that nobody has asked for."""
    overrides = ["--lookahead.plan=nodes", "--lookahead.nodes=[2]", "--lookahead.copy_dtype=bfloat16"]
    overrides += ["--lookahead.cache=text:own", "--sampler.guidance_scale=2", "--lookahead.guidance=cond_only"]
    target, variants, own, _ = chosen(pipeline_directory, ["--guidance", "full"], *overrides)
    (variant,) = own
    assert variant.name == "nodes{2}+copy(bfloat16)+cache(text:own)/cond_only/full"
    names = ["nodes{2}/full/full", "exact_but_last/full/full", "n_step{2}/full/full", "one_step/full/full"]
    assert [found.name for found in variants] == [variant.name, *names]
    found = measure(target, own, range(1), group_size=G, seed=3)[variant]

    config = loaded(
        *overrides, f"--model.path={pipeline_directory}", "--sampler.num_steps=4", "--sampler.micro_batch=1"
    )
    one = {"sampler": config.sampler.model_copy(update={"group_size": G})}
    one["data"] = config.data.model_copy(update={"num_prompts": 1})
    config, model, index = config.model_copy(update=one), target.model, torch.arange(G)
    lookahead = build_lookahead(config, model)
    assert lookahead is not None
    rows = [target.prompts.prompts[0]] * G
    trajectory = rollout(
        model,
        initial_noise(model, index, seed=3, iteration=0),
        model.encode(rows),
        Schedule(config, model).coefficients(),
        sample_index=index,
        seed=3,
        iteration=0,
        guidance_scale=2.0,
        cache=lookahead.cache,
    )
    images = lookahead.images(trajectory, lookahead.complete(trajectory), "full")
    scores = target.reward(images.flatten(0, 1), rows * 5, [{}] * 5 * G).values
    torch.testing.assert_close(found[0], scores.view(5, G).T, rtol=1e-4, atol=1e-4)


@pytest.mark.ci
def test_the_record_names_it(pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fidelity.json"
    common = [f"--model.path={pipeline_directory}", "--sampler.num_steps=4", JPEG, "--groups=1", f"--group-size={G}"]
    own = ["--lookahead.copy_dtype=bfloat16", "--lookahead.plan=one_step", "--sampler.shared_noise=true"]
    assert fidelity.main([*common, *own, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["settings"]["lookahead"] == ["one_step+copy(bfloat16)/full/full"]
    assert document["plans"]["one_step+copy(bfloat16)/full/full"]["copy"] == "bfloat16"
    assert document["settings"]["sampler"]["shared_noise"] and not document["settings"]["graphs"]
    # of 10 evaluations by four states with noise before them only in three: 3 + 2 + 1, and state 0's for all samples
    assert document["plans"]["exact_but_last/full/full"]["forwards"] == 2 / G + 1
    assert "The configuration trains with one_step+copy(bfloat16)/full/full." in capsys.readouterr().out
    # whoever names plans gets these
    assert fidelity.main([*common, *own, "--plans", "nodes:1", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert (list(document["plans"]), document["settings"]["lookahead"]) == (["nodes{1}/full/full"], [])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        (
            "embedded_fast",
            [],
            "window.schedule: expected fixed, as plans are compared in one window, got random with the windows 0..1, "
            "1..2; choose by --window.schedule fixed --window.first STEP",
        ),
        ("embedded_dense", ["--window.schedule=progressive", "--window.size=1"], "window.schedule: expected fixed"),
        (
            "embedded_tempflow",
            ["--objective.trained_steps=2"],
            "objective.trained_steps: expected all_but_last or a list of steps, as plans are compared in the same "
            "steps, got 2 drawn for each iteration",
        ),
        ("embedded_dense", ["--lookahead.graphs=true"], "lookahead.graphs: CUDA graphs need a CUDA device"),
    ],
)
def test_what_one_measurement_cannot_show_is_refused(
    preset: str, overrides: list[str], message: str, pipeline_directory: Path
) -> None:
    if "graphs" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        chosen(pipeline_directory, [], *overrides, preset=preset)
    assert exit_code_of(raised.value) == ExitCode.USAGE
    if preset == "embedded_fast":
        fixed = chosen(pipeline_directory, ["--plans", "one_step"], "--window.schedule=fixed", preset=preset)
        assert fixed.target.coefficients.noisy == (True, True, False, False)


@pytest.mark.ci
def test_the_search_tries_copies_caches_and_decoders_too(pipeline_directory: Path) -> None:
    arguments = ["--plans", "exact", "--copy-dtype", "float32", "--vae-dtype", "bfloat16", "--decoder", "full"]
    target, _, _, ways = chosen(pipeline_directory, [*arguments, "--cache", "text:own"])
    # beside the model itself its copy, and that with a cache; each with either precision of the decoder
    assert [(way.copy, way.cache, way.vae) for way in ways] == [
        (copy, cache, vae)
        for vae in (None, "bfloat16")
        for copy, cache in ((None, None), ("float32", None), ("float32", "text:own"))
    ]
    found = search(target, range(1), ways=ways, max_nodes=1, group_size=G, seed=2)
    # of three nodes none or one, and the former, which evaluates nothing, with the model itself alone
    sets = [candidate.variant for candidate in found if not candidate.variant.plan.name.startswith("paths")]
    assert sorted(variant.plan.name for variant in sets if variant.copy is None) == sorted(
        ["one_step", "nodes{1}", "nodes{2}", "nodes{3}"] * 2
    )
    assert all(variant.plan.evaluations for variant in sets if variant.copy) and len(sets) == 2 * (4 + 3 + 3)
    picked = [candidate for candidate in found if candidate.variant.plan.name == "nodes{2}"]
    assert len(picked) == 6
    rewards = measure(target, [candidate.variant for candidate in picked], range(1), group_size=G, seed=2)
    for candidate in picked:
        direct = agreement_of(target, rewards[reference(4)], rewards[candidate.variant])
        assert candidate.agreement.pooled_gains == pytest.approx(direct.pooled_gains, abs=1e-4), candidate.variant.name
    assert longest_path(target) == 3


@pytest.mark.ci
def test_what_is_searched_to_the_end_is_not_to_be_searched_further(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """State 2 of four steps alone is completed, by an evaluation or none; all its pictures score alike."""
    flat = tmp_path / "flat.py"
    flat.write_text("def flat(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    common = [f"--model.path={pipeline_directory}", "--sampler.num_steps=4", f"--reward.terms={{'{flat}:flat': 1.0}}"]
    common += ["--window.size=1", "--window.first=2", "--search", "--groups=2", "--group-size=2", "--plans", "one_step"]
    for most, advice in (("0", "raise --max-nodes"), ("1", "there are no longer paths to search")):
        assert fidelity.main([*common, "--max-nodes", most]) == 0
        (line,) = re.findall("^search: .*$", capsys.readouterr().out, re.MULTILINE)
        count = 1 + int(most)
        assert line.startswith(f"search: none of {count} candidates reaches") and line.endswith(f"; {advice}."), line


def commands() -> list[str]:
    """The command lines of the docstring, without what is said of them."""
    found = re.findall(r"^    python -m densegrpo_fast\.fidelity(.*)$", str(fidelity.__doc__), re.MULTILINE)
    return [re.split(r" {2,}\w", line)[0].strip() for line in found]


@pytest.mark.ci
@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_docstring_fit(command: str, pipeline_directory: Path) -> None:
    options, overrides = parse(shlex.split(command))
    if options.cost:
        assert all(make(STEPS).num_steps == STEPS for make in plans_of(options))
        return
    named = ["--config", options.config] if options.config else []
    config = None if options.analytic else configuration([*named, *overrides])
    if config is not None:
        model: Any = config.model.model_copy(update={"path": str(pipeline_directory)})
        config = config.model_copy(update={"model": model})
    choice = choose(options, config)
    assert len(choice.target.prompts.prompts) == options.groups
    assert choice.target.branched == ("tempflow" in command) and choice.variants
