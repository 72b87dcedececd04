"""The low-rank adapter: adding it to a transformer, saving it for diffusers and ComfyUI, attaching a saved one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.files import ADAPTER_FILE, replace_bytes
from densegrpo_fast.common.pretrained import check_finite


def add_lora(transformer: Any, *, rank: int, alpha: int, targets: list[str], seed: int) -> None:
    """Freeze `transformer` and give the named projections a trainable float32 LoRA (arXiv 2106.09685) through peft.

    On a half-precision transformer its products are computed in that precision (`models/lora_linear.py`).

    Args:
        transformer: a diffusers model.
        rank, alpha: the update is alpha / rank * B A; A starts Gaussian, B zero.
        targets: suffixes of module names, e.g. "attn.to_q".
        seed: of A's initial values; the global generator is left as it was.

    Raises:
        ValueError: a target matches no module.
    """
    from densegrpo_fast.models.lora_linear import lora_config

    names = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"lora.targets: {target!r} matches no module of {type(transformer).__name__}")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            lora_config(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
        )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def base_fingerprint(network: Any) -> str:
    """SHA-256 over names, shapes and 64 values of each frozen weight: tells one base model from another in no time.

    The names are those of a network that carries an adapter, so it must carry one, with the same targets each time. Of
    a network whose weights are all trained it is over all of them, as they are now.
    """
    digest = hashlib.sha256()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(network.parameters())):
        trained = set()
    for name, weight in network.state_dict().items():
        if ".lora_" not in name and name not in trained:
            values = weight.detach().flatten()
            picked = values[:: max(1, len(values) // 64)].double().cpu()
            digest.update(f"{name}{tuple(weight.shape)}{picked.tolist()}".encode())
    return digest.hexdigest()


def lora_layers(parameters: Mapping[str, Tensor], *, rank: int, alpha: int) -> dict[str, Tensor]:
    """An adapter's parameters under the names, and with the values, that a file of diffusers has.

    alpha / rank is multiplied into B, so no loader can get the scale wrong: readers that find no alpha use 1.

    Args:
        parameters: by peft's name (`MODULE.lora_A.default.weight`), of a module of the transformer.

    Returns:
        `MODULE.lora_A.weight` and `MODULE.lora_B.weight`: [rank, in] and [out, rank] float32 on the CPU.
    """
    layers: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        layers[name.replace(".default.", ".")] = (tensor.detach().float() * scale).cpu().contiguous()
    return layers


COMFYUI_FILE = "comfyui.safetensors"
_WAN = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Part of a layer's name in diffusers -> in Wan's own code, whose names ComfyUI has."""


def comfyui_layers(layers: Mapping[str, Tensor], kind: str) -> dict[str, Tensor] | None:
    """The layers under the names that ComfyUI knows, where it does not read those of diffusers.

    It reads diffusers' of SD3, FLUX, Qwen-Image and Z-Image (`comfy/lora.py` at 17358c8); of a UNet kohya's, of Wan the
    original code's.

    Args:
        layers: as `lora_layers` returns them.
        kind: class of the network.

    Returns:
        None where the file of diffusers will do.
    """
    if kind == "UNet2DConditionModel":
        halves = {"lora_A": "lora_down", "lora_B": "lora_up"}
        named = {}
        for name, tensor in layers.items():
            module, half, weight = name.rsplit(".", 2)
            named[f"lora_unet_{module.replace('.', '_')}.{halves[half]}.{weight}"] = tensor
        return named
    if kind == "WanTransformer3DModel":
        named = {}
        for name, tensor in layers.items():
            part = next((part for part in _WAN if part in name), "")
            named[f"diffusion_model.{name.replace(part, _WAN[part]) if part else name}"] = tensor
        return named
    return None


def save_lora(transformer: Any, directory: Path, *, rank: int, alpha: int) -> Path:
    """Write the adapter as diffusers' `pytorch_lora_weights.safetensors` and return the file; see `lora_layers`.

    Where ComfyUI does not know these names, `comfyui.safetensors` lies beside it.
    """
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    layers = lora_layers(get_peft_model_state_dict(transformer), rank=rank, alpha=alpha)
    check_finite("the trained adapter", layers)
    # diffusers writes in place, and as a file that its owner alone may read
    with TemporaryDirectory() as staged:
        # every pipeline of a kind names them alike: transformer.MODULE or unet.MODULE
        if isinstance(transformer, UNet2DConditionModel):
            StableDiffusionPipeline.save_lora_weights(staged, unet_lora_layers=layers, safe_serialization=True)
        else:
            StableDiffusion3Pipeline.save_lora_weights(staged, transformer_lora_layers=layers, safe_serialization=True)
        data = (Path(staged) / ADAPTER_FILE).read_bytes()
    directory.mkdir(parents=True, exist_ok=True)
    replace_bytes(directory / ADAPTER_FILE, data, digest=True)
    if (renamed := comfyui_layers(layers, type(transformer).__name__)) is not None:
        replace_bytes(directory / COMFYUI_FILE, save(renamed, metadata={"format": "pt"}), digest=True)
    return directory / ADAPTER_FILE


def save_parameters(parameters: Mapping[str, Tensor], directory: Path) -> Path:
    """Write the trained parameters of a network without a LoRA as they are, and return the file."""
    from safetensors.torch import save

    values = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    check_finite("the trained parameters", values)
    directory.mkdir(parents=True, exist_ok=True)
    replace_bytes(directory / "parameters.safetensors", save(values), digest=True)
    return directory / "parameters.safetensors"


def attach_lora(transformer: Any, layers: Mapping[str, Tensor]) -> None:
    """Give a transformer without an adapter this one, frozen, in float32 whatever its own precision.

    diffusers' own loader would round it to the transformer's dtype; a run keeps it unrounded.

    Args:
        layers: as `lora_layers` returns them.

    Raises:
        ValueError: a layer has no module, or not the shape that it needs; nothing was changed.
    """
    from densegrpo_fast.models.lora_linear import lora_config

    modules = dict(transformer.named_modules())
    ranks: dict[str, int] = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in layers}):
        down, up = layers.get(f"{name}.lora_A.weight"), layers.get(f"{name}.lora_B.weight")
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or down is None or up is None:
            raise ValueError(f"the adapter's layer {name!r} does not belong to this {type(transformer).__name__}")
        if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            shapes = f"{list(up.shape)} x {list(down.shape)}, the model {list(weight.shape)}"
            raise ValueError(f"the adapter's layer {name!r} has the shape {shapes}")
        ranks[name] = len(down)
    common = next(iter(ranks.values()), 1)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(
            lora_config(
                r=common,
                lora_alpha=common,
                rank_pattern=others,
                alpha_pattern=others,
                target_modules=list(ranks),
            )
        )
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = layers[name.replace(".default.", ".")].to(parameter.device)
            parameter.requires_grad_(False)


@contextmanager
def attached_lora(transformer: Any, layers: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the transformer has the adapter, as `attach_lora` says; it leaves without.

    Raises:
        ValueError: it does not fit.
    """
    attach_lora(transformer, layers)
    try:
        yield
    finally:
        transformer.unload_lora()
