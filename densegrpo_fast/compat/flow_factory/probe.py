"""Calls on which Flow-Factory's step is compared with ours before it is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._compare import Call
from densegrpo_fast.flow.schedule import dance_sigmas


class ProbeScheduler:
    """What the step asks of its scheduler, on a grid of four steps."""

    is_eval = False
    noise_level = 0.7
    dynamics_type = "Flow-SDE"

    def __init__(self) -> None:
        self.sigmas = dance_sigmas(4)
        self.timesteps = self.sigmas[:-1] * 1000
        self.current_sde_steps = torch.tensor([0, 2])

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """As diffusers' schedulers have it."""
        return int((self.timesteps == timestep).nonzero()[0])

    def get_noise_level_for_sigma(self, sigma: Tensor) -> Tensor:
        """As the host's newer versions have it."""
        steps = (sigma.reshape(-1, 1) == self.sigmas).int().argmax(1)
        return torch.where(torch.isin(steps, self.current_sde_steps), self.noise_level, 0.0)


def calls() -> list[Call]:
    """Each dynamics, scoring and sampling, at one step or one per row; with a step that is left to the schedule."""
    ramp = torch.linspace(-1, 1, 12).reshape(2, 3, 2)
    made: list[Call] = []

    def call(steps: list[int], latents: Tensor, next_given: bool, scored: bool, options: dict[str, Any]) -> Any:
        def run(step: Callable[..., Any]) -> Any:
            scheduler = ProbeScheduler()
            timestep = scheduler.timesteps[steps] if len(steps) > 1 else scheduler.timesteps[steps[0]]
            given = (0.3 * latents + 0.1) if scored else None
            if next_given:
                times = torch.cat([scheduler.timesteps, torch.zeros(1)])
                options["timestep_next"] = times[[index + 1 for index in steps]]
            return step(
                scheduler,
                ramp.cos()[: len(latents)],
                timestep,
                latents,
                next_latents=given,
                return_dict=False,
                **options,
            )

        return run

    for dynamics in ("Flow-SDE", "Dance-SDE", "CPS", "ODE"):
        options = {"dynamics_type": dynamics, "noise_level": 0.5}
        for scored in (True, False):
            words = f"{'scoring' if scored else 'sampling'} {dynamics}"
            # Earlier versions take the logarithm of Dance-SDE's deviation as a number, so of one row.
            rows = 1 if dynamics == "Dance-SDE" else 2
            made.append((f"{words} at one step", call([1], ramp[:rows].bfloat16(), False, scored, dict(options))))
            steps = [0, 3][:rows]
            made.append((f"{words} with timestep_next", call(steps, ramp[:rows], True, scored, dict(options))))
        made.append((f"{dynamics} unscored", call([0], ramp, False, False, {**options, "compute_log_prob": False})))
    inner = {"dynamics_type": "Flow-SDE", "noise_level": 0.5, "sigma_max": 0.9}
    made.append(("Flow-SDE with sigma_max", call([0], ramp, False, True, inner)))
    return made
