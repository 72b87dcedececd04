"""What the pretraining stages share: the optimiser loop, kept stages, and writing the pipeline directory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

_AVERAGE, _STATE = "average::", "optimizer::"
CHUNK = 4_000
"""Pictures of one file of a data set."""
WARMUP_STEPS = 200
CURVE_STEPS = 50
"""Steps whose mean loss is one point of the curve."""


@dataclass
class Log:
    """Loss curve and seconds of every stage; saved with the stage."""

    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Stages:
    """Keeps each finished stage's weights and log; skips a stage that is already there."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.log = Log()
        if (directory / "log.json").exists():
            self.log = Log(**json.loads((directory / "log.json").read_text()))

    def run(self, name: str, modules: dict[str, nn.Module], train: Callable[[], list[tuple[int, float]]]) -> None:
        """Load stage `name` into `modules`, or train and keep it."""
        path = self.directory / f"{name}.safetensors"
        if path.exists():
            tensors = load_file(path)
            load_modules(modules, tensors)
            return
        started = time.perf_counter()
        self.log.losses[name] = train()
        self.log.seconds[name] = self.log.seconds.get(name, 0.0) + time.perf_counter() - started
        write_tensors(path, _module_tensors(modules))
        (self.directory / "log.json").write_text(json.dumps(vars(self.log)))


class Loop:
    """Iterates optimiser steps: clipped gradients, a schedule that ends flat, a loss curve, a progress bar.

    The learning rate warms up over 200 steps, stays, and falls in a straight line to nothing over the last
    `decay_steps`; so a loop that has not begun its decay can be made longer at any time, and loses nothing.
    AdamW trains every parameter but `matrices`, which Muon (torch's, its updates scaled to AdamW's size) trains with
    twice the learning rate.
    """

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        steps: int,
        lr: float,
        decay_steps: int,
        matrices: Sequence[nn.Parameter] = (),
    ):
        self.name, self.parameters, self.steps, self.decay_steps = name, parameters, steps, decay_steps
        taken = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in taken]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True), lr)
        ]
        if matrices:
            muon = torch.optim.Muon(list(matrices), weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append((muon, 2 * lr))
        self.curve: list[tuple[int, float]] = []
        self._start = 0
        self._recent: list[Tensor] = []

    def __iter__(self) -> Iterator[int]:
        with tqdm(total=self.steps, initial=self._start, desc=self.name, mininterval=30.0) as bar:
            self._bar = bar
            for step in range(self._start, self.steps):
                self._step = step
                yield step
                bar.update()

    def share(self, step: int) -> float:
        """The learning rate of a step, as a share of its highest."""
        return min(1.0, (step + 1) / WARMUP_STEPS, (self.steps - step) / max(1, self.decay_steps))

    def update(self, loss: Tensor, shown: Tensor | None = None) -> None:
        """One optimiser step on `loss`; the curve is of `shown`, where that is another."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * self.share(self._step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._recent.append((loss if shown is None else shown).detach())
        if (self._step + 1) % CURVE_STEPS == 0:
            self.curve.append((self._step + 1, float(torch.stack(self._recent).mean())))
            self._recent.clear()
            self._bar.set_postfix(loss=f"{self.curve[-1][1]:.4f}")

    def keep(self, path: Path, modules: dict[str, nn.Module], average: EMAModel) -> None:
        """Write a checkpoint: weights, average, optimiser moments, curve."""
        tensors = _module_tensors(modules)
        for i, (parameter, shadow) in enumerate(zip(self.parameters, average.shadow_params, strict=True)):
            tensors[f"{_AVERAGE}{i}"] = shadow
            tensors |= {f"{_STATE}{i}::{key}": value for key, value in self._state(parameter).items()}
        tensors["step"] = torch.tensor(self._step + 1)
        tensors["curve"] = torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 2)
        tensors["recent"] = torch.stack(self._recent) if self._recent else torch.empty(0)
        write_tensors(path, tensors)

    def restore(self, path: Path, modules: dict[str, nn.Module], average: EMAModel) -> None:
        """Continue from a checkpoint if there is one."""
        if not path.exists():
            return
        tensors = load_file(path)
        load_modules(modules, tensors)
        self._start = average.optimization_step = int(tensors["step"])
        self.curve = [(int(step), loss) for step, loss in tensors["curve"].tolist()]
        self._recent = list(tensors["recent"])
        for i, parameter in enumerate(self.parameters):
            average.shadow_params[i].copy_(tensors[f"{_AVERAGE}{i}"])
            prefix = f"{_STATE}{i}::"
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self._state(parameter).update(kept)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimiser's tensors for a parameter."""
        owner = next(o for o, _ in self.optimizers if any(p is parameter for g in o.param_groups for p in g["params"]))
        return owner.state[parameter]


def save(pipeline: Any, preview: Any, target: Path) -> None:
    """Write the pipeline directory in fp16, with `preview_decoder/` beside its components."""
    # fp16 copies by way of the state dict: the modules in use stay float32
    for name, module in {**pipeline.components, "preview_decoder": preview}.items():
        if isinstance(module, nn.Module):
            _save_half(module, target / name)
        elif module is not None:
            module.save_pretrained(target / name)
    pipeline.save_config(target)
    for path in [target / "model_index.json", *target.glob("*/config.json")]:
        # diffusers notes the directory that a module was loaded from
        settings = json.loads(path.read_text())
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2) + "\n")


def _save_half(module: Any, directory: Path) -> None:
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    if type(module).__module__.startswith("transformers."):
        module.save_pretrained(directory, state_dict=half)
    else:
        module.save_config(directory)
        write_tensors(directory / "diffusion_pytorch_model.safetensors", half)


def _module_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{key}::{name}": t for key, module in modules.items() for name, t in module.state_dict().items()}


def load_modules(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Weights by "module::name" into modules."""
    for key, module in modules.items():
        prefix = f"{key}::"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors by way of a temporary name, so that a file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
