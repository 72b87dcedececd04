"""Branch credit: branches of one state are compared with each other alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from densegrpo_fast.credit.branch import branch_advantages
from densegrpo_fast.credit.registry import CreditMethod


def rewards(*trunks: list[float]) -> Tensor:
    """[1, N, C, 1, 1] of one prompt's trunks."""
    return torch.tensor(trunks)[None, :, :, None, None]


def test_numbers_by_hand() -> None:
    # Trunk 0: mean 2, deviations -1 0 1, population variance 2/3. Trunk 1, from better noise: mean 12, deviations
    # -2 0 2, variance 8/3. Compared over the prompt (mean 7), all branches of trunk 0 would be bad.
    own, other = 1 / (math.sqrt(2 / 3) + 1e-4), 2 / (math.sqrt(8 / 3) + 1e-4)
    found = branch_advantages(rewards([1.0, 2.0, 3.0], [10.0, 12.0, 14.0]))
    assert found.values.shape == (1, 6, 1) and found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.flatten(), torch.tensor([-own, 0, own, -other, 0, other]))
    assert (found.zero_spread, found.missing) == (0.0, 0.0)


def test_the_global_spread_is_over_all_trunks_around_each_ones_mean() -> None:
    # all six: mean 7, deviations -6 -5 -4 3 5 7, sum of squares 160, variance 160/6
    scale = 1 / (math.sqrt(160 / 6) + 1e-4)
    found = branch_advantages(rewards([1.0, 2.0, 3.0], [10.0, 12.0, 14.0]), std="global")
    torch.testing.assert_close(found.values.flatten(), scale * torch.tensor([-1.0, 0, 1, -2, 0, 2]))


def test_what_all_branches_of_a_trunk_share_drops_out() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 3, 4, 5, 1, generator=generator, dtype=torch.float64)
    luck = 10 * torch.randn(2, 3, 1, 5, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(branch_advantages(drawn + luck).values, branch_advantages(drawn).values)


def test_a_missing_branch_is_as_if_never_drawn_and_a_flat_trunk_has_nothing_to_say() -> None:
    found = branch_advantages(rewards([1.0, math.nan, 3.0], [5.0, 5.0, 5.0]))
    # trunk 0: mean 2, deviations -1 1, std 1
    one = 1 / (1 + 1e-4)
    torch.testing.assert_close(found.values.flatten(), torch.tensor([-one, 0, one, 0, 0, 0]))
    assert found.zero_spread == pytest.approx(1 / 2) and found.missing == pytest.approx(1 / 6)


def test_the_finest_completion_counts() -> None:
    both = torch.cat([rewards([3.0, 2.0, 1.0]), rewards([1.0, 2.0, 3.0])], dim=-1)
    assert torch.equal(branch_advantages(both).values, branch_advantages(both[..., 1:]).values)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"branch_rewards must have shape \[P, N, C, K, L\], got \[2, 4, 3\]"):
        branch_advantages(torch.zeros(2, 4, 3))


def test_a_method_of_branches_cannot_ask_for_trajectories() -> None:
    assert CreditMethod("some:where", ("rewards", "branch_rewards"), plan="exact").uses_branches
    for need in ("lookahead_rewards", "latents", "similarity"):
        with pytest.raises(ValueError, match=f"branches have no {need}; it needs branch_rewards too"):
            CreditMethod("some:where", ("branch_rewards", need))
