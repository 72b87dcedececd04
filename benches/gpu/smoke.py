"""The first minutes on a GPU: everything that can be wrong with a new machine, one line each, going on after a failure.

    python -m benches.gpu.smoke                  exit code 1 if something failed
    python -m benches.gpu.smoke --device cpu     a test of itself

Packages, the device, the compiled library, every implementation of the ops against the reference (even and odd sizes,
half precision, gradients), a captured step, and an iteration of a small model whose ratios are 1.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import argparse
import importlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

PACKAGES = (
    "numpy",
    "diffusers",
    "transformers",
    "peft",
    "pydantic",
    "jinja2",
    "yaml",
    "safetensors",
    "scipy",
    "pytest",
)
IMPLEMENTATIONS = ("triton", "cuda")
SIZES = (4096, 4099)


@dataclass(frozen=True)
class Check:
    """One thing to try.

    Attributes:
        name: for its line.
        run: raises where something is wrong; returns what to say.
        gpu: whether only a CUDA device has it.
    """

    name: str
    run: Callable[[torch.device], str]
    gpu: bool = True


def package(name: str, device: torch.device) -> str:
    """Import a package that training or the tests need."""
    return str(getattr(importlib.import_module(name), "__version__", ""))


def gpu(device: torch.device) -> str:
    """Name, capability and memory; a product that is known."""
    free, total = torch.cuda.mem_get_info(device)
    ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    assert (ones @ ones == 64).all(), "a matrix product is wrong"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)}, sm {capability}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"


def library(device: torch.device) -> str:
    """The compiled CUDA library is there."""
    from densegrpo_fast.flow import native_cuda

    reason = native_cuda.why_not()
    assert not reason, reason
    return "loaded"


def op(implementation: str, size: int, dtype: torch.dtype, device: torch.device) -> str:
    """A step, its log-probability again and its gradient, against the reference."""
    from densegrpo_fast.flow.dynamics import coefficients
    from densegrpo_fast.flow.ops import sde_log_prob, sde_step
    from densegrpo_fast.flow.schedule import sd3_sigmas

    table = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table.to(device)
    steps, samples = torch.tensor([1, 4, 7], device=device), torch.arange(3, device=device)
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 3, size, generator=generator).to(device)
    options = {"seed": 3, "sample_index": samples, "iteration": 1}
    results = []
    for name in (implementation, "reference"):
        leaf = velocity.to(dtype).requires_grad_()
        state, log_prob = sde_step(latents, leaf, table, steps, **options, implementation=name)
        state = results[0][0] if results else state.detach()
        scored = sde_log_prob(latents, leaf, state, table, steps, implementation=name)
        results.append((state, log_prob.detach(), scored.detach(), torch.autograd.grad(scored.sum(), leaf)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return "equals the reference"


def captured(device: torch.device) -> str:
    """A step in a CUDA graph whose replay follows its counters."""
    from densegrpo_fast.flow.dynamics import coefficients
    from densegrpo_fast.flow.ops import sde_step
    from densegrpo_fast.flow.schedule import sd3_sigmas
    from densegrpo_fast.sampling.graphs import CudaCapturer

    table = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table.to(device)
    latents, velocity = torch.randn(2, 3, 4096, device=device)
    steps, iteration = torch.tensor([1, 4, 7], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    options = {"seed": torch.tensor([3], device=device), "sample_index": torch.arange(3, device=device)}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return sde_step(latents, velocity, table, steps, **options, iteration=iteration)

    replay, outputs = CudaCapturer().capture(step)
    for number in (1, 2):
        iteration.fill_(number)
        replay()
        assert torch.equal(outputs[0], step()[0]), "a replay differs from the step"
    return "replays follow their inputs"


def ratios(device: torch.device) -> str:
    """A rollout of a tiny SD3 replayed: every importance ratio is 1."""
    from densegrpo_fast.flow.dynamics import coefficients
    from densegrpo_fast.models.lora import add_lora
    from densegrpo_fast.models.tiny import tiny_sd3
    from densegrpo_fast.sampling.replay import replay
    from densegrpo_fast.sampling.rollout import initial_noise, rollout

    model = tiny_sd3()
    add_lora(model.network, rank=2, alpha=4, targets=["attn.to_q"], seed=0)
    model.pipeline.to(device)
    model.device = device
    model.set_attention("auto")
    index = torch.arange(3, device=device)
    noise, text = initial_noise(model, index, seed=0, iteration=0), model.encode(["a cat", "a cat", "the moon"])
    table = coefficients(model.sigmas(4), 0.7, "flow_sde").to(device)
    counters = {"sample_index": index, "seed": 0, "iteration": 0}
    sampled = rollout(model, noise, text, table, **counters, guidance_scale=3.0)
    log_prob = replay(model, sampled, 1, slice(0, 3))[0]
    furthest = float(((log_prob - sampled.log_probs[1]).exp() - 1).abs().max())
    assert furthest <= 1e-6, f"a ratio is {furthest:.1e} off"
    return f"within {furthest:.1e} of 1"


CHECKS = [
    *(Check(f"package {name}", partial(package, name), gpu=False) for name in PACKAGES),
    Check("package triton", partial(package, "triton")),
    Check("device", gpu),
    Check("compiled CUDA library", library),
    *(
        Check(f"{name}, {size} elements, {str(dtype).removeprefix('torch.')} velocity", partial(op, name, size, dtype))
        for name in IMPLEMENTATIONS
        for size in SIZES
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Check("captured step", captured),
    Check("importance ratios", ratios, gpu=False),
]


def smoke(checks: Sequence[Check], device: torch.device) -> list[str]:
    """Run the checks that the device has; the names of those that failed."""
    failed = []
    for check in checks:
        if check.gpu and device.type != "cuda":
            print(f"skip {check.name}: needs a CUDA device", flush=True)
            continue
        start = perf_counter()
        try:
            said = check.run(device)
            print(f"ok   {check.name}: {said} ({perf_counter() - start:.1f} s)", flush=True)
        except Exception as error:
            failed.append(check.name)
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip() or "no message").splitlines()[0]
            print(f"FAIL {check.name}: {type(error).__name__}: {first} ({where.filename}:{where.lineno})", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="where to run; default: %(default)s")
    failed = smoke(CHECKS, torch.device(parser.parse_args(arguments).device))
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
