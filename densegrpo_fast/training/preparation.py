"""What happens between building a run and its first iteration: prompts encoded ahead, and a look at the memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.flops import architecture_of
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.memory import ModelMemory, module_bytes
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.training.chunks import Chunks
from densegrpo_fast.training.loading import is_slow, without_gpu
from densegrpo_fast.training.memory import MemoryEstimate, check, estimate, free_bytes, held_bytes, refuse

logger = logging.getLogger(__name__)


def check_device(config: Config, device: torch.device) -> None:
    """Refuse to start on a large model without a GPU, before anything is downloaded or loaded.

    Raises:
        SetupError: as `run.memory_check refuse` asks for.
    """
    if config.run.memory_check == "refuse" and is_slow(config.model, device):
        raise SetupError(
            f"there is no CUDA device: {without_gpu(config.model)}. --dry-run tries these settings on a tiny random "
            "model; run.memory_check warn goes on all the same",
        )


def prepare(
    config: Config,
    model: FlowModel,
    lookahead: Lookahead | None,
    prompts: Sequence[str],
    reward: RewardMixture | None = None,
) -> None:
    """Encode a run's prompts into its cache, say how its network runs, and see whether the memory will do.

    Args:
        config: the run's.
        model: with its adapter.
        lookahead: the run's, whose model may be a copy.
        prompts: all that the run will use, training and held-out.
        reward: all that the run scores with; networks on the model's device are counted.

    Raises:
        SetupError: the device's free memory is clearly too small; OutputError: the cache cannot be written.
    """
    if not isinstance(model, SD3):
        return
    encoded = model.prepare(list(prompts))
    if encoded:
        print(f"encoded {encoded} prompts into {config.model.prompt_cache}", flush=True)
    if model.device.type == "cuda" or config.model.attention != "auto":
        by = "PyTorch's own" if model.attention == "auto" else f"{model.attention} through diffusers' dispatcher"
        print(f"attention: {by}, {str(model.transformer.dtype).removeprefix('torch.')} on {model.device}", flush=True)
    if config.run.memory_check == "off":
        return
    needed = estimate_memory(config, model, lookahead, reward)
    print(needed, flush=True)
    problem = check(needed, free_bytes(model.device), str(model.device))
    if problem is None:
        return
    if model.device.type != "cuda":
        problem += "; without a GPU, the embedded model trains in minutes: python -m densegrpo_fast.train"
    if config.run.memory_check == "refuse":
        raise refuse(problem)
    logger.warning("%s", problem)


def estimate_memory(
    config: Config, model: SD3, lookahead: Lookahead | None = None, reward: RewardMixture | None = None
) -> MemoryEstimate:
    """What the run will need on the model's device, the model's own weights included.

    Args:
        lookahead: the run's; its copy, its completion head and what its cache will hold are counted.
        reward: of the run; its networks on the device are counted.
    """
    pipeline, lora = model.pipeline, config.lora
    memory = ModelMemory(
        architecture_of(model),
        dtype=model.transformer.dtype,
        vae_dtype=pipeline.vae.dtype,
        preview_dtype=model.preview_dtype,
        lora_rank=lora.rank,
        lora_targets=tuple(lora.targets),
    )
    chunks = None if lookahead is None else Chunks(lookahead.chunk, lookahead.decode_chunk)
    evaluated, head, cache = (
        None if lookahead is None else getattr(lookahead, name) for name in ("model", "head", "cache")
    )
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    return estimate(
        config,
        memory,
        chunks=chunks,
        encoders=sum(module_bytes(encoder) for encoder in encoders),
        rewards=0 if reward is None else held_bytes([scorer for scorer, _ in reward.terms.values()], model.device),
        copy=evaluated.bytes() if isinstance(evaluated, LookaheadCopy) else 0,
        head=module_bytes(head) if isinstance(head, CompletionHead) else 0,
        features=cache.capacity(*memory.tokens) if isinstance(cache, FeatureCache) else 0,
    )
