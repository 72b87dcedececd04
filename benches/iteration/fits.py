"""What each published model costs, and with which settings it fits GPUs of 24 to 141 GB: counted, not measured.

    python -m benches.iteration.fits --json benches/results/fits.json

Operations are those of `python -m densegrpo_fast.fidelity --cost --config PRESET`, memory is the estimate that a run
prints (`training/memory.py`): by the tensors alone, so a tenth of each GPU is left to what it does not count. Eight
GPUs share the samples, the base stands whole in each, and text encoders do not stay (`model.prompt_cache`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benches.common.record import provenance, write_json
from benches.iteration.layouts import memory_of
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.fidelity.costs import own_record
from densegrpo_fast.models.memory import ModelMemory
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.training.memory import estimate

SETTINGS: dict[str, tuple[str, ...]] = {
    "sd35_medium": ("--config", "sd35_medium_pickscore"),
    "sd35_large": ("--config", "sd35_medium_pickscore"),
    "flux": ("--config", "flux1_dev_pickscore"),
    "flux2_klein": ("--config", "flux2_klein_pickscore"),
    "qwen_image": ("--config", "qwen_image_pickscore"),
    "wan21_1b": ("--config", "wan21_pickscore"),
    "z_image": ("--config", "z_image_pickscore"),
    "sd15": ("--config", "sd15_pickscore"),
    "sdxl": ("--config", "sd15_pickscore", "--model.height", "1024", "--model.width", "1024"),
}
"""Preset whose settings each model gets, of its own where there is one."""
GPUS = (24, 48, 80, 141)
"""Memory in 10^9 bytes."""
PROCESSES, LEFT = 8, 0.9
ROWS = (16, 8, 4, 2, 1)


def fit(name: str) -> dict[str, Any]:
    """What a model costs, and the most rows of a forward that each GPU has room for, activations kept or not."""
    model = MODELS[name]
    config, _ = parse_arguments([*SETTINGS[name], "--model.path", model.hub, "--model.vae_decode", "sliced"])
    record, memory = own_record(config), memory_of(config)
    fits: dict[str, dict[str, int | None]] = {str(size): {} for size in GPUS}
    for kind, again in (("kept", False), ("checkpointed", True)):
        needed = {rows: _needed(config, memory, rows, again) for rows in ROWS}
        for size in GPUS:
            fitting = (rows for rows in ROWS if needed[rows] <= LEFT * size * 1e9)
            fits[str(size)][kind] = next(fitting, None)
    return {
        "title": memory.architecture.title,
        "preset": config.preset,
        "parameters": sum(p.numel() for p in memory.network.parameters() if not p.requires_grad),
        "operations": record["operations"],
        "over_replayed_sparse": record["over_replayed_sparse"],
        "over_streamed_sparse": record["over_streamed_sparse"],
        "fits": fits,
    }


def _needed(config: Config, memory: ModelMemory, rows: int, again: bool) -> int:
    """Bytes of a process with so many rows in a forward, activations kept or computed again."""
    sampler = config.sampler.model_copy(update={"micro_batch": rows})
    lookahead = config.lookahead.model_copy(update={"chunk": rows})
    model = config.model.model_copy(update={"gradient_checkpointing": again})
    changed = config.model_copy(update={"sampler": sampler, "lookahead": lookahead, "model": model})
    return estimate(changed, memory, processes=PROCESSES).total


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    options = parser.parse_args(arguments)
    with user_errors_exit():
        found = {name: fit(name) for name in options.models}
        settings = {"processes": PROCESSES, "left": LEFT}
        write_json(options.json, provenance() | {"settings": settings, "models": found})
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
