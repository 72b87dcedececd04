"""What the ops and their gradients give on fixed inputs, into a safetensors file: `python op_outputs.py FILE`.

`compare_revisions.py` runs it in the environments of two revisions. It takes public names only; one that has moved is
looked for in every place that it has had.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SERVED = [
    ("reference", F32, F32),
    ("cpu", F32, F32),
    *(("auto", *dtypes) for dtypes in ((F32, BF16), (F32, F16), (BF16, BF16), (F16, F16))),
]
"""Implementation, dtype of the latents, dtype of the velocities."""

SHAPES = ((4, 8, 8), (3, 5, 7))
SIGMAS = torch.tensor([1.0, 0.93, 0.81, 0.6, 0.35, 0.11, 0.0])
LEVELS = [0.7, 0.2, 0.9, 0.5, 0.7, 0.3]
STEPS = torch.arange(6)
SAMPLES = STEPS + 11


def public(name: str, *modules: str) -> Any:
    """A name from the first of these modules of the package that has it."""
    for module in modules:
        try:
            return getattr(import_module(f"densegrpo_fast.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"densegrpo_fast has no {name} in {', '.join(modules)}")


coefficients = public("coefficients", "flow.dynamics", "flow")
gaussian = public("gaussian", "flow.noise", "flow")
sde_step, sde_step_outputs, sde_log_prob, sde_log_prob_kl, euler_jump, grpo_loss = (
    public(name, "flow.ops", "flow")
    for name in ("sde_step", "sde_step_outputs", "sde_log_prob", "sde_log_prob_kl", "euler_jump", "grpo_loss")
)
# the iteration of the noise counters was called epoch until f883293
ITERATION = "iteration" if "iteration" in inspect.signature(gaussian).parameters else "epoch"
_generator = torch.Generator().manual_seed(20)
_outputs: dict[str, Tensor] = {}


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Fixed pseudo-random numbers."""
    return torch.randn(*shape, generator=_generator).to(dtype)


def keep(name: str, outputs: Sequence[Tensor | None], *inputs: Tensor) -> None:
    """Keep the outputs of a call, and the gradient of a weighted sum of them in `inputs`."""
    present = [value for value in outputs if value is not None]
    gradients: Sequence[Tensor] = ()
    if inputs:
        weighted = [value.double().flatten() * torch.arange(1.0, 1.0 + value.numel()) for value in present]
        gradients = torch.autograd.grad(torch.cat(weighted).sum(), inputs)
    for number, value in enumerate([*present, *gradients]):
        _outputs[f"{name}/{number}"] = value.detach().clone(memory_format=torch.contiguous_format)


def probe_steps(family: str) -> None:
    """Coefficients, steps, log-probabilities and divergences of one family of dynamics."""
    made = coefficients(SIGMAS, 0.0 if family == "ode" else LEVELS, family)
    keep(f"coefficients/{family}", [made.table, made.only({1, 3}).table])
    for how, latent_dtype, dtype in SERVED:
        for shape in SHAPES:
            latents, following = (normal(6, *shape, dtype=latent_dtype) for _ in range(2))
            velocity, uncond = (normal(6, *shape, dtype=dtype).requires_grad_() for _ in range(2))
            other, other_uncond = (normal(6, *shape, dtype=dtype) for _ in range(2))
            for guided in (False, True):
                name = f"{family}/{how}/{latent_dtype}/{dtype}/{shape[0]}/{'guided' if guided else 'plain'}"
                common: dict[str, Any] = {"implementation": how}
                common |= {"uncond": uncond, "guidance_scale": 4.5} if guided else {}
                noise = {"seed": 3, "sample_index": SAMPLES, ITERATION: 2}
                start, end = (latents, velocity, made.table, STEPS), (following, made.table, STEPS)
                keep(f"{name}/step", sde_step(*start, **noise, **common, stream=257))
                for more in ({"with_mean": True}, {"input_dtype": BF16}, {"input_dtype": F16}):
                    keep(f"{name}/outputs/{more}", sde_step_outputs(*start, **noise, **common, **more))
                trained = (velocity, uncond)[: 1 + guided]
                keep(f"{name}/log_prob", [sde_log_prob(latents, velocity, *end, **common)], *trained)
                common |= {"reference_uncond": other_uncond} if guided else {}
                for scale in ("paper", "flow_grpo"):
                    both = sde_log_prob_kl(latents, velocity, other, *end, scale=scale, **common)
                    keep(f"{name}/kl/{scale}", both, *trained)


def probe_jumps() -> None:
    """Straight lines from a noise level of its own for every row."""
    for how, latent_dtype, dtype in SERVED:
        for shape in SHAPES:
            latents, velocity = normal(6, *shape, dtype=latent_dtype), normal(6, *shape, dtype=dtype).requires_grad_()
            moved = euler_jump(latents, velocity, SIGMAS[:-1].clone(), SIGMAS[1:].clone(), implementation=how)
            keep(f"jump/{how}/{latent_dtype}/{dtype}/{shape[0]}", [moved], velocity)


def probe_losses() -> None:
    """The loss with nothing optional, and with all of it."""
    for how in ("reference", "cpu"):
        for full in (False, True):
            log_prob, old, kl = (1e-3 * normal(37) for _ in range(3))
            log_prob, kl = log_prob.requires_grad_(), kl.square().requires_grad_()
            advantages = normal(37) * (torch.arange(37) % 5 > 0)
            rows = {name: normal(37).abs() for name in ("log_ratio_scale", "log_ratio_bias", "weight") if full}
            settings = {"clip_range": 8e-4, "kl_coef": 0.04 if full else 0.0, "implementation": how}
            loss, metrics = grpo_loss(log_prob, old, advantages, kl if full else None, **settings, **rows)
            keep(f"loss/{how}/{full}", [loss], *(log_prob, kl)[: 1 + full])
            keep(f"loss/{how}/{full}/metrics", [metrics])


def main() -> None:
    """Write all of it."""
    for stream in (0, 1, 2, 3, 256, 300):
        noise = gaussian((3, 5, 7), seed=2**40 + 9, sample_index=SAMPLES, step=STEPS, stream=stream, **{ITERATION: 4})
        keep(f"noise/{stream}", [noise])
    for family in ("ode", "flow_sde", "cps", "dance", "precise", "wan"):
        probe_steps(family)
    probe_jumps()
    probe_losses()
    save_file(_outputs, sys.argv[1])


if __name__ == "__main__":
    main()
