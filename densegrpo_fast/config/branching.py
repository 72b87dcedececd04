"""What branches (`sampler.branches`) go with: checked before anything is computed. Nothing here imports torch.

A branch is a single noisy step from a noise-free trunk: what is defined on whole trajectories has no meaning with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegrpo_fast.config.methods import deterministic_steps
from densegrpo_fast.credit import registry

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config


def branching_problem(config: Config) -> str | None:
    """What is wrong with the branches among the other options, beginning with the key; None = nothing."""
    branches, method = config.sampler.branches, registry.find(config.credit.method)
    if branches is None:
        if method.uses_branches:
            return f"sampler.branches: credit.method {config.credit.method} compares branches of one state, got null"
        if (factor := config.objective.negative_factor) != 1:
            return f"objective.negative_factor: expected 1 without sampler.branches, got {factor}"
        return None
    if not method.uses_branches:
        able = " or ".join(name for name in registry.names() if registry.find(name).uses_branches)
        return (
            f"credit.method: expected {able} with sampler.branches, got {config.credit.method}, which judges "
            "trajectories (--config embedded_dense, or sampler.branches null)"
        )
    if config.sampler.group_size % branches:
        return f"sampler.branches: expected a divisor of sampler.group_size {config.sampler.group_size}, got {branches}"
    for key, plain, expected in (
        ("sampler.shared_noise", False, "false"),
        ("window.remainder", "euler", "euler"),
        ("window.remainder_share", 1, "1"),
        ("lookahead.cache", None, "null"),
    ):
        section, _, name = key.partition(".")
        if (given := getattr(getattr(config, section), name)) != plain:
            return f"{key}: expected {expected} with sampler.branches, got {given}"
    if config.lookahead.guidance == "reuse":
        return "lookahead.guidance: expected full or cond_only with sampler.branches, got reuse"
    if deterministic := deterministic_steps(config):
        return f"sampler.branches: branches need noise in every trained step, there is none in {deterministic}"
    if "granularities" in method.options and config.credit.granularities[-1] >= config.sampler.num_steps:
        return (
            f"credit.granularities: expected at most {config.sampler.num_steps - 1} (sampler.num_steps is "
            f"{config.sampler.num_steps}), got {config.credit.granularities}"
        )
    return None
