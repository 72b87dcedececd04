"""Memory of a run: what it will need, whether the device has it, and the most that it took; prompts encoded ahead."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from densegrpo_fast.common.errors import SetupError, UserError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.flops import architecture_of
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.memory import ModelMemory, module_bytes, tensor_bytes
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.lookahead import GB, Chunks
from densegrpo_fast.training.meter import underlying
from densegrpo_fast.training.sharding import ShardMode

logger = logging.getLogger(__name__)

GIB = 2**30
_CLEARLY = 1.1
"""An estimate beyond the free memory by this factor is refused: the estimate counts tensors alone, so it is low."""

_ADVICE = {
    "rollout": "a smaller sampler.micro_batch",
    "lookahead": "a smaller lookahead.chunk, or fewer samples (data.num_prompts, sampler.group_size)",
    "pictures": "fewer samples (data.num_prompts, sampler.group_size), model.vae_decode sliced, model.vae_dtype "
    "or model.preview_dtype bfloat16, or a smaller lookahead.chunk",
    "update": "model.gradient_checkpointing true, or a smaller sampler.micro_batch",
    "training": "a smaller lora.rank, or with model.train full more processes and distributed.shard full",
    "trajectories": "fewer samples (data.num_prompts, sampler.group_size)",
    "lookahead features": "fewer lookahead.nodes, lookahead.guidance cond_only, or lookahead.cache null",
    "graphs": "optimizer.update replayed, model.gradient_checkpointing true, or fewer samples (data.num_prompts, "
    "sampler.group_size)",
    "captured graphs": "lookahead.graphs false, or a smaller lookahead.chunk",
    "evaluation": "fewer held-out pictures (evaluation.num_prompts, evaluation.samples_per_prompt), model.vae_decode "
    "sliced, or a smaller sampler.micro_batch",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run needs.

    Attributes:
        weights: of each network, loaded before the first iteration.
        state: what stays from then on: gradients, moments and average of the adapter, the trajectories, and the
            features that the rollout leaves for the lookahead (`models/feature_cache.py`).
        phases: the most that each phase needs beside that; only one runs at a time.
    """

    weights: Mapping[str, int]
    state: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def to_come(self) -> int:
        """What the run needs beside the weights."""
        return sum(self.state.values()) + self.phases[self.largest]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.weights.values()) + self.to_come

    def __str__(self) -> str:
        def listed(parts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)

        return (
            f"memory: about {readable(self.total)} by the tensors alone; the phase that needs most is {self.largest}\n"
            f"  weights: {listed(self.weights)}\n  kept: {listed(self.state)}\n  phases: {listed(self.phases)}"
        )


def estimate(
    config: Config,
    memory: ModelMemory,
    *,
    chunks: Chunks | None = None,
    encoders: int = 0,
    rewards: int = 0,
    copy: int = 0,
    features: int = 0,
    processes: int = 1,
    shards: int = 1,
) -> MemoryEstimate:
    """What a run with these settings needs; the arithmetic is in `models/memory.py`.

    Args:
        config: the run's.
        memory: of its model.
        chunks: rows of a forward of the lookahead and of a decode; None = `lookahead.chunk`.
        encoders: bytes of the text encoders; 0 if they do not stay.
        rewards: bytes of the reward models on the same device.
        copy: bytes of a lookahead copy.
        features: bytes that the lookahead's cache will hold.
        processes: that share the samples; the estimate is of one of them.
        shards: parts of the network, of which each process holds one; the block that is gathered is not counted.
    """
    sampler, model, held_out = config.sampler, config.model, config.evaluation
    latents = 4 * prod(memory.architecture.latent_shape)
    samples, steps = -(-config.data.num_prompts * sampler.group_size // processes), sampler.num_steps
    guided = sampler.guidance_scale != 1.0 and memory.architecture.guided
    dense = config.uses_lookahead or config.uses_branches
    # with branches micro_batch counts trajectories, and evaluation has a row for each branch
    held_out_rows = -(-held_out.num_prompts * held_out.samples_per_prompt // processes)
    evaluated = min(sampler.micro_batch * (sampler.branches or 1), held_out_rows)
    states = _completed_states(config) if dense else 0
    per_state = 2 + int(dense and guided and config.lookahead.guidance == "reuse")
    decoder = config.lookahead.decoder if dense else "full"
    chunks = Chunks(config.lookahead.chunk, config.lookahead.chunk) if chunks is None else chunks
    decoded = min(chunks.decode, (states + 1) * samples)
    # without overlap all pictures are kept, then put together; with it four parts are under way at most
    pictures = 4 * decoded if config.reward.overlap else 2 * (states + 1) * samples
    decoding = memory.decode(decoded, decoder, model.vae_decode)
    if config.uses_lookahead and decoder == "preview":
        # the ends are decoded in full besides, as many at a time as the budget allows
        ends = memory.decode(min(config.lookahead.chunk, samples), "full", model.vae_decode)
        budget = config.lookahead.memory_gb
        decoding = max(decoding, ends if budget is None else min(ends, int(budget * GB)))
    graphs = 1 + int(guided and config.objective.guidance_gradient == "full")
    further = 1 + int(guided) - graphs + (1 + int(guided)) * int(config.objective.kl_coef != 0)
    kept = memory.graph(sampler.micro_batch, checkpointing=model.gradient_checkpointing) if _streams(config) else 0
    picture, completed = memory.picture, states * samples
    evaluation = memory.forward(min(chunks.forward, completed)) if completed else 0
    captured = config.lookahead.graphs and config.uses_lookahead
    phases = {
        "rollout": memory.forward(sampler.micro_batch),
        # where the completions stand and where they go, states and velocities
        "lookahead": completed * 4 * latents + (0 if captured else evaluation),
        "pictures": pictures * picture + decoding,
        "update": memory.update(
            sampler.micro_batch, forwards=further, checkpointing=model.gradient_checkpointing, graphs=graphs
        ),
        "evaluation": held_out_rows * (latents + 2 * picture)
        + max(memory.forward(evaluated), memory.decode(evaluated, "full", model.vae_decode)),
    }
    # gradients and two moments, and of the average one copy and what it takes the place of while it is in use
    copies, whole = 3 + (2 if config.ema.every else 0), model.train == "full"
    return MemoryEstimate(
        weights={
            "transformer": (memory.trained if whole else memory.transformer) // shards,
            "adapter": 0 if whole else memory.trained,
            "reference": memory.transformer // shards if whole and config.objective.kl_coef else 0,
            "text encoders": encoders,
            "decoders": memory.full_decoder + memory.preview_decoder,
            "lookahead copy": copy,
            "rewards": rewards,
        },
        state={
            "training": copies * memory.trained // (shards if whole else 1),
            "trajectories": samples * latents * (per_state * steps + 1),
            "lookahead features": features,
            # of two steps, and of both halves of guidance if both have a gradient
            "graphs": 2 * graphs * kept * samples // sampler.micro_batch,
            # CUDA graphs keep their pool, which no other phase may use
            "captured graphs": evaluation if captured else 0,
        },
        phases=phases,
    )


def _completed_states(config: Config) -> int:
    """Most states of a sample that an iteration completes, the image not among them."""
    states = config.window.size or sum(level > 0 for level in config.noise_levels)
    trained = config.objective.trained_steps
    if not config.uses_lookahead or config.credit_scope == "whole" or trained == "all_but_last":
        return states
    # those at both ends of each trained step
    if isinstance(trained, int):
        return min(states, 2 * trained)
    return len({step + end for step in config.noisy_among(trained) for end in (0, 1)} - {config.sampler.num_steps})


def _streams(config: Config) -> bool:
    return config.optimizer.update == "streamed"


def check(estimated: MemoryEstimate, free: int | None, what: str) -> str | None:
    """Compare what is to come with the free memory.

    Args:
        estimated: of a run whose weights are loaded already.
        free: bytes; None = unknown.
        what: the device, for the message.

    Returns:
        What is wrong and what to change, or None if it may fit.
    """
    if free is None or estimated.to_come <= _CLEARLY * free:
        return None
    largest = estimated.largest
    parts = {largest: estimated.phases[largest], **estimated.state}
    most = max(parts, key=lambda name: parts[name])
    return (
        f"this run needs about {readable(estimated.to_come)} beside the weights, {what} has {readable(free)} free; "
        f"most goes to {'the phase ' if most == largest else ''}{most} ({readable(parts[most])}), less with "
        f"{_ADVICE[most]}. The preset sd35_medium_pickscore_24gb shows settings for a small GPU; "
        "run.memory_check warn goes on all the same"
    )


def readable(size: int) -> str:
    """Bytes for people: `14.1 GiB`, `31 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def refuse(problem: str) -> UserError:
    """The error for a run that does not fit."""
    return SetupError(f"run.memory_check: {problem}")


def free_bytes(device: torch.device, cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that this process can still take: of a GPU also what PyTorch holds unused, of the machine what Linux
    calls available within the container's limit; None = unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    sizes = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit, used = ((cgroup / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        sizes += [] if limit == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        pass
    return min(sizes, default=None)


def held_bytes(objects: Iterable[object], device: torch.device, depth: int = 2) -> int:
    """Bytes on a device of the networks among the attributes of objects, and among their attributes' attributes."""
    networks: dict[int, nn.Module] = {}
    level = list(objects)
    for _ in range(depth + 1):
        networks |= {id(thing): thing for thing in level if isinstance(thing, nn.Module)}
        level = [
            value
            for thing in level
            if not isinstance(thing, nn.Module)
            for value in getattr(thing, "__dict__", {}).values()
        ]
    tensors = {id(x): x for each in networks.values() for x in (*each.parameters(), *each.buffers())}
    return tensor_bytes(tensor for tensor in tensors.values() if tensor.device.type == device.type)


def start_peak(device: torch.device) -> None:
    """Begin a measurement of `peak_bytes`; a process on a CPU only knows its highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory since `start_peak`: of a GPU what tensors took, of a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes, except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_metrics(device: torch.device) -> dict[str, float]:
    """`peak_bytes` as a metric, in GiB."""
    return {"memory/peak_gib": peak_bytes(device) / GIB}


def prepare(
    config: Config,
    model: FlowModel,
    lookahead: Lookahead | None,
    prompts: Sequence[str],
    reward: RewardMixture | None = None,
    world: World | None = None,
    shards: int = 1,
) -> bool:
    """Encode a run's prompts into its cache, say how its network runs, and see whether the memory will do.

    Args:
        config: the run's.
        model: with its adapter.
        lookahead: the run's, whose model may be a copy.
        prompts: all that the run will use, training and held-out.
        reward: all that the run scores with; networks on the model's device are counted.
        world: the processes that share the run: one encodes the prompts, and what the estimate says is of each.
        shards: parts of the base, of which each process holds one.

    Returns:
        Whether a streamed update fits; False where the run must replay instead.

    Raises:
        SetupError: the device's free memory is clearly too small; OutputError: the cache cannot be written.
    """
    if not isinstance(model, DiffusersModel):
        return True
    world = World() if world is None else world
    encoded = world.on_main(lambda: model.prepare(list(prompts)))
    if encoded:
        print(f"encoded {encoded} prompts into {config.model.prompt_cache}", flush=True)
    if not world.main:
        # where the cache is not on a shared disk
        model.prepare(list(prompts))
    if world.main and (model.device.type == "cuda" or config.model.attention != "auto"):
        by = "PyTorch's own" if model.attention == "auto" else f"{model.attention} through diffusers' dispatcher"
        print(f"attention: {by}, {str(model.dtype).removeprefix('torch.')} on {model.device}", flush=True)
    if config.run.memory_check == "off":
        return True
    needed = estimate_memory(config, model, lookahead, reward, processes=world.size, shards=shards)
    if world.main:
        print(needed, flush=True)
    problem, streams = check(needed, free_bytes(model.device), str(model.device)), True
    if _streams(config) and world.largest(problem is not None):
        logger.warning(
            "optimizer.update: the graphs of two steps need about %s, which do not fit; every trained step's forward "
            "is replayed instead, with the same gradient",
            readable(needed.state["graphs"]),
        )
        streams = False
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"update": "replayed"})})
        needed = estimate_memory(config, model, lookahead, reward, processes=world.size, shards=shards)
        problem = check(needed, free_bytes(model.device), str(model.device))
    if problem is None:
        return streams
    if model.device.type != "cuda":
        problem += "; without a GPU, the embedded model trains in minutes: python -m densegrpo_fast.train"
    if config.run.memory_check == "refuse":
        raise refuse(problem)
    logger.warning("%s", problem)
    return streams


def shard_mode(config: Config, model: FlowModel, reward: RewardMixture, world: World) -> ShardMode:
    """What `distributed.shard` says; auto = full if the base leaves too little memory in one of the processes."""
    mode = config.distributed.shard
    if mode != "auto":
        return mode
    short = False
    if isinstance(model, DiffusersModel) and model.device.type == "cuda":
        needed = estimate_memory(config, model, None, reward, processes=world.size)
        weights = sum(needed.weights[part] for part in ("transformer", "adapter", "reference"))
        free = (free_bytes(model.device) or 0) - (weights if model.awaits_weights else 0)
        short = check(needed, free, "") is not None
    return "full" if world.largest(short) else "none"


def estimate_memory(
    config: Config,
    model: DiffusersModel,
    lookahead: Lookahead | None = None,
    reward: RewardMixture | None = None,
    *,
    processes: int = 1,
    shards: int = 1,
) -> MemoryEstimate:
    """What the run will need on the model's device, the model's own weights included.

    Args:
        processes: that share the samples.
        shards: parts of the base, of which each process holds one.
        lookahead: the run's; its copy and what its cache will hold are counted.
        reward: of the run; its networks on the device are counted.
    """
    pipeline = model.pipeline
    memory = ModelMemory(
        architecture_of(model),
        dtype=model.dtype,
        vae_dtype=pipeline.vae.dtype,
        preview_dtype=model.preview_dtype,
        lora_rank=config.adapter_rank,
        lora_targets=tuple(config.lora.targets),
    )
    chunks = None if lookahead is None else Chunks(lookahead.rows.rows, lookahead.decode_rows.rows)
    evaluated, cache = (None, None) if lookahead is None else (underlying(lookahead.model), lookahead.cache)
    encoders = [getattr(pipeline, name) for name in pipeline.config if name.startswith("text_encoder")]
    return estimate(
        config,
        memory,
        chunks=chunks,
        encoders=sum(module_bytes(encoder) for encoder in encoders),
        rewards=0 if reward is None else held_bytes([scorer for scorer, _ in reward.terms.values()], model.device),
        copy=evaluated.bytes() if isinstance(evaluated, LookaheadCopy) else 0,
        features=cache.capacity(memory.text_tokens) if isinstance(cache, FeatureCache) else 0,
        processes=processes,
        shards=shards,
    )
