"""The optimiser loop of pretraining: that an interrupted stage ends in the very weights of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from densegrpo_fast.embedded.stages import Loop

STEPS = 20


def train(partial: Path, stop: int | None, restore: bool) -> list[Tensor]:
    """Weights and their average after `STEPS` steps, or None of them if stopped and kept before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    parameters = list(model.parameters())
    average = EMAModel(parameters, decay=0.99, use_ema_warmup=True, power=0.75, foreach=True)
    loop = Loop("test", parameters, STEPS, lr=1e-2, matrices=[p for p in parameters if p.ndim == 2])
    if restore:
        loop.restore(partial, {"model": model}, average)
    for step in loop:
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loop.update((model(inputs) - inputs.flip(1)).square().mean())
        average.step(parameters)
        if step + 1 == stop:
            loop.keep(partial, {"model": model}, average)
            return []
    return [p.detach().clone() for p in [*parameters, *average.shadow_params]]


@pytest.mark.parametrize("stop", [1, 10, STEPS - 1])
def test_a_restored_loop_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    partial = tmp_path / "partial.safetensors"
    uninterrupted = train(partial, stop=None, restore=False)
    train(partial, stop=stop, restore=False)
    continued = train(partial, stop=None, restore=True)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, continued, strict=True))


def test_both_optimisers_train_their_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    untrained = [
        p.detach().clone() for p in nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).parameters()
    ]
    trained = train(tmp_path / "partial.safetensors", stop=None, restore=False)[: len(untrained)]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(untrained, trained, strict=True))
