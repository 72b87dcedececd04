"""How much the text stream's keys and values depend on the latents and on sigma, which `lookahead.cache text` neglects.

    python benches/bench_text_features.py    writes results/text_features.json

In a joint-attention transformer the text tokens attend to the image tokens. Recorded in each block at every state of
trajectories of the embedded model (settings of `embedded_paper`: 10 steps, guidance; the conditional half), the RMS of
the difference as a share of the RMS of the features themselves, between

    same_prompt     two samples of one prompt at the same sigma: what `text` takes one for the other
    completion      a sample in the rollout and where its noise-free jump from three steps before comes to the same
                    sigma: what `text:own` takes one for the other (from a shorter jump it differs less)
    next_sigma      the same sample at one sigma of the grid and at the next
    other_prompt    two samples of different prompts at the same sigma: the scale for the others

Padding tokens count, as image tokens attend to them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# advice about optional packages is none of a bench's business
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# what is measured is the checkout around this file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from _record import RESULTS, portable, provenance, write_json
from torch import Tensor

from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.cached_blocks import recording
from densegrpo_fast.models.features import Features, Layout
from densegrpo_fast.sampling.rollout import Trajectory
from densegrpo_fast.training.trainer import Trainer

COMPARED = ("same_prompt", "completion", "next_sigma", "other_prompt")
KINDS = ("keys", "values")
_JUMP = 3

Sums = dict[str, list[Tensor]]
"""For each comparison and step, [blocks, 2, 2]: of keys and values the sums of squares of differences and features."""


@torch.no_grad()
def text_of(model: FlowModel, latents: Tensor, sigma: Tensor, conditioning: Conditioning, tokens: int) -> Tensor:
    """Text features [blocks, 2, B, H, L, D/H] of a conditional evaluation: keys, then values.

    Args:
        model: a model that a cache fits.
        latents: [B, ...].
        sigma: 0-dimensional.
        conditioning: of the rows; `tokens` is its text length.
        tokens: L.
    """
    network, spec, rows = model.network, CacheSpec(text=True, own_text=True), slice(0, len(latents))
    features = Features(network, spec, Layout(len(latents), 1, 0, tokens))
    with recording(network, spec, lambda: (features, rows)):
        model.velocity(latents, sigma.expand(len(latents)), conditioning)
    assert features.text is not None
    return features.text


def squares(found: Tensor, other: Tensor) -> Tensor:
    """[blocks, 2, 2] mean squares of the difference and of what is compared, over rows, heads, tokens and channels."""
    return torch.stack([x.double().square().mean(dim=(2, 3, 4, 5)) for x in (found - other, found)], dim=-1)


def compare(model: FlowModel, trajectory: Trajectory, group: int) -> Sums:
    """The mean squares of every comparison, step after step.

    Args:
        model: that drew the trajectories.
        trajectory: rows of at least two prompts, each with `group` samples one after another.
        group: at least 2.
    """
    sigmas, conditioning = trajectory.coefficients.sigmas, trajectory.conditioning
    tokens, batch = conditioning.prompts["embeds"].shape[1], trajectory.batch
    index = torch.arange(batch)
    # the next sample of the group, and the same one of the next group
    partner, foreign = index - index % group + (index + 1) % group, (index + group) % batch
    found: Sums = {name: [] for name in COMPARED}
    before = None
    for step in range(trajectory.num_steps):
        here = text_of(model, trajectory.latents[step], sigmas[step], conditioning, tokens)
        found["same_prompt"].append(squares(here, here[:, :, partner]))
        found["other_prompt"].append(squares(here, here[:, :, foreign]))
        if before is not None:
            found["next_sigma"].append(squares(before, here))
        if step >= _JUMP:
            start = step - _JUMP
            jumped = ops.euler_jump(
                trajectory.latents[start],
                trajectory.velocities[start],
                sigmas[start].expand(batch),
                sigmas[step].expand(batch),
            )
            found["completion"].append(squares(here, text_of(model, jumped, sigmas[step], conditioning, tokens)))
        before = here
    return found


def relative(sums: Tensor) -> list[float]:
    """Root of the share of the first in the second number of the last dimension, to four digits; [..., 2] -> list."""
    return [round(float(x), 4) for x in (sums[..., 0] / sums[..., 1]).sqrt().flatten()]


def summary(found: Sums) -> dict[str, Any]:
    """Relative differences of keys and values: by block over all steps, and by step as the mean of the blocks."""
    document: dict[str, Any] = {}
    for number, kind in enumerate(KINDS):
        own = {name: torch.stack(steps)[:, :, number] for name, steps in found.items() if steps}  # [steps, blocks, 2]
        document[kind] = {
            "by_block": {name: relative(sums.mean(0)) for name, sums in own.items()},
            "by_step": {name: [round(fmean(relative(step)), 4) for step in sums] for name, sums in own.items()},
        }
    return document


def measure(config: Config) -> dict[str, Any]:
    """The whole document, from one rollout of the configuration's prompts."""
    trainer = Trainer(config)
    batch = trainer.prompts.batch(0)
    assert len(set(batch.prompts)) == config.data.num_prompts > 1, "different prompts are needed to compare them"
    trajectory = trainer.sample(batch, trainer.schedule.at(0), iteration=0)
    settings = {
        "model": config.model.path,
        "prompts": config.data.num_prompts,
        "sampler": config.sampler.model_dump(mode="json"),
        "jump": _JUMP,
    }
    found = summary(compare(trainer.model, trajectory, config.sampler.group_size))
    return provenance() | portable({"settings": settings}) | found


def table(document: dict[str, Any]) -> str:
    """A line for each block: the comparisons of its keys, then those of its values."""
    names = list(document["keys"]["by_block"])
    lines = [f"{'block':>5}" + "".join(f"  {kind + ' ' + name:>19}" for kind in KINDS for name in names)]
    columns = [document[kind]["by_block"][name] for kind in KINDS for name in names]
    lines += [
        f"{block:5}" + "".join(f"  {x:19.3f}" for x in row) for block, row in enumerate(zip(*columns, strict=True))
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="embedded", help="a pipeline of the SD3 family; default: the embedded model")
    add("--prompts", type=int, default=16, help="at least 2; default: 16")
    add("--group-size", type=int, default=4, help="samples per prompt, at least 2; default: 4")
    add("--output", type=Path, default=RESULTS / "text_features.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.prompts < 2:
        parser.error(f"--prompts: expected at least 2, got {options.prompts}")
    with user_errors_exit():
        settings = {
            "model.path": options.model,
            "data.num_prompts": options.prompts,
            "sampler.group_size": options.group_size,
            "sampler.micro_batch": options.group_size,
        }
        given = [f"{key}={value}" for key, value in settings.items()]
        config = parse_arguments(["--config", "embedded_paper", *given])[0]
        document = measure(config)
        write_json(options.output, document)
    print(table(document))
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
