"""Calls on which MixGRPO's functions are compared with ours before they are replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._compare import Call
from densegrpo_fast.compat.mix_grpo.dpm import DPMState
from densegrpo_fast.flow.schedule import dance_sigmas

SOLVER = {"dpm_algorithm_type": "dpmsolver++", "dpm_solver_order": 2, "dpm_solver_type": "midpoint"}


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    """State, velocity and a next state."""
    ramp = torch.linspace(-1, 1, 12).reshape(2, 3, 2)
    return ramp, ramp.cos(), 0.3 * ramp + 0.1


def _formulas(version: str) -> list[dict[str, Any]]:
    """Options of a version's steps: none, and those of V2."""
    if version == "V1":
        return [{}]
    return [{}, {"noise_level": 0.5}, {"sde_type": "cps"}, {"sde_type": "cps", "noise_level": 0.5}]


def flow_calls(version: str) -> list[Call]:
    """Of `flow_grpo_step`."""
    grid = dance_sigmas(4)

    def call(index: int, scored: bool, options: dict[str, Any]) -> Callable[..., Any]:
        state, velocity, given = _tensors()
        velocity = velocity.bfloat16() if index == 2 else velocity
        return lambda step: step(velocity, state, 0.7, grid, index, given if scored else None, **options)

    calls: list[Call] = []
    for options in _formulas(version):
        for index in (0, 2):
            calls.append((f"scoring step {index} with {options}", call(index, True, options)))
            calls.append((f"sampling step {index} with {options}", call(index, False, options)))
        calls.append((f"a deterministic step with {options}", call(1, False, {"determistic": True, **options})))
    return calls


def dance_calls(version: str) -> list[Call]:
    """Of `dance_grpo_step`."""
    grid = dance_sigmas(4)

    def call(index: int, scored: bool, grpo: bool, noisy: bool, options: dict[str, Any]) -> Callable[..., Any]:
        state, velocity, given = _tensors()
        velocity = velocity.bfloat16() if index == 2 else velocity
        given_or_none = given if scored else None
        return lambda step: step(velocity, state, 0.3, grid, index, given_or_none, grpo, noisy, **options)

    calls: list[Call] = []
    for options in _formulas(version):
        for noisy in (True, False):
            for index in (0, 2):
                words = f"step {index}, sde_solver {noisy}, with {options}"
                calls.append((f"scoring {words}", call(index, True, True, noisy, options)))
                calls.append((f"sampling {words}", call(index, False, True, noisy, options)))
            calls.append((f"without grpo, sde_solver {noisy}", call(1, False, False, noisy, options)))
    return calls


def dpm_calls(version: str) -> list[Call]:
    """Of `dpm_step`; it does not depend on the version."""
    grid = dance_sigmas(5)

    def call(index: int, noisy: bool, order: int, kind: str, remembers: bool) -> Callable[..., Any]:
        state, velocity, before = _tensors()
        args = SimpleNamespace(**{**SOLVER, "dpm_solver_order": order, "dpm_solver_type": kind})

        def made(step: Callable[..., Any]) -> Any:
            memory = DPMState(order) if remembers else None
            if memory is not None and index > 0:
                memory.update(before)
                memory.update_lower_order()
            generator = torch.Generator().manual_seed(1)
            options = {"dpm_state": memory, "generator": generator, "sde_solver": noisy}
            return step(args, velocity, state, index, grid[:-1], sigmas=grid, **options)

        return made

    return [
        (f"step {index} of order {order} ({kind}), sde_solver {noisy}", call(index, noisy, order, kind, remembers))
        for index in (0, 2, 4)
        for noisy in (False, True)
        for order, kind, remembers in (
            (1, "midpoint", True),
            (2, "midpoint", True),
            (2, "heun", True),
            (2, "heun", False),
        )
    ]


class _Transformer:
    """Stands for FLUX: a velocity that depends on state and time."""

    def eval(self) -> _Transformer:
        return self

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **other: Any) -> tuple[Tensor]:
        return (hidden_states.float().sin() + timestep[:, None, None],)


def sampling_calls(version: str) -> list[Call]:
    """Of `run_sample_step`."""
    steps, shift = 6, 3.0
    grid = dance_sigmas(steps, shift)

    def call(settings: dict[str, Any]) -> Callable[..., Any]:
        state, *_ = _tensors()
        common = {"eta": 0.4, "shift": shift, "drop_last_sample": False, "dpm_post_compress_ratio": 0.6}
        args = SimpleNamespace(**common, **SOLVER, sample_strategy="progressive")
        vars(args).update(settings)
        embeddings, ids = torch.zeros(2, 4, 3), torch.zeros(2, 3)
        flags = [True, False, False, True, True, True]
        return lambda run: run(
            args, state, range(steps), grid, _Transformer(), embeddings, ids, ids, ids, True, determistic=flags
        )

    calls: list[Call] = []
    for flow in (True, False):
        words = "flow_grpo_step" if flow else "dance_grpo_step"
        off = {"flow_grpo_sampling": flow, "dpm_algorithm_type": "null"}
        # A V1 host knows no sde_type and does not look at it.
        calls.append((f"a trajectory of {words}", call({**off, "sde_type": "cps", "noise_level": 0.6})))
        calls.append((f"a trajectory of {words} to data", call({**off, "drop_last_sample": True})))
        solver = {"flow_grpo_sampling": flow, "dpm_apply_strategy": "post"}
        calls.append((f"{words} with a solver after the window", call(solver)))
    calls.append(("a solver for all steps", call({"flow_grpo_sampling": True, "dpm_apply_strategy": "all"})))
    return calls


CALLS: Mapping[str, Callable[[str], list[Call]]] = {
    "flow_grpo_step": flow_calls,
    "dance_grpo_step": dance_calls,
    "dpm_step": dpm_calls,
    "run_sample_step": sampling_calls,
}
