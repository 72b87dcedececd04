"""The completion head: where it acts, what it sees, that it learns, and the command that makes one."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast import completion
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.completion import main
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration, parse_arguments
from densegrpo_fast.fidelity import options as fidelity_options
from densegrpo_fast.fidelity.__main__ import main as fidelity
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models import flops
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, load_head, save_head
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.training import models

T = 4
PLAN = plans.nodes(T, [2])
PROMPTS = ["a cat", "the moon", "a photo"]
MakePolicy = Callable[..., FlowModel]


def new_head(model: FlowModel, plan: plans.Plan = PLAN) -> CompletionHead:
    config = HeadConfig(T, plan.paths, model.latent_shape, patch=2, hidden=model.network.inner_dim, width=16, depth=1)
    return CompletionHead(config).eval()


def sampled(model: FlowModel, guidance_scale: float = 1.0, keep_hidden: bool = True) -> Trajectory:
    index = torch.arange(len(PROMPTS))
    return rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(PROMPTS),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=guidance_scale,
        micro_batch=1,
        keep_hidden=keep_hidden,
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_keeping_hidden_tokens_changes_nothing_else(tiny_policy: MakePolicy, guidance_scale: float) -> None:
    model = tiny_policy(spread=0.1)
    plain, kept = (sampled(model, guidance_scale, keep) for keep in (False, True))
    assert plain.hidden is None and kept.hidden is not None
    assert kept.hidden.shape == (T, len(PROMPTS), 16, model.network.inner_dim)
    assert torch.equal(plain.latents, kept.latents) and torch.equal(plain.velocities, kept.velocities)
    # the tokens are those of the conditional forward, from which its velocity follows
    alone = sampled(model, 1.0)
    torch.testing.assert_close(kept.hidden[0], alone.hidden[0])


def test_an_untrained_head_changes_nothing(tiny_policy: MakePolicy) -> None:
    model = tiny_policy(spread=0.1)
    trajectory = sampled(model)
    plain = Lookahead(model, PLAN).complete(trajectory)
    assert torch.equal(Lookahead(model, PLAN, head=new_head(model)).complete(trajectory), plain)


def test_only_completions_that_leave_steps_out_are_corrected(tiny_policy: MakePolicy) -> None:
    model = tiny_policy(spread=0.1)
    trajectory, head = sampled(model), new_head(model)
    # T = 4, node 2: states 0, 1, 2 leave step 3 out (0 also step 1), state 3 jumps over nothing
    assert [head.applies(state) for state in range(T)] == [True, True, True, False]
    torch.nn.init.constant_(head.out.bias, 0.5)
    head.scale.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    plain = Lookahead(model, PLAN).complete(trajectory)
    corrected = Lookahead(model, PLAN, head=head).complete(trajectory)
    expected = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.0]).view(-1, 1, 1, 1, 1).expand_as(plain)
    torch.testing.assert_close(corrected - plain, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 64])
def test_the_head_sees_the_last_evaluation(tiny_policy: MakePolicy, chunk: int) -> None:
    model = tiny_policy(spread=0.1)
    trajectory, seen = sampled(model), []

    class Spy:
        def applies(self, state: int) -> bool:
            return True

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            seen.append([tensor.clone() for tensor in inputs])
            return torch.zeros_like(inputs[1])

    Lookahead(model, PLAN, chunk=chunk, head=Spy()).complete(trajectory)
    hidden, latents, estimate, state = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert state.tolist() == [j for j in range(T) for _ in PROMPTS]
    sigmas = trajectory.coefficients.sigmas
    for j in range(T):
        rows = state == j
        index = 2 if j < 2 else j
        arrived = trajectory.latents[j] + (sigmas[index] - sigmas[j]) * trajectory.velocities[j]
        with model.tap() as tokens:
            velocity = model.velocity(arrived, sigmas[index].expand(len(PROMPTS)), trajectory.conditioning).combined()
        torch.testing.assert_close(latents[rows], arrived, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden[rows], tokens[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(estimate[rows], arrived - sigmas[index] * velocity, rtol=1e-4, atol=1e-4)


def test_a_head_needs_hidden_tokens(tiny_policy: MakePolicy, mixture_model: FlowModel) -> None:
    model = tiny_policy()
    trajectory = sampled(model, keep_hidden=False)
    with pytest.raises(ValueError, match="keep_hidden"):
        Lookahead(model, PLAN, head=new_head(model)).complete(trajectory)
    with pytest.raises(ValueError, match="no hidden tokens"):
        mixture_model.tap()


def test_a_file_gives_the_head_back(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    head = new_head(tiny_policy())
    torch.nn.init.normal_(head.out.weight)
    head.scale.uniform_()
    save_head(head, tmp_path / "head.safetensors")
    back = load_head(tmp_path / "head.safetensors")
    assert back.config == head.config and not any(p.requires_grad for p in back.parameters())
    assert back.cost is None
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), back.state_dict().values(), strict=True))


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not a head")
    for name in ("missing.safetensors", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is no completion head"):
            load_head(tmp_path / name)
    config = HeadConfig(T, PLAN.paths, (4, 5, 5), patch=2, hidden=8)
    with pytest.raises(ValueError, match="do not divide"):
        CompletionHead(config)
    with pytest.raises(ValueError, match="do not divide"):
        CompletionHead(replace(config, latent_shape=(4, 4, 4), width=30))


@dataclass(frozen=True)
class Made:
    """A head by the command on a random pipeline, what the command printed, and the forwards that it took."""

    path: Path
    shown: str
    forwards: int


def make(train: Any, directory: Path, options: dict[str, object]) -> Made:
    path, shown, forwards = directory / "head.safetensors", io.StringIO(), 0
    velocity = SD3.velocity

    def counted(self: SD3, latents: Tensor, *others: Any) -> Any:
        nonlocal forwards
        forwards += len(latents)
        return velocity(self, latents, *others)

    own = ["--output", str(path), "--trajectories", "96", "--steps", "150", "--width", "32", "--depth", "1"]
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SD3, "velocity", counted)
        assert main([*own, *train.arguments(directory / "unused", **options)]) == 0
    return Made(path, shown.getvalue(), forwards)


@pytest.fixture(scope="module")
def made(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of node 1 of three steps."""
    plan = {"lookahead.plan": "nodes", "lookahead.nodes": "[1]", "lookahead.decoder": "preview"}
    return make(train, tmp_path_factory.mktemp("head"), plan)


BRANCHES = {
    "sampler.branches": 2,
    "sampler.micro_batch": 1,
    "credit.method": "branch",
    "lookahead.plan": "one_step",
    "objective.trained_steps": "[0, 1]",
}


@pytest.fixture(scope="module")
def made_of_branches(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of one step, for branches of steps 0 and 1 of three."""
    return make(train, tmp_path_factory.mktemp("branches"), BRANCHES)


def test_the_command_makes_a_head_that_helps(made: Made) -> None:
    path, shown = made.path, made.shown
    rows = [line.split() for line in shown.splitlines()[1:3]]
    # states 0 and 1 leave step 2 out; the head takes part of the error away on trajectories it has not seen
    assert [int(state) for state, _, _ in rows] == [0, 1]
    assert all(float(share) > 0.2 for _, _, share in rows), shown
    assert load_head(path).config.paths == ((1,), (), ())


def test_the_command_makes_a_head_for_branches(made_of_branches: Made) -> None:
    # branches lead to states 1 and 2, of which the second leaves no step out; 4 held-out batches of 4 branches
    (row,) = re.findall(r"^ +(\d+) +(\d+)  ([\d.]+)$", made_of_branches.shown, re.M)
    assert row[:2] == ("1", "16") and float(row[2]) > 0.2, made_of_branches.shown
    assert load_head(made_of_branches.path).config.paths == ((), (), ())


def test_the_file_tells_what_the_head_took(made: Made, made_of_branches: Made) -> None:
    """96 samples are 24 batches of 4, and 4 more are held out: 112 samples.

    Of a trajectory 3 evaluations are the rollout, 2 + 1 exact completions, and 1 brings state 0 to node 1. Two branches
    share 2 of an ODE trajectory; each takes 1 at each of two states, which the head sees too, and 1 more to complete
    exactly.
    """
    for found, forwards, judged in ((made, 112 * 7, 2 * 16), (made_of_branches, 112 * (1 + 2 + 1), 16)):
        cost = load_head(found.path).cost
        assert cost is not None and cost.tflop is not None
        assert (cost.forwards, cost.decodes, cost.head_rows) == (forwards, 0, 150 * 128 + judged)
        assert cost.forwards == found.forwards
        assert f"cost: {forwards:,} forwards, 0 decodes, {cost.head_rows:,} rows of the head, " in found.shown
        assert f"{cost.tflop:.3g} TFLOP, {cost.seconds:.0f} s" in found.shown
    # what it took goes on with the head
    save_head(load_head(made.path), made.path.parent / "again.safetensors")
    assert load_head(made.path.parent / "again.safetensors").cost == load_head(made.path).cost


def test_operations_of_making_a_head(made: Made, train: Any) -> None:
    unit = flops.count(flops.embedded(), lora_rank=2, lora_targets=configuration(train.arguments(Path())).lora.targets)
    head, cost = load_head(made.path), load_head(made.path).cost
    assert cost is not None
    # three forwards for a row that is learnt from, one for one that it is judged by
    rows = (3 * 150 * 128 + 32) * flops.completion_head(head.config)
    assert cost.tflop == pytest.approx((112 * 7 * unit.forward + rows) / 1e12, rel=1e-6)


def test_fidelity_measures_the_head_beside_its_plan(
    made: Made, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--plans", "nodes:1", "--head", str(made.path), "--groups", "2", "--group-size", "4"]
    common = [f"--model.path={train.model}", "--sampler.num_steps=3", "--lookahead.plan=exact", "--lora.rank=2"]
    common += ["--window.schedule=none", "--window.size=null"]
    common += ["--lookahead.decoder=preview"]
    common += ["--reward.terms={jpeg_incompressibility: 1.0}", "--objective.trained_steps=1"]
    out = tmp_path / "fidelity.json"
    assert fidelity([*own, "--json", str(out), *common]) == 0
    plans_found = json.loads(out.read_text())["plans"]
    plain, helped = plans_found["nodes{1}/full/preview"], plans_found["nodes{1}+head/full/preview"]
    assert plain["forwards"] == helped["forwards"]
    # states 0 and 1 go through the head
    assert helped["iteration_flops_ratio"] > plain["iteration_flops_ratio"]
    assert helped["spearman_rewards"] != plain["spearman_rewards"]
    with pytest.raises(SystemExit):
        fidelity(["--plans", "exact", *own[2:], *common])
    assert "--head" in capsys.readouterr().err


def test_fidelity_measures_a_head_on_branches(made_of_branches: Made, train: Any, tmp_path: Path) -> None:
    own = ["--plans", "one_step", "--head", str(made_of_branches.path), "--groups", "2", "--group-size", "4"]
    options = BRANCHES | {"sampler.num_steps": 3, "window.schedule": "none", "window.size": "null"}
    options |= {"model.path": train.model, "lora.rank": 2, "reward.terms": "{jpeg_incompressibility: 1.0}"}
    options |= {"lookahead.decoder": "full", "sampler.noise_level": 0.7, "sampler.micro_batch": 6}
    out = tmp_path / "fidelity.json"
    assert fidelity([*own, "--json", str(out), *(f"--{key}={value}" for key, value in options.items())]) == 0
    found = json.loads(out.read_text())["plans"]
    plain, helped = found["one_step/full/full"], found["one_step+head/full/full"]
    assert plain["forwards"] == helped["forwards"]
    # state 1 goes through the head
    assert helped["iteration_flops_ratio"] > plain["iteration_flops_ratio"]
    assert helped["pooled_gains"] != plain["pooled_gains"]


def test_training_takes_the_head(made: Made, made_of_branches: Made, train: Any, tmp_path: Path) -> None:
    nodes = {"lookahead.plan": "nodes", "lookahead.nodes": "[1]", "run.iterations": 1}
    assert train(tmp_path / "trajectories", **nodes, **{"lookahead.head": made.path}) == 0
    branches = BRANCHES | {"run.iterations": 1, "optimizer.updates_per_iteration": 2}
    assert train(tmp_path / "plain", **branches) == 0
    assert train(tmp_path / "branches", **branches, **{"lookahead.head": made_of_branches.path}) == 0
    (plain,), (helped,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "branches"))
    assert plain["nfe/lookahead"] == helped["nfe/lookahead"] and plain["flops/iteration"] < helped["flops/iteration"]
    assert plain["reward"] != helped["reward"]


def test_a_head_for_another_plan_is_refused(
    made: Made, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", **{"lookahead.head": made.path}) == 2
    assert "lookahead.head" in (message := capsys.readouterr().err) and "another plan" in message


def test_the_command_refuses_what_it_cannot_do(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = BRANCHES | {"objective.trained_steps": "[1]"}
    for output, options, words in (
        (tmp_path / "no" / "head.safetensors", {}, "--output"),
        (tmp_path / "head.safetensors", {"lookahead.plan": "exact"}, "leaves no step out"),
        (tmp_path / "head.safetensors", {"credit.method": "sparse"}, "credit.method"),
        # of three steps, where branches of step 1 lead is one step from the image
        (tmp_path / "head.safetensors", late, "leaves no step out"),
        (
            tmp_path / "head.safetensors",
            {"window.schedule": "fixed", "window.size": 1, "window.remainder_share": 0.5},
            "window.remainder_share",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["--output", str(output), *train.arguments(tmp_path / "unused", **options)])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "head.safetensors"), "--width", "30", *train.arguments(tmp_path / "unused")])
    assert "--width: expected a multiple of 4, got 30" in capsys.readouterr().err
    assert not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"window.schedule": "fixed", "window.size": 1, "window.remainder": "dpm_solver", "sampler.num_steps": 6},
            "lookahead.head: a head corrects Euler's last jump; expected null with window.remainder dpm_solver",
        ),
        ({"model.compile": "default"}, "lookahead.head: expected null with model.compile"),
    ],
)
def test_what_training_refuses_the_command_refuses_before_anything_is_loaded(
    train: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    problem: str,
) -> None:
    def loaded(*arguments: Any, **others: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(models, "build_model", loaded)
    head, options = tmp_path / "head.safetensors", {**options, "lookahead.plan": "one_step"}
    assert train(tmp_path / "run", **options, **{"lookahead.head": head}) == ExitCode.USAGE
    refused = capsys.readouterr().err
    assert problem in refused
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(head), *train.arguments(tmp_path / "run", **options)])
    assert ended.value.code == ExitCode.USAGE and capsys.readouterr().err == refused


def commands() -> list[list[str]]:
    """The command lines of the module's docstring, each as its arguments after `python -m`."""
    lines = (completion.__doc__ or "").replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("    python -m ")]


def test_the_commands_of_the_docstring_are_accepted() -> None:
    """Three for trajectories and three for branches; each triple is about one plan on one grid."""
    plans_found: list[tuple[str, object]] = []
    configs: list[Config] = []
    for module, *arguments in commands():
        if module.endswith(".completion"):
            _, overrides = completion._parser().parse_known_args(arguments)
            configs.append(configuration([*overrides, "lookahead.head=head.safetensors"]))
        elif module.endswith(".fidelity"):
            options, overrides = fidelity_options.parse(arguments, "")
            own = configuration(["--config", options.config or "embedded_dense", *overrides])
            (plan,) = (make(own.sampler.num_steps) for make in fidelity_options.plans_of(options))
            assert own.sampler == configs[-1].sampler and plan.paths == path_of(configs[-1])
        else:
            assert module.endswith(".train")
            assert parse_arguments(arguments)[0].model_dump() == configs[-1].model_dump()
        plans_found.append((module, configs[-1].lookahead.plan))
    assert [plan for _, plan in plans_found] == ["nodes"] * 3 + ["one_step"] * 3
    assert [config.sampler.branches for config in configs] == [None, 8]


def path_of(config: Config) -> tuple[tuple[int, ...], ...]:
    options = config.lookahead
    return plans.make_plan(options.plan, config.sampler.num_steps, options.nodes, options.n or 1, options.paths).paths
