"""What a script's penalty, (mean difference)^2 / (2 fourth value^2), is in each generation: beta keeps its meaning."""

from __future__ import annotations

import pytest
import torch

from densegrpo_fast.compat.flow_grpo import step_function

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize("version", ["V1", "V2", "V3", "V3g", "Wan", "cps"])
def test_the_fourth_value_decides_what_beta_means(version: str, step: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    function = step_function("V3g" if version == "cps" else version, sde_type="cps" if version == "cps" else "sde")
    x, policy, reference = torch.randn(3, 2, 4, 8, 8)
    t = scheduler.timesteps[step : step + 1]
    means = []
    for velocity in (policy, reference):
        prev, _, mean, fourth, *_ = function(scheduler, velocity, t, x)
        means.append(mean.double())
    penalty = (means[0] - means[1]).square().mean(dim=(1, 2, 3)) / (2 * fourth.double().square().squeeze())
    # The standard deviation of the injected noise, by formula; that of the 512 drawn numbers is within some 3% of it.
    sigma, following = (scheduler.sigmas[step + place].double() for place in (0, 1))
    gap = sigma - following
    if version == "Wan":
        injected = (scheduler.sigmas[-1] + (scheduler.sigmas[1] - scheduler.sigmas[-1]) * sigma) * gap.sqrt()
    elif version == "cps":
        injected = following * torch.sin(torch.tensor(0.7 * torch.pi / 2, dtype=torch.float64))
    else:
        inner = scheduler.sigmas[1].double() if sigma == 1 else sigma
        injected = 0.7 * (sigma / (1 - inner)).sqrt() * gap.sqrt()
    assert ((prev - mean).std() / injected).item() == pytest.approx(1, abs=0.15)
    kl = (means[0] - means[1]).square().mean(dim=(1, 2, 3)) / (2 * injected**2)
    scale = gap if version in ("V2", "V3", "V3g") else 1.0
    torch.testing.assert_close(penalty, scale * kl, rtol=1e-5, atol=0)
