"""The examples of docs/library.md run and are typed, and what does not fit together is refused in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import pytest
import torch
from mypy import api
from torch import Tensor

import densegrpo_fast
from densegrpo_fast import (
    Callback,
    CreditMethod,
    FlowModel,
    Lookahead,
    Trainer,
    Trajectory,
    advantages,
    coefficients,
    load_config,
    make_plan,
    normalize_groups,
    register_credit,
    reward_gains,
    rollout,
)
from densegrpo_fast.common.errors import PluginError, UsageError
from densegrpo_fast.config.yaml_files import parse_yaml
from densegrpo_fast.credit.dense import dense_advantages
from densegrpo_fast.credit.return_to_go import return_advantages
from densegrpo_fast.models.check import check_model
from densegrpo_fast.run_files.early_stopping import EarlyStopping

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
EXAMPLES = {
    heading: code
    for heading, code in re.findall(r"^## (.+?)$(?:(?!^## ).*\n)+?^```python\n((?:.*\n)*?)^```", PAGE, re.MULTILINE)
}
OWN_MODEL = "A model of your own"


@pytest.fixture
def shortened(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> dict[str, Any]:
    """`load_config` with the test suite's small settings beneath an example's own; they are returned."""
    small = {key: parse_yaml(value, key) if isinstance(value, str) else value for key, value in train.SETTINGS.items()}
    small |= {"model.path": str(train.model), "run.output_dir": str(tmp_path / "run")}
    small |= {"objective.trained_steps": "all_but_last", "optimizer.updates_per_iteration": 1}
    kept = ("run.iterations", "evaluation.every")

    def load(source: str, overrides: dict[str, Any] | None = None) -> Any:
        return load_config(source, {**small, **{k: v for k, v in (overrides or {}).items() if k not in kept}})

    monkeypatch.setattr(densegrpo_fast, "load_config", load)
    monkeypatch.chdir(ROOT)
    return small


@pytest.mark.ci
@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_runs(
    heading: str, shortened: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(EXAMPLES[heading], names)
    assert capsys.readouterr().out
    if heading == OWN_MODEL:
        assert (tmp_path / "run" / "adapter" / "parameters.safetensors").is_file()
    if heading.startswith("Callbacks"):
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3 and all("mine/gain" in json.loads(line) for line in lines)
    if heading.startswith("Dense rewards"):
        dense = names["dense"]
        assert dense.gains.shape == (8, 5)
        torch.testing.assert_close(dense.gains.sum(1), dense.rewards[:, -1] - dense.rewards[:, 0])


@pytest.mark.ci
def test_the_examples_are_typed(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 5
    files = [tmp_path / f"example_{number}.py" for number in range(len(EXAMPLES))]
    for file, code in zip(files, EXAMPLES.values(), strict=True):
        file.write_text(code)
    # that the package's names are not just Any
    files[0].write_text(EXAMPLES["A reward of your own"] + "reveal_type(trainer)\n")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    out, errors, status = api.run([*options, *map(str, files)])
    assert status == 0, out + errors
    assert 'Revealed type is "densegrpo_fast.training.trainer.Trainer"' in out


def drawn(model: FlowModel, steps: int = 3) -> Trajectory:
    conditioning = model.encode(["0", "12"])
    table = coefficients(model.sigmas(steps), 0.7, "flow_sde")
    noise = torch.randn(2, 4)
    return rollout(model, noise, conditioning, table, sample_index=torch.arange(2), seed=0, iteration=0)


def test_samples_before_steps_are_refused(mixture_model: FlowModel) -> None:
    trajectory = drawn(mixture_model)
    assert Lookahead(mixture_model, make_plan("exact", 3)).complete(trajectory).shape == trajectory.latents.shape
    swapped = {name: getattr(trajectory, name).movedim(0, 1) for name in ("latents", "velocities", "log_probs")}
    for name, value in swapped.items():
        with pytest.raises(ValueError, match="steps before samples"):
            replace(trajectory, **{name: value})
    with pytest.raises(ValueError, match="steps before samples"):
        replace(trajectory, **swapped)
    with pytest.raises(ValueError, match="conditioning must have 2 rows"):
        replace(trajectory, conditioning=mixture_model.encode(["0"]))
    with pytest.raises(ValueError, match="3 steps were taken, coefficients has 2"):
        replace(trajectory, coefficients=coefficients(mixture_model.sigmas(2), 0.7, "flow_sde"))


def pixels() -> Any:
    """The example's model."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(EXAMPLES[OWN_MODEL].partition("options = ")[0], names)
    torch.manual_seed(0)
    return names["Pixels"]()


Broken = Callable[[Any], None]


def _patched(**methods: Any) -> Broken:
    def patch(model: Any) -> None:
        for name, method in methods.items():
            setattr(model, name, method)

    return patch


def _channels_last(latents: Tensor, decoder: str = "full") -> Tensor:
    return latents.sigmoid().movedim(1, 3)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_patched(trainable_parameters=dict), "has no adapter"),
        (_patched(sigmas=lambda steps: torch.linspace(0, 1, steps + 1)), "expected 3 falling noise levels"),
        (_patched(sigmas=lambda steps: torch.linspace(1, 0, steps)), "expected 3 falling noise levels"),
        (_patched(latent_shape=(8, 8, 3)), r"velocity: cond must be float32 with shape \[2, 8, 8, 3\]"),
        (_patched(decode=_channels_last), r"decode: images must be float32 with shape \[2, 3, .* got .*\[2, 8, 8, 3\]"),
        (_patched(decode=lambda latents, decoder="full": latents.sigmoid() * 2 - 2), r"images must be in \[0, 1\]"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(broken: Broken, message: str) -> None:
    model = pixels()
    check_model(model, "anything", 1.0, 2)
    if "8, 8, 3" in message and "cond" in message:
        model.velocity = lambda latents, *rest: densegrpo_fast.Velocity(latents.movedim(3, 1), None, 1.0)
    broken(model)
    with pytest.raises(UsageError, match=message):
        check_model(model, "anything", 1.0, 2)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="derived from densegrpo_fast.FlowModel"):
        check_model(torch.nn.Linear(1, 1), "", 1.0, 2)  # type: ignore[arg-type]


def test_advantages_are_those_of_the_methods() -> None:
    rewards = torch.randn(2, 5, 4)
    torch.testing.assert_close(advantages(rewards).values, dense_advantages(rewards).values)
    assert advantages(rewards[..., :2], "sparse").values.shape == (2, 5, 1)
    expected = return_advantages(rewards, discount=0.5, normalize="step").values
    own = advantages(rewards, "return_to_go", discount=0.5, normalize="step").values
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    ("rewards", "method", "options", "message"),
    [
        (torch.zeros(2, 4), "dense", {}, r"with shape \[P, G, T\+1\]"),
        (torch.zeros(2, 4, 1), "dense", {}, r"with shape \[P, G, T\+1\]"),
        (torch.zeros(2, 4, 3), "dens", {}, "unknown method 'dens'"),
        (torch.zeros(2, 4, 3), "coca", {}, "needs similarity, not rewards alone"),
        (torch.zeros(2, 4, 3), "dense", {"normalise": "step"}, "no option 'normalise'; did you mean \"normalize\""),
        (torch.zeros(2, 4, 3), "transposed", {}, r"expected advantages \[2, 4, 2\], got \[4, 2, 2\]"),
        (torch.zeros(2, 4, 3), "sharp", {}, "needs the options sharpness"),
    ],
)
def test_what_advantages_cannot_be_made_of(
    rewards: Tensor, method: str, options: dict[str, Any], message: str, registries: None
) -> None:
    def transposed(lookahead_rewards: Tensor, *, std: str, spread_floor: float, clip: float) -> Any:
        return normalize_groups(reward_gains(lookahead_rewards).transpose(0, 1))

    def sharp(lookahead_rewards: Tensor, *, sharpness: float) -> Any:
        raise AssertionError

    register_credit("transposed", CreditMethod(transposed, ("lookahead_rewards",)))
    register_credit("sharp", CreditMethod(sharp, ("lookahead_rewards",), ("sharpness",)))
    with pytest.raises((ValueError, PluginError), match=message):
        advantages(rewards, method, **options)


@pytest.mark.ci
def test_a_run_ends_early_and_can_be_resumed(shortened: dict[str, Any], tmp_path: Path) -> None:
    class Once(Callback):
        seen: list[int] = []

        def on_evaluate(self, trainer: Trainer, evaluation: Any, iteration: int) -> None:
            self.seen.append(iteration)
            if iteration:
                trainer.stop("enough")

    own = {"sampler.guidance_scale": 1.0, "reward.observed": [], "run.output_dir": str(tmp_path / "early")}
    config = load_config("embedded_dense", {**shortened, **own, "run.iterations": 5})
    result = Trainer(config, model=pixels(), callbacks=[Once()]).run()
    assert result.iterations == 2 and Once.seen == [0, 2, 2]
    assert result.summary is not None and result.summary.startswith("ended after iteration 2 of 5: enough\nheld-out")
    again = Trainer(config, model=pixels()).run(resume=True)
    assert again.iterations == 5 and "ended" not in str(again.summary)
    assert len((tmp_path / "early" / "metrics.jsonl").read_text().splitlines()) == 5
    with pytest.raises(UsageError, match="expected callbacks derived from densegrpo_fast.Callback"):
        Trainer(config, model=pixels(), callbacks=[print])  # type: ignore[list-item]


def test_early_stopping_reads_the_records_alone() -> None:
    options = {"run.early_stopping_patience": 2, "run.early_stopping_threshold": 0.1, "run.max_kl": 0.5}
    config = load_config("embedded_dense", {**options, "objective.kl_coef": 0.01})
    rewards = [0.2, None, 0.5, 0.55, None, float("nan"), 0.58, 0.9]
    records = [{"kl": 0.1} if value is None else {"kl": 0.1, "eval/reward": value} for value in rewards]
    stopping = EarlyStopping(config)
    reasons = [stopping.check(record) for record in records]
    assert [reason is not None for reason in reasons] == [False] * 6 + [True, False]
    assert "0.5 in 2 evaluations" in str(reasons[6])
    assert EarlyStopping(config, records[:6]).check(records[6]) == reasons[6]
    assert "kl 0.6 is above run.max_kl 0.5" in str(stopping.check({"kl": 0.6}))
    with pytest.raises(UsageError, match="run.early_stopping_patience: expected 0 without evaluation.every"):
        load_config("embedded_dense", {"run.early_stopping_patience": 2, "evaluation.every": 0})
    with pytest.raises(UsageError, match="run.max_kl: expected null with objective.kl_coef 0"):
        load_config("embedded_dense", {"run.max_kl": 0.5})


@pytest.mark.ci
def test_the_notebook_runs(shortened: dict[str, Any], tmp_path: Path) -> None:
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert not cell["outputs"]
    matplotlib.pyplot.close("all")
    assert list(names["history"].rewards) == [0, 2, 3] and len(names["records"]) == 3
