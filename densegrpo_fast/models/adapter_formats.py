"""Adapters as people have them, read with their true scale, or refused with the way to convert them.

Read are LoRAs of a transformer's linear layers in the forms of diffusers (with or without its metadata in the file's
header), PEFT (a folder with adapter_config.json), ComfyUI (`diffusion_model.`) and kohya's sd-scripts, the last two
also by the names of the original SD3 code, whose one projection for q, k and v becomes three. What the update is
multiplied by, alpha / rank or with rsLoRA alpha / sqrt(rank), is multiplied into B, so it cannot get lost again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.files import PEFT_CONFIG, PEFT_WEIGHTS, read_verified
from densegrpo_fast.common.pretrained import check_finite

_HEADER = "lora_adapter_metadata"
"""Key of the safetensors header under which diffusers keeps the settings of PEFT."""

_LAYER = re.compile(r"(?P<module>.+?)\.(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.weight")
_DOWN = ("lora_A", "lora_down", "lora.down")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_KOHYA = ("lora_unet_", "lora_transformer_")
_DORA = "DoRA, which rescales the weights themselves: merge it into the model, or train without it"
_OTHERS = {
    "lora_magnitude_vector": _DORA,
    "dora_scale": _DORA,
    "hada_w": "LoHa: extract a LoRA from the merged model (sd-scripts' extract_lora_from_models.py)",
    "lokr_w": "LoKr: extract a LoRA from the merged model (sd-scripts' extract_lora_from_models.py)",
    "lora_mid": "LoCon with a convolution's third factor: train a LoRA of linear layers alone",
    "lora_bias": "a LoRA with biases: train it with bias none",
    ".bias": "a LoRA with biases: train it with bias none",
    "text_encoder": "a LoRA of text encoders, too: save the layers of the transformer alone",
    "lora_te": "a LoRA of text encoders, too: save the layers of the transformer alone",
}
"""Part of a tensor's name -> what such a file is, and the way out."""

_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
"""Layer of a joint block of the original SD3 code -> those of diffusers that its output is made of, in order."""


@dataclass(frozen=True)
class _Scaling:
    """What PEFT's settings say of the factor of an update.

    Attributes:
        rank, alpha: of every layer, None = the file does not say.
        rank_pattern, alpha_pattern: of some layers, by the ends of their names.
        rslora: whether the factor is alpha / sqrt(rank).
    """

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _Scaling:
        """Of PEFT's settings.

        Raises:
            ValueError: they are of another kind of adapter.
        """
        if str(settings.get("peft_type") or "LORA").upper() != "LORA":
            raise ValueError(f"it is a {settings['peft_type']}, expected a LORA")
        if settings.get("use_dora"):
            raise ValueError(f"it is {_DORA}")
        if settings.get("modules_to_save"):
            raise ValueError("it holds whole layers, too (modules_to_save): merge it into the model")
        try:
            found = cls(
                int(settings["r"]),
                float(settings["lora_alpha"]),
                {str(key): int(value) for key, value in (settings.get("rank_pattern") or {}).items()},
                {str(key): float(value) for key, value in (settings.get("alpha_pattern") or {}).items()},
                bool(settings.get("use_rslora")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError("its settings hold no rank r and lora_alpha") from None
        return found

    def factor(self, module: str, rank: int, alpha: float | None) -> float:
        """What a layer's update is multiplied by.

        Args:
            rank: of its tensors.
            alpha: from a tensor of its own; None = there is none.

        Raises:
            ValueError: the settings say another rank.
        """
        said = _matching(self.rank_pattern, module, self.rank)
        if said is not None and said != rank:
            raise ValueError(f"its settings say rank {said} of {module}, its tensors have {rank}")
        if alpha is None:
            alpha = _matching(self.alpha_pattern, module, self.alpha)
        # without any alpha a reader takes the rank
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.rslora else rank)


def read_lora(path: Path) -> dict[str, Tensor]:
    """The layers of an adapter's file by the names of diffusers, on the CPU.

    Args:
        path: a safetensors file; beside one of PEFT lies its adapter_config.json.

    Returns:
        `MODULE.lora_A.weight` [rank, in] and `MODULE.lora_B.weight` [out, rank] float32, whose product is the update.

    Raises:
        ValueError: it cannot be read, or is none of the forms that are; the message says what it is.
        NonFiniteError: a tensor is not finite.
    """
    import safetensors.torch

    try:
        data = read_verified(path)
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except Exception as error:  # the library raises its own kinds for a damaged file
        raise ValueError(f"{path} cannot be read: {error}") from None
    check_finite(str(path), tensors)
    try:
        layers = dict(_layers(tensors, _scaling(path, header)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # an alpha may be so large, or no number at all
    check_finite(str(path), layers)
    return layers


def _scaling(path: Path, header: Mapping[str, str]) -> _Scaling:
    """What the header, or the folder's settings, say."""
    source = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_WEIGHTS and source.is_file():
        try:
            settings = json.loads(read_verified(source))
        except (OSError, ValueError, RecursionError):
            settings = None
    elif _HEADER in header:
        try:
            settings = json.loads(header[_HEADER])
        except (ValueError, RecursionError):
            settings = None
        if isinstance(settings, dict):
            settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    else:
        return _Scaling()
    if not isinstance(settings, dict):
        raise ValueError(f"its settings ({PEFT_CONFIG}, or {_HEADER} in its header) are damaged")
    return _Scaling.of(settings)


def _layers(tensors: Mapping[str, Tensor], scaling: _Scaling) -> Iterator[tuple[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        if other := next((what for part, what in _OTHERS.items() if part in name), None):
            raise ValueError(f"it is {other} (tensor {name!r})")
        if name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor.item())
            continue
        found = _LAYER.fullmatch(name)
        if found is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"expected a LoRA of linear layers of a transformer, got the tensor {name!r}")
        halves.setdefault(found["module"], {})["A" if found["half"] in _DOWN else "B"] = tensor.float()
    if not halves:
        raise ValueError("it holds no layer")
    if stray := sorted({*alphas} - {*halves}):
        raise ValueError(f"it has an alpha of {stray[0]!r} and no such layer")
    for module, pair in halves.items():
        if {*pair} != {"A", "B"} or not len(pair["A"]) == pair["B"].shape[1] > 0:
            raise ValueError(f"expected two matching halves of the layer {module!r}")
        names = _diffusers_names(module)
        factor = scaling.factor(_plain(module), len(pair["A"]), alphas.get(module))
        if len(pair["B"]) % len(names):
            raise ValueError(f"expected the layer {module!r} to have outputs for q, k and v")
        for name, up in zip(names, pair["B"].chunk(len(names)), strict=True):
            yield f"{name}.lora_A.weight", pair["A"]
            yield f"{name}.lora_B.weight", (up * factor).contiguous()


def _plain(module: str) -> str:
    """A layer's name without what tools put before it."""
    while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None):
        module = module.removeprefix(prefix)
    return module


def _diffusers_names(module: str) -> tuple[str, ...]:
    """What a layer is called by diffusers: one name, or three of a projection to q, k and v.

    Raises:
        ValueError: it is named by an unknown code.
    """
    plain = _plain(module)
    flat = next((plain.removeprefix(prefix) for prefix in _KOHYA if plain.startswith(prefix)), None)
    if flat is None:
        block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", plain)
        if block is None:
            return (plain,)
        known = {layer: layer for layer in _FUSED}
    else:
        # in kohya's names every dot is an underscore
        block = re.fullmatch(r"joint_blocks_(\d+)_(.+)", flat)
        known = {layer.replace(".", "_"): layer for layer in _FUSED}
    layer = None if block is None else known.get(block[2])
    if block is None or layer is None:
        raise ValueError(
            f"its layer {module!r} is not known by that name; expected attention and feed-forward layers of SD3's "
            "joint blocks, or the names of diffusers: load it with diffusers and save it with save_lora_weights"
        )
    return tuple(f"transformer_blocks.{block[1]}.{name}" for name in _FUSED[layer])


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a name ends with, as PEFT matches them."""
    for pattern, value in patterns.items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('transformer.')})", module):
                return value
        except re.error:
            raise ValueError(f"its settings hold the pattern {pattern!r}, which is none") from None
    return otherwise


def fit_to(layers: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter], scale: float) -> None:
    """Let a new adapter begin as a saved one; its other layers stay as they are.

    Args:
        layers: as `read_lora` returns them.
        parameters: of the new adapter, by peft's names.
        scale: alpha / rank of the new adapter, by which its B is divided.

    Raises:
        ValueError: a layer is not one of the new adapter's, or has another rank.
    """
    own = {name.replace(".default.", "."): parameter for name, parameter in parameters.items()}
    for name, values in layers.items():
        if name not in own:
            raise ValueError(f"its layer {name.rpartition('.lora_')[0]!r} is not among lora.targets")
        if own[name].shape != values.shape:
            raise ValueError(f"{name} has the shape {list(values.shape)}, expected {list(own[name].shape)} (lora.rank)")
    with torch.no_grad():
        for name, values in layers.items():
            own[name].copy_(values / scale if ".lora_B." in name else values)
