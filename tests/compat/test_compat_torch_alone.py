"""Every adapter is imported, and its step taken, where nothing but torch is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from importlib.machinery import PathFinder
from types import SimpleNamespace

ABSENT = {"accelerate", "diffusers", "huggingface_hub", "matplotlib", "numpy", "peft", "PIL", "pydantic"}
ABSENT |= {"safetensors", "scipy", "tqdm", "transformers", "yaml"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in ABSENT else find(name, *more)

import torch
from densegrpo_fast.compat import dance_grpo, dense_rewards, flow_factory, flow_grpo, mix_grpo, turning_point

sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
grid = SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000, is_eval=False, dynamics_type="CPS", noise_level=0.7)


class Scheduler:
    def __init__(self):
        vars(self).update(vars(grid))


x, v = torch.randn(2, 2, 4, 4, 4)
taken = [
    flow_grpo.sde_step_with_logprob(Scheduler(), v, grid.timesteps[1:2], x),
    dance_grpo.flux_step(v, x, 0.3, sigmas, 1, None, True, True),
    mix_grpo.flow_grpo_step(v, x, 0.7, sigmas, 1, None),
    flow_factory.step(Scheduler(), v, grid.timesteps[1], x, noise_level=0.7, return_dict=False),
]
assert all(result[0].shape == x.shape and result[0].isfinite().all() for result in taken)
assert turning_point.pipeline_ode_sampling and dense_rewards.dense_rewards
print("all taken")
"""


def test_steps_are_taken_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "all taken\n"), done.stderr
