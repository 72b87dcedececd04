"""GRPO for flow-matching image models with a reward for every denoising step: DenseGRPO and its relatives.

Shapes are written with these letters, in docstrings and as suffixes of names:

    P prompts   G images per prompt (group)   T denoising steps   B = P*G rows of a batch
    C, H, W     channels, height, width of latents or images      N, D tokens and their width

Importing this package imports nothing heavy: the public names below are resolved on first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# OpenMP threads that spin while they wait starve every other process on shared cores. The setting is only
# read when the runtime starts, so it has to be in place before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_PUBLIC = {
    "Trainer": "training.trainer",
    "load_config": "config.cli",
    "Lookahead": "sampling.lookahead",
    "Rollout": "sampling.rollout",
    "FlowModel": "models.base",
    "sde_step": "flow.ops",
    "sde_step_outputs": "flow.ops",
    "sde_log_prob": "flow.ops",
    "sde_log_prob_kl": "flow.ops",
    "euler_jump": "flow.ops",
    "grpo_loss": "flow.ops",
    "coefficients": "flow.dynamics",
    "StepCoefficients": "flow.dynamics",
    "gaussian": "flow.noise",
    "Stream": "flow.noise",
    "sd3_sigmas": "flow.schedule",
    "flux_sigmas": "flow.schedule",
    "dance_sigmas": "flow.schedule",
    "timesteps": "flow.schedule",
    "GaussianMixtureFlow": "flow.analytic",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
