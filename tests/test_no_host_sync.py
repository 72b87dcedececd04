"""Rollout and lookahead on the meta device, where a tensor has no values: any read of one by the host would raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout, sample_ode

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
    shapes = [(2, 5, width), (2, pooled), (1, 5, width), (1, pooled)]
    return Conditioning(
        *(torch.empty(shape, device="meta") for shape in shapes), torch.zeros(B, dtype=torch.int64, device="meta")
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("family", ["flow_sde", "cps"])
def test_nothing_is_read_back(model: FlowModel, conditioning: Conditioning, family: str, guidance_scale: float) -> None:
    index = torch.arange(B, device="meta")
    noise = initial_noise(model, index, seed=0, epoch=0)
    table = coefficients(model.sigmas(T), [0.7, 0.7, 0.0, 0.7], family).to(torch.device("meta"))
    trajectory = rollout(
        model,
        noise,
        conditioning,
        table,
        sample_index=index,
        seed=0,
        epoch=0,
        guidance_scale=guidance_scale,
        micro_batch=3,
        keep_guidance=True,
        keep_hidden=True,
    )
    for guidance in ("full", "cond_only", "reuse"):
        lookahead = Lookahead(model, plans.nodes(T, [2]), guidance=guidance, chunk=4)
        clean = lookahead.complete(trajectory)
        assert clean.device.type == "meta" and clean.shape == (T + 1, B, *model.latent_shape)
        for decoder in ("full", "preview"):
            assert lookahead.images(clean, trajectory.coefficients.noisy, decoder).shape == (T + 1, B, 3, 64, 64)
    assert sample_ode(model, noise, conditioning, model.sigmas(T)).shape == noise.shape


def test_a_read_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()
