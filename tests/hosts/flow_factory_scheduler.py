"""A miniature of Flow-Factory's scheduler, restated from its formulas; the constants stand for its versions."""

import math
from dataclasses import dataclass

import torch

ROUND_TRIP = True
DANCE_STD_INJECTED = False


@dataclass
class SDESchedulerOutput:
    next_latents: torch.Tensor = None
    next_latents_mean: torch.Tensor = None
    std_dev_t: torch.Tensor = None
    dt: torch.Tensor = None
    log_prob: torch.Tensor = None
    noise_pred: torch.Tensor = None

    @classmethod
    def from_dict(cls, data):
        return cls(**data)


def column(value, like):
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1)
    return value.expand(len(like)).reshape(-1, *[1] * (like.ndim - 1))


class FlowMatchEulerDiscreteSDEScheduler:
    def __init__(self, sigmas, noise_level=0.7, sde_steps=(0, 1), dynamics_type="Flow-SDE"):
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000
        self.noise_level, self.dynamics_type, self.is_eval = noise_level, dynamics_type, False
        self.current_sde_steps = torch.tensor(sde_steps)

    def index_for_timestep(self, timestep):
        found = (self.timesteps == timestep).nonzero()
        return found[min(1, len(found) - 1)].item()

    def get_noise_level_for_sigma(self, sigma):
        steps = [(self.sigmas == s).nonzero()[0].item() for s in sigma.reshape(-1)]
        return torch.tensor([self.noise_level if step in self.current_sde_steps else 0.0 for step in steps])

    def step(
        self,
        noise_pred,
        timestep,
        latents,
        next_latents=None,
        timestep_next=None,
        generator=None,
        noise_level=None,
        compute_log_prob=True,
        return_dict=True,
        return_kwargs=("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"),
        dynamics_type=None,
        sigma_max=None,
    ):
        if timestep_next is None:
            steps = [timestep] if isinstance(timestep, int) else [
                self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)
            ]  # fmt: skip
            here, there = self.sigmas[steps], self.sigmas[[step + 1 for step in steps]]
        else:
            here, there = timestep / 1000, timestep_next / 1000
        stored = latents.dtype
        wide = torch.promote_types(stored, torch.float32)
        v, x = noise_pred.to(wide), latents.to(wide)
        kind = dynamics_type or self.dynamics_type
        if self.is_eval or kind == "ODE":
            noise_level = 0.0
        elif noise_level is None:
            noise_level = self.get_noise_level_for_sigma(here)
        a, here, there = (column(value, x) for value in (noise_level, here, there))
        dt = there - here
        clean = x - here * v
        if kind == "ODE":
            mean, std, injected = x + v * dt, torch.zeros_like(dt), None
        elif kind == "CPS":
            std = injected = there * torch.sin(a * math.pi / 2)
            mean = clean * (1 - there) + (x + v * (1 - here)) * (there**2 - std**2).sqrt()
        else:
            std = a
            if kind == "Flow-SDE":
                first = torch.as_tensor(sigma_max or self.sigmas[1], dtype=wide, device=x.device)
                inner = torch.where(here == 1, first, here)
                std = a * (here / (1 - inner)).sqrt()
            injected = std * (-dt).sqrt()
            mean = x + dt * v + 0.5 * std**2 * dt * (x - (1 - here) * clean) / here**2
        if next_latents is not None:
            next_latents = next_latents.to(wide)
        elif kind == "ODE":
            next_latents = mean
        else:
            next_latents = mean + injected * torch.randn(v.shape, dtype=wide, device=v.device, generator=generator)
            if ROUND_TRIP:
                next_latents = next_latents.to(stored).to(wide)
        log_prob = None
        if compute_log_prob:
            density = torch.zeros_like(x)
            if kind == "CPS":
                density = -((next_latents.detach() - mean) ** 2)
            elif kind != "ODE":
                density = -((next_latents.detach() - mean) ** 2) / (2 * injected**2) - injected.log()
                density = density - 0.5 * math.log(2 * math.pi)
            log_prob = density.flatten(1).mean(1)
        if kind == "Dance-SDE" and DANCE_STD_INJECTED:
            std = injected
        if not return_dict:
            return next_latents, mean, v, log_prob, std, dt
        found = dict(
            next_latents=next_latents, next_latents_mean=mean, std_dev_t=std, dt=dt, log_prob=log_prob, noise_pred=v
        )
        return SDESchedulerOutput.from_dict({name: found[name] for name in return_kwargs})
