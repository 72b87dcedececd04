from __future__ import annotations

import pytest
import torch

from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.objective.weights import step_weights

TABLE = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table


def test_none_is_one_for_every_step():
    assert step_weights(TABLE, range(9), "none").tolist() == [1.0] * 10


def test_noise_aware_has_mean_one_over_the_trained_steps():
    weights = step_weights(TABLE, range(9), "noise_aware")
    assert weights[:9].mean().item() == pytest.approx(1.0, rel=1e-6)


def test_noise_aware_equals_the_published_constant_on_sd3s_grid():
    # TempFlow's code multiplies by 2.25 * step_std at T = 10, a = 0.7: 2.25 = 1 / mean of the nine steps' std (.444)
    weights = step_weights(TABLE, range(9), "noise_aware")
    torch.testing.assert_close(weights, 2.25 * TABLE[:, C], rtol=2e-3, atol=0)


def test_noise_aware_follows_the_trained_steps():
    assert step_weights(TABLE, [3], "noise_aware")[3].item() == 1.0


@pytest.mark.parametrize(("steps", "kind"), [([], "noise_aware"), ([0], "loud")])
def test_bad_arguments_are_refused(steps, kind):
    with pytest.raises(ValueError, match="step_weights"):
        step_weights(TABLE, steps, kind)
