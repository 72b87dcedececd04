"""Dense rewards for a training script of another codebase: one call after its own sampling.

    dense = dense_rewards(pipeline, reward_fn, prompts, metadata, latents=latents, timesteps=timesteps, ...)
    dense.gains             [B, T], what each step added to the reward of the image that the ODE would end in
    dense.advantages        [B, T], by the script's own tracker
    dense.result()          what the future of `executor.submit(reward_fn, ...)` gives, and the gains beside it

DenseGRPO (arXiv 2601.20218, Eq 7-10): every state of the trajectory is completed without noise and scored. It knows the
pipelines of SD3, FLUX.1, Qwen-Image and Stable Diffusion 1.x and 2.x (DDIM). Call it where the script samples: under
the same adapter and autocast. The pipeline's scheduler is only read, and no random
number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.pipelines import Kept
from densegrpo_fast.compat.flow_grpo.schedule import Schedule, schedule_of
from densegrpo_fast.compat.flow_grpo.sd3 import Prompts
from densegrpo_fast.compat.pipeline_model import PipelineModel, conditioning_of, plan_from, trajectory_from
from densegrpo_fast.compat.scored import DenseRewards, RewardFunction, Tracker, scoring
from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Conditioning
from densegrpo_fast.sampling.lookahead import Guidance, Lookahead
from densegrpo_fast.sampling.plan import Plan

if TYPE_CHECKING:
    from densegrpo_fast.compat.family_model import FamilyModel, Grid


@torch.no_grad()
def dense_rewards(
    pipeline: Any,
    reward_fn: RewardFunction,
    prompts: Sequence[str],
    metadata: Sequence[Any] | None = None,
    *,
    latents: Tensor | Sequence[Tensor],
    timesteps: Tensor | Sequence[Tensor] | None = None,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor | None = None,
    prompt_embeds_mask: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds_mask: Tensor | None = None,
    guidance_scale: float,
    height: int = 0,
    width: int = 0,
    images: Any = None,
    kept: Kept | None = None,
    tracker: Tracker | None = None,
    plan: str | Plan = "exact",
    nodes: Sequence[int] = (),
    n: int = 1,
    guidance: Guidance = "full",
    chunk: int | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    executor: Executor | None = None,
    key: str = "avg",
) -> DenseRewards:
    """Complete, decode and score every state that a sampling call of the script went through.

    Args:
        pipeline: the script's, its scheduler as sampling left it.
        reward_fn: the script's, `fn(images, prompts, metadata) -> (scores, info)`; called once per state with B
            images [B, 3, H, W] in [0, 1].
        prompts, metadata: of the B rows; metadata defaults to empty dicts.
        latents: the T+1 states, stacked [B, T+1, ...] or as the pipeline returned them; all T steps inject noise.
        timesteps: of the T steps, stacked [B, T] or as the fast pipeline returned them; rows may have different
            windows. None means the scheduler's own, all N of them.
        prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask: of the B rows, those that the pipeline has.
        negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask: [B, ...] or [1, ...]; needed
            for a guidance scale above 1, except of FLUX.1, whose network takes the scale as an input.
        guidance_scale: of the sampling; of Qwen-Image its `true_cfg_scale`.
        height, width: of the pictures in pixels, where states are tokens and the pictures are not square.
        images: the end images [B, 3, H, W] that sampling returned, so that they need not be made again.
        kept: of SD3, the sampling call's entry of `compat.flow_grpo.keep_velocities`; without it the first velocity of
            every state is evaluated once more.
        tracker: the script's `PerPromptStatTracker`, for `.advantages`.
        plan: a plan for the scheduler's N steps: "exact", "exact_but_last", "nodes", "n_step", "one_step" or a `Plan`.
        nodes: grid indices of "nodes", in 1..N-1.
        n: of "n_step".
        guidance: after a state's first velocity: "full", "cond_only", or "reuse", which needs `kept`.
        chunk: rows per forward of the lookahead; None is B.
        decoder: a cheaper decoder for all images, clean latents [m, ...] -> images [m, 3, H, W] in [0, 1].
        executor: runs the calls of `reward_fn`; None makes them here.
        key: name of the reward to credit, where `reward_fn` returns a dict.

    Raises:
        ValueError: shapes that do not belong together, timesteps that are not consecutive steps of the scheduler's
            grid, options that do not fit, or a pipeline that is not known.
    """
    states = (latents.movedim(1, 0) if isinstance(latents, Tensor) else torch.stack(list(latents))).contiguous()
    steps, batch = len(states) - 1, states.shape[1]
    kind = _kind(pipeline)
    within = kind == "FluxPipeline"
    if kind is not None and (kept is not None or guidance == "reuse"):
        raise ValueError(f"{kind}: kept velocities, and guidance reuse, which needs them, are of SD3's pipelines")
    if within and guidance != "full":
        raise ValueError(f"{kind} is guided within the network: expected guidance full, got {guidance!r}")
    scale = float(guidance_scale) if guidance_scale > 1 or within else 1.0
    needs = scale != 1.0 and not within
    _check(states, prompts, metadata, prompt_embeds, negative_prompt_embeds, needs, images, kept, guidance, decoder)
    model: PipelineModel | FamilyModel
    if kind is None:
        if pooled_prompt_embeds is None:
            raise ValueError("a pipeline of SD3 needs pooled_prompt_embeds")
        schedule: Schedule | Grid = schedule_of(pipeline.scheduler)
        model = PipelineModel(pipeline, dtype=states.dtype, decoder=decoder)
        conditioning = conditioning_of(
            Prompts(prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
        )
    else:
        from densegrpo_fast.compat.family_model import FamilyModel
        from densegrpo_fast.models.families import FAMILIES

        model = FamilyModel(pipeline, FAMILIES[kind], states=states, height=height, width=width, decoder=decoder)
        schedule = model.grid()
        negative = {
            "embeds": negative_prompt_embeds,
            "pooled": negative_pooled_prompt_embeds,
            "mask": negative_prompt_embeds_mask,
        }
        conditioning = model.conditioning(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask, negative)
    starts = _starts(timesteps, steps, batch, schedule)
    if isinstance(model, PipelineModel):
        flow = states
    else:
        flow = model.flow_states(states, schedule.sigmas, torch.tensor(starts, device=states.device))
    completion = _Completion(model, schedule, scale, guidance, batch if chunk is None else chunk)
    rows_of: dict[int, list[int]] = {}
    for row, start in enumerate(starts):
        rows_of.setdefault(start, []).append(row)

    pending, evaluations = [], 0
    for start, rows in rows_of.items():
        index = torch.tensor(rows, device=states.device)
        clean, used = completion.complete(
            start,
            flow[:, index],
            conditioning.select(index),
            plan_from(start, schedule.num_steps, plan, nodes, n),
            kept and Kept(kept.velocities[:, index], kept.guidance_terms[:, index], kept.clean[index]),
            needs_end=images is None,
        )
        evaluations += used * len(rows)
        score = scoring(
            reward_fn,
            [prompts[row] for row in rows],
            [{} if metadata is None else metadata[row] for row in rows],
            executor,
        )
        calls = [score(completion.model.decode(latent)) for latent in clean]
        if images is not None:
            calls.append(score(images[index.to(images.device)]))
        pending.append((rows, calls))
    return DenseRewards(pending, list(prompts), key, tracker, evaluations / batch)


def _kind(pipeline: Any) -> str | None:
    """The class of a pipeline that `family_model.py` serves; None = it is taken for SD3's.

    Raises:
        ValueError: it is one of diffusers' that is not known.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    known = ("FluxPipeline", "QwenImagePipeline", "StableDiffusionPipeline")
    if found := next((name for name in names if name in known), None):
        return found
    if "StableDiffusion3Pipeline" in names or "DiffusionPipeline" not in names:
        return None
    raise ValueError(f"dense_rewards knows StableDiffusion3Pipeline, {', '.join(known)}, got a {names[0]}")


class _Completion:
    """The lookahead over the states of one window."""

    def __init__(
        self,
        model: PipelineModel | FamilyModel,
        schedule: Schedule | Grid,
        scale: float,
        guidance: Guidance,
        chunk: int,
    ):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 row, got {chunk}")
        self.model, self.grid, self.scale, self.guidance, self.chunk = model, schedule.sigmas, scale, guidance, chunk

    def complete(
        self,
        start: int,
        states: Tensor,
        conditioning: Conditioning,
        plan: Plan,
        kept: Kept | None,
        *,
        needs_end: bool,
    ) -> tuple[list[Tensor], int]:
        """Clean latents [B, ...] of the states [T+1, B, ...] from grid index `start` on, and evaluations per row.

        The trajectory's own end comes last, if it is needed.
        """
        steps, left, used = len(states) - 1, len(self.grid) - 1 - start, 0
        if kept is None:
            velocities, terms = self._velocities(states[:-1], start, conditioning), None
            used += steps
        else:
            velocities, terms = kept.velocities[start:], kept.guidance_terms[start:]
        if steps == left:
            end = states[-1]
        elif kept is not None:
            end = kept.clean
        elif needs_end:
            end = self._to_the_end(states[-1], start + steps, conditioning)
            used += left - steps
        else:
            end = torch.zeros_like(states[-1])
        # what lies between the window and the end is nobody's completion
        between = states.new_zeros(left - steps - 1, *states.shape[1:]) if steps < left else states[:0]
        whole = torch.cat([states if steps < left else states[:-1], between, end[None]])
        unknown = velocities.new_zeros(left - len(velocities), *velocities.shape[1:])
        trajectory = trajectory_from(
            start,
            self.grid,
            [step < steps for step in range(left)],
            whole,
            torch.cat([velocities, unknown]),
            terms,
            conditioning,
            self.scale,
        )
        lookahead = Lookahead(self.model, plan, guidance=self.guidance, chunk=self.chunk)
        clean = lookahead.complete(trajectory)
        used += lookahead.evaluations(trajectory.coefficients.noisy)
        return [*clean[:steps], *([clean[-1]] if needs_end else [])], used

    def _velocities(self, states: Tensor, start: int, conditioning: Conditioning) -> Tensor:
        """Guided velocity at every state [T, B, ...]."""
        sigma = torch.tensor(self.grid[start : start + len(states)], device=states.device)
        sigma = sigma.repeat_interleave(states.shape[1])
        velocity = self._velocity(states.flatten(0, 1).float(), sigma, conditioning.repeat(len(states)))
        return velocity.unflatten(0, states.shape[:2])

    def _to_the_end(self, state: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """Euler's method over all steps that are left."""
        latents = state.float()
        for here in range(index, len(self.grid) - 1):
            sigma, after = (latents.new_full((len(latents),), self.grid[place]) for place in (here, here + 1))
            latents = ops.euler_jump(latents, self._velocity(latents, sigma, conditioning), sigma, after)
        return latents.to(state.dtype)

    def _velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Guided velocity of rows [n, ...], some at a time."""
        parts = []
        for rows in torch.arange(len(latents), device=latents.device).split(self.chunk):
            part = self.model.velocity(latents[rows], sigma[rows], conditioning.select(rows), self.scale)
            parts.append(part.combined())
        return torch.cat(parts)


def _starts(timesteps: Any, steps: int, batch: int, schedule: Schedule | Grid) -> list[int]:
    """Grid index of every row's first step."""
    if timesteps is None:
        if steps != schedule.num_steps:
            raise ValueError(
                f"latents has {steps + 1} states, the scheduler {schedule.num_steps} steps: give the timesteps of the "
                "window that was kept"
            )
        return [0] * batch
    given = timesteps if isinstance(timesteps, Tensor) else torch.stack(list(timesteps))
    if given.shape not in ((steps,), (batch, steps)):
        raise ValueError(f"timesteps must have shape [T] or [B, T] = {[batch, steps]}, got {list(given.shape)}")
    rows = given.expand(batch, steps).tolist()
    grid = schedule.timesteps.tolist()
    starts = [grid.index(row[0]) if row[0] in grid else -1 for row in rows]
    for row, start in zip(rows, starts, strict=True):
        if start < 0 or grid[start : start + steps] != row:
            raise ValueError(
                f"timesteps {row} are not consecutive steps of the scheduler's {grid}; call dense_rewards before the "
                "scheduler is set to another grid"
            )
    return starts


def _check(
    states: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Any] | None,
    embeds: Tensor,
    negative: Tensor | None,
    needs_negative: bool,
    images: Any,
    kept: Kept | None,
    guidance: str,
    decoder: Any,
) -> None:
    batch = states.shape[1]
    if len(states) < 2:
        raise ValueError(f"latents must hold the T+1 states of T >= 1 steps, got {len(states)}")
    counts = {"prompts": prompts, "metadata": metadata, "prompt_embeds": embeds, "images": images}
    if kept is not None:
        counts["kept"] = kept.clean
    for name, rows in counts.items():
        if rows is not None and len(rows) != batch:
            raise ValueError(
                f"{name} must have one entry per row of latents ({batch}), got {len(rows)}; latents are a tensor "
                "[B, T+1, ...] or a list of T+1 states [B, ...]"
            )
    if guidance not in get_args(Guidance):
        raise ValueError(f"guidance must be one of {', '.join(get_args(Guidance))}, got {guidance!r}")
    if needs_negative and negative is None:
        raise ValueError("a guidance_scale above 1 needs negative_prompt_embeds, and what else the pipeline encodes")
    if needs_negative and guidance == "reuse" and kept is None:
        raise ValueError('guidance "reuse" needs kept: sample inside compat.flow_grpo.keep_velocities')
    if images is not None and not isinstance(images, Tensor):
        raise ValueError('images must be a tensor [B, 3, H, W]: sample with output_type="pt", or leave images out')
    if images is not None and decoder is not None:
        raise ValueError("images come from the pipeline's autoencoder and cannot be compared with another decoder's")
