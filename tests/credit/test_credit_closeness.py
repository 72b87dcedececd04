"""Closeness to the group's best sample: by hand, by property, and how it fades over a run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit.closeness import closeness, with_closeness
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages

P, G, T = 2, 5, 3
seeds = st.integers(0, 2**20)
several = settings(deadline=None, max_examples=20)


def known(seed: int, progress: float = 0.0) -> CreditInputs:
    generator = torch.Generator().manual_seed(seed)
    return CreditInputs(
        rewards=torch.randn(P, G, generator=generator, dtype=torch.float64),
        noisy=(True, False, True),
        latents=torch.randn(T + 1, P * G, 2, 3, generator=generator),
        velocities=torch.zeros(T, P * G, 2, 3),
        sigmas=torch.linspace(1, 0, T + 1),
        progress=progress,
    )


def added(inputs: CreditInputs, *, weight: float = 1.0, clip: float = 1e6) -> Tensor:
    nothing = Advantages(torch.zeros(*inputs.rewards.shape, len(inputs.noisy)), 0.25, 0.5)
    return with_closeness(nothing, inputs, weight=weight, clip=clip).values


def test_numbers_by_hand() -> None:
    # sample 2 is the best. From (0, 0) the others lie (3, 4) and (0, 2) away: root mean squares 5/sqrt(2), 2/sqrt(2)
    states = torch.tensor([[[3.0, 4.0], [0.0, -2.0], [0.0, 0.0], [9.0, 9.0]]])
    rewards = torch.tensor([[1.0, -1.0, 2.0, math.nan]])
    found = closeness(states, rewards)
    expected = torch.tensor([-5 / math.sqrt(2), -math.sqrt(2), math.nan, math.nan])
    torch.testing.assert_close(found.flatten(), expected, equal_nan=True)
    # two others, normalised: -1 and 1; half of the run is done, so that .8 of the weight counts half
    inputs = CreditInputs(rewards, (True,), torch.cat([states, states]), states, torch.tensor([1.0, 0.0]), progress=0.5)
    torch.testing.assert_close(added(inputs, weight=0.8).flatten(), torch.tensor([-0.4, 0.4, 0, 0]))


@several
@given(seed=seeds)
def test_the_best_gets_nothing_and_the_nearer_ones_more(seed: int) -> None:
    inputs = known(seed)
    values, best = added(inputs), inputs.rewards.argmax(1)
    states = inputs.latents.unflatten(1, (P, G)).flatten(3)
    for p in range(P):
        assert not values[p, best[p]].any() and not values[..., 1].any()
        others = [g for g in range(G) if g != best[p]]
        for step in (0, 2):
            away = (states[step + 1, p, others] - states[step + 1, p, best[p]]).norm(dim=-1)
            assert torch.equal(values[p, others, step].argsort(), away.argsort(descending=True))
            assert values[p, others, step].sum().item() == pytest.approx(0, abs=1e-4)


@several
@given(seed=seeds, order=st.permutations(range(G)), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_order_scale_and_the_rewards_distances_do_not_matter(
    seed: int, order: list[int], scale: float, shift: float
) -> None:
    inputs = known(seed)
    rows = torch.tensor([p * G + g for p in range(P) for g in order])
    moved = CreditInputs(
        rewards=(inputs.rewards**3)[:, order],
        noisy=inputs.noisy,
        latents=scale * inputs.latents[:, rows] + shift,
        velocities=inputs.velocities,
        sigmas=inputs.sigmas,
    )
    torch.testing.assert_close(added(moved), added(inputs)[:, order], rtol=1e-3, atol=1e-3)


@several
@given(seed=seeds, lost=st.integers(0, G - 1))
def test_a_missing_sample_is_as_if_it_never_was(seed: int, lost: int) -> None:
    inputs = known(seed)
    others = [g for g in range(G) if g != lost]
    rows = torch.tensor([p * G + g for p in range(P) for g in others])
    without = CreditInputs(
        inputs.rewards[:, others], inputs.noisy, inputs.latents[:, rows], inputs.velocities[:, rows], inputs.sigmas
    )
    inputs.rewards[:, lost] = math.nan
    assert not added(inputs)[:, lost].any()
    torch.testing.assert_close(added(inputs)[:, others], added(without))


def test_equal_bests_are_all_measured_by_and_groups_of_equals_get_nothing() -> None:
    inputs = known(3)
    inputs.rewards[0] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    inputs.rewards[1] = 1.0
    inputs.latents[1:, 2] = inputs.latents[1:, 1] + 1e-3  # next to one of the two
    values = added(inputs)
    assert not values[0, :2].any() and not values[1].any()
    assert (values[0, 2, [0, 2]] > 1).all()
    inputs.rewards[0] = math.nan
    assert not added(inputs).any()


@several
@given(seed=seeds, progress=st.floats(0, 1))
def test_it_fades_and_is_clipped_with_the_rest(seed: int, progress: float) -> None:
    torch.testing.assert_close(added(known(seed, progress)), (1 - progress) * added(known(seed)))
    assert added(known(seed), weight=50.0, clip=0.5).abs().max() <= 0.5
    base = Advantages(torch.ones(P, G, T), 0.25, 0.5)
    found = with_closeness(base, known(seed), weight=0.5, clip=5.0)
    torch.testing.assert_close(found.values, (1 + 0.5 * added(known(seed))).clamp(-5, 5))
    assert (found.zero_spread, found.missing) == (0.25, 0.5)


def test_an_option_of_trajectories_that_belongs_to_the_runs_length() -> None:
    config, _ = parse_arguments(["--config", "embedded_dense", "credit.closeness=0.5"])
    assert config.credit_scope == "whole"
    longer, _ = parse_arguments(["--config", "embedded_dense", "credit.closeness=0.5", "run.iterations=200"])
    assert longer.fingerprint() != config.fingerprint()
    plain, longer = (parse_arguments(["--config", "embedded_dense", f"run.iterations={n}"])[0] for n in (100, 200))
    assert longer.fingerprint() == plain.fingerprint()
    with pytest.raises(UserError, match="credit.closeness: expected 0 with sampler.branches, got 0.5"):
        parse_arguments(["--config", "embedded_branched", "credit.closeness=0.5"])
