"""A whole training iteration: sparse and dense rewards, ours and as the published codebases run them.

    python -m benches.iteration.bench_iteration                                       writes results/iteration_cpu.json
    python -m benches.iteration.bench_iteration --model sd35_medium_random --prompts 2 --group-size 24 \\
        --override sampler.micro_batch=8
    pytest benches/iteration/bench_iteration.py --benchmark-only                      untrained, each variant by itself

Ten steps, guidance 4.5 with its full gradient, nine trained steps unless said otherwise, one update per sample, with a
KL term (the headline) and without:

    sparse              one reward per image; every exact optimisation that dense has, one decode
    sparse_retained     the same with all trained steps' graphs kept from the rollout: no forward is repeated
    dense_fast          a reward per branch, DenseGRPO's relative: a prompt's samples leave one noise-free trajectory at
                        every trained step, and are completed by the plan, guidance, decoder and copy that are asked
                        for; without options it is the preset embedded_paper_fast
    dense_trajectories  DenseGRPO: a reward per state of whole trajectories by the same lookahead
    dense_drawn         the same for 4 of the nine steps, drawn by the expected size of their gradients; every round has
                        the draw whose forwards are nearest to the mean over draws
    dense_streamed      the same without a repeated forward (optimizer.update streamed)
    dense_exact         DenseGRPO of all steps: exact plan, full guidance, full decoder in float32, the policy itself
    stock_sparse        Flow-GRPO          } `common/stock.py` lists where they are slow
    stock_dense         n = t, serially    }

All but the last three decode in one precision, bfloat16 unless `--vae-dtype` says otherwise; the baseline always in
float32, all images of a batch at once. What each asks of the model is counted and must be what `sampling/cost.py` says
before anything is timed.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# advice about optional packages is none of a bench's business
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch

from benches.common.record import (
    NOISY_SPREAD,
    interleaved,
    load_average,
    portable,
    provenance,
    spread,
    write_json,
)
from benches.common.stock import Stock
from benches.iteration.models import EMBEDDED_RANDOM, load, with_decoder
from benches.iteration.protocol import (
    DENSE_FAST,
    NAMES,
    SPARSE,
    STOCK_SPARSE,
    Protocol,
    default_output,
    fast_settings,
    parser,
    pinned,
    protocol_of,
    ratios,
    stock_pinned,
)
from benches.iteration.variants import Tally, Variant, counted, reward_with_tally
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.sampling.cost import IterationCost
from densegrpo_fast.training.models import default_device
from densegrpo_fast.training.rewarding import build_reward

RATIOS = (
    "dense_fast/sparse",
    "dense_fast/stock_sparse",
    "dense_trajectories/sparse",
    "dense_drawn/sparse",
    "dense_streamed/sparse",
    "dense_streamed/sparse_retained",
    "sparse_retained/sparse",
    "dense_exact/sparse",
    "dense_exact/stock_dense",
    "stock_dense/stock_sparse",
)


@dataclass(frozen=True)
class Bench:
    """The variants on one model.

    Attributes:
        protocol: what was asked for.
        model: with its adapter, which all variants train; the baseline's decoder.
        variants: by name.
        tally: counts the pictures that their rewards score.
    """

    protocol: Protocol
    model: DiffusersModel
    variants: dict[str, Variant]
    tally: Tally


def prepare(protocol: Protocol, *, kl: bool, model: DiffusersModel | None = None) -> Bench:
    """Make the variants, on a model that is loaded unless given, and check that they agree and cost what they should.

    Args:
        protocol: what is asked for.
        kl: whether the loss has its KL term.
        model: with its adapter and the baseline's decoder.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
        AssertionError: a variant's work is not its closed form's, or ours and the baseline's states differ.
    """
    configs = {name: protocol.config(name, kl=kl) for name in NAMES}
    model = load(configs[STOCK_SPARSE], default_device()) if model is None else model
    reward, tally = reward_with_tally(configs[SPARSE])
    # variants that decode alike share a decoder
    kinds = {_decoding(config): config for config in configs.values()}
    models = {kind: with_decoder(model, config) for kind, config in kinds.items()}
    variants = {name: Variant(name, config, models[_decoding(config)], reward) for name, config in configs.items()}
    bench = Bench(protocol, model, variants, tally)
    check_states(bench)
    return bench


def _decoding(config: Config) -> tuple[str, str]:
    return config.model.vae_dtype, config.model.vae_decode


def check_states(bench: Bench) -> None:
    """Ours and the baseline's rollout reach the same states under equal noise, to float32 rounding.

    A narrower base rounds with the batch shape, which the two do not share, so there is nothing to compare there.
    """
    model, sparse = bench.model, bench.variants[SPARSE]
    if model.network.dtype != torch.float32:
        return
    trainer, config = sparse.trainer, sparse.config
    assert trainer is not None
    batch, size = trainer.prompts.batch(0), config.sampler.micro_batch
    ours = trainer.sample(batch, sparse.steps, iteration=0).latents[:, :size]
    index = torch.arange(size, device=model.device)
    steps = [
        gaussian(model.latent_shape, seed=config.seed, sample_index=index, step=step, stream=Stream.STEP)
        for step in range(len(ours) - 1)
    ]
    reward = build_reward(config.reward.terms, config.reward.options)
    stock = Stock(model, bench.variants[STOCK_SPARSE].config, reward)
    theirs, _ = stock.rollout(stock.encode(batch.prompts[:size]), size, ours[0], torch.stack(steps))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


def check_work(bench: Bench) -> dict[str, int]:
    """Run every variant once, assert that it does the work of its closed form; peak memory in bytes.

    The peak is each variant's own on a GPU; a CPU process only knows its highest so far, of all of them.
    """
    peaks = {}
    for name, variant in bench.variants.items():
        if bench.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with counted(variant.models, bench.tally) as work:
            variant()
        found, cost = work.per_trajectory(variant.rows), variant.cost
        expected = {key: float(getattr(cost, key)) for key in found}
        assert found == expected, f"{name} did {found} per trajectory, expected {expected}"
        if bench.model.device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated()
    # kilobytes, except on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return peaks or {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def timed(bench: Bench, *, rounds: int, warmup: int) -> dict[str, Any]:
    """Time the variants in turns: `ratios`, `seconds`, `nfe`, `peak_memory_bytes`, `noisy`."""
    peaks = check_work(bench)
    calls: Mapping[str, Callable[[], object]] = bench.variants
    seconds = interleaved(calls, rounds=rounds, warmup=warmup)
    summary = {}
    for name, own in seconds.items():
        phases = bench.variants[name].phases[-rounds:]
        summary[name] = {
            "median": median(own),
            "spread": spread(own),
            "rounds": own,
            "phases": {phase: median(each[phase] for each in phases) for phase in phases[0]},
        }
    return {
        "ratios": ratios(seconds, RATIOS),
        "seconds": summary,
        "nfe": {name: evaluations(variant.cost) for name, variant in bench.variants.items()},
        "peak_memory_bytes": peaks,
        "noisy": any(own["spread"] > NOISY_SPREAD for own in summary.values()),
    }


def evaluations(cost: IterationCost) -> dict[str, int | float]:
    """Network forwards by phase, decodes and rewards per trajectory."""
    phases = ("rollout", "lookahead", "policy", "reference")
    found = {phase: getattr(cost, phase).forwards for phase in phases} | {"total": cost.forwards}
    return found | {key: getattr(cost, key) for key in ("full_decodes", "preview_decodes", "rewards")}


def measure(protocol: Protocol, *, rounds: int, warmup: int) -> dict[str, Any]:
    """The whole document: with the KL term at the top, without it under `no_kl`."""
    started = load_average()
    bench = prepare(protocol, kl=True)
    headline = timed(bench, rounds=rounds, warmup=warmup)
    without = timed(prepare(protocol, kl=False, model=bench.model), rounds=rounds, warmup=warmup)
    configs = {name: variant.config.model_dump(mode="json") for name, variant in bench.variants.items()}
    stock = bench.variants[STOCK_SPARSE].config
    settings = {
        "rounds": rounds,
        "warmup": warmup,
        "pinned": pinned(bench.variants[SPARSE].config),
        "stock": stock_pinned(stock) | {"images_per_decode": stock.sampler.micro_batch},
        "dense_fast": fast_settings(bench.variants[DENSE_FAST].config),
        "variants": configs,
    }
    return (
        headline
        | provenance()
        | {
            "load_average": {"start": started, "end": load_average()},
            "settings": portable(settings),
            "noisy": headline["noisy"] or without["noisy"],
            "no_kl": without | {"settings": {"objective.kl_coef": 0.0}},
        }
    )


@pytest.mark.parametrize("name", NAMES)
def bench_iteration(benchmark: Any, name: str) -> None:
    bench = prepare(Protocol(model=EMBEDDED_RANDOM, prompts=1, group_size=2), kl=True)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "load_average": load_average()}
    benchmark.extra_info["nfe"] = evaluations(bench.variants[name].cost)
    benchmark.pedantic(bench.variants[name], rounds=3, warmup_rounds=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    made = parser(__doc__)
    # every variant runs once before that, to be counted
    made.set_defaults(rounds=3, warmup=0)
    options = made.parse_args(arguments)
    with user_errors_exit():
        document = measure(protocol_of(options), rounds=options.rounds, warmup=options.warmup)
        write_json(options.output or default_output("iteration"), document)
    for title, part in (("with KL", document), ("without KL", document["no_kl"])):
        print(title)
        for name, own in part["seconds"].items():
            phases = ", ".join(f"{phase} {value:.3f}" for phase, value in own["phases"].items())
            total = part["nfe"][name]["total"]
            print(f"  {name:18} {own['median']:8.3f} s  spread {own['spread']:4.0%}  {total:6.1f} NFE  {phases}")
        for pair, value in part["ratios"].items():
            print(f"  {pair:26} {value:6.3f}")
    if document["noisy"]:
        print("noisy: repeat on a quieter machine before quoting")
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
