"""Bad branches that point where good ones do: which are held back, by hand and by property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.flow.noise import gaussian
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.objective.negatives import branch_noise, negative_weights


def test_numbers_by_hand() -> None:
    # Good: a = (1, 0) and b = (0, 1); their scores are cos with themselves and each other, 1 + 0. The least is 1.
    # Bad: c = (3, 4)/5 has .6 + .8 = 1.4 > 1; d = (1, -1) has (1 - 1)/sqrt(2) = 0; e = (-1, 0) has -1.
    noise = torch.tensor([[[1.0, 0], [0, 1], [3, 4], [1, -1], [-1, 0]]])
    advantages = torch.tensor([[0.5, 2.0, -1.0, -1.0, -1.0]])
    found = negative_weights(noise, advantages, factor=0.25, threshold=1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 0.25, 1, 1]]))
    # 1.4 > 1.5 * 1 does not hold; with a threshold below 0 / 1 any score above 0 counts
    assert torch.equal(negative_weights(noise, advantages, factor=0.0, threshold=1.5), torch.ones(1, 5))
    assert negative_weights(noise, advantages, factor=0.0, threshold=0.0).tolist() == [[1, 1, 0, 1, 1]]
    # good branches that oppose each other: scores 1 - .8 each, so that .2 is enough
    opposed = torch.tensor([[[1.0, 0], [-0.8, 0.6], [0.3, 0.9539392]]])
    # the bad one has .3 + (-.24 + .5723635) = .632 > .2
    found = negative_weights(opposed, torch.tensor([[1.0, 1, -1]]), factor=0.5, threshold=1.0)
    assert found.tolist() == [[1, 1, 0.5]]


def test_without_a_good_branch_nothing_is_held_back() -> None:
    noise, advantages = torch.ones(2, 3, 4), torch.tensor([[-1.0, -1, 0], [1, -1, -1]])
    assert negative_weights(noise, advantages, factor=0.0, threshold=0.5).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(negative_weights(noise, advantages, factor=1.0), torch.ones(2, 3))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 100), order=st.permutations(range(5)))
def test_order_and_length_do_not_matter(seed: int, scale: float, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    advantages = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    found = negative_weights(noise, advantages, factor=0.5, threshold=0.6)
    assert (found[advantages >= 0] == 1).all()
    assert torch.equal(
        negative_weights(scale * noise[:, order], advantages[:, order], factor=0.5, threshold=0.6), found[:, order]
    )


@pytest.mark.parametrize("dimensions", [2**8, 2**10, 2**14])
def test_the_default_threshold_means_the_same_in_any_number_of_dimensions(dimensions: int) -> None:
    # scores of bad branches are sums of about 6 cosines of standard deviation 1/sqrt(D), those of good ones at least
    # about 1: some third of the bad ones lies above 1/sqrt(D), and none above 1
    generator = torch.Generator().manual_seed(0)
    noise, advantages = torch.randn(32, 12, dimensions, generator=generator), torch.randn(32, 12, generator=generator)
    held = negative_weights(noise, advantages, factor=0.0) == 0
    assert 0.2 < held.sum() / (advantages < 0).sum() < 0.5
    assert torch.equal(held, negative_weights(noise, advantages, factor=0.0, threshold=dimensions**-0.5) == 0)
    assert (negative_weights(noise, advantages, factor=0.0, threshold=1.0) == 1).all()


def test_noise_is_recovered_from_where_branches_lead() -> None:
    table = coefficients(sd3_sigmas(5, shift=3.0), 0.7, "flow_sde").table
    latents, velocity = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    words = {"seed": 1, "sample_index": torch.arange(2), "iteration": 0}
    drawn = [ops.sde_step(latents, velocity, table, 2, stream=300 + k, **words)[0] for k in range(3)]
    arrivals = torch.stack(drawn, dim=1).flatten(0, 1)
    expected = torch.stack([gaussian((3, 4), step=2, stream=300 + k, **words) for k in range(3)], dim=1).flatten(2)
    found = branch_noise(latents, velocity, arrivals, table[2])
    torch.testing.assert_close(found, table[2, C] * expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    noise, advantages = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for options, message in (
        ({"factor": 1.5}, "factor must be in"),
        ({"factor": 0.5, "threshold": -1}, "threshold must be finite and at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            negative_weights(noise, advantages, **options)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4\] and \[6\]"):
        negative_weights(noise, advantages.flatten(), factor=0.5)
