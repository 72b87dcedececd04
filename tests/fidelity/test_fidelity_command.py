"""The fidelity command as it is called: small runs, tables, and bad options."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.fidelity import __main__ as fidelity
from densegrpo_fast.fidelity.options import parse, plans_of


@pytest.mark.ci
def test_an_analytic_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "fidelity.json", tmp_path / "fidelity.png"
    arguments = ["--analytic", "--groups", "4", "--group-size", "6", "--plans", "exact", "nodes:4,7", "one_step"]
    arguments += ["--guidance", "full", "cond_only", "--decoder", "full", "preview"]
    assert fidelity.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    document = json.loads(out.read_text())
    own = {"plans", "search", "persistence", "settings"}
    assert set(document) == own | {"command", "commit", "hardware", "versions"}
    assert len(document["persistence"]) == 10 and all(0 < value <= 1 for value in document["persistence"])
    assert document["settings"]["group_size"] == 6 and document["search"] is None
    found = document["plans"]
    # exact and nodes with both guidances, one_step with one (it never evaluates), each with both decoders
    assert len(found) == 2 * (2 + 2 + 1)
    cheap = found["nodes{4,7}/cond_only/preview"]
    assert (cheap["nfe_guided"], cheap["nfe_unguided"], cheap["forwards"]) == (0, 11, 11)
    assert cheap["cost_ratio"] == pytest.approx(11 / 90)
    assert found["exact/full/full"]["spearman_gains_mean"] == pytest.approx(1.0)
    assert found["exact/full/preview"]["spearman_gains_mean"] > 0.9
    assert found["one_step/full/full"]["spearman_gains_mean"] < found["nodes{4,7}/full/full"]["spearman_gains_mean"]
    assert len(cheap["spearman_gains"]) == 9
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "nodes{4,7}/cond_only/preview" in shown and str(tmp_path) not in out.read_text()


def test_an_analytic_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "search.json"
    arguments = ["--analytic", "--search", "--groups", "4", "--group-size", "6", "--max-nodes", "1", "--plans", "exact"]
    low = ["--threshold-rewards", "0.5", "--threshold-gains", "0.3", "--threshold-worst", "-1"]
    picture = tmp_path / "search.png"
    assert fidelity.main([*arguments, *low, "--json", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(out.read_text())
    chosen = document["search"]["chosen"]
    candidates = document["search"]["candidates"]
    # ten sets of at most one node, and the plan that is named
    assert chosen in candidates and len([name for name in candidates if not name.startswith("paths")]) == 11
    # what is chosen can be asked for by what is printed
    again = document["search"]["chosen_plan"]
    assert f"again by --plans {again}\n" in (shown := capsys.readouterr().out)
    assert plans_of(parse(["--plans", again])[0])[0](10).name == document["plans"][chosen]["plan"]
    assert document["search"]["in_sample"]["spearman_rewards_mean"] >= 0.5
    # the held-out half judges the chosen plan beside the ones asked for
    assert set(document["plans"]) == {"exact/full/full", chosen}
    assert document["settings"]["groups_measured"] == 2
    assert "held out" in shown


def test_a_search_without_a_find_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--analytic", "--search", "--groups", "2", "--group-size", "4", "--max-nodes", "0"]
    assert fidelity.main([*arguments, "--plans", "one_step", "--threshold-gains", "1"]) == 0
    assert "none of 1 candidates reaches" in capsys.readouterr().out


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the models that are known by name cost, and what is printed of it."""
    out, shown = tmp_path_factory.mktemp("cost") / "cost.json", io.StringIO()
    arguments = ["--cost", "--plans", "exact_but_last", "nodes:4", "--guidance", "full", "cond_only"]
    with redirect_stdout(shown):
        arguments += ["--copy-dtype", "bfloat16", "--cache", "text:own"]
        assert fidelity.main([*arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())["models"], shown.getvalue()


@pytest.mark.ci
def test_the_cost_table_by_hand(costs: tuple[dict[str, Any], str]) -> None:
    models, shown = costs
    for record in models.values():
        unit, half = record["flops"], 2 if record["guided"] else 1
        forward, reference, backward = (half * unit[part] for part in ("forward", "reference_forward", "backward"))
        # 10 steps of the rollout, and 9 that are trained and held to the reference
        sparse = 19 * forward + 9 * (reference + backward) + unit["full_decode"] + unit["reward"]
        assert record["sparse_kl"] == pytest.approx(sparse)
        # an ODE trajectory of 9 steps, and their training, in eighths; 9 branches' first velocities; 7 + 6 + ... + 1
        # to complete
        own = (2 * 9 / 8 + 9 + 28) * forward + 9 / 8 * (reference + backward)
        row = record["plans"]["exact_but_last/full/preview, 8 branches"]
        assert row["ratio_kl"] == pytest.approx((own + 9 * (unit["preview_decode"] + unit["reward"])) / sparse)
        assert row["ratio_kl"] < record["plans"]["exact_but_last/full/preview"]["ratio_kl"]
        # with noise in the steps 0..2 alone: 3 trained, completions of 8 + 7 + 6 evaluations, 3 states and the image,
        # which is decoded and scored in full besides
        sparse = 13 * forward + 3 * (reference + backward) + unit["full_decode"] + unit["reward"]
        own = 34 * forward + 3 * (reference + backward) + 4 * unit["preview_decode"] + 5 * unit["reward"]
        own += unit["full_decode"]
        row = record["plans"]["exact_but_last/full/preview, window 0..2"]
        assert row["ratio_kl"] == pytest.approx(own / sparse) and row["decodes"] == 5
        assert record["sparse_window_kl"] == pytest.approx(sparse)
        # three of the steps 0..8 drawn: a state is at an end of one in all but (7 choose 3) of (9 choose 3) draws, the
        # states 0 and 9 but (8 choose 3); all have noise, and the image is decoded and scored besides
        inner, outer = 1 - 35 / 84, 1 - 56 / 84
        own = (13 + outer * 9 + inner * 36) * forward + 3 * (reference + backward)
        own += (8 * inner + 2 * outer + 1) * (unit["full_decode"] + unit["reward"])
        row = record["plans"]["exact/full/full, 3 steps drawn"]
        assert row["ratio_kl"] == pytest.approx(own / sparse)
    assert "FLUX.1-dev, 512 px" in shown


@pytest.mark.ci
def test_a_configuration_is_priced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SD3.5-Medium by its own settings, in forwards: the table of the lookahead's page."""
    out = tmp_path / "cost.json"
    arguments = ["--cost", "--config", "sd35_medium_pickscore", "--json", str(out)]
    assert fidelity.main(arguments) == 0
    found = json.loads(out.read_text())
    # ten steps, 45 evaluations ahead, nine trained with their reference, all guided
    assert found["nfe"] == {"rollout": 20, "lookahead": 90, "update": 36} and found["decodes"] == 11
    assert found["over_replayed_sparse"] == found["over_sparse_of_as_many_steps"] == pytest.approx(2.33, abs=0.01)
    assert sum(found["operations"].values()) == pytest.approx(2 * found["operations"]["iteration"])
    # over a thousand draws of the seed
    drawn = ["--objective.trained_steps=4", "--objective.step_sampling=importance", "--optimizer.update=streamed"]
    assert fidelity.main([*arguments, *drawn]) == 0
    found = json.loads(out.read_text())
    assert found["over_replayed_sparse"] == pytest.approx(1.03, abs=0.02)
    assert found["over_sparse_of_as_many_steps"] == pytest.approx(1.73, abs=0.02)
    assert "trained steps: 4, drawn by importance; update streamed; with KL" in capsys.readouterr().out


@pytest.mark.ci
def test_costs_of_cheaper_forwards_by_hand(costs: tuple[dict[str, Any], str]) -> None:
    models, shown = costs
    record = models["sd35_medium"]
    unit, found = record["flops"], record["plans"]
    plain = found["nodes{4}/cond_only/preview"]["extra_flops"]

    def saved(extras: str) -> float:
        return plain - found[f"nodes{{4}}{extras}/cond_only/preview"]["extra_flops"]

    # states 0..3 evaluate once each
    assert saved("+copy(bfloat16)") == pytest.approx(4 * (unit["forward"] - unit["reference_forward"]), rel=1e-6)
    row = found["nodes{4}+copy(bfloat16)+cache(text:own)/cond_only/preview"]
    assert saved("+copy(bfloat16)+cache(text:own)") == pytest.approx(4 * (unit["forward"] - row["lookahead_forward"]))
    assert 0.85 < row["lookahead_forward"] / unit["reference_forward"] < 0.9
    assert (row["copy"], row["cache"]) == ("bfloat16", "text:own")
    # what does not fit a model is left out, and said
    assert not models["embedded"]["left_out"] and not record["left_out"]
    assert list(models["flux"]["left_out"]) == ["cache(text:own)"]
    assert "left out: cache(text:own): for SD3's transformer alone" in shown


@pytest.mark.ci
def test_a_pipeline_run(pipeline_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    arguments = ["--groups", "2", "--group-size", "3", "--plans", "nodes:2", "--json", str(out)]
    arguments += ["--model.path", str(pipeline_directory), "--sampler.num_steps", "4", "--sampler.guidance_scale", "3"]
    arguments += ["--lookahead.decoder", "preview"]
    assert fidelity.main([*arguments, "--reward.terms", "{jpeg_compressibility: 1.0}"]) == 0
    document = json.loads(out.read_text())
    # with a preview decoder the ceiling stands beside the plan
    assert list(document["plans"]) == ["exact/full/preview", "nodes{2}/full/preview"]
    record = document["plans"]["nodes{2}/full/preview"]
    assert (record["nfe_guided"], record["nfe_unguided"]) == (2, 0)
    assert record["cost_ratio"] == pytest.approx(2 / 6)
    assert 1.0 < record["iteration_flops_ratio"] < document["plans"]["exact/full/preview"]["iteration_flops_ratio"]
    assert document["settings"]["model"] == pipeline_directory.name
    assert str(pipeline_directory.parent) not in out.read_text()


@pytest.mark.ci
def test_a_preset_with_branches_is_judged_on_branches(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fidelity.json"
    arguments = ["--config", "embedded_tempflow", "--groups", "2", "--group-size", "4", "--plans", "exact", "one_step"]
    arguments += ["--model.path", str(pipeline_directory), "--reward.terms", "{jpeg_compressibility: 1.0}"]
    arguments += ["--decoder", "full", "--copy-dtype", "bfloat16", "--vae-dtype", "bfloat16"]
    picture = tmp_path / "fidelity.png"
    assert fidelity.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(out.read_text())
    ways = ["exact/full/full", "one_step/full/full", "exact+copy(bfloat16)/full/full"]
    assert list(document["plans"]) == [*ways, *(f"{way}(bfloat16)" for way in ways)]
    exact = document["plans"]["exact/full/full"]
    # what is rounded is the pictures: nearly the same order, and the same completions
    rounded = document["plans"]["exact/full/full(bfloat16)"]
    assert 0.5 < rounded["spearman_rewards_mean"] < 1.0 and rounded["vae"] == "bfloat16"
    assert rounded["nfe_unguided"] == exact["nfe_unguided"]
    assert document["settings"]["vae_dtypes"] == ["float32", "bfloat16"]
    assert exact["spearman_gains_mean"] == exact["spearman_rewards_mean"] == pytest.approx(1.0)
    # three of six steps branch: states 1, 2, 3 are completed with 5 + 4 + 3 evaluations, and one picture each
    assert (exact["nfe_unguided"], exact["decodes"], len(exact["spearman_gains"])) == (12, 3, 3)
    assert document["plans"]["exact+copy(bfloat16)/full/full"]["spearman_rewards_mean"] > 0.5
    assert document["settings"]["branched"] and document["persistence"] is None
    assert "2 groups of 4 branches of one ODE trajectory" in capsys.readouterr().out
    for wrong, problem in ((["--cache", "text:own"], "--cache is for"), (["--guidance", "reuse"], "full or cond_only")):
        extra = ["--sampler.guidance_scale", "2"] if "--guidance" in wrong else []
        with pytest.raises(SystemExit) as ended:
            fidelity.main([*arguments, *wrong, *extra])
        assert ended.value.code == ExitCode.USAGE
        assert problem in capsys.readouterr().err


@pytest.mark.ci
def test_an_adapter_changes_the_policy(pipeline_directory: Path, tmp_path: Path) -> None:
    from densegrpo_fast.config.cli import parse_arguments
    from densegrpo_fast.fidelity.target import pipeline_target
    from densegrpo_fast.models.loading import load_pipeline
    from densegrpo_fast.models.lora import add_lora, save_lora

    model = load_pipeline(
        str(pipeline_directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0
    )
    add_lora(model.network, rank=2, alpha=4, targets=["attn.to_q", "attn.to_out.0"], seed=0)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model.network, tmp_path, rank=2, alpha=4)
    config, _ = parse_arguments(["--config", "embedded_dense", "--model.path", str(pipeline_directory)])
    latents, sigma = torch.randn(1, *model.latent_shape), torch.full((1,), 0.5)
    velocities = [
        target.model.velocity(latents, sigma, target.model.encode(["a red circle"])).cond.detach()
        for target in (pipeline_target(config, tmp_path, 1), pipeline_target(config, None, 1))
    ]
    expected = model.velocity(latents, sigma, model.encode(["a red circle"])).cond.detach()
    torch.testing.assert_close(velocities[0], expected, rtol=1e-4, atol=1e-5)
    assert (velocities[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plans", "nodes"], "expected exact, exact_but_last, one_step, nodes:3,6, n_step:2 or paths:2,3:3:-:-"),
        (["--plans", "paths"], "got 'paths'"),
        (["--plans", "paths:1,2::-"], "got 'paths:1,2::-'"),
        (["--analytic", "--plans", "paths:1:2:-"], "--plans: lookahead paths must be one for each of the 10 states"),
        (["--cache", "txt"], "expected text:own, or null for no cache, got txt"),
        (["--cache", "reuse:2-5"], "reuse:2-5 was removed"),
        (["--plans", "nodes:3,x"], "got 'nodes:3,x'"),
        (["--plans", "n_step:0"], "got 'n_step:0'"),
        (["--analytic", "--plans", "nodes:12"], "--plans: lookahead nodes must increase within 1..9 for 10 steps"),
        (
            ["--plans", "nodes:12", "--config", "embedded_paper"],
            "--plans: lookahead nodes must increase within 1..9 for 10 steps",
        ),
        (["--guidance", "half"], "invalid choice: 'half'"),
        (["--groups", "0"], "expected a whole number of at least 1, got '0'"),
        (["--group-size", "1"], "expected a whole number of at least 2, got '1'"),
        (["--threshold-gains", "2"], "expected a number in [-1, 1], got '2'"),
        (["--search", "--groups", "1"], "--search needs --groups of at least 2"),
        (["--cost", "--analytic"], "--cost and --analytic exclude each other"),
        (["--cost", "--config", "embedded_paper", "--plans", "exact"], "not with --plans, but with options such as"),
        (["--analytic", "--config", "embedded_dense"], "--analytic and --config exclude each other"),
        (["--analytic", "--sampler.num_steps", "4"], "--analytic takes no configuration"),
        (["--sampler.steps", "4"], 'unknown option "sampler.steps"'),
        (["--dry-run"], "options of training"),
        (["--groups", "100000"], "--groups: expected at most the"),
        (["--config", "embedded_mixgrpo"], "window.remainder_share: plans are compared on all of the grid"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--analytic", "--json", "nowhere/at/all.json"], 7, "there is no directory nowhere/at"),
        (["--model.path", "./nowhere"], 3, "is no directory"),
    ],
)
def test_other_failures_have_their_exit_codes(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(arguments)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_an_adapter_that_is_not_there(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(["--groups", "1", "--adapter", str(tmp_path), "--model.path", str(pipeline_directory)])
    assert stopped.value.code == 3
    assert "holds no pytorch_lora_weights.safetensors" in capsys.readouterr().err


@pytest.mark.ci
def test_an_analytic_run_needs_nothing_but_torch() -> None:
    """In a fresh process in which every other package of ours is out of reach."""
    program = (
        "import sys\n"
        "for name in ('numpy', 'scipy', 'pydantic', 'yaml', 'diffusers', 'transformers', 'peft', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from densegrpo_fast.fidelity import __main__ as fidelity\n"
        "fidelity.parse(['--analytic'])\n"
        "assert 'torch' not in sys.modules\n"
        "arguments = ['--analytic', '--groups', '1', '--group-size', '3', '--plans', 'one_step']\n"
        "sys.exit(fidelity.main(arguments))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "one_step/full/full" in done.stdout
