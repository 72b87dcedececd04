"""The low-rank adapter: adding it to a transformer, and saving it so that diffusers and ComfyUI load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def add_lora(transformer: Any, *, rank: int, alpha: int, targets: list[str], seed: int) -> None:
    """Freeze `transformer` and give the named projections a trainable float32 LoRA (arXiv 2106.09685) through peft.

    Args:
        transformer: a diffusers model.
        rank, alpha: the update is alpha / rank * B A; A starts Gaussian, B zero.
        targets: suffixes of module names, e.g. "attn.to_q".
        seed: of A's initial values; the global generator is left as it was.

    Raises:
        ValueError: a target matches no module.
    """
    from peft import LoraConfig

    names = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"lora.targets: {target!r} matches no module of {type(transformer).__name__}")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
        )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_lora(transformer: Any, directory: Path, *, rank: int, alpha: int) -> Path:
    """Write the adapter as diffusers' `pytorch_lora_weights.safetensors` and return the file.

    alpha / rank is multiplied into B, so no loader can get the scale wrong: readers that find no alpha use 1.
    """
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict

    layers: dict[str, Tensor] = {}
    for name, tensor in get_peft_model_state_dict(transformer).items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        layers[name] = (tensor.detach().float() * scale).cpu().contiguous()
    StableDiffusion3Pipeline.save_lora_weights(directory, transformer_lora_layers=layers, safe_serialization=True)
    return directory / "pytorch_lora_weights.safetensors"
