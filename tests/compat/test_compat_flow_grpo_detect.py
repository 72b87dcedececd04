"""Telling a host's signature generation, and refusing what only looks like one."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat import flow_grpo
from densegrpo_fast.compat.flow_grpo.step import detect_version, step_replacement
from densegrpo_fast.compat.hosts import SIGNATURES
from densegrpo_fast.compat.patch import CompatError
from densegrpo_fast.flow.schedule import sd3_sigmas


class Scheduler:
    def __init__(self) -> None:
        self.sigmas = sd3_sigmas(10)
        self.timesteps = 1000 * self.sigmas[:-1]

    def index_for_timestep(self, timestep: Tensor) -> int:
        return self.timesteps.tolist().index(timestep.item())


def formula(
    kind: str,
    scheduler: Any,
    timestep: Tensor,
    v: Tensor,
    x: Tensor,
    level: float,
    prev: Any,
    generator: Any,
    euler: bool,
) -> tuple[Tensor, ...]:
    """prev, log_prob, mean, std_dev, std of the injected noise, sqrt(-dt), as a host computes them."""
    steps = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    sigmas, column = scheduler.sigmas, (-1, *[1] * (x.ndim - 1))
    here, there = sigmas[steps].reshape(column), sigmas[steps + 1].reshape(column)
    gap = here - there
    if kind == "cps":
        std = injected = math.sin(level * math.pi / 2) * there
        mean = (1 - there) * (x - here * v) + (there**2 - std**2).sqrt() * (x + (1 - here) * v)
    else:
        odds = (here / (1 - torch.where(here == 1, sigmas[1], here))).sqrt()
        std = level * odds if kind == "sde" else sigmas[-1] + (sigmas[1] - sigmas[-1]) * here
        mean, injected = x - gap * v - std**2 * gap * (x + (1 - here) * v) / (2 * here), std * gap.sqrt()
    if prev is None:
        prev = mean + injected * torch.randn(v.shape, generator=generator)
    prev = x - gap * v if euler else prev
    density = torch.distributions.Normal(mean, injected, validate_args=False).log_prob(prev)
    density = -((prev - mean) ** 2) if kind == "cps" else density
    return prev, density.flatten(1).mean(1), mean, std, injected, gap.sqrt()


def host_step(version: str, kind: str | None = None, level: float | None = None, scale: float = 1.0):
    """A host's function of some generation, from the formulas above; optionally with something changed."""

    def run(scheduler, velocity, timestep, sample, kind, level, prev, generator, euler=False):
        found = formula(kind, scheduler, timestep, velocity, sample, level, prev, generator, euler)
        return found[0], found[1], scale * found[2], *found[3:]

    if version == "V1" and level is not None:

        def v1_short(self, model_output, timestep, sample, prev_sample=None, generator=None, determistic=False):
            given = (prev_sample, generator, determistic)
            done = run(self, model_output, timestep, sample, "sde", level, *given)
            return *done[:3], done[4]

        return v1_short
    if version == "V1":

        def v1(
            self, model_output, timestep, sample, prev_sample=None, generator=None, determistic=False, noise_level=0.7
        ):
            given = (prev_sample, generator, determistic)
            done = run(self, model_output, timestep, sample, "sde", noise_level, *given)
            return *done[:3], done[4]

        return v1
    if version == "V2":

        def v2(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
            given = (noise_level, prev_sample, generator)
            return run(self, model_output, timestep, sample, kind or "sde", *given)[:4]

        return v2
    if version == "V3":

        def v3(
            self,
            model_output,
            timestep,
            sample,
            noise_level=level or 0.7,
            prev_sample=None,
            generator=None,
            sde_type=kind or "sde",
        ):
            return run(self, model_output, timestep, sample, sde_type, noise_level, prev_sample, generator)[:4]

        return v3
    if version == "V3g":

        def v3g(
            self,
            model_output,
            timestep,
            sample,
            noise_level=0.7,
            prev_sample=None,
            generator=None,
            sde_type="sde",
            return_sqrt_dt=False,
        ):
            done = run(self, model_output, timestep, sample, sde_type, noise_level, prev_sample, generator)
            return (*done[:4], done[5]) if return_sqrt_dt else done[:4]

        return v3g

    def wan(
        self,
        model_output,
        timestep,
        sample,
        prev_sample=None,
        generator=None,
        determistic=False,
        return_pixel_log_prob=False,
        return_dt_and_std_dev_t=False,
    ):
        done = run(self, model_output, timestep, sample, "wan", 1.0, prev_sample, generator, determistic)
        return (*done[:4], done[5]) if return_dt_and_std_dev_t else (*done[:3], done[4])

    return wan


@pytest.mark.parametrize("version", flow_grpo.VERSIONS)
def test_a_generation_is_recognised_and_equalled(version: str) -> None:
    host = host_step(version)
    assert detect_version(host) == version
    state = torch.get_rng_state()
    replacement, note = step_replacement(host)
    assert torch.equal(torch.get_rng_state(), state)
    assert note.startswith(version)
    theirs, ours = (list(inspect.signature(step).parameters.values()) for step in (host, replacement))
    assert [(p.name, p.default, p.kind) for p in theirs] == [(p.name, p.default, p.kind) for p in ours]
    assert step_replacement(host, version=version)[1] == note


def test_what_a_signature_does_not_tell_is_found_by_running_it() -> None:
    scheduler = Scheduler()
    x, v, prev = torch.randn(3, 2, 4, 4, 4)
    arguments = (scheduler, v, scheduler.timesteps[[2, 5]], x)
    for host, says in [
        (host_step("V2", kind="cps"), "V2, sde_type cps"),
        (host_step("V1", level=0.9), "V1, noise_level 0.9"),
        (host_step("V3", kind="cps", level=0.4), "V3"),
    ]:
        replacement, note = step_replacement(host)
        assert note.startswith(says)
        for found, expected in zip(
            replacement(*arguments, prev_sample=prev), host(*arguments, prev_sample=prev), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_host_that_computes_something_else_is_refused() -> None:
    with pytest.raises(CompatError, match="scoring with its defaults value 3 differs by 0.0"):
        step_replacement(host_step("V3", scale=1.01))
    with pytest.raises(CompatError, match="version V2 was asked for, .* has the parameters of V3"):
        step_replacement(host_step("V3"), version="V2")

    def strange(self, model_output, timestep, sample, eta): ...

    with pytest.raises(CompatError, match=r"takes \(self, model_output, timestep, sample, eta\), which is no known"):
        detect_version(strange)

    def broken(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
        raise RuntimeError("no")

    with pytest.raises(CompatError, match="it raised RuntimeError"):
        step_replacement(broken)
    assert {key.split()[0] for key in SIGNATURES["sde_step_with_logprob"]} == set(flow_grpo.VERSIONS)
