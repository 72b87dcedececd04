"""The learner: optimiser, running average, and the policy update from one batch of trajectories.

Where FSDP2 holds the parameters (`training/sharding.py`), each process has its part of them, of their gradients,
moments and average; `tensors` and `restore` speak of the whole ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from densegrpo_fast.common.errors import CheckpointError, NonFiniteError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel, GuidanceGradient
from densegrpo_fast.objective.negatives import branch_noise, negative_weights
from densegrpo_fast.objective.policy import Objective, ObjectiveSettings
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.replay import per_branch, replay, replay_kl
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.distributed import Share, add_up_gradients
from densegrpo_fast.training.schedule import objective_settings
from densegrpo_fast.training.sharding import ends_the_run, like, local


@dataclass(frozen=True)
class LearnerOptions:
    """What the learner needs of the configuration, which says what each option means."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    max_grad_norm: float
    updates_per_iteration: int
    warmup: int
    ema_decay: float
    ema_every: int
    objective: ObjectiveSettings
    micro_batch: int
    max_bad_steps: int
    guidance_gradient: GuidanceGradient = "full"

    @classmethod
    def of(cls, config: Config) -> LearnerOptions:
        """The part of a run's configuration that the learner needs."""
        optimizer = config.optimizer
        return cls(
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            eps=optimizer.eps,
            max_grad_norm=optimizer.max_grad_norm,
            updates_per_iteration=optimizer.updates_per_iteration,
            warmup=optimizer.warmup,
            ema_decay=config.ema.decay,
            ema_every=config.ema.every,
            objective=objective_settings(config),
            micro_batch=config.sampler.micro_batch,
            max_bad_steps=config.run.max_bad_steps,
            guidance_gradient=config.objective.guidance_gradient,
        )


class StepScores(NamedTuple):
    """What the policy says of a recorded step.

    Attributes:
        log_prob: [m*K] float32, mean over the latent's elements.
        velocity: [m, ...] float32, guided.
        kl: [m*K] float32 in nats to the reference policy; None where the loss has no such term.
    """

    log_prob: Tensor
    velocity: Tensor
    kl: Tensor | None = None

    def select(self, rows: slice, branches: int) -> StepScores:
        """Those of some of the m states."""
        samples = slice(rows.start * branches, rows.stop * branches)
        return StepScores(self.log_prob[samples], self.velocity[rows], None if self.kl is None else self.kl[samples])


class UpdateSums:
    """What the parts of an update add up to.

    Attributes:
        totals: loss and metrics, each the mean over the update.
        deviations: largest |ratio - 1| of each part.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.deviations: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add what `Learner.step_gradient` returns."""
        for name, value in metrics.items():
            if name == "ratio_deviation":
                self.deviations.append(value)
            else:
                self.totals[name] = self.totals.get(name, 0.0) + value


class Learner:
    """Trains a model's adapter, or all its weights, with AdamW on the configured objective.

    Args:
        model: the policy; `model.reference()` is the policy that the KL term holds it to.
        options: see `LearnerOptions`.
        share: the rows of an iteration that this process trains on; None = all.
    """

    def __init__(self, model: FlowModel, options: LearnerOptions, share: Share | None = None):
        self.model, self.options, self.share = model, options, share
        self.parameters = model.trainable_parameters()
        self._spread = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self.average = EMAModel(self._parts(), decay=options.ema_decay) if options.ema_every else None
        self.updates = 0
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self._full_micro_batch = micro_batch = options.micro_batch if share is None else share.micro_batch
        self.rows = OomBackoff(micro_batch, "sampler.micro_batch", "set model.gradient_checkpointing to true")

    def update(
        self,
        rollout: Rollout,
        advantages: Tensor,
        steps: Sequence[int],
        weights: Tensor | None = None,
        draw_weights: Tensor | None = None,
    ) -> dict[str, float]:
        """Train on `steps` of every sample, in `updates_per_iteration` optimiser steps over parts of the batch.

        One forward and backward of a state trains all branches that leave it. A part whose loss or gradient is not
        finite is skipped and counted.

        If a GPU's memory runs out, the micro-batch is replayed in smaller ones, `rows` of them from then on: the same
        gradient to rounding. The rollout was drawn with the larger ones, so this once the ratios deviate from 1 by the
        rounding of another batch shape (`first_ratio_deviation`); the next rollout must be drawn with `rows` too.

        Args:
            advantages: [B, T] float32.
            steps: indices of the trained steps.
            weights: [T] float32 of the steps, see `Objective`.
            draw_weights: [T] float32 factors of the steps' whole losses, KL included; None = 1.

        Returns:
            Metrics averaged over the parts: loss, those of the objective, ratio_deviation (largest) and
            first_ratio_deviation (of the first part, before anything was trained), grad_norm, lr, skipped_updates
            (their number), and micro_batch (rows per forward at the end).

        Raises:
            NonFiniteError: too many parts in a row were skipped; the adapter is as before the first of them.
            SetupError: the memory does not even allow a single row.
            ValueError: the objective does not fit the rollout's sampler, or the parts do not fit its batch.
        """
        size = self.rows.rows
        slices = [slice(start, start + size) for start in range(0, rollout.batch, size)]
        parts = _split(slices, self.options.updates_per_iteration)
        objective = Objective(self.options.objective, rollout.coefficients, steps, weights)
        factors = [1.0] * rollout.coefficients.num_steps if draw_weights is None else draw_weights.tolist()
        records = [self._step(rollout, advantages, objective, steps, factors, part) for part in parts]
        return self.metrics(records)

    def metrics(self, records: Sequence[dict[str, float]]) -> dict[str, float]:
        """Metrics of an iteration, as `update` has them, from those of its parts."""
        metrics = {name: sum(record[name] for record in records) / len(records) for name in records[0]}
        metrics["ratio_deviation"] = max(record["ratio_deviation"] for record in records)
        metrics["first_ratio_deviation"] = records[0]["ratio_deviation"]
        metrics["skipped_updates"] = sum(record["skipped_updates"] for record in records)
        metrics["micro_batch"] = float(self.rows.rows)
        return metrics

    def micro_batches(self, part: Sequence[slice]) -> float:
        """How many micro-batches of this process's size the rows of an update make, over all processes."""
        if self.share is None:
            return len(part)
        return self.share.total / self.options.updates_per_iteration / (part[0].stop - part[0].start)

    def begin_update(self) -> None:
        """Start an optimiser step: the learning rate of now, and no gradient yet."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * min(1.0, (self.updates + 1) / max(self.options.warmup, 1))
        self.optimizer.zero_grad(set_to_none=True)

    def _step(
        self,
        rollout: Rollout,
        advantages: Tensor,
        objective: Objective,
        steps: Sequence[int],
        factors: Sequence[float],
        part: list[slice],
    ) -> dict[str, float]:
        self.begin_update()
        share, sums = 1.0 / (self.micro_batches(part) * len(steps)), UpdateSums()
        for step in steps:
            for whole in part:

                def gradient(rows: slice, step: int = step, whole: slice = whole) -> dict[str, Tensor]:
                    weight = share * factors[step] * (rows.stop - rows.start) / (whole.stop - whole.start)
                    return self.step_gradient(rollout, advantages, objective, step, rows, weight)

                for metrics in self.rows.each(whole, gradient):
                    sums.add(metrics)
        return self.apply_update(sums)

    def step_gradient(
        self,
        rollout: Rollout,
        advantages: Tensor,
        objective: Objective,
        step: int,
        rows: slice,
        weight: float,
        velocity: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradient of the loss of one step of some rows, times `weight`, to the parameters'.

        Args:
            rollout: that took the step.
            advantages: [B, T] float32.
            objective: of the iteration.
            step, rows: which ones; the rows are one micro-batch, or a part of one.
            weight: what their mean counts for in the update.
            velocity: [m, ...] of the policy as it is, with its graph; None = it is evaluated again.

        Returns:
            The loss and the metrics of the objective, times `weight`; and ratio_deviation, as it is.
        """
        scores = self.replay(rollout, step, rows, velocity)
        owned = rows if self.share is None else self.share.owned(rows)
        if owned == slice(owned.start, owned.start):
            weight = 0.0
        elif owned != rows:
            scores = scores.select(slice(owned.start - rows.start, owned.stop - rows.start), rollout.branches)
            weight *= (owned.stop - owned.start) / (rows.stop - rows.start)
            rows = owned
        judged = advantages[rollout.sample_rows(rows), step]
        loss, metrics = self.loss(rollout, judged, objective, step, rows, scores)
        deviation = metrics.pop("ratio_deviation")
        self.add_gradient(loss * weight)
        parts = {name: value * weight for name, value in {"loss": loss.detach(), **metrics}.items()}
        return parts | {"ratio_deviation": deviation}

    def apply_update(self, sums: UpdateSums) -> dict[str, float]:
        """Clip the gradient that was added, and take the optimiser step unless something is not finite.

        Args:
            sums: of everything that was added.

        Returns:
            The metrics as numbers, with ratio_deviation, grad_norm, lr and skipped_updates; all 0 if skipped.

        Raises:
            NonFiniteError: too many updates in a row were skipped.
        """
        totals, deviation = sums.totals, torch.stack(sums.deviations).max()
        if self.share is not None:
            totals = add_up_gradients(self.share.world, [*self.parameters.values()], totals)
            deviation = self.share.world.max(deviation)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        record = {name: value.item() for name, value in totals.items()}
        record |= {
            "ratio_deviation": deviation.item(),
            "grad_norm": norm.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_updates": 0.0,
        }
        if not all(torch.isfinite(value) for value in (totals["loss"], norm)):
            self._skip()
            return dict.fromkeys(record, 0.0) | {"skipped_updates": 1.0}
        self.optimizer.step()
        self.updates += 1
        self.bad_in_a_row = 0
        if self.average is not None and self.updates % self.options.ema_every == 0:
            self.average.step(self._parts())
        return record

    def add_gradient(self, loss: Tensor) -> None:
        """Add a loss's gradient to the parameters', whole or, if the memory runs out on the way, not at all."""
        parameters = list(self.parameters.values())
        try:
            if self._spread:
                # only in a backward of its own does FSDP2 add up gradients
                loss.backward()
                return
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError as error:
            if self.model.sharded or self._spread:
                raise ends_the_run(error) from None
            raise
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.contiguous()
            else:
                parameter.grad.add_(gradient)

    def replay(self, rollout: Rollout, step: int, rows: slice, velocity: Tensor | None = None) -> StepScores:
        """Score one recorded step with gradient, and with the KL to the reference if the loss has that.

        Args:
            velocity: as in `step_gradient`.
        """
        settings, gradient = self.options.objective, self.options.guidance_gradient
        if settings.kl_coef:
            return StepScores(*replay_kl(self.model, rollout, step, rows, settings.kl_scale, gradient, velocity))
        return StepScores(*replay(self.model, rollout, step, rows, gradient, velocity))

    def loss(
        self, rollout: Rollout, advantages: Tensor, objective: Objective, step: int, rows: slice, scores: StepScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step of some rows.

        Args:
            rollout: that took the step.
            advantages: [m*K] float32 of the step.
            objective: of the iteration.
            step, rows: which ones.
            scores: of the policy as it is, with gradient.
        """
        branches = rollout.branches
        weights = self._negative_weights(rollout, advantages, step, rows)
        loss, metrics = objective.loss(
            step,
            log_prob=scores.log_prob,
            old_log_prob=rollout.log_probs[step, rollout.sample_rows(rows)],
            advantages=advantages if weights is None else advantages * weights,
            velocity=per_branch(scores.velocity, branches),
            old_velocity=per_branch(rollout.velocities[step, rows], branches),
            kl=scores.kl,
        )
        return loss, metrics if weights is None else metrics | {"held_back": (weights < 1).float().mean()}

    def _negative_weights(self, rollout: Rollout, advantages: Tensor, step: int, rows: slice) -> Tensor | None:
        """What some states' branches' advantages [m*K] are multiplied by; None where nothing can be held back."""
        settings = self.options.objective
        if settings.negative_factor == 1 or rollout.branches == 1:
            return None
        noise = branch_noise(
            rollout.latents[step, rows],
            rollout.velocities[step, rows],
            rollout.next_latents(step, rows),
            rollout.coefficients.table[step],
        )
        return negative_weights(
            noise,
            advantages.unflatten(0, noise.shape[:2]),
            factor=settings.negative_factor,
            threshold=settings.negative_threshold,
        ).flatten()

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.options.max_bad_steps:
            raise NonFiniteError(
                f"loss or gradient was not finite {self.bad_in_a_row} times in a row; lower optimizer.lr or "
                "sampler.noise_level. Nothing of it reached the weights.",
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the parameters hold their running average (if one is kept)."""
        if self.average is None:
            yield
            return
        parameters = self._parts()
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def _parts(self) -> list[Tensor]:
        """Of every parameter this process's part."""
        return [local(parameter) for parameter in self.parameters.values()]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs, by group and name; those that FSDP2 spreads as DTensors."""
        groups: dict[str, dict[str, Tensor]] = {"adapter": dict(self.parameters), "optimizer": {}}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                groups["optimizer"][f"{name}/{key}"] = value
        if self.average is not None:
            shadows = zip(self.parameters.items(), self.average.shadow_params, strict=True)
            groups["ema"] = {name: like(shadow, parameter) for (name, parameter), shadow in shadows}
        return groups

    def room_for(self, names: Iterable[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
        """Zeros in the place of some of `tensors`, spread like them.

        Args:
            names: groups and names.

        Raises:
            CheckpointError: they are no learner's of this model.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for group, name in names:
            parameter = self.parameters.get(name.rpartition("/")[0] if group == "optimizer" else name)
            if parameter is None:
                raise CheckpointError("the checkpoint holds the weights of another model")
            counts = group == "optimizer" and name.endswith("/step")
            groups.setdefault(group, {})[name] = torch.zeros(()) if counts else torch.zeros_like(parameter.detach())
        return groups

    def state(self) -> dict[str, Any]:
        """The counters that go with `tensors`."""
        return {
            "updates": self.updates,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "micro_batch": self.options.micro_batch if self.rows.rows == self._full_micro_batch else self.rows.rows,
            "ema_steps": self.average.optimization_step if self.average is not None else 0,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continue from `tensors` and `state` of a checkpoint.

        Raises:
            CheckpointError: what was trained has other parameters than this model's.
        """
        saved = {name: tensor.shape for name, tensor in tensors["adapter"].items()}
        if saved != {name: parameter.shape for name, parameter in self.parameters.items()}:
            raise CheckpointError("the checkpoint holds what was trained of another model")
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors["adapter"][name])
            moments = {
                key: tensors["optimizer"][f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}/{key}" in tensors["optimizer"]
            }
            if moments:
                self.optimizer.state[parameter] = moments
        if self.average is not None:
            for shadow, name in zip(self.average.shadow_params, self.parameters, strict=True):
                shadow.copy_(local(tensors["ema"][name]))
            self.average.optimization_step = state["ema_steps"]
        self.updates = state["updates"]
        self.bad_steps, self.bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]
        self.rows.rows = min(self.rows.rows, state["micro_batch"])


def _split(slices: list[slice], count: int) -> list[list[slice]]:
    if len(slices) % count:
        raise ValueError(
            f"updates_per_iteration must divide the {len(slices)} micro-batches of an iteration, got {count}"
        )
    size = len(slices) // count
    return [slices[start : start + size] for start in range(0, len(slices), size)]
