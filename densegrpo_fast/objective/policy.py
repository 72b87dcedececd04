"""The loss of one training step, put together from what is configured: a policy loss, step weights, a KL term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import PluginError
from densegrpo_fast.common.plugins import fence, is_package_code, select_options
from densegrpo_fast.flow.dynamics import LOG_PROB_SCALE, B, C, StepCoefficients
from densegrpo_fast.objective.clip import METRICS, clip_ratios
from densegrpo_fast.objective.guard import GuardWeight
from densegrpo_fast.objective.kl import KlScale
from densegrpo_fast.objective.pairs import Pairs
from densegrpo_fast.objective.registry import POLICIES
from densegrpo_fast.objective.weights import step_weights


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the loss is made of.

    Attributes:
        policy: name of a policy loss (`objective.registry`): "clip" = PPO's clipped ratios; "guard" = GRPO-Guard's
            normalised ones; "dppo" = Flow-DPPO's mask; or one of one's own.
        clip_range: of clip and guard; guard's ratios are smaller by the injected standard deviation of the step.
        guard_weight: see `guard.guard_table`.
        dppo_threshold: see `dppo.dppo_keep`.
        step_weight: name of a weighting of the steps; multiplies guard's own weight.
        kl_coef: weight of the KL to the reference policy; 0 = no term.
        kl_scale: see `kl.gaussian_kl`.
        negative_factor: what the negative advantages of branches that point where good ones do are multiplied by, see
            `negatives.negative_weights`; 1 = off.
        negative_threshold: see there.
        arguments: options of a policy loss or a weighting of one's own.
    """

    policy: str
    clip_range: float
    guard_weight: GuardWeight
    dppo_threshold: float
    step_weight: str
    kl_coef: float
    kl_scale: KlScale
    negative_factor: float = 1.0
    negative_threshold: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What a policy loss or a weighting may take, by name."""
        return {**vars(self), **self.arguments}

    def step_weights(self, coefficients: StepCoefficients, steps: Sequence[int]) -> Tensor:
        """`weights.step_weights` by the configured weighting. [T] float32."""
        return step_weights(coefficients, steps, self.step_weight, self.options)


class Objective:
    """The loss of every trained step of one iteration.

    Args:
        settings: what it is made of.
        coefficients: of the iteration's sampler.
        steps: the trained steps.
        weights: [T] float32 of the steps, where a run trains others too; None = `step_weights` of `steps`.

    Attributes:
        weights: [T] float32 of the steps.

    Raises:
        ValueError: there is no such policy loss or weighting, it lacks an option, or it does not fit the sampler
            ("guard" without a ratio to normalise).
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        coefficients: StepCoefficients,
        steps: Sequence[int],
        weights: Tensor | None = None,
    ):
        self.settings, self.coefficients = settings, coefficients
        self.weights = settings.step_weights(coefficients, steps) if weights is None else weights
        self._policy = POLICIES.find(settings.policy)
        chosen = select_options(f"policy {settings.policy}", self._policy.options, settings.options)
        with fence(self._policy.function(), f"policy {settings.policy}"):
            self._loss = self._policy.function()(coefficients, steps, **chosen)

    def loss(
        self,
        step: int,
        *,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        velocity: Tensor,
        old_velocity: Tensor,
        kl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of B samples' transition at one step.

        Args:
            step: its index.
            log_prob: [B] float32, of the policy being trained; mean over latent dims. Carries gradient.
            old_log_prob: [B] float32, of the policy that sampled.
            advantages: [B] float32.
            velocity: [B, ...] float, of the policy being trained; carries gradient.
            old_velocity: same shape, of the policy that sampled.
            kl: [B] float, divergence from the reference policy in `settings.kl_scale`, as `ops.sde_log_prob_kl` gives
                it; carries gradient. Needed where kl_coef is not 0.

        Returns:
            loss and metrics as `clip.ppo_clip_loss`. The ratios are guard's normalised ones with "guard", and
            clip_fraction is the share of dropped samples with "dppo". A policy loss of one's own may say more.

        Raises:
            ValueError: kl_coef is not 0 but kl is None, or shapes disagree.
            PluginError: a policy loss of one's own raised, or returns something else than a number that depends on the
                policy, and metrics.
        """
        coef, name = self.settings.kl_coef, self.settings.policy
        if kl is None and coef:
            raise ValueError(f"Objective: kl_coef {coef} needs kl, got None")
        weight = self.weights[step].expand(len(advantages))
        pairs = Pairs(step, log_prob, old_log_prob, advantages, weight, velocity, old_velocity, kl, coef)
        function = self._policy.function()
        with fence(function, f"policy {name}", through=(torch.OutOfMemoryError,)):
            loss, metrics = self._loss(pairs)
            if not is_package_code(function):
                metrics = {str(key): torch.as_tensor(value).detach() for key, value in metrics.items()}
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PluginError(f"policy {name}: expected a loss without dimensions, got {found}")
        if log_prob.requires_grad and not loss.requires_grad:
            raise PluginError(f"policy {name}: expected a loss that depends on pairs.log_prob or pairs.velocity")
        if odd := [key for key, value in metrics.items() if value.ndim]:
            raise PluginError(f"policy {name}: expected metrics without dimensions, got some in {odd[0]!r}")
        if not metrics.keys() >= {*METRICS}:
            metrics = _plain_metrics(pairs, loss) | metrics
        if kl is not None and coef and not self._policy.adds_kl:
            loss = loss + coef * kl.mean()
        return loss, metrics

    def gradient_size(self, step: int) -> float:
        """How large the gradient of a step's policy loss is, but for the network's own share of it.

        That is the loss's slope at an unchanged policy with an advantage of 1, times the log-probability's gradient
        with respect to the velocity per unit of noise (`weights.py`).
        """
        table = self.coefficients.table
        row, velocity = torch.zeros(1, device=table.device), torch.zeros(1, 1, device=table.device)
        log_prob = row.clone().requires_grad_()
        kl = row if self.settings.kl_coef else None
        loss, _ = self.loss(
            step,
            log_prob=log_prob,
            old_log_prob=row,
            advantages=row + 1,
            velocity=velocity,
            old_velocity=velocity,
            kl=kl,
        )
        (slope,) = torch.autograd.grad(loss, log_prob)
        gain = 2 * table[step, LOG_PROB_SCALE] * table[step, B].abs() * table[step, C]
        return (slope.abs() * gain).item()


def _plain_metrics(pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
    """The metrics of `ppo_clip_loss` for a policy loss that bounds no ratio."""
    log_ratio = pairs.log_prob.detach() - pairs.old_log_prob
    ratio, none = log_ratio.exp(), loss.new_zeros(())
    kl = none if pairs.kl is None else pairs.kl.detach().mean()
    found = (loss.detach(), kl, none, (ratio - 1 - log_ratio).mean(), (ratio - 1).abs().max())
    return dict(zip(METRICS, found, strict=True)) | clip_ratios(log_ratio, pairs.advantages, torch.inf)
