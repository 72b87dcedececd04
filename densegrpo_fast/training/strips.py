"""Strips of an iteration's first prompt, from the pictures that its rewards were computed of: no forward is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from densegrpo_fast.common.pictures import still, to_bytes
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import Scorer
from densegrpo_fast.run_files.strip import Strip, StripRow
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import BranchedRollout
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Completions, Lookahead
from densegrpo_fast.sampling.rollout import Rollout, Trajectory

_SIDE = 192
"""Longest side of a kept picture, in pixels."""


class StripRecorder:
    """Keeps pictures, clean latents, states and rewards of a batch's first prompt, while they are computed.

    Args:
        prompt: the first prompt.
        group_size: G samples that show it.
    """

    def __init__(self, prompt: str, group_size: int):
        self.prompt, self.group = prompt, group_size
        self.rollout: Rollout | None = None
        self._pictures: dict[tuple[int, int], Tensor] = {}
        self._clean: dict[tuple[int, int], Tensor] = {}
        self._by_state: Tensor | None = None
        self._branches: Tensor | None = None
        self._final: Tensor | None = None

    def watching(self, parts: Iterator[Tensor], rollout: Rollout, completions: Completions) -> Iterator[Tensor]:
        """The same pictures of `completions.clean`, part after part; those of the first prompt are kept, small."""
        states = rollout.dedup().states
        if len(completions.index) < len(states) * rollout.batch * rollout.branches:
            # the ends alone, as of a sparse reward
            states = [rollout.coefficients.num_steps]
        # of several ways to complete a state, the last is the finest
        index = completions.index.view(-1, len(states), rollout.batch * rollout.branches)[-1, :, : self.group]
        uses: dict[int, list[tuple[int, int]]] = {}
        for state, rows in zip(states, index.tolist(), strict=True):
            for sample, row in enumerate(rows):
                uses.setdefault(row, []).append((state, sample))
        done = 0
        for images in parts:
            here = [row for row in range(done, done + len(images)) if row in uses]
            if here:
                small = _small(still(images[[row - done for row in here]])).cpu()
                for row, picture in zip(here, small, strict=True):
                    for use in uses[row]:
                        self._pictures[use] = picture
                        self._clean[use] = completions.clean[row].float().cpu()
            done += len(images)
            yield images

    def rewarded(
        self, rollout: Rollout, final: Tensor, by_state: Tensor | None = None, branches: Tensor | None = None
    ) -> None:
        """Take the rewards of a rollout, as `RewardBatch` has them; those of an earlier part of it stay."""
        self.rollout = rollout
        self._final = final[0].float().cpu()
        if by_state is not None:
            found = by_state[0].float().cpu()
            self._by_state = found if self._by_state is None else torch.where(found.isnan(), self._by_state, found)
        if branches is not None:
            self._branches = branches[0, ..., -1].float().cpu()

    def strip(self, labels: Sequence[str] | None = None) -> Strip | None:
        """The strip of what was kept.

        Args:
            labels: one for each of the G samples, all of which are then shown; None = the samples (of every step the
                branches) with the highest and the lowest reward.

        Returns:
            None if nothing was kept.
        """
        if self.rollout is None or not self._pictures:
            return None
        colours = _latent_colours(self._clean, self._pictures)
        if isinstance(self.rollout, BranchedRollout):
            return self._of_branches(self.rollout, colours)
        assert isinstance(self.rollout, Trajectory)
        return self._of_trajectories(self.rollout, colours, labels)

    def _of_trajectories(self, rollout: Trajectory, colours: Tensor | None, labels: Sequence[str] | None) -> Strip:
        steps, noisy = rollout.num_steps, rollout.coefficients.noisy
        # states that noise-free steps join have one completion: the last of them stands for all
        columns = CompletionDedup(noisy).states
        rewards = torch.full((self.group, steps + 1), torch.nan)
        assert self._final is not None
        if self._by_state is not None:
            rewards = self._by_state
        else:
            rewards[:, -1] = self._final
        chosen: Sequence[int] = range(self.group)
        if labels is None:
            chosen, labels = _extremes(self._final)
        rows = []
        for sample, label in zip(chosen, labels, strict=True):
            own = rewards[sample, columns]
            gains = torch.cat([own.new_full((1,), torch.nan), own.diff()])
            latents = [_latent_picture(rollout.latents[state, sample], colours) for state in columns]
            rows.append(self._row(label, latents, [(state, sample) for state in columns], own, gains))
        notes = ["A column is a state of the sampler; the gain is that of the step that led to it."]
        if self._by_state is None:
            notes = ["This reward is sparse: only the image at the end was scored."]
        elif rewards[:, columns].isnan().all(0).any():
            notes.append("Empty: states that this iteration did not complete, since only some steps were trained.")
        if len(columns) <= steps:
            free = [str(step) for step, injects in enumerate(noisy) if not injects]
            notes.append(f"Steps without noise change no reward and are left out ({', '.join(free)}).")
        return Strip(self.prompt, " ".join(notes), self._headings(columns, rollout), rows)

    def _of_branches(self, rollout: BranchedRollout, colours: Tensor | None) -> Strip:
        assert self._branches is not None
        # [K branches, M steps] of the first trajectory
        rewards, columns = self._branches[0], rollout.completed
        spread = rewards - rewards.nanmean(0)
        rows = []
        for label, worst in (("best branch of each step", False), ("worst branch of each step", True)):
            filled = rewards.nan_to_num(torch.inf if worst else -torch.inf)
            chosen = (filled.argmin(0) if worst else filled.argmax(0)).tolist()
            places = range(len(columns))
            latents = [_latent_picture(rollout.branch_latents[j, chosen[j]], colours) for j in places]
            pairs = [(state, chosen[j]) for j, state in enumerate(columns)]
            own, gains = rewards[chosen, places], spread[chosen, places]
            rows.append(self._row(label, latents, pairs, own, gains))
        note = (
            f"Branches: {rollout.branches} samples leave one noise-free trajectory in steps "
            f"{', '.join(map(str, rollout.steps))}, with noise in that step alone. A column is where such a "
            "step leads, and above mean is its reward minus the mean over the branches of that step."
        )
        return Strip(self.prompt, note, self._headings(columns, rollout), rows, gain="above mean")

    def _row(
        self,
        label: str,
        latents: list[Image.Image | None],
        places: list[tuple[int, int]],
        rewards: Tensor,
        gains: Tensor,
    ) -> StripRow:
        pictures = [None if place not in self._pictures else _image(self._pictures[place]) for place in places]
        return StripRow(label, latents, pictures, rewards.tolist(), gains.tolist())

    @staticmethod
    def _headings(states: Sequence[int], rollout: Rollout) -> list[str]:
        steps, sigmas = rollout.coefficients.num_steps, rollout.coefficients.sigmas.tolist()
        words = {0: "noise", steps: "image"}
        return [words.get(state, f"{state}, sigma {sigmas[state]:.2f}") for state in states]


@torch.no_grad()
def strip_of(
    model: FlowModel,
    reward: Scorer,
    trajectory: Trajectory,
    prompt: str,
    metadata: Mapping[str, Any],
    labels: Sequence[str],
    chunk: int,
) -> Strip:
    """The strip of trajectories of one prompt, completed exactly: every step, full guidance, full decoder.

    Args:
        model: the policy.
        reward: scores the completions.
        trajectory: of G samples.
        prompt, metadata: of all of them.
        labels: G.
        chunk: rows per forward and decode.

    Raises:
        RewardError: the reward failed.
    """
    lookahead = Lookahead(model, plans.exact(trajectory.num_steps), chunk=chunk)
    recorder, count = StripRecorder(prompt, trajectory.batch), trajectory.batch
    completions = lookahead.completions(trajectory)
    parts = lookahead.decoded(completions.clean, "full")
    images = torch.cat(list(recorder.watching(parts, trajectory, completions)))
    scores = reward(images, [prompt] * len(images), [dict(metadata) for _ in images])
    values = scores.select(completions.index).values.view(-1, count)
    states = trajectory.group_rewards(values, count).states
    assert states is not None
    recorder.rewarded(trajectory, states[..., -1], states)
    strip = recorder.strip(labels)
    assert strip is not None
    return strip


def _extremes(rewards: Tensor) -> tuple[list[int], list[str]]:
    """The samples with the highest and the lowest of G rewards, and what they are called."""
    best = rewards.nan_to_num(-torch.inf).argmax().item()
    worst = rewards.nan_to_num(torch.inf).argmin().item()
    if best == worst:
        return [int(best)], [f"sample {int(best)}"]
    words = f"of {len(rewards)} samples"
    return [int(best), int(worst)], [f"highest reward {words}", f"lowest reward {words}"]


def _small(images: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] at no more than `_SIDE` pixels a side."""
    factor = max(images.shape[-2:]) / _SIDE
    if factor <= 1:
        return images.float()
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)


def _latent_colours(clean: dict[tuple[int, int], Tensor], pictures: dict[tuple[int, int], Tensor]) -> Tensor | None:
    """[C+1, 3] the colour of a clean latent's C channels and a constant: least squares over the kept pictures.

    None for latents that are not laid out as a picture [C, H, W].
    """
    if next(iter(clean.values())).ndim != 3:
        return None
    channels, colours = [], []
    for place, latent in clean.items():
        small = torch.nn.functional.interpolate(pictures[place][None], latent.shape[-2:], mode="area")[0]
        channels.append(latent.flatten(1).T)
        colours.append(small.flatten(1).T)
    values = torch.cat(channels)
    values = torch.cat([values, torch.ones(len(values), 1)], dim=1)
    # a little ridge, since few pictures may leave a channel undetermined
    normal = values.T @ values + 1e-3 * len(values) * torch.eye(values.shape[1])
    return torch.linalg.solve(normal, values.T @ torch.cat(colours))


def _latent_picture(latent: Tensor, colours: Tensor | None) -> Image.Image | None:
    """A latent [C, H, W] in the colours that its channels have in clean ones."""
    if colours is None:
        return None
    values = latent.detach().float().cpu()
    flat = torch.cat([values.flatten(1).T, torch.ones(values[0].numel(), 1)], dim=1) @ colours
    return _image(flat.T.unflatten(1, values.shape[1:]))


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(to_bytes(picture[None])[0]))
