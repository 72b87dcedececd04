"""The benches' baseline: under equal noise it computes what the package computes, by its own slow way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.common.stock import Stock, StockIteration
from benches.iteration import bench_iteration
from benches.iteration.bench_iteration import check_work, evaluations
from benches.iteration.protocol import NAMES, STOCK_PINNED, Protocol, fast_settings, stock_pinned
from benches.iteration.variants import stock_cost
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.models import diffusers_model
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import initial_noise
from densegrpo_fast.training.meter import PhaseTimer
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.trainer import Experience, Trainer

STEPS, ROWS = 4, ["a cat"] * 3 + ["the moon"] * 3
METADATA: list[dict[str, Any]] = [{} for _ in ROWS]
BATCH = PromptBatch(ROWS, METADATA, 3)
Policy = Callable[..., FlowModel]


def graded(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A smooth reward with a spread that rounding cannot reach."""
    weight = torch.linspace(-1.0, 1.0, images[0].numel())
    return (images.flatten(1) * weight).sum(1) + torch.tensor([0.1 * len(prompt) for prompt in prompts])


REWARD = RewardMixture({"graded": (graded, 1.0)})


def settings(method: str, **options: object) -> Config:
    chosen = {
        "data.num_prompts": 2,
        "sampler.group_size": 3,
        "sampler.num_steps": STEPS,
        "sampler.micro_batch": len(ROWS),
        "lookahead.plan": "exact",
        "lookahead.decoder": "full",
        "credit.method": method,
        "objective.kl_coef": 0.04,
        # a norm that nothing reaches: gradients are compared unclipped
        "optimizer.max_grad_norm": 1e6,
        "ema.every": 0,
        "lookahead.monitor_every": 0,
        **options,
    }
    return parse_arguments(["--config", "embedded_paper", *(f"{key}={value}" for key, value in chosen.items())])[0]


@dataclass
class Both:
    """One iteration done twice from the same start, and the adapter gradients that each left."""

    config: Config
    trained: list[int]
    ours: Experience
    gradients: dict[str, Tensor]
    stock: StockIteration
    stock_gradients: dict[str, Tensor]


def run_both(policy: Policy, config: Config) -> Both:
    model = policy(spread=0.2)
    trainer = Trainer(config, model=model, reward=REWARD)
    steps = trainer.schedule.at(3)
    ours = trainer.strategy.run(trainer, BATCH, steps, iteration=3)

    index = torch.arange(len(ROWS))
    draws = [
        gaussian(model.latent_shape, seed=config.seed, sample_index=index, step=step, stream=Stream.STEP, iteration=3)
        for step in range(STEPS)
    ]
    again = policy(spread=0.2)
    result = Stock(again, config, REWARD).iteration(
        ROWS,
        METADATA,
        PhaseTimer(),
        dense=config.credit.method == "dense",
        noise=initial_noise(again, index, seed=config.seed, iteration=3),
        step_noise=torch.stack(draws),
    )
    return Both(config, steps.trained, ours, gradients(model), result, gradients(again))


def gradients(model: FlowModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.trainable_parameters().items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding, measured against the largest of the values."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(params=[("sparse", "full"), ("dense", "full"), ("dense", "conditional")], ids="-".join)
def both(request: pytest.FixtureRequest, tiny_policy: Policy) -> Both:
    method, gradient = request.param
    return run_both(tiny_policy, settings(method, **{"objective.guidance_gradient": gradient}))


def check_equal(both: Both) -> None:
    rollout, rewards = both.ours.rollout, both.ours.rewards
    close(both.stock.latents, rollout.latents)
    close(both.stock.log_probs, rollout.log_probs)
    close(both.stock.rewards[:, -1], rewards.rewards.flatten())
    if rewards.gains is not None:
        close(both.stock.rewards.diff(dim=1), rewards.gains.flatten(0, 1))
    advantages = both.ours.advantages.values.flatten(0, 1)
    close(both.stock.advantages[:, both.trained], advantages[:, both.trained])
    # the last step, which is not trained, gains so little that the rewards' rounding shows in it
    torch.testing.assert_close(both.stock.advantages[:, -1], advantages[:, -1], rtol=0, atol=1e-2)
    assert advantages.abs().max() > 0.5
    assert both.stock.loss == pytest.approx(both.ours.update["loss"], rel=1e-4, abs=1e-6)
    largest = max(gradient.abs().max().item() for gradient in both.gradients.values())
    assert largest > 0
    for name, gradient in both.gradients.items():
        torch.testing.assert_close(both.stock_gradients[name], gradient, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.ci
def test_it_computes_what_the_package_computes(both: Both) -> None:
    assert both.config.sampler.guidance_scale == 4.5
    check_equal(both)


@pytest.mark.ci
@pytest.mark.parametrize("method", ["sparse", "dense"])
def test_without_guidance_and_kl_too(tiny_policy: Policy, method: str) -> None:
    options = {"sampler.guidance_scale": 1.0, "objective.kl_coef": 0.0}
    check_equal(run_both(tiny_policy, settings(method, **options)))


@pytest.mark.ci
def test_micro_batches_give_the_same(tiny_policy: Policy) -> None:
    check_equal(run_both(tiny_policy, settings("dense", **{"sampler.micro_batch": 2})))


@pytest.mark.ci
def test_the_kl_term_counts(tiny_policy: Policy) -> None:
    # the first update's policy loss does not depend on the coefficient, so the losses differ by 0.04 times the KL
    losses = [run_both(tiny_policy, settings("sparse", **{"objective.kl_coef": c})).stock.loss for c in (0.0, 0.04)]
    assert losses[1] > losses[0] + 1e-6


def test_a_serial_completion_is_the_exact_plan(tiny_policy: Policy) -> None:
    config, model = settings("dense"), tiny_policy(spread=0.2)
    trainer = Trainer(config, model=model, reward=REWARD)
    trajectory = trainer.sample(BATCH, trainer.schedule.at(0), iteration=0)
    assert trainer.lookahead is not None
    stock = Stock(model, config, REWARD)
    stock.set_timesteps()
    text = stock.encode(ROWS)
    for state, expected in enumerate(trainer.lookahead.complete(trajectory)[:-1]):
        close(stock.complete(trajectory.latents[state], state, text), expected)


def test_its_own_noise_is_torchs(tiny_policy: Policy) -> None:
    config = settings("sparse")
    stock = Stock(tiny_policy(), config, REWARD)
    latents = []
    for _ in range(2):
        torch.manual_seed(5)
        latents.append(stock.iteration(ROWS, METADATA, PhaseTimer(), dense=False).latents)
    # the update in between changes the policy, but not the numbers that were drawn
    assert torch.equal(latents[0][0], latents[1][0])
    assert latents[0][0].std().item() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(latents[0][1:], latents[1][1:])


@pytest.mark.parametrize("dense", [False, True])
def test_all_images_go_through_the_autoencoder_at_once(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    # ours would decode one by one with so small a cache
    monkeypatch.setattr(diffusers_model, "_CACHED_PLACES", 1)
    model, decoded = tiny_policy(), []
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    Stock(model, settings("dense"), REWARD).iteration(ROWS, METADATA, PhaseTimer(), dense=dense)
    assert [(len(latents), latents.dtype) for latents in decoded] == [(6, torch.float32)] * (5 if dense else 1)


def test_another_autoencoder_is_refused(tiny_policy: Policy) -> None:
    model = tiny_policy()
    with pytest.raises(ValueError, match=r"needs a float32 autoencoder .*, got torch\.bfloat16"):
        Stock(model.decoding_in(torch.bfloat16), settings("sparse"), REWARD)
    model.decode_by("sliced")
    with pytest.raises(ValueError, match="decodes all images at once, .* sliced True"):
        Stock(model, settings("sparse"), REWARD)


def test_phases_are_timed(tiny_policy: Policy) -> None:
    timer = PhaseTimer()
    Stock(tiny_policy(), settings("dense"), REWARD).iteration(ROWS, METADATA, timer, dense=True)
    assert set(timer.seconds()) == {"rollout", "lookahead", "reward", "update"}


def test_costs_by_hand() -> None:
    # T = 10 with guidance: the rollout takes 2*10 forwards, 9 trained steps 2*9 for the policy and as many for the
    # reference; the completions 2*(10+9+...+1) = 110
    sparse = stock_cost(10, trained_steps=9, guided=True, kl=True, dense=False)
    assert (sparse.forwards, sparse.full_decodes, sparse.rewards) == (20 + 18 + 18, 1, 1)
    dense = stock_cost(10, trained_steps=9, guided=True, kl=False, dense=True)
    assert (dense.forwards, dense.full_decodes, dense.rewards) == (20 + 110 + 18, 11, 12)


@pytest.mark.parametrize("options", [{"sampler.dynamics": "dance"}, {"sampler.noise_level": "[0.7, 0.7, 0.7, 0.5]"}])
def test_other_dynamics_are_refused(tiny_policy: Policy, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="needs flow_sde with one noise level"):
        Stock(tiny_policy(), settings("sparse", **options), REWARD)


@pytest.mark.ci
@pytest.mark.parametrize(("kl", "copy_dtype"), [(True, "null"), (False, "bfloat16")])
def test_every_variant_does_the_work_of_its_closed_form(tiny_policy: Policy, kl: bool, copy_dtype: str) -> None:
    protocol = Protocol(
        prompts=1, group_size=2, plan="nodes:4,7", guidance="cond_only", decoder="preview", copy_dtype=copy_dtype
    )
    bench = bench_iteration.prepare(protocol, kl=kl, model=tiny_policy())
    assert check_work(bench)["process"] > 0
    found = {name: evaluations(variant.cost) for name, variant in bench.variants.items()}
    # nodes {4, 7}: of the states 0..8 four meet at 4 and seven at 7, without guidance
    trajectories = {"dense_trajectories": 4 + 7, "dense_exact": 2 * 45, "stock_dense": 2 * 55}
    lookahead = {"sparse": 0, "sparse_retained": 0, "stock_sparse": 0} | trajectories
    branched = found.pop("dense_fast")
    drawn, streamed = (found.pop(name) for name in ("dense_drawn", "dense_streamed"))
    retained = found.pop("sparse_retained")
    del lookahead["sparse_retained"]
    assert {name: cost["lookahead"] for name, cost in found.items()} == lookahead
    for name, cost in found.items():
        assert cost["total"] == 20 + 18 + (18 if kl else 0) + lookahead[name]
    # no forward is repeated
    assert retained["total"] == 20 + (18 if kl else 0)
    # four of the nine steps, with one forward and its backward each, and the states at their ends alone
    assert (drawn["policy"], drawn["reference"]) == (8, 8 if kl else 0) and drawn["lookahead"] <= 4 + 7
    assert streamed["total"] == drawn["total"] - 8
    # two branches share nine evaluations of the trunk and of its replay; states 1..9 are evaluated with guidance, and
    # then 1..3 meet at 4 and 1..6 at 7 without
    assert branched["rollout"] == 2 * 9 / 2
    assert branched["lookahead"] == 2 * 9 + 3 + 6
    assert (branched["policy"], branched["reference"]) == (2 * 9 / 2, 2 * 9 / 2 if kl else 0)
    assert (branched["full_decodes"], branched["preview_decodes"], branched["rewards"]) == (0, 9, 9)
    # T + 1 previews for the gains, and the end once more in full for the final reward
    whole = found["dense_trajectories"]
    assert (whole["full_decodes"], whole["preview_decodes"], whole["rewards"]) == (1, 11, 12)
    assert set(bench.variants["stock_dense"].phases[0]) == {"rollout", "lookahead", "reward", "update"}


@pytest.mark.ci
def test_the_record_says_what_the_fast_engine_and_the_baseline_are(
    tiny_policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_policy()
    monkeypatch.setattr(bench_iteration, "load", lambda config, device: made)
    output = tmp_path / "iteration.json"
    arguments = ["--model", "embedded_random", "--prompts", "1", "--group-size", "2", "--rounds", "1"]
    assert bench_iteration.main([*arguments, "--output", str(output)]) == ExitCode.OK
    document = json.loads(output.read_text())
    assert set(document["ratios"]) == set(document["no_kl"]["ratios"]) == set(bench_iteration.RATIOS)
    settings = document["settings"]
    assert settings["stock"] == STOCK_PINNED | {"images_per_decode": 2}
    assert settings["dense_fast"]["preset"] == "embedded_paper_fast" and settings["dense_fast"]["branches"] == 2
    decoding = {name: config["model"]["vae_dtype"] for name, config in settings["variants"].items()}
    exact = ("dense_exact", "stock_sparse", "stock_dense")
    assert decoding == dict.fromkeys(NAMES, "bfloat16") | dict.fromkeys(exact, "float32")


@pytest.mark.ci
def test_work_that_is_not_the_closed_forms_is_noticed(tiny_policy: Policy) -> None:
    bench = bench_iteration.prepare(Protocol(prompts=1, group_size=2), kl=False, model=tiny_policy())
    sparse = bench.variants["sparse"]
    sparse.cost = bench.variants["dense_exact"].cost
    with pytest.raises(AssertionError, match="sparse did"):
        check_work(replace(bench, variants={"sparse": sparse}))


def test_variants_differ_in_rewards_and_lookahead_alone() -> None:
    overrides = ("sampler.micro_batch=4", "lookahead.chunk=3")
    protocol = Protocol(
        prompts=2, group_size=8, plan="n_step:2", guidance="cond_only", decoder="preview", overrides=overrides
    )
    configs = {name: protocol.config(name, kl=True) for name in NAMES}
    branched = configs.pop("dense_fast")
    drawn = {name: configs.pop(name) for name in ("dense_drawn", "dense_streamed")}
    own = {"lookahead": True, "credit": {"method"}, "model": {"vae_dtype"}}
    shared = [config.model_dump(exclude=own) for config in configs.values()]
    assert all(settings == shared[0] for settings in shared)
    ahead, exact = configs["dense_trajectories"].lookahead, configs["dense_exact"].lookahead
    assert (ahead.plan, ahead.n, ahead.guidance, ahead.decoder, ahead.chunk) == ("n_step", 2, "cond_only", "preview", 3)
    assert (exact.plan, exact.n, exact.guidance, exact.decoder, exact.chunk) == ("exact", None, "full", "full", 3)
    sparse = [name for name, config in configs.items() if config.credit.method == "sparse"]
    assert sparse == ["sparse", "sparse_retained", "stock_sparse"]
    for name, config in drawn.items():
        own_choice = {"objective": {"trained_steps", "step_sampling"}, "optimizer": {"update"}}
        assert config.model_dump(exclude=own_choice) == configs["dense_trajectories"].model_dump(exclude=own_choice)
        assert (config.objective.trained_steps, config.objective.step_sampling) == (4, "importance")
        assert config.optimizer.update == ("streamed" if name == "dense_streamed" else "replayed")
    own |= {"sampler": {"branches", "micro_batch"}}
    assert branched.model_dump(exclude=own) == configs["dense_exact"].model_dump(exclude=own)
    assert (branched.sampler.branches, branched.sampler.micro_batch) == (8, 2)
    assert branched.lookahead == ahead


def test_ours_decodes_in_one_precision_and_the_baseline_in_its_own() -> None:
    configs = {name: Protocol(overrides=("model.vae_decode=sliced",)).config(name, kl=True) for name in NAMES}
    decoding = {name: (config.model.vae_dtype, config.model.vae_decode) for name, config in configs.items()}
    ours = ("sparse", "sparse_retained", "dense_fast", "dense_trajectories", "dense_drawn", "dense_streamed")
    assert {decoding.pop(name) for name in ours} == {("bfloat16", "sliced")}
    assert decoding.pop("dense_exact") == ("float32", "sliced")
    assert decoding == dict.fromkeys(("stock_sparse", "stock_dense"), ("float32", "whole"))
    assert stock_pinned(configs["stock_dense"]) == STOCK_PINNED
    with pytest.raises(UserError, match=r"model\.vae_dtype=bfloat16 is set by the protocol"):
        Protocol(overrides=("model.vae_dtype=bfloat16",)).config("stock_dense", kl=True)


@pytest.mark.ci
def test_each_variant_has_the_decoder_of_its_configuration(tiny_policy: Policy) -> None:
    model = tiny_policy()
    bench = bench_iteration.prepare(Protocol(prompts=1, group_size=2), kl=False, model=model)
    decoders = {name: variant.models[0].pipeline.vae for name, variant in bench.variants.items()}
    assert all(decoders[name] is model.pipeline.vae for name in ("dense_exact", "stock_sparse", "stock_dense"))
    assert model.pipeline.vae.dtype == torch.float32
    assert decoders["sparse"] is decoders["dense_fast"] is decoders["dense_trajectories"]
    assert decoders["sparse"].dtype == torch.bfloat16
    assert {variant.models[0].network for variant in bench.variants.values()} == {model.network}


def test_what_is_timed_without_options_is_the_fast_preset() -> None:
    config, preset = Protocol().config("dense_fast", kl=True), parse_arguments(["--config", "embedded_paper_fast"])[0]
    # but for its rate, which would change the policy that is timed, the running average and the lookahead's checks
    apart = {"preset": True, "optimizer": {"lr"}, "ema": True, "lookahead": {"monitor_every"}}
    assert config.model_dump(exclude=apart) == preset.model_dump(exclude=apart)
    expected = {
        "preset": "embedded_paper_fast",
        "branches": 16,
        "plan": "exact_but_last",
        "guidance": "full",
        "copy_dtype": "float32",
        "decoder": "full",
        "vae_dtype": "bfloat16",
    }
    assert fast_settings(config) == expected
    other = fast_settings(Protocol(group_size=8, plan="nodes:4,7").config("dense_fast", kl=True))
    assert other == expected | {"preset": None, "branches": 8, "plan": "nodes{4,7}"}


def test_a_plan_is_written_as_for_the_fidelity_command() -> None:
    ahead = Protocol(plan="paths:4,7:4:4:7:7:8:-:-:9:-").config("dense_trajectories", kl=True).lookahead
    assert (ahead.plan, ahead.nodes, ahead.n) == ("paths", [], None)
    assert ahead.paths == [[4, 7], [4], [4], [7], [7], [8], [], [], [9], []]
    with pytest.raises(UserError, match="--plan: expected exact, .*, got 'paths:'") as caught:
        Protocol(plan="paths:").config("dense_fast", kl=True)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    with pytest.raises(UserError, match=r"lookahead\.paths: expected a list for each of the 10 states, got 4"):
        Protocol(plan="paths:2,3:3:-:-").config("dense_fast", kl=True)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sampler.num_steps=8", "num_steps is 8, not 10"),
        ("objective.trained_steps=3", "trained_steps is 3, not 9"),
        ("optimizer.updates_per_iteration=2", "updates_per_iteration is 2, not 1"),
        ("model.prompt_cache=prompts", "prompt_cache is prompts, not None"),
        ("lookahead.decoder=preview", "is set by the protocol"),
        ("sampler.micro_batch", "must be KEY=VALUE"),
    ],
)
def test_pinned_settings_cannot_be_moved(override: str, problem: str) -> None:
    overrides = (override,) if "micro" in override else (override, "sampler.micro_batch=8")
    with pytest.raises(UserError, match=problem) as caught:
        Protocol(overrides=overrides).config("sparse", kl=True)
    assert exit_code_of(caught.value) == ExitCode.USAGE
