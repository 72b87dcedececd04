"""The completion head: where it acts, what it sees, that it learns, and the command that makes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from densegrpo_fast.completion import main
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, load_head, save_head
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.sampling.trajectory import Trajectory

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
        initial_noise(model, index, seed=0, epoch=0),
        model.encode(PROMPTS),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        epoch=0,
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


@pytest.fixture(scope="module")
def made(train: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A head for node 1 of three steps, made by the command on a random pipeline; and what the command printed."""
    import contextlib
    import io

    path, shown = tmp_path_factory.mktemp("head") / "head.safetensors", io.StringIO()
    own = ["--output", str(path), "--trajectories", "96", "--steps", "150", "--width", "32", "--depth", "1"]
    plan = {"lookahead.plan": "nodes", "lookahead.nodes": "[1]", "lookahead.decoder": "preview"}
    with contextlib.redirect_stdout(shown):
        assert main([*own, *train.arguments(path.parent / "unused", **plan)]) == 0
    return path, shown.getvalue()


def test_the_command_makes_a_head_that_helps(made: tuple[Path, str]) -> None:
    path, shown = made
    rows = [line.split() for line in shown.splitlines()[1:3]]
    # states 0 and 1 leave step 2 out; the head takes part of the error away on trajectories it has not seen
    assert [int(state) for state, _, _ in rows] == [0, 1]
    assert all(float(share) > 0.2 for _, _, share in rows), shown
    assert load_head(path).config.paths == ((1,), (), ())


def test_fidelity_measures_the_head_beside_its_plan(
    made: tuple[Path, str], train: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from densegrpo_fast.fidelity.__main__ import main as fidelity

    own = ["--plans", "nodes:1", "--head", str(made[0]), "--groups", "2", "--group-size", "4"]
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


def test_training_takes_the_head(made: tuple[Path, str], train: object, tmp_path: Path) -> None:
    options = {"lookahead.plan": "nodes", "lookahead.nodes": "[1]", "lookahead.head": made[0], "run.iterations": 1}
    assert train(tmp_path / "run", **options) == 0


def test_a_head_for_another_plan_is_refused(
    made: tuple[Path, str], train: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", **{"lookahead.head": made[0]}) == 2
    assert "lookahead.head" in (message := capsys.readouterr().err) and "another plan" in message


def test_the_command_refuses_what_it_cannot_do(
    train: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, options, words in (
        (tmp_path / "no" / "head.safetensors", {}, "--output"),
        (tmp_path / "head.safetensors", {"lookahead.plan": "exact"}, "leaves no step out"),
        (tmp_path / "head.safetensors", {"credit.method": "sparse"}, "credit.method"),
        (
            tmp_path / "head.safetensors",
            {"window.schedule": "fixed", "window.size": 1, "window.remainder_share": 0.5},
            "window.remainder_share",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["--output", str(output), *train.arguments(tmp_path / "unused", **options)])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "head.safetensors").exists()
