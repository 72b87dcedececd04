"""Whole training iterations as tonight's run would have them, on a model of SD3.5-Medium's shape with random weights.

    python -m benches.gpu.rehearsal                                  512 px, a reward of PickScore's size; needs a GPU
    python -m benches.gpu.rehearsal --override model.gradient_checkpointing=true sampler.micro_batch=8
    python -m benches.gpu.rehearsal --model embedded_random --prompts 1 --group-size 2      on a CPU: a test of itself

Settings are those of the other benches (ten steps, guidance 4.5, nine trained steps, KL); the lookahead is the fast
one unless the options say otherwise. Written to results/gpu_rehearsal_gpu.json: seconds, floating-point operations and
their rate by phase, against the rate of plain matrix products on the same device; network forwards; the peak of the
memory beside its estimate; power and clocks; and, in one more iteration, the lines where Python waits for the GPU.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# advice about optional packages is none of a bench's business
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benches.common.record import load_average, portable, provenance, spread, write_json
from benches.gpu.host_syncs import HostSyncs
from benches.gpu.sensors import Sensors
from benches.iteration.models import SD35_RANDOM, load
from benches.iteration.protocol import DENSE_FAST, Protocol, default_output, parser, protocol_of
from benches.iteration.variants import Variant
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.flops import ModelFlops, architecture_of, clip_h_image, count
from densegrpo_fast.sampling.cost import IterationCost
from densegrpo_fast.training.memory import estimate_memory, peak_bytes, start_peak
from densegrpo_fast.training.models import default_device, synchronizer
from densegrpo_fast.training.rewarding import build_reward

BAR = 0.45
"""Share of the matrix products' rate that rollout and update shall reach on a GPU."""

_MATRIX = {"cuda": 8192, "cpu": 512}


def operations(cost: IterationCost, unit: ModelFlops, *, checkpointing: bool) -> dict[str, float]:
    """Floating-point operations of a trajectory by phase; what checkpointing computes again is work, too."""
    decodes = sum(
        number * single
        for number, single in ((cost.full_decodes, unit.full_decode), (cost.preview_decodes, unit.preview_decode))
        if number
    )
    again = cost.backwards * unit.forward if checkpointing else 0.0
    return {
        "rollout": cost.rollout.forwards * unit.forward,
        "lookahead": cost.lookahead.forwards * unit.forward,
        "reward": decodes + cost.rewards * unit.reward,
        "update": cost.policy.forwards * unit.forward
        + cost.backwards * unit.backward
        + cost.reference.forwards * unit.reference_forward
        + again,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of large square matrix products, after a warm-up of the same length."""
    size, finish = _MATRIX[device.type], synchronizer(device)
    one, two = torch.randn(2, size, size, device=device, dtype=dtype)
    for _ in range(2):
        finish()
        start, done = perf_counter(), 0
        while perf_counter() - start < seconds:
            for _ in range(4):
                torch.mm(one, two)
            finish()
            done += 4
        rate = done * 2 * size**3 / (perf_counter() - start)
    return rate


def rehearse(protocol: Protocol, *, rounds: int, warmup: int, model: DiffusersModel | None = None) -> dict[str, Any]:
    """Run the iterations; the document that the command writes.

    Args:
        model: with its adapter; None = the protocol's is loaded.

    Raises:
        UserError: an option is wrong.
    """
    started, config = load_average(), protocol.config(DENSE_FAST, kl=True)
    model = load(config, default_device()) if model is None else model
    reward = build_reward(config.reward.terms, config.reward.options)
    variant, device = Variant(DENSE_FAST, config, model, reward), model.device
    for _ in range(warmup):
        variant()
    peaks = []
    with Sensors(device) as sensors:
        for _ in range(rounds):
            start_peak(device)
            variant()
            peaks.append(peak_bytes(device))
    phases = variant.phases[-rounds:]
    with HostSyncs(device) as waits:
        if device.type == "cuda":
            variant()
    return provenance() | {
        "settings": portable({"rounds": rounds, "warmup": warmup, "config": config.model_dump(mode="json")}),
        "load_average": {"start": started, "end": load_average()},
        "memory": {"peak_bytes": max(peaks), "estimate_bytes": estimated_bytes(config, model, reward)},
        "sensors": {"readings": sensors.summary(), "why_not": sensors.why_not},
        "host_syncs": waits.where,
        **rates(variant, config, model, phases),
    }


def rates(
    variant: Variant, config: Config, model: DiffusersModel, phases: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Seconds, forwards, operations and their rate by phase."""
    scored = clip_h_image() if config.model.path == SD35_RANDOM else 0.0
    lora, cost = config.lora, variant.cost
    unit = count(architecture_of(model), lora_rank=lora.rank, lora_targets=tuple(lora.targets), reward=scored)
    work = operations(cost, unit, checkpointing=config.model.gradient_checkpointing)
    fastest = matmul_rate(model.device, model.network.dtype)
    seconds = {name: [each.get(name, 0.0) for each in phases] for name in work}
    done = {name: variant.rows * each / median(seconds[name]) for name, each in work.items()}
    forwards = {name: variant.rows * getattr(cost, name).forwards for name in ("rollout", "lookahead")}
    forwards["update"] = variant.rows * (cost.policy.forwards + cost.reference.forwards)
    return {
        "seconds": {
            name: {"median": median(own), "rounds": own, "spread": spread(own)} for name, own in seconds.items()
        },
        "seconds_per_iteration": median(sum(each.values()) for each in phases),
        "nfe": forwards,
        "flops": {name: variant.rows * each for name, each in work.items()},
        "tflops_per_second": {name: each / 1e12 for name, each in done.items()},
        "matmul_tflops_per_second": fastest / 1e12,
        "share_of_matmul": {name: each / fastest for name, each in done.items()},
        "bar": {
            "share": BAR,
            "met": all(done[name] >= BAR * fastest for name in ("rollout", "update"))
            if model.device.type == "cuda"
            else None,
        },
    }


def estimated_bytes(config: Config, model: DiffusersModel, reward: Any) -> int:
    """What the run's memory check would have said, the reward's network included."""
    return estimate_memory(config, model, reward=reward).total


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    made = parser(__doc__)
    made.set_defaults(model=SD35_RANDOM, prompts=2, group_size=8, rounds=3)
    options = made.parse_args(arguments)
    with user_errors_exit():
        document = rehearse(protocol_of(options), rounds=options.rounds, warmup=options.warmup)
        write_json(options.output or default_output("gpu_rehearsal"), document)
    for name, own in document["seconds"].items():
        rate, share = document["tflops_per_second"][name], document["share_of_matmul"][name]
        evaluated = document["nfe"].get(name, 0)
        print(f"  {name:10} {own['median']:8.3f} s  {evaluated:6.0f} NFE  {rate:8.2f} TFLOP/s  {share:4.0%} of matmul")
    memory = document["memory"]
    print(f"  memory     {memory['peak_bytes'] / 2**30:.2f} GiB, estimated {memory['estimate_bytes'] / 2**30:.2f}")
    if document["bar"]["met"] is False:
        print(f"rollout or update is below {BAR:.0%} of the matrix products' rate")
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
