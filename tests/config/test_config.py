from __future__ import annotations

import ast
import importlib
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.common.fingerprint import differences
from densegrpo_fast.config import Config, options
from densegrpo_fast.config.cli import CliFlags, parse_arguments, validate
from densegrpo_fast.config.schema import sections
from densegrpo_fast.config.yaml_files import dump_yaml, parse_yaml, preset_names, read_settings
from densegrpo_fast.rewards.registry import BUILT_IN

PRESETS = [
    "embedded_branched",
    "embedded_calibrated",
    "embedded_coca",
    "embedded_dense",
    "embedded_dppo",
    "embedded_fast",
    "embedded_flash",
    "embedded_g2rpo",
    "embedded_guard",
    "embedded_mixgrpo",
    "embedded_mixture",
    "embedded_paper",
    "embedded_paper_drawn",
    "embedded_paper_fast",
    "embedded_pcpo",
    "embedded_return_to_go",
    "embedded_sparse",
    "embedded_stepwise",
    "embedded_tempflow",
    "embedded_turning_point",
    "embedded_turning_point_free",
    "embedded_value",
    "embedded_vgpo",
    "embedded_words",
    "flux1_dev_pickscore",
    "flux2_klein_pickscore",
    "qwen_image_pickscore",
    "sd15_pickscore",
    "sd35_medium_pickscore",
    "sd35_medium_pickscore_24gb",
    "sd35_medium_pickscore_drawn",
    "sd35_medium_pickscore_fast",
    "wan21_pickscore",
    "z_image_pickscore",
]
EMBEDDED_DENSE = read_settings("embedded_dense")
BASE = Path(__file__).parents[1] / "data" / "base.yaml"


def based(*argv: str) -> list[str]:
    """The arguments, with the tests' base configuration unless they name one."""
    named = any(argument.partition("=")[0] in ("--config", "--resume") for argument in argv)
    return list(argv) if named else [f"--config={BASE}", *argv]


def refused(*argv: str, code: ExitCode = ExitCode.USAGE) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        parse_arguments(based(*argv))
    assert exit_code_of(caught.value) == code
    return str(caught.value)


def config(*argv: str) -> Config:
    return parse_arguments(based(*argv))[0]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_presets_are_the_documented_ones() -> None:
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = config("--config", name)
    assert loaded.preset == name
    again = config("--config", write(tmp_path / "resolved.yaml", dump_yaml(loaded)))
    assert again == loaded
    assert again.fingerprint() == loaded.fingerprint()
    assert Config.model_validate_json(json.dumps(loaded.model_dump(mode="json"))) == loaded


def test_the_sparse_preset_differs_only_in_the_method() -> None:
    dense, sparse = config("--config=embedded_dense"), config("--config=embedded_sparse")
    assert differences(dense.resume_settings(), sparse.resume_settings()) == [
        'credit.method: "dense" in the checkpoint, "sparse" now'
    ]
    assert dense.run == sparse.run


def test_the_paper_preset_has_the_pinned_settings() -> None:
    paper = config("--config", "embedded_paper")
    assert paper.sampler.num_steps == 10
    assert paper.sampler.guidance_scale > 1
    assert paper.objective.kl_coef == 0.01
    assert paper.lookahead.plan == "exact"
    assert paper.objective.trained_steps == "all_but_last"
    assert paper.optimizer.updates_per_iteration == 1


def test_the_fast_preset_trains_a_window_of_the_first_half() -> None:
    fast, sparse = config("--config=embedded_fast"), config("--config=embedded_sparse")
    changed = differences(sparse.resume_settings(), fast.resume_settings())
    assert sorted(line.partition(":")[0] for line in changed) == [
        "sampler.noise_level",
        "window.last",
        "window.schedule",
        "window.size",
    ]
    assert fast.windows() == [range(0, 2), range(1, 3)] and fast.sampler.num_steps == 6


def test_the_branching_presets_branch() -> None:
    tempflow, g2rpo = config("--config=embedded_tempflow"), config("--config=embedded_g2rpo")
    assert (tempflow.sampler.group_size, tempflow.sampler.branches, tempflow.credit.method) == (8, 4, "branch")
    assert tempflow.objective.step_weight == "noise_aware"
    # all of a prompt's samples leave one trunk
    assert g2rpo.sampler.branches == g2rpo.sampler.group_size and g2rpo.credit.granularities == [1, 2]
    # noise in the first half of the steps
    assert g2rpo.windows() == [range(3)] and g2rpo.sampler.num_steps == 6


def test_the_sd35_preset_has_the_published_settings() -> None:
    sd35 = config("--config", "sd35_medium_pickscore")
    assert (sd35.data.num_prompts, sd35.sampler.group_size, sd35.sampler.num_steps) == (48, 24, 10)
    assert (sd35.lora.rank, sd35.lora.alpha, sd35.model.max_sequence_length) == (32, 64, 128)
    assert (sd35.optimizer.lr, sd35.optimizer.betas, sd35.optimizer.weight_decay) == (
        3e-4,
        [0.9, 0.999],
        1e-4,
    )
    assert (sd35.objective.clip_range, sd35.objective.kl_coef) == (1e-4, 0.01)
    assert (sd35.ema.decay, sd35.ema.every, sd35.evaluation.num_steps) == (0.9, 8, 40)


def test_overrides_in_all_three_spellings() -> None:
    loaded, flags = parse_arguments(
        ["--sampler.group_size", "16", "--optimizer.lr=1e-5", "seed=7", "--run.overwrite", "--dry-run"]
    )
    assert (loaded.sampler.group_size, loaded.optimizer.lr, loaded.seed) == (16, 1e-5, 7)
    assert loaded.run.overwrite is True
    assert flags == CliFlags(resume=False, dry_run=True)


def test_text_options_take_the_argument_as_it_stands() -> None:
    loaded = config("--model.revision", "1e5", "--data.prompts", "a: b.txt", "--run.output_dir", "true")
    assert (loaded.model.revision, loaded.data.prompts, loaded.run.output_dir) == ("1e5", "a: b.txt", "true")
    assert config("--model.revision", "null").model.revision is None


def test_lists_and_mappings_are_read_as_yaml() -> None:
    loaded = config(
        "--lookahead.plan", "nodes", "--lookahead.nodes", "[3, 5]", "reward.terms={scenes: 1, 'm.py:f': -0.5}"
    )
    assert loaded.lookahead.nodes == [3, 5]
    assert loaded.reward.terms == {"scenes": 1.0, "m.py:f": -0.5}


@pytest.mark.parametrize("key", list(options()))
def test_every_key_misspelt_is_refused_with_a_suggestion(key: str) -> None:
    assert f'did you mean "{key}"' in refused(f"{key}q=1")


@pytest.mark.parametrize("key", list(options()))
@pytest.mark.parametrize("wrong", [[[1]], float("nan"), float("inf"), {"a": {}}])
def test_every_key_refuses_a_value_of_the_wrong_type(key: str, wrong: object) -> None:
    values = deepcopy(EMBEDDED_DENSE)
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = wrong
    with pytest.raises(UserError) as caught:
        validate(values)
    assert key in str(caught.value)
    assert exit_code_of(caught.value) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("sampler.group_size=1", "sampler.group_size: expected a number >= 2, got 1"),
        ("sampler.group_size=8.0", "sampler.group_size: expected an integer, got 8.0"),
        ("sampler.group_size=true", "sampler.group_size: expected an integer, got true"),
        ("sampler.group_size='8'", "sampler.group_size: expected an integer, got '8'"),
        ("sampler.guidance_scale=0.5", "sampler.guidance_scale: expected a number >= 1"),
        ("optimizer.lr=.nan", "optimizer.lr: expected a finite number, got nan"),
        ("optimizer.lr=nan", "optimizer.lr: expected a number, got 'nan'"),
        ("optimizer.lr=1e999", "optimizer.lr: expected a finite number, got inf"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected at least 2"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]: expected a number < 1"),
        ("run.overwrite=yes", "run.overwrite: expected true or false, got 'yes'"),
        ("credit.method=dens", 'did you mean "dense"?'),
        ("lookahead.plan=exact_but_las", 'did you mean "exact_but_last"?'),
        ("reward.terms={scene: 1}", 'unknown reward "scene"; did you mean "scenes"?'),
        ("reward.terms={scenes: x}", "reward.terms.scenes: expected a number, got 'x'"),
        ("reward.terms={scenes: 0}", "reward.terms: expected at least one weight other than 0"),
        ("reward.terms={}", "reward.terms: expected at least 1"),
        (
            "objective.trained_steps=some",
            'objective.trained_steps: expected "all_but_last" or a list or an integer',
        ),
        ("objective.trained_steps=[0, x]", "objective.trained_steps[1]: expected an integer, got 'x'"),
        ("objective.trained_steps=[1, 8]", "objective.trained_steps: expected steps in 0..7, got [1, 8]"),
        ("objective.trained_steps=[2, 1]", "objective.trained_steps: expected increasing step indices"),
        ("objective.trained_steps=[]", "objective.trained_steps: expected increasing step indices"),
        ("objective.trained_steps=8", "objective.trained_steps: expected at most 3 steps to draw, got 8"),
        ("sampler.noise_level=[0.5, 0.7]", "sampler.noise_level: expected one number per step, got 2"),
        ("sampler.noise_level=[0.5, -1]", "sampler.noise_level[1]: expected a number >= 0"),
        ("sampler.noise_level=0", "sampler.noise_level: expected noise in at least one trained step"),
        ("lookahead.nodes=[3]", 'lookahead.nodes: expected [] with plan "exact_but_last", got [3]'),
        ("lookahead.n=3", 'lookahead.n: expected null with plan "exact_but_last", got 3'),
        ("lookahead.plan=nodes", 'lookahead.nodes: expected at least one step with plan "nodes", got []'),
        ("lookahead.paths=[[3]]", 'lookahead.paths: expected [] with plan "exact_but_last", got [[3]]'),
        ("lookahead.plan=paths", 'lookahead.paths: expected a list of steps for every state with plan "paths", got []'),
        ("lookahead.plan=n_step", 'lookahead.n: expected a number of steps with plan "n_step", got null'),
        ("model.height=64", "model.height, model.width: expected both 0 or both set, got 64 and 0"),
        ("model.height=60", "model.height: expected a multiple of 8, got 60"),
        (
            "optimizer.updates_per_iteration=1000",
            "optimizer.updates_per_iteration: expected a divisor of the 6 micro-batches",
        ),
        ("preset=../up", "preset: expected text that matches"),
        ("lora.targets=[a, a]", "lora.targets: expected every projection once"),
        ("optimizer.lr=[1", "option optimizer.lr: expected"),
        ("optimizer.lr=", "optimizer.lr: expected a number, got null"),
        ("optimizer={}", 'unknown option "optimizer"'),
        ("stray", 'unexpected argument "stray"'),
        ("--dryrun", 'did you mean "--dry-run"?'),
        ("--dry-run=1", "--dry-run takes no value"),
        ("--lr=1", 'did you mean "optimizer.lr"?'),
        ("--seed", "--seed needs a value"),
        ("--config", "--config needs a value"),
        ("--config=embedded_spars", 'did you mean "embedded_sparse"?'),
        ("--config=none.yaml", "none.yaml: cannot read this configuration: No such file"),
    ],
)
def test_refusals_name_the_key_and_the_reason(argument: str, expected: str) -> None:
    message = refused(argument)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["lookahead.plan=nodes", "lookahead.nodes=[3, 8]"],
            "lookahead.nodes: expected steps in 1..7, got [3, 8]",
        ),
        (
            ["lookahead.plan=nodes", "lookahead.nodes=[0, 3]"],
            "lookahead.nodes[0]: expected a number >= 1, got 0",
        ),
        (["lookahead.plan=nodes", "lookahead.nodes=[4, 3]"], "lookahead.nodes: expected increasing steps"),
        (["lookahead.plan=n_step", "lookahead.n=9"], "lookahead.n: expected 1..8, got 9"),
        (
            ["lookahead.plan=paths", "lookahead.paths=[[3], []]"],
            "lookahead.paths: expected a list for each of the 8 states, got 2",
        ),
        (
            ["lookahead.plan=paths", "lookahead.paths=[[3], [0], [], [], [], [], [], []]"],
            "lookahead.paths[1][0]: expected a number >= 1, got 0",
        ),
        (
            ["lookahead.plan=paths", "lookahead.paths=[[3], [3, 2], [], [], [], [], [], []]"],
            "lookahead.paths[1]: expected increasing steps in 2..7, got [3, 2]",
        ),
        (
            ["lookahead.plan=paths", "lookahead.paths=[[3], [4], [], [], [], [], [], [8]]"],
            "lookahead.paths[7]: expected [], got [8]",
        ),
        (
            ["sampler.dynamics=cps", "sampler.noise_level=1.2"],
            "expected at most 1 with dynamics cps, got 1.2",
        ),
        (
            ["objective.trained_steps=2", "sampler.noise_level=[0,0.7,0,0,0,0,0,0]"],
            "objective.trained_steps: expected at least 3 to draw where 2 of the steps 0..2 inject no noise, got 2",
        ),
        (
            ["sampler.dynamics=cps", "objective.trained_steps=[7]", "window.schedule=none", "window.size=null"],
            "objective.trained_steps: expected a step that injects noise, which the last one of dynamics cps does "
            "not, got [7]",
        ),
        (
            [
                "sampler.dynamics=precise",
                "objective.trained_steps=[0, 7]",
                "window.schedule=none",
                "window.size=null",
                "sampler.noise_level=[0,1,1,1,1,1,1,1]",
            ],
            "objective.trained_steps: expected a step that injects noise, which the last one of dynamics precise does "
            "not, got [0, 7]",
        ),
        (
            ["model.compile=default", "lookahead.cache=text:own"],
            "lookahead.cache: expected null with model.compile, which hides the network's blocks, got",
        ),
        (["model.compile=reduce-overhead"], 'expected "default" or "max-autotune-no-cudagraphs"'),
        (["seed=1", "--seed", "1"], "option seed is given twice"),
        (["--dry-run", "--dry-run"], "option --dry-run is given twice"),
        (["--run.overwrite", "yes"], 'unexpected argument "yes"'),
    ],
)
def test_refusals_of_options_that_disagree(arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_errors_name_options_that_there_are() -> None:
    """Of the texts of the package that begin as a message about an option: SECTION.KEY, a colon, a blank."""
    begins = re.compile(rf"({'|'.join(sections())})\.[a-z_.]+(?=: )")
    named = set()
    for path in (Path(__file__).parents[2] / "densegrpo_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := begins.match(node.value)):
                named.add(found[0])
    assert len(named) > 30 and named <= set(options())


def test_every_reward_of_the_package_can_be_named() -> None:
    for name in BUILT_IN:
        assert config(f"reward.terms={{{name}: 1}}").reward.terms == {name: 1.0}


@pytest.mark.parametrize(
    ("key", "module", "name"),
    [
        ("credit.std", "credit.normalize", "Std"),
        ("credit.normalize", "credit.normalize", "Normalize"),
        ("credit.step_value", "credit.mixture", "StepValue"),
        ("objective.guard_weight", "objective.guard", "GuardWeight"),
        ("objective.kl_scale", "flow.log_prob_op", "KlScale"),
        ("sampler.dynamics", "flow.dynamics", "Family"),
        ("lookahead.guidance", "sampling.lookahead", "Guidance"),
        ("lookahead.decoder", "models.base", "Decoder"),
        ("model.vae_decode", "models.diffusers_model", "VaeDecode"),
        ("model.attention", "models.attention", "Attention"),
    ],
)
def test_choices_are_those_of_the_code(key: str, module: str, name: str) -> None:
    """Which needs torch, and so cannot be what the configuration imports."""
    choices = get_args(getattr(importlib.import_module(f"densegrpo_fast.{module}"), name))
    # noise-free dynamics are a noise level of 0
    assert {*get_args(options()[key].annotation)} == {*choices} - {"ode"}


def test_several_problems_are_reported_together() -> None:
    message = refused("data.num_prompts=0", "credit.std=grp", "seed=-1")
    assert [line.strip().partition(":")[0] for line in message.splitlines()[1:]] == [
        "seed",
        "data.num_prompts",
        "credit.std",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", 'line 2: key "seed" is given twice'),
        ("sampler:\n  num_steps: 4\n  num_steps: 5\n", 'line 3: key "num_steps" is given twice'),
        ("samplr:\n  num_steps: 4\n", 'unknown key "samplr"; did you mean "sampler"?'),
        ("sampler:\n  num_step: 4\n", 'unknown key "sampler.num_step"; did you mean "sampler.num_steps"?'),
        ("sampler: 4\n", "sampler: expected a section of options, got 4"),
        ("- 1\n", "expected options as `key: value`, got [1]"),
        ("a: &x {b: *x}\n", "aliases are not supported"),
        ("seed: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
        ("1: 2\n", "expected a name as key, got 1"),
        ("a: 1\nseed: [\n", "line 3: expected the node content"),
        ("extends: nowhere\n", 'unknown preset "nowhere"'),
        ("extends: [a]\n", "extends: expected the name of a preset"),
        ("seed: \x01\n", "not readable as YAML"),
        ("a: " + "[" * 5000, "not readable as YAML"),
        ("sampler:\n  noise_level: 1:30\n", "sampler.noise_level: expected a number or a list, got '1:30'"),
    ],
)
def test_refusals_of_a_file(text: str, expected: str, tmp_path: Path) -> None:
    message = refused("--config", write(tmp_path / "mine.yaml", text))
    assert expected in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"seed: 1 # caf\xe9\n")
    assert "not UTF-8 text (byte 13)" in refused("--config", str(path))


def test_a_file_gives_part_of_the_keys_and_the_default_preset_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "my run.yaml", "\ufeffsampler:\n  num_steps: 6\noptimizer:\n  lr: 1e-5\nlora:\n")
    loaded = config("--config", path, "--optimizer.lr", "2e-5")
    expected = config("--config=embedded_dense", "sampler.num_steps=6", "optimizer.lr=2e-5", "preset=my-run")
    assert loaded == expected
    assert loaded.output_dir == Path("runs/my-run-0")


def test_a_file_can_extend_another_preset(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "extends: embedded_sparse\nseed: 3\n")
    assert config("--config", path) == config("--config=embedded_sparse", "seed=3", "preset=mine")


def test_reward_terms_replace_those_of_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "reward:\n  terms: {jpeg_compressibility: 2}\n")
    assert config("--config", path).reward.terms == {"jpeg_compressibility": 2.0}


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20))
def test_any_text_survives_a_round_trip(text: str) -> None:
    loaded = config()
    changed = loaded.model_copy(update={"run": loaded.run.model_copy(update={"output_dir": text})})
    assert parse_yaml(dump_yaml(changed), "dump")["run"]["output_dir"] == text


@pytest.mark.parametrize("text", ["1e-4", "off", "null", "0x10", "1_000", "- a", "a: b", "#x", "'", "2001-01-01", "~"])
def test_text_that_looks_like_something_else_survives_a_round_trip(text: str) -> None:
    dumped = dump_yaml(config("--run.output_dir=" + text) if text != "null" else config())
    expected = None if text == "null" else text
    assert parse_yaml(dumped, "dump")["run"]["output_dir"] == expected


@settings(deadline=None, max_examples=60)
@given(st.floats(min_value=1e-300, max_value=1.0))
def test_numbers_survive_a_round_trip_to_the_bit(number: float) -> None:
    loaded = config()
    changed = loaded.model_copy(update={"optimizer": loaded.optimizer.model_copy(update={"lr": number})})
    assert parse_yaml(dump_yaml(changed), "dump")["optimizer"]["lr"] == number


def test_the_fingerprint_covers_what_must_match_on_resume() -> None:
    base = config().fingerprint()
    same = [
        "run.iterations=9",
        "run.output_dir=x",
        "run.checkpoint_every=3",
        "evaluation.every=1",
        "preset=other",
    ]
    for argument in [*same, "run.overwrite=true"]:
        assert config(argument).fingerprint() == base, argument
    for argument in [
        "seed=1",
        "optimizer.lr=1e-5",
        "evaluation.num_prompts=9",
        "model.path=x",
        "sampler.num_steps=9",
    ]:
        assert config(argument).fingerprint() != base, argument


def test_a_configuration_cannot_be_changed_in_place() -> None:
    loaded = config()
    with pytest.raises(ValueError, match="frozen"):
        loaded.sampler.num_steps = 3  # type: ignore[misc]


def test_resume_reads_the_settings_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", dump_yaml(config("seed=5", "run.output_dir=elsewhere", "run.overwrite=true")))
    for arguments in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        loaded, flags = parse_arguments([*arguments, "run.iterations=99"])
        assert (loaded.seed, loaded.run.iterations, loaded.output_dir) == (5, 99, tmp_path)
        assert not loaded.run.overwrite and not config("run.overwrite=true").self_contained().run.overwrite
        assert flags.resume
    with pytest.raises(UserError, match="--resume and --run.overwrite contradict each other"):
        parse_arguments(["--resume", str(tmp_path), "--run.overwrite"])
    assert parse_arguments(["--resume", "seed=2"])[0].seed == 2


def test_resume_from_nowhere_is_refused(tmp_path: Path) -> None:
    assert "no run to continue" in refused("--resume", str(tmp_path), code=ExitCode.CHECKPOINT)


def test_loggers_are_known_and_given_once() -> None:
    assert config("--run.loggers", "[wandb, tensorboard]").run.loggers == ["wandb", "tensorboard"]
    assert "run.loggers: expected every logger once" in refused("run.loggers=[wandb, wandb]")
    assert "run.loggers[0]" in refused("run.loggers=[mlflow]")
    assert config("run.loggers=[wandb]").fingerprint() == config().fingerprint()
