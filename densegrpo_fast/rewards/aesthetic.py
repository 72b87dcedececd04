"""Aesthetic score: how much people like the look of a picture, whatever its prompt.

A small head on the unit-length picture features of CLIP ViT-L/14, trained on ratings from 1 to 10 (LAION's predictors;
the head in wide use is sac+logos+ava1-l14-linearMSE). They are published as pickle files, which can run any code when
read. So a head is converted once, and from then on read as safetensors:

    python -m densegrpo_fast.rewards.aesthetic sac+logos+ava1-l14-linearMSE.pth aesthetic.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from densegrpo_fast.common.files import user_path
from densegrpo_fast.rewards.clip import Clip

Activation = Literal["none", "relu"]
Layers = list[tuple[Tensor, Tensor]]
"""Weight [out, in] and bias [out] of each linear layer, first to last."""

_CONVERTER = "python -m densegrpo_fast.rewards.aesthetic"
_ACTIVATIONS = get_args(Activation)


class Aesthetic:
    """The aesthetic reward.

    Args:
        head: safetensors file of the head, made by this module's command.
        model: hub id or local directory of the CLIP model that the head was trained on, with safetensors weights.
        device: where to score; None = the current GPU, or the CPU.
        dtype: of the CLIP model; None = float16 on a GPU, float32 on the CPU. The head is float32.
        chunk: pictures per forward pass.

    Raises:
        OSError: head or model cannot be loaded; the message says which and what was expected.
        ValueError: chunk is below 1, or dtype is not a floating-point type.
    """

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chunk: int = 32,
    ):
        layers, self.activation = load_head(user_path(head))
        self.clip = Clip("aesthetic", model, None, device=device, dtype=dtype, chunk=chunk)
        if layers[0][0].shape[1] != self.clip.width:
            raise OSError(
                f"aesthetic: the head {head} takes {layers[0][0].shape[1]} features, {model} has {self.clip.width}; "
                "expected the CLIP model that the head was trained on"
            )
        self._layers = [(weight.to(self.clip.device), bias.to(self.clip.device)) for weight, bias in layers]

    def __call__(
        self, images: Tensor, prompts: list[str] | None = None, metadata: list[dict[str, Any]] | None = None
    ) -> Tensor:
        """Score pictures.

        Args:
            images: [N, 3, H, W] float in [0, 1], any size and device.
            prompts, metadata: not used.

        Returns:
            [N] float32 on the model's device, about 3 to 8 for real pictures.
        """
        return apply_head(self.clip.image_features(images), self._layers, self.activation)


@torch.no_grad()
def apply_head(features: Tensor, layers: Layers, activation: Activation) -> Tensor:
    """Score [N] of features [N, D]: the linear layers in turn, with the activation between them."""
    for number, (weight, bias) in enumerate(layers):
        features = linear(relu(features) if number and activation == "relu" else features, weight, bias)
    return features.squeeze(-1)


def load_head(path: Path) -> tuple[Layers, Activation]:
    """Read a head.

    Raises:
        OSError: the file is not there, is not safetensors, or is not a chain of linear layers that ends in one score.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OSError(f"aesthetic: there is no head {str(path)!r}; make one with {_CONVERTER} SOURCE.pth {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            activation = (file.metadata() or {}).get("activation")
    except SafetensorError:
        raise OSError(
            f"aesthetic: the head {str(path)!r} is not a safetensors file. A pickle file can run any code when it is "
            f"read, so it is refused; convert it with {_CONVERTER} {path.name} {path.with_suffix('.safetensors').name}"
        ) from None
    if activation not in _ACTIVATIONS:
        raise OSError(f"aesthetic: the head {str(path)!r} does not name its activation; make it with {_CONVERTER}")
    try:
        return layers_of(tensors), "relu" if activation == "relu" else "none"
    except ValueError as error:
        raise OSError(f"aesthetic: the head {str(path)!r} {error}") from None


def layers_of(tensors: Mapping[str, Tensor]) -> Layers:
    """The linear layers among named tensors, ordered by the numbers in their names (`layers.2.weight`); float32.

    Raises:
        ValueError: something else is among them, or they do not form a chain that ends in one number.
    """
    names = sorted({name.rpartition(".")[0] for name in tensors}, key=_numbers)
    layers = []
    for name in names:
        prefix = f"{name}." if name else ""
        weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected linear layers with weight and bias, got something else in {name or 'its root'!r}"
            )
        layers.append((weight.float(), bias.float()))
    if len(tensors) != 2 * len(layers) or not layers:
        unknown = sorted(key for key in tensors if key.rpartition(".")[2] not in ("weight", "bias"))
        raise ValueError(f"expected linear layers alone, got {unknown[:3] or 'nothing'}")
    shapes = [list(weight.shape) for weight, _ in layers]
    if any(earlier[0] != later[1] for earlier, later in zip(shapes, shapes[1:], strict=False)) or shapes[-1][0] != 1:
        raise ValueError(f"expected layers that follow one another and end in one score, got weights of shape {shapes}")
    return layers


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def convert(source: Path, target: Path, activation: Activation) -> Layers:
    """Write the head of a pickle file as safetensors, reading nothing from it but tensors.

    Args:
        source: state dict of an nn.Linear or of a Sequential of them (dropout has no weights).
        target: safetensors file to write.
        activation: what stands between the layers; the published linearMSE heads have none, reluMSE has relu.

    Raises:
        OSError: the source cannot be read or the target cannot be written.
        ValueError: the source holds anything but the tensors of such a head.
    """
    from pickle import UnpicklingError

    from safetensors.torch import save_file

    try:
        # weights_only: the reader knows tensors and containers, and refuses everything else
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError):
        # torch's own words advise to read it all the same, with everything that it would run
        raise ValueError(
            f"{source} is not a file of tensors: it is damaged, or holds something else, which is neither read nor run"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{source} is not a state dict, a mapping of names to tensors")
    try:
        layers = layers_of(tensors)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from None
    named = {
        f"layers.{number}.{kind}": tensor.contiguous().clone()
        for number, pair in enumerate(layers)
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }
    save_file(named, target, metadata={"activation": activation})
    return layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: convert a head from pickle to safetensors; returns the exit code."""
    parser = argparse.ArgumentParser(prog=_CONVERTER, description="Convert an aesthetic head to safetensors.")
    parser.add_argument("source", type=Path, help="the published .pth file")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--activation", choices=_ACTIVATIONS, default="none", help="between the layers (default: none)")
    options = parser.parse_args(arguments)
    if options.target.suffix != ".safetensors":
        parser.error(f"expected a target that ends in .safetensors, got {options.target}")
    try:
        layers = convert(options.source, options.target, options.activation)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    widths = [layers[0][0].shape[1], *(len(bias) for _, bias in layers)]
    print(f"{options.target}: layers {' -> '.join(map(str, widths))}, activation {options.activation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
