"""The flow stage: rectified-flow matching on cached latents (arXiv 2403.03206), resumable at any step.

The velocity is noise - data. Every step draws from its own generator, so a continued run sees what an uninterrupted
one sees. While the learning rate is constant, the scores of the averaged weights on held-out sentences are the curve to
watch.

Beside the velocity, a small head reads from a middle block which object covers each token and where its centre is, and
its loss trains the blocks below it (after REPA, arXiv 2410.06940, with the objects themselves in place of another
network's features). The head is not part of the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from densegrpo_fast.embedded.dataset import Dataset
from densegrpo_fast.embedded.stages import Loop

CHECKPOINT_SECONDS = 90.0


class PlainAttention:
    """SD3's joint attention by plain matrix products.

    For bfloat16 on a CPU, where the backward of torch's fused attention is slow.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over [N, I, C] picture and [N, T, C] text tokens together."""
        tokens = hidden_states.shape[1]
        own = (attn.to_q, attn.to_k, attn.to_v)
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (
            torch.cat([a(hidden_states), b(encoder_hidden_states)], 1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for a, b in zip(own, text, strict=True)
        )
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        picture = attn.to_out[0](mixed[:, :tokens])
        return picture, mixed[:, tokens:] if attn.context_pre_only else attn.to_add_out(mixed[:, tokens:])


class Reader(nn.Module):
    """Reads objects from picture tokens [N, 64, width]: logits of kinds, and places; see `Dataset`."""

    def __init__(self, width: int, kinds: int):
        super().__init__()
        self.kinds = kinds
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, kinds + 3)
        )

    def loss(self, hidden: Tensor, kinds: Tensor, places: Tensor) -> Tensor:
        """Cross-entropy of the kinds, plus the squared error of places where there is an object."""
        read, kinds = self.layers(hidden).float(), kinds.long()
        covered = (kinds > 0).unsqueeze(-1)
        error = ((read[..., self.kinds :] - places.float()).square() * covered).sum() / (3 * covered.sum()).clamp(min=1)
        return F.cross_entropy(read[..., : self.kinds].flatten(0, 1), kinds.flatten()) + error


@dataclass(frozen=True)
class FlowRecipe:
    """Everything that decides what the flow learns from a data set."""

    seed: int = 0
    steps: int = 7_600
    decay_steps: int = 1_500
    batch: int = 128
    lr: float = 1e-3
    average: float = 0.999
    uniform_share: float = 0.2
    shift: float = 3.0
    drop_prompt: float = 0.1
    pad_share: float = 0.03
    read_block: int = 3
    read_weight: float = 0.2
    bfloat16: bool = True
    score_every: int = 1_000


def train_flow(
    transformer: SD3Transformer2DModel,
    data: Dataset,
    recipe: FlowRecipe,
    directory: Path,
    scores: Callable[[], dict[str, object]] | None = None,
) -> list[tuple[int, float]]:
    """Train in place; the transformer ends with the average of its weights. Returns the loss curve.

    `directory` holds `flow.partial.safetensors` (newest step), `flow.stable.safetensors` (before the decay: what a
    longer run continues from) and `flow.scores.jsonl` (what `scores` returns for the average, every `score_every`).
    """
    reader = _reader(transformer, data.num_kinds, recipe)
    modules: dict[str, nn.Module] = {"transformer": transformer, "reader": reader}
    parameters = [p for module in modules.values() for p in module.parameters()]
    average = EMAModel(parameters, decay=recipe.average, use_ema_warmup=True, power=0.75, foreach=True)
    matrices = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2]
    loop = Loop("flow", parameters, recipe.steps, recipe.lr, recipe.decay_steps, matrices)
    partial, stable = directory / "flow.partial.safetensors", directory / "flow.stable.safetensors"
    loop.restore(partial, modules, average)
    transformer.set_attn_processor(PlainAttention())
    transformer.train()
    hidden: list[Tensor] = []
    hook = transformer.transformer_blocks[recipe.read_block].register_forward_hook(
        lambda block, inputs, outputs: hidden.append(outputs[1])
    )
    kept = time.monotonic()
    for step in loop:
        index, noisy, target, conditions = draw(data, recipe, step)
        with torch.autocast("cpu", torch.bfloat16) if recipe.bfloat16 else nullcontext():
            velocity = transformer(noisy, **conditions).sample
            reading = reader.loss(hidden.pop(), data.kinds[index], data.places[index])
        error = F.mse_loss(velocity.float(), target)
        loop.update(error + recipe.read_weight * reading, shown=error)
        average.step(parameters)
        if step + 1 == recipe.steps - recipe.decay_steps:
            loop.keep(stable, modules, average)
        if time.monotonic() - kept > CHECKPOINT_SECONDS:
            loop.keep(partial, modules, average)
            kept = time.monotonic()
        if scores is not None and (step + 1) % recipe.score_every == 0:
            average.store(parameters)
            average.copy_to(parameters)
            line = {"step": step + 1, "loss": loop.curve[-1][1], **scores()}
            average.restore(parameters)
            hidden.clear()
            with (directory / "flow.scores.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    average.copy_to(parameters)
    hook.remove()
    transformer.set_attn_processor(JointAttnProcessor2_0())
    transformer.eval()
    return loop.curve


def _reader(transformer: SD3Transformer2DModel, kinds: int, recipe: FlowRecipe) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Reader(transformer.inner_dim, kinds)


def draw(data: Dataset, recipe: FlowRecipe, step: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A step's pictures: their numbers, noisy latents, target velocities and conditions.

    Noise levels are logit-normal, some uniform, then shifted as the sampler's are. A tenth of the prompts is dropped
    for guidance. In some batches a random number of zero tokens stands where SD3 puts T5's, so that the model gives
    the same picture with and without diffusers' 256 zero tokens.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    count = recipe.batch
    index = torch.randint(len(data), (count,), generator=generator)
    clean = data.latents[index].float()
    dropped = torch.rand(count, generator=generator) < recipe.drop_prompt
    sentence = torch.where(dropped, len(data.embeds) - 1, data.sentence[index])
    normal = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    sigma = torch.where(torch.rand(count, generator=generator) < recipe.uniform_share, uniform, normal)
    sigma = (recipe.shift * sigma / (1 + (recipe.shift - 1) * sigma)).view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    chance, size = torch.rand(2, generator=generator).tolist()
    pad = round(256**size) if chance < recipe.pad_share else 0
    conditions = {
        "encoder_hidden_states": F.pad(data.embeds[sentence], (0, 0, 0, pad)),
        "pooled_projections": data.pooled[sentence],
        "timestep": 1000 * sigma.flatten(),
    }
    return index, (1 - sigma) * clean + sigma * noise, noise - clean, conditions
