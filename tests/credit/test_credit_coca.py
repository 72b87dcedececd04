"""CoCA: similarity to the final latents, its shares, and the twice normalised advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.coca import coca_advantages, contribution_weights, latent_similarity
from densegrpo_fast.credit.sparse import sparse_advantages

NAN = math.nan


def random_case(seed, prompts=2, group=5, steps=4):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, group, generator=generator).double()
    # rising, as predictions approach the final latents, with noise
    rising = torch.linspace(0.2, 0.9, steps + 1) + 0.2 * torch.rand(prompts, group, steps + 1, generator=generator)
    return rewards, rising.double()


def test_similarity_by_hand():
    # two steps of one sample with two elements, sigmas 1, 1/2, 0; the final latents are (0, 2)
    # state 0: (1, 0) - 1 * (0, -1) = (1, 1): cosine 1/sqrt(2);  state 1: (0, 1) - 1/2 * (0, 8) = (0, -3): cosine -1;
    # the last is the final latents
    latents = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]])
    velocities = torch.tensor([[[0.0, -1.0]], [[0.0, 8.0]]])
    similarity = latent_similarity(latents, velocities, torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(similarity, torch.tensor([[1 / math.sqrt(2), -1.0, 1.0]], dtype=torch.float64))


def test_shares_by_hand():
    # states 0 to 4. Windows of 2: the steps lead to .3 .4 and .8 1, means .35 and .9; gains .35 - .1 = .25 and .55, sum
    # .8; shares .25/(2*.8) = 5/32 and 11/32
    similarity = torch.tensor([0.1, 0.3, 0.4, 0.8, 1.0], dtype=torch.float64)
    expected = torch.tensor([5 / 32, 5 / 32, 11 / 32, 11 / 32], dtype=torch.float64)
    torch.testing.assert_close(contribution_weights(similarity, window=2), expected)
    # windows of 1: each step is credited with its own rise, .2 .1 .4 .2 of .9
    expected = torch.tensor([2 / 9, 1 / 9, 4 / 9, 2 / 9], dtype=torch.float64)
    torch.testing.assert_close(contribution_weights(similarity), expected)


def test_a_step_has_the_share_of_what_it_did_itself():
    """Only step 1 moves: it leads from a state with another prediction to one that predicts the final latents."""
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    latents = torch.stack([wrong, wrong, right, right])
    similarity = latent_similarity(latents, torch.zeros(3, 1, 2), sigmas)
    assert contribution_weights(similarity).tolist() == [[0.0, 1.0, 0.0]]


def test_advantages_by_hand():
    # rewards 0 and 2: advantages -1 and 1. Similarity .0 .0 .2 .8 | .1 .1 .1 .5: shares 0 1/4 3/4 | 0 0 1, still to
    # come 1 1 3/4 | 1 1 1. Values -1 -1 -3/4 | 1 1 1: mean 1/24; squares 1+1+9/16+3 over 6 = 89/96, variance
    # 89/96 - 1/576 = 533/576
    rewards = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    similarity = torch.tensor([[[0.0, 0.0, 0.2, 0.8], [0.1, 0.1, 0.1, 0.5]]], dtype=torch.float64)
    values = torch.tensor([[[-1.0, -1.0, -0.75], [1.0, 1.0, 1.0]]])
    expected = (values - 1 / 24) / math.sqrt(533 / 576)
    torch.testing.assert_close(coca_advantages(rewards, similarity, epsilon=0.0).values, expected)


def test_second_normalisation_is_the_sources_pooled_formula():
    # the source pools (mean, std) of the samples: m = E[mean_i], std = sqrt(E[mean_i^2 + std_i^2] - m^2)
    rewards, similarity = random_case(0, prompts=1)
    image = (rewards - rewards.mean()) / rewards.std(correction=0)
    to_come = contribution_weights(similarity).flip(-1).cumsum(-1).flip(-1)
    values = image.unsqueeze(-1) * to_come
    mean, std = values.mean(-1), values.std(-1, correction=0)
    pooled = ((mean.square() + std.square()).mean() - mean.mean() ** 2).sqrt()
    expected = ((values - mean.mean()) / pooled).float()
    torch.testing.assert_close(coca_advantages(rewards, similarity, epsilon=0.0).values, expected, atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), window=st.sampled_from([1, 2, 4]))
def test_shares_sum_to_one_and_ignore_the_level_of_similarity(seed, window):
    similarity = random_case(seed)[1]
    shares = contribution_weights(similarity, window=window)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5).double())
    torch.testing.assert_close(contribution_weights(3 * similarity - 1, window=window), shares)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), shift=st.floats(-50, 50))
def test_shift_permutation_and_dtype(seed, shift):
    rewards, similarity = random_case(seed)
    plain = coca_advantages(rewards, similarity).values
    torch.testing.assert_close(coca_advantages(rewards + shift, similarity).values, plain)
    in_float32 = coca_advantages(rewards.float(), similarity.float()).values
    torch.testing.assert_close(in_float32, plain, atol=1e-4, rtol=1e-4)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted = coca_advantages(rewards[:, order], similarity[:, order]).values
    torch.testing.assert_close(permuted, plain[:, order])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), member=st.integers(0, 4), what=st.sampled_from(["reward", "similarity"]))
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, member, what):
    rewards, similarity = random_case(seed)
    others = [g for g in range(5) if g != member]
    without = coca_advantages(rewards[:, others], similarity[:, others]).values
    if what == "reward":
        rewards[:, member] = NAN
    else:
        similarity[:, member, 2] = NAN
    with_gap = coca_advantages(rewards, similarity)
    torch.testing.assert_close(with_gap.values[:, others], without)
    assert with_gap.values[:, member].count_nonzero() == 0 and with_gap.missing == pytest.approx(1 / 5)


def test_alpha_one_and_even_shares_are_related_to_sparse_credit():
    rewards, similarity = random_case(1)
    sparse = sparse_advantages(rewards, 4, epsilon=0.0).values
    torch.testing.assert_close(coca_advantages(rewards, similarity, alpha=1.0, epsilon=0.0).values, sparse)


def test_a_trajectory_that_does_not_approach_shares_evenly():
    for similarity in ([0.5, 0.5, 0.5, 0.5, 0.5], [0.9, 0.2, 0.8, 0.1, 0.4]):
        assert contribution_weights(torch.tensor(similarity)).tolist() == [0.25] * 4


def test_flat_groups_get_zero():
    rewards, similarity = random_case(2)
    rewards[0] = 1.5
    advantages = coca_advantages(rewards, similarity)
    assert advantages.values[0].count_nonzero() == 0 and advantages.values[1].count_nonzero() > 0
    assert advantages.zero_spread == 0.5
    assert coca_advantages(rewards, similarity, spread_floor=100.0).values.count_nonzero() == 0


def test_bad_input_is_refused():
    rewards, similarity = random_case(3)
    with pytest.raises(ValueError, match="window must divide the 4 steps, got 3"):
        coca_advantages(rewards, similarity, window=3)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        coca_advantages(rewards, similarity, alpha=2.0)
    with pytest.raises(ValueError, match="similarity_floor must be finite and above 0"):
        coca_advantages(rewards, similarity, similarity_floor=0.0)
    with pytest.raises(ValueError, match=r"must agree, got \[2, 5\] and \[2, 4, 5\]"):
        coca_advantages(rewards, similarity[:, :4])
    with pytest.raises(ValueError, match=r"latent_similarity: .* must agree"):
        latent_similarity(torch.zeros(3, 1, 2), torch.zeros(2, 1, 2), torch.zeros(2))
