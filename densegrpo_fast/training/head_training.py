"""What a completion head learns from exact completions, and how it is fitted to them, at first and during a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from densegrpo_fast.common.errors import CheckpointError
from densegrpo_fast.models.base import Head
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.meter import underlying

BATCH = 128
"""Most rows of an optimiser step."""
_REFRESH_LR = 1e-4
"""Low, as a refresh goes over few examples many times."""
_MEMORY_ROWS, _MEMORY_BYTES = 512, 2**28
"""Most that a run's head remembers: each checkpoint holds it."""


@dataclass(frozen=True)
class Examples:
    """What the head sees and what it should say, N rows; all on the CPU.

    Attributes:
        hidden: [N, tokens, D] in the network's dtype or half precision.
        latents, estimate, target: [N, C, H, W] float32; target = exact completion - estimate.
        state: [N] int64.
    """

    hidden: Tensor
    latents: Tensor
    estimate: Tensor
    target: Tensor
    state: Tensor

    def __len__(self) -> int:
        return len(self.state)

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The rows of all parts."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def rows(self, index: Tensor | slice) -> Examples:
        """Some of the rows."""
        return Examples(*(tensor[index] for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def row_bytes(self) -> int:
        """Memory of one row."""
        return sum(tensor[:1].nbytes for tensor in self.tensors().values())


def exactly_completed(exact: Lookahead, lookahead: Lookahead, rollout: Rollout) -> tuple[Rollout, Tensor]:
    """The rollout as a lookahead completes it, and the exact completions [J, B, ...] of its states.

    Branches are evaluated once, unless the lookahead evaluates another model than the exact one.
    """
    evaluated = rollout.evaluated(lookahead)
    alike = underlying(exact.model) is underlying(lookahead.model)
    return evaluated, exact.complete(evaluated if alike else rollout.evaluated(exact))


@torch.no_grad()
def examples_of(lookahead: Lookahead, head: Head, rollout: Rollout, ends: Tensor, first: int = 0) -> list[Examples]:
    """Examples of each state that the head applies to, samples that share a completion once.

    Args:
        lookahead: brings the states to their last evaluation.
        head: that shall learn.
        rollout: its B samples are completed by the lookahead, with their hidden tokens.
        ends: [J, B, ...] their exact completions.
        first: as in `Lookahead.evaluate`.
    """
    sigmas, dedup, examples = rollout.coefficients.sigmas, lookahead.dedup(rollout), []
    for state, last in lookahead.evaluate(rollout, first).items():
        if not head.applies(state):
            continue
        assert last.hidden is not None
        estimate, hidden = last.latents - sigmas[last.index] * last.velocity, last.hidden
        exact = ends[rollout.completed.index(state)]
        examples.append(
            Examples(
                hidden.half().cpu() if hidden.dtype.itemsize == 4 else hidden.cpu(),
                last.latents.cpu(),
                estimate.cpu(),
                (dedup.rows(state, exact) - estimate).cpu(),
                torch.full((len(estimate),), state),
            )
        )
    return examples


def train_head(head: CompletionHead, examples: Examples, steps: int, seed: int) -> None:
    """Fit the head in place, every state's errors in units of their errors size."""
    for state in range(head.config.num_steps):
        errors = examples.target[examples.state == state]
        if len(errors):
            head.scale[state] = errors.square().mean().sqrt().clamp(min=1e-6).to(head.scale.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(head, 1e-3)
    head.train()
    for step in tqdm(range(steps), desc="head", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        _step(head, optimizer, examples, torch.randint(len(examples), (BATCH,), generator=generator))
    head.eval()


def explained(head: CompletionHead, examples: Examples) -> dict[int, tuple[int, float]]:
    """Per state: how many examples, and 1 - (squared error with the head) / (squared error of the estimate)."""
    return {
        state: (int((examples.state == state).sum()), _share(left, energy))
        for state, (left, energy) in _errors(head, examples).items()
    }


class Refreshed(NamedTuple):
    """What a refresh found.

    Attributes:
        explained: how good the head was on the new examples before: the share of the one-step estimates' squared error
            that it took away, in (-inf, 1], over all rows; NaN where they had none.
        rows: that it then learnt from, forward and backward.
    """

    explained: float
    rows: int


class HeadRefresher:
    """Trains a run's completion head further, on exact completions of the policy as it is.

    Each time it is shown a few examples, of one prompt, and would soon do well on such alone. So it remembers those of
    earlier times, the newest ones, as many as a checkpoint may well hold, and half of a step's rows are of them.

    Nothing else of the run changes by it: the head is no part of the policy, and its random numbers come from a
    generator of its own, so a run that continues from a checkpoint goes on to the bit.

    Args:
        head: trained in place.
        steps: optimiser steps of each `refresh`.
        seed: the run's.
    """

    def __init__(self, head: CompletionHead, steps: int, seed: int):
        self.head, self.steps, self.seed = head, steps, seed
        self.optimizer = _optimizer(head, _REFRESH_LR)
        self.memory: Examples | None = None

    def refresh(self, examples: Examples, iteration: int) -> Refreshed:
        """Learn from examples that the head has not seen, and remember them."""
        errors = _errors(self.head, examples).values()
        before = _share(sum(left for left, _ in errors), sum(energy for _, energy in errors))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + iteration) % 2**63)
        known = examples if self.memory is None else Examples.joined([examples, self.memory])
        new = min(len(examples), BATCH if self.memory is None else BATCH // 2)
        old = min(len(known) - len(examples), new)
        self.head.requires_grad_(True).train()
        with torch.enable_grad():
            for _ in range(self.steps):
                index = torch.randperm(len(examples), generator=generator)[:new]
                if old:
                    earlier = torch.randperm(len(known) - len(examples), generator=generator)[:old]
                    index = torch.cat([index, len(examples) + earlier])
                _step(self.head, self.optimizer, known, index)
        self.head.requires_grad_(False).eval()
        # the newest come first
        self.memory = known.rows(slice(min(_MEMORY_ROWS, _MEMORY_BYTES // known.row_bytes)))
        return Refreshed(before, self.steps * (new + old))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs, by group and name."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.head.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        remembered = {} if self.memory is None else self.memory.tensors()
        return {"head": dict(self.head.state_dict()), "head_optimizer": moments, "head_memory": remembered}

    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `tensors` of a checkpoint.

        Raises:
            CheckpointError: it holds no head, or one of another shape.
        """
        expected = self.head.state_dict()
        saved = tensors.get("head", {})
        if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in expected.items()}:
            raise CheckpointError("the checkpoint holds no completion head of this shape")
        self.head.load_state_dict(saved)
        self.optimizer.state.clear()
        for name, parameter in self.head.named_parameters():
            moments: dict[str, Any] = {
                key: tensors["head_optimizer"][f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}/{key}" in tensors["head_optimizer"]
            }
            if moments:
                self.optimizer.state[parameter] = moments
        remembered = tensors.get("head_memory")
        self.memory = Examples(**remembered) if remembered else None


@torch.no_grad()
def _errors(head: CompletionHead, examples: Examples) -> dict[int, tuple[float, float]]:
    """Per state the sums of squared errors with the head, and of the estimate."""
    sums = {}
    for state in examples.state.unique().tolist():
        rows = (examples.state == state).nonzero().flatten()
        parts = (_predict(head, examples, index) for index in rows.split(BATCH))
        left = sum((predicted - target).square().sum().item() for predicted, target, _ in parts)
        sums[state] = (left, examples.target[rows].square().sum().item())
    return sums


def _share(left: float, energy: float) -> float:
    return 1 - left / energy if energy else math.nan


def _optimizer(head: CompletionHead, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)


def _step(head: CompletionHead, optimizer: torch.optim.AdamW, examples: Examples, index: Tensor) -> None:
    predicted, target, scale = _predict(head, examples, index)
    loss = ((predicted - target) / scale).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()


def _predict(head: CompletionHead, examples: Examples, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device, state = head.scale.device, examples.state[index]
    inputs = (examples.hidden[index], examples.latents[index], examples.estimate[index], state)
    predicted = head(*(tensor.to(device) for tensor in inputs))
    return predicted, examples.target[index].to(device), head.scale[state.to(device)].view(-1, 1, 1, 1)
