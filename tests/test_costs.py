"""What a record says an iteration cost, against what really went through the model in one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.run_files.metrics import PhaseTimer
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import branched_iteration, sparse_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.training import builders
from densegrpo_fast.training.costs import GFLOP, CostLog
from densegrpo_fast.training.experience import RewardComputer, draw
from densegrpo_fast.training.learner import Learner
from densegrpo_fast.training.monitor import LookaheadMonitor

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
    "lookahead.monitor_every": 1,
    "optimizer.updates_per_iteration": 1,
    "ema.every": 0,
}
ROWS = ["a cat"] * 4 + ["the moon"] * 4
GUIDED = {"sampler.guidance_scale": 3.0, "objective.kl_coef": 0.1}
BRANCHES = {"credit.method": "branch", "sampler.branches": 2, "sampler.micro_batch": 2}
WINDOW = {"window.schedule": "fixed", "window.size": 2, "window.first": 1}


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    return load_config(["--config=embedded_dense", *given])[0]


class Tally:
    """Brightness, with a count of the pictures."""

    def __init__(self) -> None:
        self.pictures = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.pictures += len(images)
        return images.flatten(1).mean(1)


class Iteration:
    """The parts of a training iteration on a tiny model."""

    def __init__(self, config: Config, model: SD3):
        self.config, self.model, self.tally = config, model, Tally()
        reward = RewardMixture({"tally": (self.tally, 1.0)})
        self.lookahead: Lookahead | None = builders.build_lookahead(config, model)
        self.judge = RewardComputer(config, model, reward, self.lookahead)
        self.monitor = LookaheadMonitor(config, model, reward, self.lookahead)
        self.learner = Learner(model, builders.learner_options(config))
        self.costs = CostLog(config, model, self.lookahead)
        # prompts are encoded once in a run's iteration, which is no part of its cost
        encoded = model.encode(ROWS)
        model.encode = lambda rows: encoded  # type: ignore[method-assign]

    def run(self, phases: Callable[[str], Any], *, monitor: bool = False) -> None:
        """Roll out, judge and update, and re-score one prompt if asked to, each within `phases(name)`."""
        config, metadata = self.config, [{} for _ in ROWS]
        with phases("rollout"):
            table = builders.build_coefficients(config, self.model, builders.noisy_steps(config, 0))
            drawn = draw(config, self.model, ROWS, table, 0, cache=self.judge.cache)
        with phases("lookahead"):
            outcome = self.judge.judge(drawn, ROWS, metadata, PhaseTimer())
        if monitor:
            with phases("monitor"):
                self.monitor.check(drawn, ROWS, metadata, outcome, 0, self.costs)
        with phases("update"):
            steps = builders.trained_steps(config, 0)
            self.learner.update(drawn, outcome.advantages.values.flatten(0, 1), steps)
        self.costs.iteration(self.judge.cost(drawn, len(steps)), self.judge.sparse_cost(drawn, len(steps)), len(ROWS))


@contextmanager
def counted(iteration: Iteration) -> Iterator[tuple[Counter[str], Callable[[str], Any]]]:
    """Rows that go through the model's parts, under the keys of the record, and the context of a phase."""
    found, phase = Counter[str](), [""]

    def velocity(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(latents: Tensor, sigma: Tensor, conditioning: Any, guidance_scale: float = 1.0) -> Any:
            found[f"nfe_{'unguided' if guidance_scale == 1 else 'guided'}/{phase[0]}"] += len(latents)
            return own(latents, sigma, conditioning, guidance_scale)

        return call

    def rows(key: Callable[[], str]) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[key()] += len(kwargs.get("hidden_states", args[0] if args else ()))

        return hook

    @contextmanager
    def during(name: str) -> Iterator[None]:
        phase[0] = name
        yield

    model = iteration.model
    evaluated = [model]
    if iteration.lookahead is not None and isinstance(iteration.lookahead.model, SD3):
        evaluated += [iteration.lookahead.model] * (iteration.lookahead.model is not model)
    parts = [(each.transformer, lambda: f"nfe/{phase[0]}") for each in evaluated]
    parts += [(model.pipeline.vae.decoder, lambda: "decodes/full")]
    parts += [(model.preview_decoder.decoder, lambda: "decodes/preview")]  # type: ignore[union-attr]
    for each in evaluated:
        each.velocity = velocity(each.velocity)  # type: ignore[method-assign]
    hooks = [part.register_forward_pre_hook(rows(key), with_kwargs=True) for part, key in parts]
    yield found, during
    for hook in hooks:
        hook.remove()
    found["pictures_scored"] = iteration.tally.pictures


@pytest.mark.parametrize("monitor", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lookahead.decoder": "preview"},
        {"lookahead.decoder": "full", "lookahead.copy_dtype": "float32"},
        {**GUIDED, "lookahead.decoder": "preview", "lookahead.guidance": "cond_only"},
        {**GUIDED, **WINDOW, "lookahead.decoder": "preview", "sampler.shared_noise": "true"},
        {"credit.method": "sparse"},
        {**BRANCHES, "lookahead.decoder": "preview"},
        {**GUIDED, **BRANCHES, **WINDOW, "lookahead.decoder": "full", "lookahead.guidance": "cond_only"},
        {
            **BRANCHES,
            "credit.method": "granular",
            "lookahead.plan": "exact",
            "lookahead.nodes": "[]",
            "lookahead.monitor_every": 0,
        },
    ],
    ids=["trajectories", "copy", "cond_only", "window", "sparse", "branches", "branches of a window", "granular"],
)
def test_the_record_counts_what_went_through_the_model(
    tiny_policy: Policy, options: dict[str, object], monitor: bool
) -> None:
    iteration = Iteration(configured(**options), tiny_policy())  # type: ignore[arg-type]
    monitor = monitor and iteration.monitor.due(0)
    with counted(iteration) as (found, during):
        iteration.run(during, monitor=monitor)
    metrics = iteration.costs.metrics()
    said = {key: value for key, value in metrics.items() if not key.startswith("flops/") and value}
    assert said == dict(found)
    assert ("flops/monitor" in metrics) == monitor


@pytest.mark.parametrize(
    "options",
    [
        {**GUIDED, "lookahead.decoder": "preview"},
        {"lookahead.decoder": "full", "lookahead.cache": "reuse:1-2", "sampler.guidance_scale": 1.0},
        {**BRANCHES, "lookahead.decoder": "preview", "lookahead.copy_dtype": "float32"},
        {"lookahead.decoder": "preview", "model.gradient_checkpointing": "true"},
    ],
    ids=["trajectories", "cache", "branches", "checkpointing"],
)
def test_operations_are_those_of_a_real_iteration(tiny_policy: Policy, options: dict[str, object]) -> None:
    model = tiny_policy()
    assert isinstance(model, SD3)
    config = configured(**options)
    if config.model.gradient_checkpointing:
        model.checkpoint_gradients()
    iteration, phases = Iteration(config, model), PhaseTimer()
    # the counter knows nothing of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        iteration.run(phases, monitor=iteration.monitor.due(0) and config.lookahead.cache is None)
    metrics = iteration.costs.metrics()
    assert metrics["flops/iteration"] * GFLOP == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_over_sparse_by_hand(tiny_policy: Policy) -> None:
    """T = 5, 4 trained steps, nodes {2, 3} that 2 and 3 states meet at: 5 forwards more, 6 previews, an image the same.

    Then what a re-scoring adds is told apart, and told of in that iteration alone.
    """
    iteration = Iteration(configured(**{"lookahead.decoder": "preview"}), tiny_policy())  # type: ignore[arg-type]
    with counted(iteration) as (_, during):
        iteration.run(during)
    prices = iteration.costs.prices
    assert prices is not None
    unit = prices.unit
    sparse = 9 * unit.forward + 4 * unit.backward + unit.full_decode
    expected = sparse + 5 * unit.forward + 6 * unit.preview_decode
    metrics = iteration.costs.metrics()
    assert metrics["flops/iteration"] == pytest.approx(8 * expected / GFLOP)
    assert metrics["flops/over_sparse"] == pytest.approx(expected / sparse)
    iteration.costs.reset()
    with counted(iteration) as (_, during):
        iteration.run(during, monitor=True)
    # exact completions of 4 samples by 4 + 3 + 2 + 1 forwards, and 6 pictures of each
    monitor = 4 * (10 * unit.forward + 6 * unit.full_decode) / GFLOP
    checked = iteration.costs.metrics()
    assert checked["flops/monitor"] == pytest.approx(monitor) and "flops/monitor" not in metrics
    assert checked["flops/iteration"] == pytest.approx(metrics["flops/iteration"] + monitor)


def test_a_model_of_another_family_is_counted_without_operations(
    mixture_model: FlowModel, caplog: pytest.LogCaptureFixture
) -> None:
    costs = CostLog(configured(), mixture_model, None)
    sparse = sparse_iteration(5, trained_steps=4, guided=False, kl=False)
    costs.iteration(sparse, sparse, 8)
    with caplog.at_level(logging.WARNING):
        found = [costs.metrics(), costs.metrics()]
    assert (
        found[0] == found[1] and found[0]["nfe/rollout"] == 40 and not any(key.startswith("flops") for key in found[0])
    )
    (record,) = caplog.records
    assert "no flops/*: the operations of this MixtureModel cannot be counted" in record.getMessage()


def test_shares_of_samples_add_up_to_whole_numbers(mixture_model: FlowModel) -> None:
    """A trunk's 4 states belong to its three branches in thirds; two trunks have 8."""
    noisy = (True,) * 4 + (False,)
    cost = branched_iteration(plans.exact(5), branches=3, trained_steps=4, guided=False, kl=False, noisy=noisy)
    costs = CostLog(configured(), mixture_model, None)
    costs.iteration(cost, sparse_iteration(5, trained_steps=4, guided=False, kl=False), 6)
    found = costs.metrics()
    assert repr(found["nfe/rollout"]) == repr(found["nfe/update"]) == "8"
