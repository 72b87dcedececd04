"""The optimiser loop of pretraining: that an interrupted stage ends in the very weights of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from densegrpo_fast.embedded.stages import WARMUP_STEPS, Loop

STEPS, DECAY = 70, 10


def train(partial: Path, stop: int | None, restore: bool, steps: int = STEPS) -> tuple[list[Tensor], Loop]:
    """Weights and their average after `steps` steps, or none of them if stopped and kept before; and the loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    parameters = list(model.parameters())
    average = EMAModel(parameters, decay=0.99, use_ema_warmup=True, power=0.75, foreach=True)
    matrices = [p for p in parameters if p.ndim == 2]
    loop = Loop("test", parameters, steps, lr=1e-1, decay_steps=DECAY, matrices=matrices)
    if restore:
        loop.restore(partial, {"model": model}, average)
    for step in loop:
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loop.update((model(inputs) - inputs.flip(1)).square().mean())
        average.step(parameters)
        if step + 1 == stop:
            loop.keep(partial, {"model": model}, average)
            return [], loop
    return [p.detach().clone() for p in [*parameters, *average.shadow_params]], loop


@pytest.mark.parametrize("stop", [1, 55, STEPS - 1])
def test_a_restored_loop_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    partial = tmp_path / "partial.safetensors"
    uninterrupted, loop = train(partial, stop=None, restore=False)
    train(partial, stop=stop, restore=False)
    continued, restored = train(partial, stop=None, restore=True)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, continued, strict=True))
    assert loop.curve == restored.curve and len(loop.curve) == 1


def test_a_loop_is_made_longer_before_its_decay(tmp_path: Path) -> None:
    partial = tmp_path / "partial.safetensors"
    longer, _ = train(partial, stop=None, restore=False, steps=STEPS + 20)
    train(partial, stop=STEPS - DECAY, restore=False)
    continued, _ = train(partial, stop=None, restore=True, steps=STEPS + 20)
    assert all(torch.equal(a, b) for a, b in zip(longer, continued, strict=True))


def test_the_learning_rate_warms_up_stays_and_ends_flat() -> None:
    loop = Loop("test", [nn.Parameter(torch.zeros(1))], 1000, lr=1.0, decay_steps=100)
    shares = [loop.share(step) for step in range(1000)]
    assert shares[0] == 1 / WARMUP_STEPS and set(shares[WARMUP_STEPS:901]) == {1.0}
    assert shares[901:] == sorted(shares[901:], reverse=True) and shares[-1] == 1 / 100


def test_both_optimisers_train_their_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    untrained = [
        p.detach().clone() for p in nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).parameters()
    ]
    trained = train(tmp_path / "partial.safetensors", stop=None, restore=False)[0][: len(untrained)]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(untrained, trained, strict=True))
