"""A pipeline's network by its configuration alone: its true architecture, on the meta device, without any weights."""

from __future__ import annotations

from typing import Any

import torch

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.files import user_path
from densegrpo_fast.common.pretrained import read_settings, silence_loading
from densegrpo_fast.models.families import FAMILIES
from densegrpo_fast.models.loading import directory_family
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.published import MODELS


def network_outline(path: str, *, rank: int, alpha: int, targets: list[str]) -> str | None:
    """What the network of `model.path` is, and what of it is trained.

    Args:
        path: a pipeline directory, or a hub id.
        rank, alpha, targets: as in `add_lora`; rank 0 = there is no adapter, all weights are trained.

    Returns:
        A line for people; None for a hub id whose configuration is not in the package (`published.MODELS`).

    Raises:
        SetupError: its configuration cannot be read; ValueError: a target matches no module.
    """
    with silence_loading(), torch.device("meta"):
        network = _network(path)
        if network is None:
            return None
        whole = sum(parameter.numel() for parameter in network.parameters())
        words = f"real architecture: {type(network).__name__} of {whole / 1e6:,.0f} million parameters, "
        if not rank:
            return words + "all of them trained"
        add_lora(network, rank=rank, alpha=alpha, targets=targets, seed=0)
    trained = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    return f"{words}the adapter on {len(trained) // 2} projections trains {sum(trained) / 1e6:.1f} million"


def _network(name: str) -> Any:
    import diffusers

    for model in MODELS.values():
        if name == model.hub:
            return getattr(diffusers, model.network)(**model.network_config)
    directory = user_path(name)
    if not directory.is_dir():
        return None
    part = FAMILIES[directory_family(directory).pipeline_class].network_part
    path = directory / part / "config.json"
    try:
        settings = read_settings(path)
        return getattr(diffusers, str(settings.get("_class_name"))).from_config(settings)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise SetupError(f"model.path: {path} describes no network: {error}") from None
