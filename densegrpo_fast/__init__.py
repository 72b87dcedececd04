"""GRPO for flow-matching image models with a reward for every denoising step: DenseGRPO and its relatives.

Shapes are written with these letters, in docstrings and as suffixes of names:

    P prompts   G images per prompt (group)   T denoising steps   B = P*G rows of a batch
    C, H, W     channels, height, width of latents or images      N, D tokens and their width

Importing this package imports nothing heavy: the public names below are resolved on first use. docs/library.md shows
what they are for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densegrpo_fast.common.errors import UserError as UserError
    from densegrpo_fast.compat.dense_rewards import dense_rewards as dense_rewards
    from densegrpo_fast.config import Config as Config
    from densegrpo_fast.config.cli import load_config as load_config
    from densegrpo_fast.credit.dense import reward_gains as reward_gains
    from densegrpo_fast.credit.inputs import CreditInputs as CreditInputs
    from densegrpo_fast.credit.normalize import Advantages as Advantages
    from densegrpo_fast.credit.normalize import normalize_groups as normalize_groups
    from densegrpo_fast.credit.registry import CreditMethod as CreditMethod
    from densegrpo_fast.credit.registry import advantages_of as advantages  # noqa: F401
    from densegrpo_fast.credit.registry import register as register_credit  # noqa: F401
    from densegrpo_fast.flow.analytic import GaussianMixtureFlow as GaussianMixtureFlow
    from densegrpo_fast.flow.dynamics import StepCoefficients as StepCoefficients
    from densegrpo_fast.flow.dynamics import coefficients as coefficients
    from densegrpo_fast.flow.noise import Stream as Stream
    from densegrpo_fast.flow.noise import gaussian as gaussian
    from densegrpo_fast.flow.ops import euler_jump as euler_jump
    from densegrpo_fast.flow.ops import grpo_loss as grpo_loss
    from densegrpo_fast.flow.ops import sde_log_prob as sde_log_prob
    from densegrpo_fast.flow.ops import sde_log_prob_kl as sde_log_prob_kl
    from densegrpo_fast.flow.ops import sde_step as sde_step
    from densegrpo_fast.flow.ops import sde_step_outputs as sde_step_outputs
    from densegrpo_fast.flow.schedule import dance_sigmas as dance_sigmas
    from densegrpo_fast.flow.schedule import flux_sigmas as flux_sigmas
    from densegrpo_fast.flow.schedule import sd3_sigmas as sd3_sigmas
    from densegrpo_fast.flow.schedule import timesteps as timesteps
    from densegrpo_fast.models.base import Conditioning as Conditioning
    from densegrpo_fast.models.base import FlowModel as FlowModel
    from densegrpo_fast.models.base import Velocity as Velocity
    from densegrpo_fast.rewards.base import Reward as Reward
    from densegrpo_fast.rewards.base import RewardMixture as RewardMixture
    from densegrpo_fast.rewards.registry import create as create_reward  # noqa: F401
    from densegrpo_fast.rewards.registry import register as register_reward  # noqa: F401
    from densegrpo_fast.sampling.lookahead import Lookahead as Lookahead
    from densegrpo_fast.sampling.plan import Plan as Plan
    from densegrpo_fast.sampling.plan import make_plan as make_plan
    from densegrpo_fast.sampling.rollout import Rollout as Rollout
    from densegrpo_fast.sampling.rollout import Trajectory as Trajectory
    from densegrpo_fast.sampling.rollout import rollout as rollout
    from densegrpo_fast.training.callbacks import Callback as Callback
    from densegrpo_fast.training.run import RunResult as RunResult
    from densegrpo_fast.training.trainer import Trainer as Trainer

# OpenMP threads that spin while they wait starve every other process on shared cores. The setting is only
# read when the runtime starts, so it has to be in place before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "common.errors",
    "dense_rewards": "compat.dense_rewards",
    "Config": "config",
    "load_config": "config.cli",
    "reward_gains": "credit.dense",
    "advantages": "credit.registry:advantages_of",
    "CreditInputs": "credit.inputs",
    "Advantages": "credit.normalize",
    "normalize_groups": "credit.normalize",
    "CreditMethod": "credit.registry",
    "register_credit": "credit.registry:register",
    "GaussianMixtureFlow": "flow.analytic",
    "StepCoefficients": "flow.dynamics",
    "coefficients": "flow.dynamics",
    "Stream": "flow.noise",
    "gaussian": "flow.noise",
    "euler_jump": "flow.ops",
    "grpo_loss": "flow.ops",
    "sde_log_prob": "flow.ops",
    "sde_log_prob_kl": "flow.ops",
    "sde_step": "flow.ops",
    "sde_step_outputs": "flow.ops",
    "dance_sigmas": "flow.schedule",
    "flux_sigmas": "flow.schedule",
    "sd3_sigmas": "flow.schedule",
    "timesteps": "flow.schedule",
    "Conditioning": "models.base",
    "FlowModel": "models.base",
    "Velocity": "models.base",
    "Reward": "rewards.base",
    "RewardMixture": "rewards.base",
    "create_reward": "rewards.registry:create",
    "register_reward": "rewards.registry:register",
    "Lookahead": "sampling.lookahead",
    "Plan": "sampling.plan",
    "make_plan": "sampling.plan",
    "Rollout": "sampling.rollout",
    "Trajectory": "sampling.rollout",
    "rollout": "sampling.rollout",
    "Callback": "training.callbacks",
    "RunResult": "training.run",
    "Trainer": "training.trainer",
}
"""Public name -> where it is, `module` or `module:name`; the imports above tell type checkers the same."""

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _PUBLIC[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), own or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
