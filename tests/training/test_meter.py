"""What a record says an iteration cost: against what went through the networks, and against the closed formulas."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration, dense_iteration
from densegrpo_fast.training.costs import GFLOP
from densegrpo_fast.training.lookahead import completion_ways
from densegrpo_fast.training.meter import Meter, MeteredModel
from densegrpo_fast.training.trainer import Trainer

pytestmark = pytest.mark.ci

Policy = Callable[..., FlowModel]

SETTINGS = {
    "lora.rank": 2,
    "lora.alpha": 4,
    "lora.targets": "[attn.to_q, attn.to_v, attn.to_out.0]",
    "data.num_prompts": 2,
    "sampler.group_size": 4,
    "sampler.num_steps": 5,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.micro_batch": 4,
    "window.schedule": "none",
    "window.size": "null",
    "lookahead.plan": "nodes",
    "lookahead.nodes": "[2, 3]",
    "lookahead.monitor_every": 0,
    "optimizer.updates_per_iteration": 1,
    "ema.every": 0,
}
SAMPLES = 8
GUIDED = {"sampler.guidance_scale": 3.0, "objective.kl_coef": 0.1}
CONDITIONAL = {"objective.guidance_gradient": "conditional"}
BRANCHES = {"credit.method": "branch", "sampler.branches": 2, "sampler.micro_batch": 2}
WINDOW = {"window.schedule": "fixed", "window.size": 2, "window.first": 1}
GRANULAR = {**BRANCHES, "credit.method": "granular", "lookahead.plan": "exact", "lookahead.nodes": "[]"}
FORMS = {
    "trajectories": {"lookahead.decoder": "preview"},
    "copy": {"lookahead.decoder": "full", "lookahead.copy_dtype": "float32"},
    "cond_only": {**GUIDED, "lookahead.decoder": "preview", "lookahead.guidance": "cond_only"},
    "conditional": {**GUIDED, **CONDITIONAL, "lookahead.decoder": "preview"},
    "window": {**GUIDED, **WINDOW, "lookahead.decoder": "preview", "sampler.shared_noise": "true"},
    "drawn": {**GUIDED, "lookahead.decoder": "full", "objective.trained_steps": 2},
    "drawn_previews": {
        "lookahead.decoder": "preview",
        "objective.trained_steps": "[0, 2]",
        "sampler.shared_noise": "true",
    },
    "sparse": {"credit.method": "sparse"},
    "branches": {**BRANCHES, "lookahead.decoder": "preview"},
    "branches_window": {
        **GUIDED,
        **CONDITIONAL,
        **BRANCHES,
        **WINDOW,
        "lookahead.decoder": "full",
        "lookahead.guidance": "cond_only",
    },
    "granular": GRANULAR,
}
forms = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


class Brightness:
    """A reward that counts its pictures."""

    def __init__(self) -> None:
        self.pictures = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.pictures += len(images)
        return images.flatten(1).mean(1)


def trainer_of(config: Config, model: FlowModel, reward: Brightness | None = None) -> Trainer:
    mixture = RewardMixture({"brightness": (Brightness() if reward is None else reward, 1.0)})
    return Trainer(config, model=model, reward=mixture)


@contextmanager
def counted(trainer: Trainer) -> Iterator[Counter[str]]:
    """Rows that go through the networks and decoders themselves, by the phase that is open."""
    found, phase, own = Counter[str](), ["outside"], trainer.phase

    @contextmanager
    def during(name: str) -> Iterator[None]:
        phase.append(name)
        with own(name):
            yield
        phase.pop()

    def rows(key: Callable[[], str]) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[key()] += len(kwargs.get("hidden_states", args[0] if args else ()))

        return hook

    model = trainer.model
    assert isinstance(model, DiffusersModel)
    networks = [model.network]
    if trainer.lookahead is not None and trainer.lookahead.model.network is not model.network:
        networks.append(trainer.lookahead.model.network)
    parts = [(network, lambda: f"nfe/{phase[-1]}") for network in networks]
    parts += [(model.pipeline.vae.decoder, lambda: "decodes/full")]
    parts += [(model.preview_decoder.decoder, lambda: "decodes/preview")]  # type: ignore[union-attr]
    hooks = [part.register_forward_pre_hook(rows(key), with_kwargs=True) for part, key in parts]
    trainer.phase = during  # type: ignore[method-assign]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("monitor", [0, 1])
@forms
def test_the_record_counts_what_went_through_the_networks(
    tiny_policy: Policy, options: dict[str, object], monitor: int
) -> None:
    if options is GRANULAR and monitor:
        return  # a plan of its own is never monitored
    reward = Brightness()
    trainer = trainer_of(configured(**options, **{"lookahead.monitor_every": monitor}), tiny_policy(), reward)
    with counted(trainer) as found:
        record = trainer.step(0)
    keys = ("nfe/", "decodes/", "pictures_scored")
    said = {key: value for key, value in record.items() if key.startswith(keys) and value}
    assert said == {**found, "pictures_scored": reward.pictures}
    assert ("flops/monitor" in record) == bool(monitor and options.get("credit.method") != "sparse")


@forms
def test_the_formulas_say_what_the_meter_counts(tiny_policy: Policy, options: dict[str, object]) -> None:
    config = configured(**options)
    trainer = trainer_of(config, tiny_policy())
    record = trainer.step(0)
    steps, trained = trainer.schedule.at(0), len(trainer.schedule.trained_steps(0))
    common: dict[str, Any] = {
        "trained_steps": trained,
        "guided": config.sampler.guidance_scale != 1,
        "kl": config.objective.kl_coef > 0,
        "guidance_gradient": config.objective.guidance_gradient,
    }
    cost: IterationCost
    if trainer.lookahead is None:
        expected = {"nfe/rollout": 5, "nfe/lookahead": 0, "nfe/update": trained, "decodes/full": 1}
        assert {key: record[key] / SAMPLES for key in expected} == expected
        assert record["flops/over_sparse"] == pytest.approx(1)
        return
    common |= {
        "guidance": config.lookahead.guidance,
        "decoder": config.lookahead.decoder,
        "noisy": steps.coefficients.noisy,
    }
    if config.sampler.branches is not None:
        plan, *others = [way.plan for way in completion_ways(config, trainer.lookahead)]
        cost = branched_iteration(plan, others=others, branches=2, **common)
    else:
        shared = config.sampler.group_size if config.sampler.shared_noise else 1
        cost = dense_iteration(trainer.lookahead.plan, shared=shared, completed=steps.completed, **common)
    expected = {"decodes/full": cost.full_decodes, "decodes/preview": cost.preview_decodes}
    expected |= {"pictures_scored": cost.rewards}
    for phase, evaluations in cost.phases.items():
        expected |= {f"nfe_guided/{phase}": evaluations.guided, f"nfe_unguided/{phase}": evaluations.unguided}
    assert {key: record[key] / SAMPLES for key in expected} == pytest.approx(expected)
    prices = trainer.costs.prices
    assert prices is not None
    flops = SAMPLES * cost.flops(prices.unit, prices.lookahead) / GFLOP
    assert record["flops/iteration"] == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {**GUIDED, "lookahead.decoder": "preview"},
        {**GUIDED, **CONDITIONAL, "lookahead.decoder": "preview"},
        {"lookahead.decoder": "full", "lookahead.cache": "text:own", "sampler.guidance_scale": 1.0},
        {**BRANCHES, "lookahead.decoder": "preview", "lookahead.copy_dtype": "float32"},
        {"lookahead.decoder": "preview", "model.gradient_checkpointing": "true"},
    ],
    ids=["trajectories", "conditional", "cache", "branches", "checkpointing"],
)
def test_operations_are_those_of_a_real_iteration(tiny_policy: Policy, options: dict[str, object]) -> None:
    model = tiny_policy()
    assert isinstance(model, DiffusersModel)
    config = configured(**options, **{"lookahead.monitor_every": int("lookahead.cache" not in options)})
    if config.model.gradient_checkpointing:
        model.checkpoint_gradients()
    trainer = trainer_of(config, model)
    # prompts are encoded once in a run, which is no part of an iteration's cost
    encoded = model.encode(trainer.prompts.batch(0).prompts)
    model.encode = lambda rows: encoded  # type: ignore[method-assign]
    assert trainer.costs.prices is not None  # counted on the meta device, before the counter looks
    # the counter knows nothing of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        record = trainer.step(0)
    assert record["flops/iteration"] * GFLOP == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_over_sparse_by_hand(tiny_policy: Policy) -> None:
    """T = 5, 4 trained steps, nodes {2, 3} that 2 and 3 states meet at: 5 forwards more, 6 previews, an image the same.

    Then what the monitor adds is told apart, and told of in that iteration alone.
    """
    trainer = trainer_of(configured(**{"lookahead.decoder": "preview", "lookahead.monitor_every": 2}), tiny_policy())
    monitored, plain = trainer.step(0), trainer.step(1)
    prices = trainer.costs.prices
    assert prices is not None
    unit = prices.unit
    sparse = 9 * unit.forward + 4 * unit.backward + unit.full_decode
    expected = sparse + 5 * unit.forward + 6 * unit.preview_decode
    assert plain["flops/iteration"] == pytest.approx(SAMPLES * expected / GFLOP)
    assert plain["flops/over_sparse"] == pytest.approx(expected / sparse)
    # exact completions of 4 samples by 4 + 3 + 2 + 1 forwards, and 6 pictures of each
    extra = 4 * (10 * unit.forward + 6 * unit.full_decode) / GFLOP
    assert monitored["flops/monitor"] == pytest.approx(extra) and "flops/monitor" not in plain
    assert monitored["flops/iteration"] == pytest.approx(plain["flops/iteration"] + extra)


def test_a_model_of_another_family_is_counted_without_operations(
    mixture_model: FlowModel, caplog: pytest.LogCaptureFixture
) -> None:
    from densegrpo_fast.training.costs import CostReport

    meter = Meter()
    report = CostReport(configured(), mixture_model, None, meter)
    with meter("rollout"):
        policy = MeteredModel(mixture_model, meter)
        policy.velocity(torch.zeros(40, 4), torch.ones(40), policy.encode(["0"] * 40))
    with caplog.at_level(logging.WARNING):
        metrics = [report.metrics(5, 4, 8), report.metrics(5, 4, 8)]
    assert metrics[0] == metrics[1] and metrics[0]["nfe/rollout"] == 40
    assert not any(key.startswith("flops") for key in metrics[0])
    (record,) = caplog.records
    assert "no flops/*: the operations of this MixtureModel cannot be counted" in record.getMessage()


def test_phases_count_for_themselves_and_captures_are_left_out(mixture_model: FlowModel) -> None:
    meter = Meter()
    policy = MeteredModel(mixture_model, meter)
    latents, prompts = torch.zeros(3, 4), policy.encode(["0"] * 3)
    with meter("outer"):
        policy.velocity(latents, torch.ones(3), prompts, 2.0)
        with meter("inner"):
            policy.velocity(latents, torch.ones(3), prompts)
        with policy.uncounted():
            policy.velocity(latents, torch.ones(3), prompts)
        policy.count(5, 1.0)
    assert (meter.counts["outer"].guided, meter.counts["outer"].unguided) == (3, 5)
    assert (meter.counts["inner"].guided, meter.counts["inner"].unguided) == (0, 3)
    assert meter.total("outer", "inner").forwards == 6 + 5 + 3
    meter.reset()
    assert not meter.counts
