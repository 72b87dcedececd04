"""TurningPoint-GRPO's samplers on a small random SD3 pipeline: ours, and the host's serial completions.

    python -m benches.ops.bench_turning_point    side by side; writes results/turning_point_cpu.json

    mixed      ten steps, nine of them noisy, guided, and the completion of every state
    batched    the same with all completions of one sigma in one forward
    shared     `mixed` and the noise-free image, which ours takes from the same initial noise (fix "shared_noise")

The pipeline has the embedded model's architecture, 3.5 million parameters, at 64 px. The host's side is restated
(`tests/hosts/host_sd3.py`). With one thread the clock is that of the thread, as in `bench_dropin.py`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import importlib.util
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benches.common.record import (
    NOISY_SPREAD,
    RESULTS,
    ROOT,
    interleaved,
    load_average,
    pairwise_ratio,
    provenance,
    spread,
    write_json,
)
from densegrpo_fast.compat.turning_point import make_samplers
from densegrpo_fast.embedded import architecture

BATCH, BEST_OF = 2, 2
_STEPS, _NOISY = 10, 9

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def sides() -> dict[str, Pair]:
    """Ours and the host's own side of every row, ready to call; first it is asserted that both return the same."""
    host = _restated()
    torch.manual_seed(0)
    pipeline = architecture.build_pipeline(["a red circle"])
    pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.transformer, pipeline.vae):
        module.requires_grad_(False).eval()
    config = pipeline.transformer.config
    names = ("prompt_embeds", "negative_prompt_embeds")
    common: dict[str, Any] = {name: torch.randn(BATCH, 8, config.joint_attention_dim) for name in names}
    common |= {
        f"{sign}pooled_prompt_embeds": torch.randn(BATCH, config.pooled_projection_dim) for sign in ("", "negative_")
    }
    common |= {"num_inference_steps": _STEPS, "guidance_scale": 4.5, "output_type": "pt", "sde_type": "cps"}
    window = {"sde_window_size": _NOISY, "sde_window_range": (0, _NOISY)}
    size = {"height": 64, "width": 64, "generator": None}

    def both(mixed: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: (mixed(pipeline, **common, **window), plain(pipeline, **common, **size))

    def one(mixed: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: mixed(pipeline, **common, **window)

    theirs = host.pipeline_mixed_sampling_with_intermediate_ode
    shared = make_samplers(shared_noise=True)
    found = {
        "mixed": (one(make_samplers()[0]), one(theirs)),
        "batched": (one(make_samplers(chunk=(_NOISY - 1) * BATCH)[0]), one(theirs)),
        "shared": (both(*shared), both(theirs, host.pipeline_ode_sampling)),
    }
    for name in ("mixed", "batched"):
        images = [_images(_seeded(side)) for side in found[name]]
        torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
    return found


def _seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    return call()


def _images(result: Any) -> torch.Tensor:
    main, later = result
    return torch.stack([main["images"], *(entry["images"] for entry in later)])


def _restated() -> Any:
    spec = importlib.util.spec_from_file_location("host_sd3", ROOT / "tests" / "hosts" / "host_sd3.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Time both sides of all rows in turns; print and write medians and the median ratio within a round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 1001), metavar="N", help="default: 5")
    parser.add_argument("--output", type=Path, default=RESULTS / "turning_point_cpu.json", help="JSON file")
    options = parser.parse_args()
    started = load_average()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    rows = sides()
    calls = {f"{name}/{side}": pair[side == "host"] for name, pair in rows.items() for side in ("ours", "host")}
    seconds = interleaved(calls, rounds=options.rounds, warmup=1, clock=clock, best_of=BEST_OF)
    found = {}
    for name in rows:
        ours, eager = seconds[f"{name}/ours"], seconds[f"{name}/host"]
        found[f"turning_point.{name}"] = {
            "median_seconds": median(ours),
            "eager_median_seconds": median(eager),
            "times_faster_than_eager": pairwise_ratio(eager, ours),
            "spread": spread(ours),
            "eager_spread": spread(eager),
        }
        print(f"{name:8} {median(ours):6.3f} s  host {median(eager):6.3f} s  {pairwise_ratio(eager, ours):5.2f}x")
    settings = {
        "batch": BATCH,
        "num_steps": _STEPS,
        "noisy_steps": _NOISY,
        "rounds": options.rounds,
        "best_of": BEST_OF,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
    }
    document = provenance() | {
        "load_average": {"start": started, "end": load_average()},
        "settings": settings,
        "noisy": any(max(own["spread"], own["eager_spread"]) > NOISY_SPREAD for own in found.values()),
        "variants": found,
    }
    write_json(options.output, document)


if __name__ == "__main__":
    main()
