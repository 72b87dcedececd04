"""The host waits for the device in no step of a rollout, a lookahead or an update.

Rollout and lookahead run on the meta device, where a tensor has no values: any read of one by the host would raise. So
does here what sends the host's own numbers to the device, as that waits too. An update reads a few numbers at its end,
as many for one step as for many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import branch_rollout
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout, sample_ode
from densegrpo_fast.training.learner import Learner, LearnerOptions

pytestmark = pytest.mark.ci

T, B = 4, 6


@pytest.fixture
def model(tiny_policy: Callable[..., FlowModel]) -> FlowModel:
    policy = tiny_policy()
    for module in (policy.network, policy.pipeline.vae, policy.preview_decoder):
        module.to("meta")
    policy.device = torch.device("meta")
    return policy


@pytest.fixture
def conditioning(model: FlowModel) -> Conditioning:
    width, pooled = model.network.config.joint_attention_dim, model.network.config.pooled_projection_dim
    prompts, negative = (
        {
            "embeds": torch.empty(count, 5, width, device="meta"),
            "pooled": torch.empty(count, pooled, device="meta"),
        }
        for count in (2, 1)
    )
    return Conditioning(prompts, negative, torch.zeros(B, dtype=torch.int64, device="meta"))


@pytest.fixture
def nothing_sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a tensor of the host's numbers and an index that is a list of them raise."""
    indexed = Tensor.__getitem__

    def tensor(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("numbers are sent to the device")

    def item(self: Tensor, index: Any) -> Tensor:
        if any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,))):
            raise AssertionError("an index is sent to the device")
        return indexed(self, index)

    def refuse() -> None:
        monkeypatch.setattr(torch, "tensor", tensor)
        monkeypatch.setattr(Tensor, "__getitem__", item)

    return refuse


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("family", ["flow_sde", "cps"])
def test_nothing_is_read_back(
    model: FlowModel, conditioning: Conditioning, nothing_sent: Callable[[], None], family: str, guidance_scale: float
) -> None:
    index = torch.arange(B, device="meta")
    noise = initial_noise(model, index, seed=0, iteration=0)
    table = coefficients(model.sigmas(T), [0.7, 0.7, 0.0, 0.7], family).to(torch.device("meta"))
    cache = FeatureCache(model.network, nodes=(2,), rows=B, halves=model.forwards(guidance_scale))
    grid = model.sigmas(T)
    nothing_sent()
    trajectory = rollout(
        model,
        noise,
        conditioning,
        table,
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=guidance_scale,
        micro_batch=3,
        keep_guidance=True,
        cache=cache,
    )
    assert Lookahead(model, plans.nodes(T, [2]), chunk=4, cache=cache).complete(trajectory).device.type == "meta"
    for guidance in ("full", "cond_only", "reuse"):
        lookahead = Lookahead(model, plans.nodes(T, [2]), guidance=guidance, chunk=4)
        clean = lookahead.complete(trajectory)
        assert clean.device.type == "meta" and clean.shape == (T + 1, B, *model.latent_shape)
        shared = lookahead.complete(replace(trajectory, shared=3))
        assert shared.device.type == "meta" and shared.shape == clean.shape
        for decoder in ("full", "preview"):
            assert lookahead.images(trajectory, clean, decoder).shape == (T + 1, B, 3, 64, 64)
    assert sample_ode(model, noise, conditioning, grid).shape == noise.shape


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_nothing_of_branches_is_read_back(
    model: FlowModel, conditioning: Conditioning, nothing_sent: Callable[[], None], guidance_scale: float
) -> None:
    """Two trajectories with three branches each at the steps 0, 2 and 3, the last of which leads to the image."""
    index = torch.arange(0, B, 3, device="meta")
    noise = initial_noise(model, index, seed=0, iteration=0)
    table = coefficients(model.sigmas(T), [0.7, 0.0, 0.7, 0.7], "flow_sde").to(torch.device("meta"))
    counters = {"sample_index": index, "seed": 0, "iteration": 0}
    nothing_sent()
    branched = branch_rollout(
        model, noise, conditioning, table, branches=3, **counters, guidance_scale=guidance_scale, micro_batch=1
    )
    ways = [Lookahead(model, plans.exact(T), guidance=guidance, chunk=4) for guidance in ("full", "cond_only")]
    for lookahead in (*ways, Lookahead(model, plans.nodes(T, [2]), chunk=4)):
        for each in (branched, branched.evaluated(lookahead), branched.select(slice(0, 2))):
            clean = lookahead.complete(each)
            assert clean.device.type == "meta" and clean.shape == (3, B, *model.latent_shape)


def test_a_read_would_be_noticed(nothing_sent: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()
    nothing_sent()
    with pytest.raises(AssertionError, match="numbers are sent"):
        torch.tensor([1.0], device="meta")
    with pytest.raises(AssertionError, match="an index is sent"):
        torch.ones(2, device="meta")[[0]]


class Reads(TorchDispatchMode):
    """Counts the operations by which the host learns a tensor's values."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "kl_coef"), [("clip", 0.0), ("clip", 0.1), ("guard", 0.1), ("dppo", 0.1)])
def test_an_update_reads_as_much_for_one_step_as_for_many(
    tiny_policy: Callable[..., FlowModel], learner_options: Callable[..., LearnerOptions], policy: str, kl_coef: float
) -> None:
    model, index, prompts = tiny_policy(spread=0.1), torch.arange(4), ["a cat"] * 2 + ["the moon"] * 2
    trajectory = rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(prompts),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=3.0,
        micro_batch=2,
    )
    own = {"clip_range": 1e-3, "guard_weight": "paper", "dppo_threshold": 1e-5, "max_grad_norm": 1.0}
    options = learner_options(policy=policy, kl_coef=kl_coef, micro_batch=2, **own)
    counts = []
    for steps in ([0], [0, 1, 2]):
        learner = Learner(model, options)
        with Reads() as reads:
            learner.update(trajectory, torch.randn(4, T), steps)
        counts.append(reads.found)
    assert counts[0] == counts[1] and counts[0].total() > 0
