"""What the adapter's products cost: peft's in float32 against ours in the base's half precision.

    python -m benches.iteration.bench_lora    writes results/lora_cpu.json

Counted on the meta device in SD3.5-Medium's shape at 512 px (bfloat16, rank 32, eager operations): gigabytes that
operations read and write per row, kernels of a forward and of its backward, and what the graph keeps. Timed on the
embedded model in bfloat16, CPU seconds of one thread, interleaved: a forward, and one with its backward, as medians of
ratios over peft's in the same round; and how far velocity and gradient are from those of the model in float32.

    off       the adapter switched off: the reference policy
    peft      peft's own forward: tokens cast to float32, products and sum there, cast back
    autocast  the products in bfloat16, scaled and added by operations of their own
    ours      models/lora_linear.py: the sum in the matrix product
    kernel    the least that a kernel of its own could do after the base's product: tokens and result read once, result
              written once, the casts of the adapter in it; forward and backward are one kernel each
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benches.common.record import RESULTS, interleaved, pairwise_ratio, provenance, spread, write_json
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.models import flops
from densegrpo_fast.models.lora_linear import LoraLinear
from densegrpo_fast.models.memory import ModelMemory, fused_attention
from densegrpo_fast.training.models import build_model

Forward = Callable[[Any, Tensor], Tensor]
_VIEWS = tuple(
    "view t. transpose expand slice unsqueeze squeeze permute detach split chunk empty alias select as_strided".split()
)
_ROUNDS = 15


class Traffic(TorchDispatchMode):
    """Within the context, counts kernels and the bytes of the tensors that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not any(func.__name__.startswith(view) or f"_{view}" in func.__name__ for view in _VIEWS):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            self.kernels += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def autocast(layer: Any, x: Tensor) -> Tensor:
    """The products in the base's precision by single operations."""
    down, up = (matrices["default"].weight.to(x.dtype) for matrices in (layer.lora_A, layer.lora_B))
    return layer.base_layer(x) + F.linear(F.linear(x, down), up) * layer.scaling["default"]


@torch.library.custom_op("densegrpo_bench::lora", mutates_args=())
def _kernel(x: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError("a shape to count with")


@torch.library.custom_op("densegrpo_bench::lora_backward", mutates_args=())
def _kernel_backward(grad: Tensor, x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("a shape to count with")


def _kernel_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], inputs[3])


def _kernel_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    x_grad, down_grad, up_grad = _kernel_backward(grad, *ctx.saved_tensors)
    return x_grad, grad, down_grad, up_grad


_kernel.register_fake(lambda x, base, down, up: torch.empty_like(base))
_kernel_backward.register_fake(lambda grad, *saved: tuple(map(torch.empty_like, saved)))
_kernel.register_autograd(_kernel_grad, setup_context=_kernel_setup)


def kernel(layer: Any, x: Tensor) -> Tensor:
    """The base's product, then one kernel."""
    return _kernel(x, layer.base_layer(x), layer.lora_A["default"].weight, layer.lora_B["default"].weight)


FORMS: dict[str, Forward] = {
    "peft": Linear.forward,
    "autocast": autocast,
    "ours": LoraLinear.forward,
    "kernel": kernel,
}


@contextmanager
def form(name: str) -> Iterator[None]:
    """Within the context every adapted layer computes so."""
    own = LoraLinear.forward
    LoraLinear.forward = FORMS[name]  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraLinear.forward = own  # type: ignore[method-assign]


def count(architecture: flops.Architecture, rows: int) -> dict[str, dict[str, float]]:
    """Traffic (GB a row), kernels and graph (GB a row) of every form."""
    memory = ModelMemory(architecture, dtype=torch.bfloat16)
    inputs, unit = memory._inputs(rows), 1e9 * rows
    found: dict[str, dict[str, float]] = {}
    for name in ("off", *FORMS):
        (memory.network.disable_adapters if name == "off" else memory.network.enable_adapters)()
        with form("ours" if name == "off" else name), fused_attention():
            with torch.no_grad(), Traffic() as forward:
                memory.network(**inputs)
            found[name] = {"forward_gb": round(forward.bytes / unit, 2), "forward_kernels": forward.kernels}
            if name != "off":
                loss = memory.network(**inputs, return_dict=False)[0].float().sum()
                with Traffic() as backward:
                    torch.autograd.grad(loss, memory.parameters)
                del loss
                found[name] |= {"backward_gb": round(backward.bytes / unit, 2), "backward_kernels": backward.kernels}
                found[name]["graph_gb"] = round(memory.graph(rows, checkpointing=False) / unit, 2)
    return found


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Ratios of seconds over peft's, and errors against float32, of the embedded model in bfloat16."""
    exact, model = (
        build_model(load_config("embedded_paper", {"model.dtype": dtype}), torch.device("cpu"))
        for dtype in ("float32", "bfloat16")
    )
    torch.manual_seed(0)
    parameters, masters = list(model.trainable_parameters().values()), list(exact.trainable_parameters().values())
    for parameter, master in zip(parameters, masters, strict=True):
        # an adapter after some training: neither matrix is zero
        torch.nn.init.normal_(master, std=0.05)
        parameter.data = master.data.clone()
    latents, sigma = torch.randn(rows, *model.latent_shape), torch.full((rows,), 0.6)

    def update(model: Any, weights: list[Any]) -> list[Tensor]:
        velocity = model.velocity(latents, sigma, model.encode(["a red circle"] * rows)).cond
        return [velocity.detach(), *torch.autograd.grad(velocity.square().mean(), weights)]

    def timed(name: str, work: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            with form(name):
                work()

        return call

    conditioning = model.encode(["a red circle"] * rows)

    @torch.no_grad()
    def forward() -> None:
        model.velocity(latents, sigma, conditioning)

    @torch.no_grad()
    def reference() -> None:
        with model.reference():
            model.velocity(latents, sigma, conditioning)

    works = {"off": timed("ours", reference)}
    for name in ("peft", "autocast", "ours"):
        works[f"{name} forward"] = timed(name, forward)
        works[f"{name} update"] = timed(name, lambda: update(model, parameters))
    # of this thread alone, which does all of the work
    seconds = interleaved(works, rounds=rounds, warmup=1, clock=time.thread_time)
    ratios = {
        "off / peft forward": pairwise_ratio(seconds["off"], seconds["peft forward"]),
        **{
            f"{name} / peft {kind}": pairwise_ratio(seconds[f"{name} {kind}"], seconds[f"peft {kind}"])
            for name in ("autocast", "ours")
            for kind in ("forward", "update")
        },
    }
    expected = update(exact, masters)
    errors = {}
    for name in ("peft", "autocast", "ours"):
        with form(name):
            velocity, *gradients = (a - b for a, b in zip(update(model, parameters), expected, strict=True))
        size = torch.cat([tensor.flatten() for tensor in expected[1:]]).norm()
        error = torch.cat([tensor.flatten() for tensor in gradients]).norm() / size
        errors[name] = {"velocity": float(velocity.norm() / expected[0].norm()), "gradient": float(error)}
    return {
        "rows": rows,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "spread": {name: round(spread(times), 3) for name, times in seconds.items()},
        "relative_errors": {name: {k: round(e, 5) for k, e in pair.items()} for name, pair in errors.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of a forward; default: 8, a micro-batch")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"of timings; default: {_ROUNDS}")
    parser.add_argument("--output", type=Path, default=RESULTS / "lora_cpu.json", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    document = provenance() | {
        "sd35_medium": {"rows": options.rows, "forms": count(flops.sd35_medium(512), options.rows)},
        "embedded_bfloat16": measure(options.rows, options.rounds),
    }
    write_json(options.output, document)
    for name, numbers in document["sd35_medium"]["forms"].items():
        print(f"{name:9}", "  ".join(f"{key} {value}" for key, value in numbers.items()))
    print(document["embedded_bfloat16"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
