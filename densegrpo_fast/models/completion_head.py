"""A small network that takes a completion's last jump better than Euler does.

After its last evaluation a cheap completion jumps to sigma 0 along one velocity. The head looks at what that evaluation
has produced anyway (the transformer's last hidden tokens, the latents, the one-step clean estimate) and at which state
it completes, and adds the difference to where the exact completion would end. It is trained on exact completions of
the starting policy (`python -m densegrpo_fast.completion`), sees only lookahead rows, and has no part in the policy's
gradient. An approximation: how good is measured by `python -m densegrpo_fast.fidelity --head`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONFIG, _COST = "completion_head", "cost"
_HEADS = 4


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head and what it fits.

    Attributes:
        num_steps: T of the trajectories.
        paths: the plan's path per state; a head is trained for one plan.
        latent_shape: (C, H, W).
        patch: latents per side of a token.
        hidden: width of the transformer's tokens.
        width, depth, heads: of the head's own blocks.
    """

    num_steps: int
    paths: tuple[tuple[int, ...], ...]
    latent_shape: tuple[int, ...]
    patch: int
    hidden: int
    width: int = 128
    depth: int = 2
    heads: int = _HEADS


@dataclass(frozen=True)
class HeadCost:
    """What making a head took.

    Attributes:
        forwards: network forwards (NFE) of the rollouts and their completions.
        decodes: images decoded; 0, as a head learns from latents.
        head_rows: rows through the head, most of them forward and backward.
        tflop: 1e12 floating-point operations of all that; None where they could not be counted.
        seconds: from the first rollout to the head.
    """

    forwards: int
    decodes: int
    head_rows: int
    tflop: float | None
    seconds: float


def usual_width(hidden: int, blocks: int, depth: int) -> int:
    """Width of a head that takes about a tenth of the operations of a forward, at its default depth or another.

    A block's products grow with the square of the width, and a network's tokens are a fifth more than a head's, as
    those of the text are among them.

    Args:
        hidden: width of the transformer's tokens.
        blocks: of the transformer.
        depth: blocks of the head.

    Returns:
        A multiple of 16: heads of a multiple of 4 channels.
    """
    unit = 4 * _HEADS
    return unit * max(1, round(hidden * math.sqrt(0.12 * blocks / depth) / unit))


class CompletionHead(nn.Module):
    """Predicts exact completion minus one-step estimate from the last evaluation of a completion.

    Starts as the zero function, so an untrained head leaves every completion as it is.

    Attributes:
        cost: what making it took; None if that is not known.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        channels, height, width = config.latent_shape
        if height % config.patch or width % config.patch or config.width % config.heads:
            raise ValueError(f"completion head: latents {config.latent_shape} or width do not divide, got {config}")
        self.config = config
        self.cost: HeadCost | None = None
        tokens, values = (height // config.patch) * (width // config.patch), channels * config.patch**2
        self.hidden_norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.embed = nn.Linear(config.hidden + 2 * values, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        self.state = nn.Embedding(config.num_steps, config.width)
        block = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, config.depth, enable_nested_tensor=False)
        self.out = nn.Linear(config.width, values)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(config.num_steps))

    def forward(self, hidden: Tensor, latents: Tensor, estimate: Tensor, state: Tensor) -> Tensor:
        """What to add to the one-step estimate.

        Args:
            hidden: [B, N, D] the transformer's last hidden tokens, any float dtype.
            latents: [B, C, H, W] float32 where the last evaluation was made.
            estimate: [B, C, H, W] float32, latents - sigma * velocity there.
            state: [B] int64, the state (steps done) that is completed.

        Returns:
            [B, C, H, W] float32.
        """
        patch, (_, height, width) = self.config.patch, self.config.latent_shape
        dtype = self.embed.weight.dtype
        pixels = torch.cat([F.pixel_unshuffle(x, patch) for x in (latents, estimate)], dim=1).flatten(2).mT
        tokens = torch.cat([self.hidden_norm(hidden.to(dtype)), pixels.to(dtype)], dim=-1)
        tokens = self.embed(tokens) + self.position + self.state(state)[:, None]
        residual = self.out(self.blocks(tokens)).mT.unflatten(2, (height // patch, width // patch))
        return F.pixel_shuffle(residual, patch).float() * self.scale[state].view(-1, 1, 1, 1)

    def applies(self, state: int) -> bool:
        """Whether this state's completion leaves out a step, so that there is anything to predict."""
        path, steps = self.config.paths[state], self.config.num_steps
        return path != tuple(range(state + 1, steps))


def save_head(head: CompletionHead, path: Path) -> None:
    """Write a head as one safetensors file, its configuration and what it cost in the metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    facts = {_CONFIG: json.dumps(asdict(head.config))}
    if head.cost is not None:
        facts[_COST] = json.dumps(asdict(head.cost))
    save_file(tensors, path, metadata=facts)


def load_head(path: Path) -> CompletionHead:
    """Read a head that `save_head` wrote, frozen.

    Raises:
        ValueError: the file is missing or is no completion head.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            settings, cost = facts[_CONFIG], facts.get(_COST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no completion head ({error or type(error).__name__}); "
            "make one with python -m densegrpo_fast.completion"
        ) from None
    settings |= {"paths": tuple(map(tuple, settings["paths"])), "latent_shape": tuple(settings["latent_shape"])}
    head = CompletionHead(HeadConfig(**settings))
    head.cost = None if cost is None else HeadCost(**cost)
    head.load_state_dict(tensors)
    return head.requires_grad_(False).eval()
