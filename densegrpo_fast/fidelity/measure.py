"""Lookahead rewards of many variants on the very same trajectories, or branches of trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densegrpo_fast.fidelity.target import FidelityTarget
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.models.base import Cache, FlowModel, Recorder
from densegrpo_fast.sampling.branches import branch_rollout
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration, dense_iteration, sparse_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Rollout, initial_noise, rollout
from densegrpo_fast.training.agreement import Agreement, compare, compare_branches

if TYPE_CHECKING:
    from densegrpo_fast.training.distributed import World


def cost_of(variant: Variant, target: FidelityTarget, group_size: int) -> IterationCost:
    """Cost per sample of a training iteration with this lookahead."""
    options: dict[str, Any] = {
        "trained_steps": target.trained_steps,
        "guided": target.guided,
        "kl": target.kl,
        "guidance_gradient": target.guidance_gradient,
        "guidance": variant.guidance,
        "decoder": variant.decoder,
        "noisy": target.coefficients.noisy,
    }
    if target.branched:
        return branched_iteration(variant.plan, branches=group_size, **options)
    options["shared"] = group_size if target.shared_noise and not _uses_its_rollout(variant, target) else 1
    return dense_iteration(variant.plan, **options)


def flops_ratio(variant: Variant, target: FidelityTarget, group_size: int) -> float | None:
    """Operations of the iteration over those of the sparse one; None where they are not known."""
    if target.flops is None:
        return None
    sparse = sparse_iteration(
        target.coefficients.num_steps,
        trained_steps=target.trained_steps,
        guided=target.guided,
        kl=target.kl,
        guidance_gradient=target.guidance_gradient,
    )
    cheap = target.cheap_flops.get((variant.copy, variant.cache))
    return cost_of(variant, target, group_size).flops(target.flops, cheap) / sparse.flops(target.flops)


def agreement_of(target: FidelityTarget, exact: Tensor, cheap: Tensor) -> Agreement:
    """Agreement of the rewards of a variant with the reference's, both as `measure` returns them."""
    if target.branched:
        return compare_branches(exact, cheap, target.coefficients.noisy)
    return compare(exact, cheap, target.coefficients.noisy)


def lookahead_of(target: FidelityTarget, variant: Variant, batch: Batch) -> Lookahead:
    """What completes a batch as the variant says."""
    return Lookahead(
        target.model if variant.copy is None else target.copies[variant.copy],
        variant.plan,
        guidance=variant.guidance,
        chunk=target.chunk,
        cache=None if variant.cache is None else batch.caches[variant.copy, variant.cache],
        step_runner=target.step_runner,
    )


def without_decoder(variant: Variant) -> Variant:
    """The variant as far as its completions go: those that differ in the decoder alone share them."""
    return replace(variant, decoder="full", vae=None)


def decoding(target: FidelityTarget, variant: Variant) -> FlowModel:
    """The model whose decoders a variant's images come from."""
    return target.model if variant.vae is None else target.vaes[variant.vae]


class SideBySide:
    """Records one rollout in several caches, which only read.

    Args:
        caches: any number, over the same network and rows.
    """

    def __init__(self, caches: Iterable[Recorder]):
        self.caches = tuple(caches)

    def clear(self) -> None:
        """Forget the last rollout's."""
        for cache in self.caches:
            cache.clear()

    @contextmanager
    def record(self, step_index: int, rows: slice) -> Iterator[None]:
        """Within the context, one velocity leaves in every cache what that keeps."""
        with ExitStack() as contexts:
            for cache in self.caches:
                contexts.enter_context(cache.record(step_index, rows))
            yield


@dataclass(frozen=True)
class Batch:
    """Some groups' samples.

    Attributes:
        rollout: of B samples, group after group: trajectories, or the branches of one for each group.
        rows: prompt of each row.
        metadata: of each row.
        group_size: G.
        caches: the target's, as the rollout has left them.
    """

    rollout: Rollout
    rows: list[str]
    metadata: list[dict[str, Any]]
    group_size: int
    caches: Mapping[tuple[str | None, str], Cache] = field(default_factory=dict)


def batches(target: FidelityTarget, groups: range, *, group_size: int, seed: int) -> Iterator[Batch]:
    """Draw the named groups, as many at a time as fit the target's chunk.

    All noise is a function of (seed, group, sample) alone, so the same group is the same in any range.
    """
    if not target.branched:
        yield from trajectories(target, groups, group_size=group_size, seed=seed)
        return
    for rows, metadata, index in _rows(target, groups, group_size):
        first = index[::group_size]
        branched = branch_rollout(
            target.model,
            initial_noise(target.model, first, seed=seed, iteration=0),
            target.model.encode(rows),
            target.coefficients,
            branches=group_size,
            sample_index=first,
            seed=seed,
            iteration=0,
            guidance_scale=target.guidance_scale,
        )
        yield Batch(branched, rows, metadata, group_size)


def trajectories(target: FidelityTarget, groups: range, *, group_size: int, seed: int) -> Iterator[Batch]:
    """Roll out the named groups, as `batches` does without branches."""
    model = target.model
    for rows, metadata, index in _rows(target, groups, group_size):
        caches = {key: make(len(rows)) for key, make in target.caches.items()}
        first = index - index % group_size if target.shared_noise else index
        trajectory = rollout(
            model,
            initial_noise(model, first, seed=seed, iteration=0),
            model.encode(rows),
            target.coefficients,
            sample_index=index,
            seed=seed,
            iteration=0,
            guidance_scale=target.guidance_scale,
            keep_guidance=True,
            cache=SideBySide(caches.values()) if caches else None,
            # a group that is larger than the chunk is split evenly
            micro_batch=None if len(rows) <= target.chunk else math.gcd(len(rows), target.chunk),
        )
        if target.shared_noise:
            trajectory = replace(trajectory, shared=group_size)
        yield Batch(trajectory, rows, metadata, group_size, caches)


def _rows(
    target: FidelityTarget, groups: range, group_size: int
) -> Iterator[tuple[list[str], list[dict[str, Any]], Tensor]]:
    """Prompts, metadata and global index of the rows of as many groups at a time as fit the chunk."""
    at_once = max(1, target.chunk // group_size)
    for start in range(groups.start, groups.stop, at_once):
        chosen = range(start, min(start + at_once, groups.stop))
        rows = [target.prompts.prompts[group] for group in chosen for _ in range(group_size)]
        metadata = [target.prompts.metadata[group] for group in chosen for _ in range(group_size)]
        yield (
            rows,
            metadata,
            torch.arange(chosen.start * group_size, chosen.stop * group_size, device=target.model.device),
        )


def score(target: FidelityTarget, batch: Batch, images: Tensor) -> Tensor:
    """Rewards [P', G, S] of images [S, B, 3, H, W], S pictures for each row of a batch of P' groups; NaN = missing.

    Raises:
        RewardError: the reward failed.
    """
    count = len(images)
    scores = target.reward(images.flatten(0, 1), batch.rows * count, batch.metadata * count)
    return scores.values.view(count, -1, batch.group_size).permute(1, 2, 0)


def measure(
    target: FidelityTarget,
    variants: Sequence[Variant],
    groups: range,
    *,
    group_size: int,
    seed: int,
    progress: Callable[[int], object] = lambda done: None,
    world: World | None = None,
) -> dict[Variant, Tensor]:
    """Lookahead rewards of every variant, and of the reference, on one rollout of each group.

    Args:
        target: what is measured.
        variants: plans with their guidance and decoder; those that differ in the decoder alone share completions.
        groups: indices of the target's prompts.
        group_size: G.
        seed: of all noise.
        progress: is told how many groups are done.
        world: the processes that share the groups; each gets all rewards. None = this one alone.

    Returns:
        Per variant [P, G, T+1] float32 on the CPU; index = steps done, NaN = missing. Of a branched target [P, G, M],
        of the G branches at each of the M steps with noise.

    Raises:
        RewardError: the reward failed.
    """
    wanted = list(dict.fromkeys([reference(target.coefficients.num_steps), *variants]))
    parts: dict[Variant, list[Tensor]] = {variant: [] for variant in wanted}
    share, own, done = None if world is None else world.share(len(groups)), groups, 0
    if share is not None:
        own = range(groups.start + int(share.rows[0]), groups.start + int(share.rows[-1]) + 1)
    for batch in batches(target, own, group_size=group_size, seed=seed):
        for variant, rewards in rewards_of(target, wanted, batch):
            parts[variant].append(rewards)
        done += len(batch.rows) // group_size
        progress(done)
    found = {variant: torch.cat(values) for variant, values in parts.items()}
    return found if share is None else {variant: share.gather(values) for variant, values in found.items()}


def rewards_of(target: FidelityTarget, variants: Sequence[Variant], batch: Batch) -> Iterator[tuple[Variant, Tensor]]:
    """Every variant's rewards of a batch, as `measure` returns them; those that differ in the decoder alone share
    completions."""
    for way in dict.fromkeys(map(without_decoder, variants)):
        lookahead = lookahead_of(target, way, batch)
        clean = lookahead.complete(batch.rollout)
        for variant in variants:
            if without_decoder(variant) == way:
                images = lookahead.images(batch.rollout, clean, variant.decoder, decoding(target, variant))
                yield variant, score(target, batch, images)


def _uses_its_rollout(variant: Variant, target: FidelityTarget) -> bool:
    """Whether each completion reuses something from its own sample's rollout, as `Lookahead.dedup` asks."""
    return variant.cache is not None or (variant.guidance == "reuse" and target.guided)
