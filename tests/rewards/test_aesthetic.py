"""The aesthetic reward on a tiny random CLIP, and the conversion of its head from pickle."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from densegrpo_fast.rewards import aesthetic
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.clip import Clip
from densegrpo_fast.rewards.registry import create


def published_head(width: int = 8) -> nn.Module:
    """An MLP laid out as LAION's: linear layers and dropout in a Sequential called layers."""
    module = nn.Module()
    module.layers = nn.Sequential(
        nn.Linear(width, 6), nn.Dropout(0.2), nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 1)
    )
    return module


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    path = tmp_path / "head.pth"
    torch.save(published_head().state_dict(), path)
    return path


@pytest.mark.ci
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_scores_follow_the_formula(clip_directory, pickled, tmp_path, activation, capsys):
    target = tmp_path / "head.safetensors"
    assert aesthetic.main([str(pickled), str(target), "--activation", activation]) == 0
    assert "layers 8 -> 6 -> 4 -> 1" in capsys.readouterr().out
    reward = create("aesthetic", head=str(target), model=str(clip_directory), device="cpu", chunk=2)
    images = torch.rand(5, 3, 40, 40)
    scores = RewardMixture({"aesthetic": (reward, 1.0)})(images, ["any"] * 5).values
    # the head by hand, in float64, on features of length 1
    values = Clip("aesthetic", str(clip_directory), None, device="cpu").image_features(images).double()
    state = torch.load(pickled, weights_only=True)
    for number in (0, 2, 4):
        values = values.clamp(min=0) if number and activation == "relu" else values
        values = values @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    torch.testing.assert_close(scores.double(), values[:, 0], rtol=1e-5, atol=1e-6)
    assert reward(images[:0]).shape == (0,)


def test_a_single_linear_layer_is_a_head_too(clip_directory, tmp_path):
    head = nn.Linear(8, 1)
    torch.save(head.state_dict(), tmp_path / "linear.pth")
    aesthetic.convert(tmp_path / "linear.pth", tmp_path / "linear.safetensors", "none")
    reward = aesthetic.Aesthetic(str(tmp_path / "linear.safetensors"), str(clip_directory), device="cpu")
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(reward(images), head(reward.clip.image_features(images))[:, 0])


def test_layers_follow_their_numbers_not_their_spelling():
    sizes = {name: (2, 2) for name in ("layers.2", "layers.9")} | {"layers.10": (1, 2)}
    tensors = {f"{name}.weight": torch.full(shape, float(i)) for i, (name, shape) in enumerate(sizes.items())}
    tensors |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    assert [weight[0, 0].item() for weight, _ in aesthetic.layers_of(tensors)] == [0.0, 1.0, 2.0]


def test_a_pickled_head_is_refused_with_the_way_out(pickled, clip_directory):
    with pytest.raises(OSError, match=r"not a safetensors file. A pickle .* refused; convert it with .* head.pth"):
        create("aesthetic", head=str(pickled), model=str(clip_directory))


class Malice:
    """What a pickle file can do when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_converter_runs_nothing_that_a_pickle_asks_for(tmp_path, capsys):
    torch.save({"layers.0.weight": Malice(tmp_path / "done")}, tmp_path / "bad.pth")
    with pytest.raises(SystemExit) as stop:
        aesthetic.main([str(tmp_path / "bad.pth"), str(tmp_path / "bad.safetensors")])
    assert stop.value.code == 2
    assert "bad.pth is not a file of tensors" in capsys.readouterr().err
    assert not (tmp_path / "done").exists() and not (tmp_path / "bad.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "got nothing"),
        ({"a.weight": torch.zeros(1, 3)}, "weight and bias, got something else in 'a'"),
        ({"a.weight": torch.zeros(3), "a.bias": torch.zeros(3)}, "something else in 'a'"),
        ({"a.weight": torch.zeros(1, 3), "a.bias": torch.zeros(1), "a.scale": torch.zeros(1)}, r"got \['a.scale'\]"),
        (
            {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)},
            r"end in one score, got weights of shape \[\[2, 3\]\]",
        ),
        (
            {f"{n}.{k}": t for n in "12" for k, t in (("weight", torch.zeros(1, 3)), ("bias", torch.zeros(1)))},
            "follow one another",
        ),
    ],
)
def test_what_is_no_head_is_refused(tmp_path, tensors, problem):
    torch.save(OrderedDict(tensors), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd.pth .*{problem}"):
        aesthetic.convert(tmp_path / "odd.pth", tmp_path / "odd.safetensors", "none")
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"activation": "none"})
    with pytest.raises(OSError, match=problem):
        aesthetic.load_head(tmp_path / "odd.safetensors")


def test_other_mistakes_are_named(tmp_path, clip_directory, capsys):
    with pytest.raises(OSError, match="there is no head .*absent.safetensors"):
        create("aesthetic", head=str(tmp_path / "absent.safetensors"), model=str(clip_directory))
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(OSError, match="does not name its activation"):
        create("aesthetic", head=str(tmp_path / "bare.safetensors"), model=str(clip_directory))
    torch.save(nn.Linear(5, 1).state_dict(), tmp_path / "five.pth")
    aesthetic.convert(tmp_path / "five.pth", tmp_path / "five.safetensors", "none")
    with pytest.raises(OSError, match="takes 5 features, .* has 8"):
        create("aesthetic", head=str(tmp_path / "five.safetensors"), model=str(clip_directory))
    for arguments, problem in (
        ([str(tmp_path / "none.pth"), str(tmp_path / "x.safetensors")], "No such file"),
        ([str(tmp_path / "five.pth"), str(tmp_path / "x.pt")], "ends in .safetensors"),
    ):
        with pytest.raises(SystemExit):
            aesthetic.main(arguments)
        assert problem in capsys.readouterr().err
