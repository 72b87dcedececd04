"""KL divergence of one stochastic step between the policy and the reference policy.

Both are Gaussians around mean = A*latents + B*velocity with the same std C, so the latents cancel and only
the velocities count: the divergence per latent dim is B^2 (velocity - ref_velocity)^2 / (2 C^2).
"""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.flow.log_prob_op import KL_STD, KlScale
from densegrpo_fast.flow.reference import gaussian_kl_ref

__all__ = ["KlScale", "gaussian_kl"]


def gaussian_kl(
    velocity: Tensor,
    ref_velocity: Tensor,
    table: Tensor,
    step_index: Tensor,
    *,
    scale: KlScale = "paper",
) -> Tensor:
    """KL(policy || reference) of each row's step, **mean** over latent dims, in nats; differentiable in both.

    `ops.sde_log_prob_kl` gives it together with the log-probability, in one pass.

    Args:
        velocity: [B, ...] float, of the policy; carries gradient.
        ref_velocity: same shape, of the reference policy (adapter off).
        table: [T, 6] float32, step coefficients of `flow.dynamics`.
        step_index: [B] int64, each row's step.
        scale: "paper" divides by 2 C^2, the variance really injected (Flow-GRPO, arXiv 2505.05470);
            "flow_grpo" divides by 2 std_dev^2 as that paper's code does, without the step size, which is
            smaller by the factor |dt|: use it with kl_coef values taken from that code.

    Returns:
        [B] in float32 or wider. Rows of noise-free steps (C = 0) give 0.

    Raises:
        ValueError: shapes disagree, or scale is unknown.
    """
    if velocity.shape != ref_velocity.shape:
        raise ValueError(
            f"gaussian_kl: ref_velocity must have shape {list(velocity.shape)} like velocity, "
            f"got {list(ref_velocity.shape)}"
        )
    if list(step_index.shape) != [len(velocity)]:
        raise ValueError(f"gaussian_kl: step_index must have shape [{len(velocity)}], got {list(step_index.shape)}")
    if scale not in KL_STD:
        raise ValueError(f"gaussian_kl: scale must be 'paper' or 'flow_grpo', got {scale!r}")
    return gaussian_kl_ref(velocity, ref_velocity, table, step_index, KL_STD[scale])
