"""Known reasons why an unchanged policy's importance ratio is not 1, each with the ablation that takes it away.

An ablation is a context manager that takes a loop and gives one in which, within the context, rollout and replay agree
in one respect. They work where all code must pass (the network's forward, its layers, torch's functions, the step op,
the table of coefficients), so they need not know what causes the difference, and they can be nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from densegrpo_fast.doctor.loop import Loop, lora_layers
from densegrpo_fast.flow import ops  # noqa: F401 - registers the ops that are watched for
from densegrpo_fast.flow.dynamics import C, StepCoefficients, coefficients
from densegrpo_fast.sampling.rollout import Rollout, Trajectory

TINY_STD = 0.01
"""Injected noise (standard deviation) below which rounding differences in a velocity become visible in the ratio."""

_ATTENTION = F.scaled_dot_product_attention
_DROPOUTS = {
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
}


@dataclass(frozen=True)
class Cause:
    """One possible reason.

    Attributes:
        name: how reports and JSON call it.
        cause: what differs between rollout and replay if this is the cause.
        remedy: what to do then.
        ablation: gives the loop without this difference.
        applies: whether the loop could suffer from it at all.
    """

    name: str
    cause: str
    remedy: str
    ablation: Callable[[Loop], AbstractContextManager[Loop]]
    applies: Callable[[Loop], bool] = lambda loop: True


class StepRecorder(TorchDispatchMode):
    """Sees every stochastic step: the state it started from, the state it computed and its log-probability.

    Attributes:
        steps: step index -> (latents, next_latents, log_prob), copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.densegrpo_fast.sde_step.default:
            latents, step_index = args[0], args[5]
            self.steps[int(step_index[0])] = (latents.clone(), result[0].clone(), result[1].clone())
        return result


@contextmanager
def exact_storage(loop: Loop) -> Iterator[Loop]:
    """The replay gets the states and log-probabilities that the rollout computed, not what was stored of them."""
    recorder = StepRecorder()

    def rollout(table: StepCoefficients) -> Trajectory:
        recorder.steps.clear()
        with recorder:
            trajectory = loop.rollout(table)
        if not isinstance(trajectory, Trajectory):
            raise RuntimeError("branches take several steps from one state, and only one of them was seen")
        seen = recorder.steps
        if any(step not in seen or seen[step][0].shape != trajectory.latents[step].shape for step in loop.steps):
            raise RuntimeError("the rollout takes its steps by another function than ops.sde_step on all samples")
        log_probs = trajectory.log_probs.float().clone()
        for step in loop.steps:
            log_probs[step] = seen[step][2]
        return replace(trajectory, log_probs=log_probs)

    def replay(trajectory: Rollout, step: int) -> Tensor:
        assert isinstance(trajectory, Trajectory)
        latents = trajectory.latents.float().clone()
        latents[step], latents[step + 1], _ = recorder.steps[step]
        return loop.replay(replace(trajectory, latents=latents), step)

    yield replace(loop, rollout=rollout, replay=replay)


@contextmanager
def grid_timesteps(loop: Loop) -> Iterator[Loop]:
    """Every forward gets the timestep of the schedule that is nearest to what it is given, in float32."""
    sigmas = loop.coefficients.sigmas.float()

    def snap(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = options["timestep"]
        # in [0, 1000], or in [0, 1] as FLUX takes it
        grid = (1000.0 if given.max() > 1 else 1.0) * sigmas.to(given.device)
        nearest = (given.float()[:, None] - grid).abs().argmin(dim=1)
        return arguments, options | {"timestep": grid[nearest]}

    handle = loop.model.network.register_forward_pre_hook(snap, with_kwargs=True)
    try:
        yield loop
    finally:
        handle.remove()


@contextmanager
def single_rows(loop: Loop) -> Iterator[Loop]:
    """Every forward is evaluated row by row, so that its result cannot depend on the batch it is in."""

    def by_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*arguments: Any, **options: Any) -> tuple[Tensor]:
            batch = len(arguments[0] if arguments else options["hidden_states"])

            def row(value: Any, index: int) -> Any:
                batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
                return value[index : index + 1] if batched else value

            outputs = [
                forward(*(row(value, i) for value in arguments), **{key: row(v, i) for key, v in options.items()})[0]
                for i in range(batch)
            ]
            return (torch.cat(outputs),)

        return evaluate

    with _forward_replaced(loop.model.network, by_rows):
        yield loop


@contextmanager
def one_attention(loop: Loop) -> Iterator[Loop]:
    """Attention is PyTorch's unfused form everywhere, by the processors that the network has at the start."""

    class Unfused(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not _ATTENTION:
                return func(*args, **(kwargs or {}))
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))

    layers = [module for module in loop.model.network.modules() if getattr(module, "processor", None) is not None]
    processors = {layer: layer.processor for layer in layers}

    def put_back(layer: Any, _: Any) -> None:
        layer.processor = processors[layer]

    with Unfused(), _before_forwards(layers, put_back):
        yield loop


@contextmanager
def unmerged_adapter(loop: Loop) -> Iterator[Loop]:
    """No LoRA is merged into its weights, nor taken out of them."""

    def nothing(safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        pass

    layers = lora_layers(loop.model.network)
    merged = [layer for layer in layers if layer.merged]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.merge = layer.unmerge = nothing
    try:
        yield loop
    finally:
        for layer in layers:
            del layer.merge, layer.unmerge
        for layer in merged:
            layer.merge()


@contextmanager
def enabled_adapter(loop: Loop) -> Iterator[Loop]:
    """Every LoRA takes part in every forward, whatever has been switched off."""

    def enable(layer: Any, _: Any) -> None:
        layer._disable_adapters = False

    with _before_forwards(lora_layers(loop.model.network), enable):
        yield loop


@contextmanager
def no_dropout(loop: Loop) -> Iterator[Loop]:
    """Dropout passes everything, whoever calls it."""

    class Passing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = dict(kwargs or {})
            if func in _DROPOUTS:
                return args[0] if args else options["input"]
            if func is _ATTENTION:
                # query, key, value, mask, dropout_p, ...
                if len(args) > 4:
                    args = (*args[:4], 0.0, *args[5:])
                else:
                    options["dropout_p"] = 0.0
            return func(*args, **options)

    with Passing():
        yield loop


@contextmanager
def no_autocast(loop: Loop) -> Iterator[Loop]:
    """No forward runs under autocast."""

    def plain(forward: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*arguments: Any, **options: Any) -> Any:
            with torch.autocast(loop.model.device.type, enabled=False):
                return forward(*arguments, **options)

        return evaluate

    with _forward_replaced(loop.model.network, plain):
        yield loop


@contextmanager
def no_gradient(loop: Loop) -> Iterator[Loop]:
    """The replay records no gradient, like the rollout."""

    def replay(trajectory: Rollout, step: int) -> Tensor:
        with torch.no_grad():
            return loop.replay(trajectory, step)

    yield replace(loop, replay=replay)


@contextmanager
def more_noise(loop: Loop) -> Iterator[Loop]:
    """Steps that inject less noise than `TINY_STD` inject ten times that."""
    stds, family = loop.coefficients.table[:, C].tolist(), loop.coefficients.family
    highest = 1.0 if family == "cps" else float("inf")
    levels = [
        min(highest, level * 10 * TINY_STD / std) if 0 < std < TINY_STD else level
        for level, std in zip(loop.coefficients.noise_level, stds, strict=True)
    ]
    yield replace(loop, coefficients=coefficients(loop.coefficients.sigmas, levels, family).to(loop.model.device))


def tiny_steps(loop: Loop) -> tuple[int, ...]:
    """The replayed steps whose injected noise is below `TINY_STD`."""
    stds = loop.coefficients.table[:, C].tolist()
    return tuple(step for step in loop.steps if stds[step] < TINY_STD)


@contextmanager
def _forward_replaced(network: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before, replaced = network.forward, "forward" in vars(network)
    network.forward = wrap(before)
    try:
        yield
    finally:
        if replaced:
            network.forward = before
        else:
            del network.forward


@contextmanager
def _before_forwards(layers: list[Any], prepare: Callable[[Any, Any], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(prepare).remove)
        yield


CAUSES = (
    Cause(
        "dropout",
        "dropout is active, so every forward draws its own mask",
        "put the network in eval mode in both phases, or set every dropout probability to 0",
        no_dropout,
    ),
    Cause(
        "storage",
        "states or log-probabilities are stored in fewer digits than they were computed with",
        "keep latents and log-probabilities of the trajectory in float32, or round the state before its "
        "log-probability is computed",
        exact_storage,
    ),
    Cause(
        "timestep",
        "the network is told another timestep in one phase, such as one rounded to a half precision",
        "compute the timestep in float32 by the same code in both phases",
        grid_timesteps,
    ),
    Cause(
        "autocast",
        "one phase runs under autocast and the other does not",
        "run both phases with or without torch.autocast",
        no_autocast,
    ),
    Cause(
        "adapter_off",
        "the adapter is switched off in one phase",
        "enable the adapter again after passes of the reference policy",
        enabled_adapter,
        lambda loop: bool(lora_layers(loop.model.network)),
    ),
    Cause(
        "lora_merge",
        "the adapter is merged into the weights in one phase, which rounds them",
        "leave it unmerged in both phases, or compute the old log-probabilities with the unmerged policy",
        unmerged_adapter,
        lambda loop: bool(lora_layers(loop.model.network)),
    ),
    Cause(
        "attention",
        "attention is computed by different kernels or processors",
        "set the same attention backend and processors for both phases",
        one_attention,
    ),
    Cause(
        "batch_shape",
        "a sample's velocity depends on the batch that it is evaluated in, and the batches differ",
        "replay the rows that were rolled out together, as many to a forward: sampler.micro_batch for both",
        single_rows,
    ),
    Cause(
        "gradient_mode",
        "the forward computes other numbers when gradients are recorded",
        "look for what depends on it: compiled graphs, checkpointing, kernels chosen by requires_grad",
        no_gradient,
    ),
)
"""Reasons, the particular ones before the general ones."""

AMPLIFIER = Cause(
    "tiny_std",
    "a step injects so little noise that rounding errors of the velocity are large against it",
    "raise sampler.noise_level there, or leave the step out of objective.trained_steps",
    more_noise,
    lambda loop: bool(tiny_steps(loop)),
)
"""No reason by itself: it makes a small difference, whatever its reason, a visible one."""

BY_NAME = {cause.name: cause for cause in (*CAUSES, AMPLIFIER)}
