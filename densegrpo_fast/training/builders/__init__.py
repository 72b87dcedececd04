"""Builds the parts of a run from its configuration."""

from densegrpo_fast.training.builders.lookahead import (
    build_cache,
    build_copy,
    build_head,
    build_lookahead,
    build_plan,
    build_step_runner,
    read_head,
)
from densegrpo_fast.training.builders.model import (
    build_model,
    check_calibration,
    default_device,
    load_base,
    synchronizer,
)
from densegrpo_fast.training.builders.prompts import TrainingPrompts, build_held_out, build_prompts
from densegrpo_fast.training.builders.rewards import build_observer, build_reward
from densegrpo_fast.training.builders.settings import learner_options, shrink
from densegrpo_fast.training.builders.steps import (
    build_coefficients,
    build_step_weights,
    build_windows,
    noisy_steps,
    trained_steps,
)

__all__ = [
    "TrainingPrompts",
    "build_cache",
    "build_coefficients",
    "build_copy",
    "build_head",
    "build_held_out",
    "build_lookahead",
    "build_model",
    "build_observer",
    "build_plan",
    "build_prompts",
    "build_reward",
    "build_step_runner",
    "build_step_weights",
    "build_windows",
    "check_calibration",
    "default_device",
    "learner_options",
    "load_base",
    "noisy_steps",
    "read_head",
    "shrink",
    "synchronizer",
    "trained_steps",
]
