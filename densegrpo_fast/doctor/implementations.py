"""Findings about what would compute here: the implementation of each step op, and attention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

from densegrpo_fast.doctor.findings import Finding

_ATTENTION_PACKAGES = ("flash_attn", "flash_attn_interface", "xformers", "sageattention", "kernels")


def op_findings() -> Iterator[Finding]:
    """For each step op the implementation that serves float32 latents on the default device, and why no faster one."""
    import torch

    from densegrpo_fast.flow import backends, native

    group = "step ops"
    asked = os.environ.get(backends.ENVIRONMENT_VARIABLE, "auto")
    if asked not in ("auto", *backends.IMPLEMENTATIONS):
        advice = f"unset it, or set it to auto, {', '.join(backends.IMPLEMENTATIONS)}"
        yield Finding(group, backends.ENVIRONMENT_VARIABLE, "problem", asked, advice)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.zeros(1, 4, device=device)
    for op in backends.OPS:
        # the loss takes log-probabilities, the others latents and velocity
        tensors = (probe[0],) if op == "grpo_loss" else (probe, probe)
        try:
            chosen = backends.choose(op, "auto", *tensors)
        except RuntimeError as error:
            advice = f"unset {backends.ENVIRONMENT_VARIABLE}, which asks for {asked}"
            yield Finding(group, op, "problem", str(error), advice)
            continue
        faster = backends.OPS[op][: backends.OPS[op].index(chosen)]
        reasons = [f"{name}: {backends.why_not(op, name, *tensors)}" for name in faster if _made_for(name, device)]
        if asked != "auto":
            reasons = [f"{backends.ENVIRONMENT_VARIABLE}={asked}"]
        yield Finding(group, op, "ok", f"{chosen} on {device}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    if native.available():
        yield Finding(group, "compiled CPU library", "ok", f"available, {native.variants()[-1]}")
    else:
        # on a GPU it serves nothing but tests
        needed = device == "cpu"
        advice = "PyTorch serves instead, slower; install a C++ compiler and run pip install again"
        yield Finding(
            group, "compiled CPU library", "warn" if needed else "ok", native.why_not(), advice if needed else ""
        )


def triton_serves() -> bool:
    """Whether Triton kernels would be compiled and run on this machine's GPU."""
    import torch

    from densegrpo_fast.flow import backends

    asked = os.environ.get(backends.ENVIRONMENT_VARIABLE, "auto")
    wanted = asked in ("auto", "triton") and torch.cuda.is_available() and not backends.interpreted()
    return wanted and not backends.why_not("sde_step", "triton", torch.zeros(1, 4, device="cuda"))


def attention_findings() -> Iterator[Finding]:
    """Kernels of PyTorch's attention that are switched on, and attention packages that diffusers could use."""
    import torch

    group, cuda = "attention", torch.backends.cuda
    if torch.cuda.is_available():
        switches = {
            "flash": cuda.flash_sdp_enabled() and cuda.is_flash_attention_available(),
            "memory-efficient": cuda.mem_efficient_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        }
    else:
        switches = {"flash": cuda.flash_sdp_enabled()}
    names = [name for name, on in switches.items() if on] + (["math"] if cuda.math_sdp_enabled() else [])
    value = f"PyTorch's ({', '.join(names) or 'none'})"
    if any(switches.values()):
        yield Finding(group, "in use", "ok", value)
    else:
        advice = "fused attention is switched off: more memory and time; torch.backends.cuda.enable_flash_sdp(True)"
        yield Finding(group, "in use", "warn", value, advice)
    installed = [name for name in _ATTENTION_PACKAGES if find_spec(name) is not None]
    yield Finding(group, "packages", "ok", ", ".join(installed) or "none besides PyTorch")


def _made_for(implementation: str, device: str) -> bool:
    return device in {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}.get(implementation, ("cpu", "cuda"))
