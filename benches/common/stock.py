"""One iteration as the published training codebases run it, on the same pipeline and adapter: the baseline.

Sparse, this is Flow-GRPO's SD3 script (yifan123/flow_grpo at 879042c, "FG"). Dense, it is the n = t completion of every
state in the serial form of TurningPoint-GRPO (YunzeTong/TurningPoint-GRPO at 994d26a, "TP"), credited as in DenseGRPO
(arXiv 2601.20218, Eq 7-10). Written from the formulas; under equal noise it computes what densegrpo_fast computes
(`tests/benches/test_stock.py`). These slow ways are kept on purpose:

* Each of the B prompts is encoded, though a group shares one (FG scripts/train_sd3.py:621-627).
* The step searches the schedule for its timestep and reads it back to the host, once per timestep in sampling and once
  per sample in training (FG flow_grpo/diffusers_patch/sd3_sde_with_logprob.py:42-46, scripts/train_sd3.py:206-213),
  and runs one PyTorch op at a time (same file, 49-68). An ODE step draws noise as well and multiplies it by 0 (55-62).
* Guidance is one forward of 2B rows (FG flow_grpo/diffusers_patch/sd3_pipeline_with_logprob.py:146), and in training
  the unconditional half of it goes through the backward pass too (FG scripts/train_sd3.py:181-217).
* All B images go through the float32 autoencoder at once (FG scripts/train_sd3.py:410).
* A completion is a run of its own over all remaining steps, starting with the velocity that the rollout had there, and
  is decoded and scored by itself (TP flow_grpo/diffusers_patch/sd3_pipeline_with_logprob_fast_my.py:261-321).
* The final image is scored twice (TP scripts/my_train_sd3_fast_with_op3.py:777, 784-786).

Where the baseline differs from them, so that both sides do the same work:

* Completions start from the trajectory's own states; TP's state-0 completion starts from unrelated noise.
* All T steps are stochastic and flow_sde; TP's presets use cps and make the last step an ODE step.
* The unconditional half is trained or detached as `objective.guidance_gradient` says, at the same cost. FG trains it
  since a482878 (19 August 2025), and so does TP.
* In its favour: the frozen base is kept in its compute dtype (FG scripts/train_sd3.py:415 keeps float32 and casts it at
  every layer), logging and the running average are left out, no sample with advantage 0 is dropped on either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from densegrpo_fast.config import Config
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.training.meter import PhaseTimer
from densegrpo_fast.training.schedule import Schedule


class EagerStep(NamedTuple):
    """What the step returns.

    Attributes:
        prev_sample: next state, [B, ...] float32.
        log_prob: of that state, [B] float32, mean over the elements; NaN at noise level 0.
        mean: of the step, [B, ...] float32.
        std_dev: without sqrt(-dt), one value per timestep, broadcastable.
    """

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std_dev: Tensor


def eager_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
) -> EagerStep:
    """Flow-GRPO's step (arXiv 2505.05470, eq. 9 and 11) in the form its users call it, one PyTorch op at a time.

    The schedule is searched for every timestep, everything is lifted to float32, noise comes from torch's generator.

    Args:
        scheduler: diffusers' flow-matching Euler scheduler with its timesteps set.
        model_output: velocity after guidance, [B, ...].
        timestep: entries of the schedule, [1] or [B].
        sample: state, [B, ...].
        noise_level: a; 0 makes it an Euler step.
        prev_sample: next state to be scored; None draws one.
        noise: standard normal numbers to use instead of torch's, [B, ...] float32.
    """
    model_output, sample = model_output.float(), sample.float()
    index = [scheduler.index_for_timestep(t) for t in timestep]
    per_row = (-1, *[1] * (sample.ndim - 1))
    sigma = scheduler.sigmas[index].view(per_row)
    next_sigma = scheduler.sigmas[[i + 1 for i in index]].view(per_row)
    largest = scheduler.sigmas[1].item()
    dt = next_sigma - sigma
    std_dev = torch.sqrt(sigma / (1 - torch.where(sigma == 1, largest, sigma))) * noise_level
    drift = std_dev**2 / (2 * sigma)
    mean = sample * (1 + drift * dt) + model_output * (1 + drift * (1 - sigma)) * dt
    scale = std_dev * torch.sqrt(-dt)
    if prev_sample is None:
        drawn = torch.randn(model_output.shape, device=model_output.device) if noise is None else noise
        prev_sample = mean + scale * drawn
    log_prob = (
        -((prev_sample.float().detach() - mean) ** 2) / (2 * scale**2)
        - torch.log(scale)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return EagerStep(prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim))), mean, std_dev)


@dataclass(frozen=True)
class Text:
    """Encoded prompts of m rows, ready for a forward: with guidance [2m, ...], the empty prompts first, else [m, ...].

    Attributes:
        embeds: token embeddings.
        pooled: pooled embeddings.
    """

    embeds: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class StockIteration:
    """What an iteration computed; B rows, T steps.

    Attributes:
        latents: [T+1, B, ...] float32.
        log_probs: [T, B] float32.
        rewards: [B, 1] of the final images, or [B, T+1] of all completions; float32 on the CPU.
        advantages: [B, T] float32 on the CPU.
        loss: mean over samples and trained steps; the adapter keeps its gradient, clipped.
    """

    latents: Tensor
    log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    loss: float


class Stock:
    """The baseline's training loop, with its own AdamW on the model's adapter.

    Args:
        model: the pipeline and its adapter.
        config: of the run; `lookahead` is not used.
        reward: of the images.

    Raises:
        ValueError: the dynamics are not flow_sde at one noise level above 0, or the autoencoder is not float32 or
            decodes in parts.
    """

    def __init__(self, model: DiffusersModel, config: Config, reward: RewardMixture):
        levels = set(config.noise_levels)
        if config.sampler.dynamics != "flow_sde" or len(levels) != 1 or 0.0 in levels:
            raise ValueError(
                "the stock baseline needs flow_sde with one noise level above 0, "
                f"got {config.sampler.dynamics} with {sorted(levels)}"
            )
        vae = model.pipeline.vae
        if vae.dtype != torch.float32 or vae.use_slicing or vae.use_tiling:
            raise ValueError(
                "the stock baseline needs a float32 autoencoder that decodes all images at once, "
                f"got {vae.dtype}, sliced {vae.use_slicing}, tiled {vae.use_tiling}"
            )
        self.model, self.config, self.reward = model, config, reward
        self.trained = Schedule(config, model).trained_steps(0)
        self.scheduler = model.pipeline.scheduler
        self.guidance_scale, self.noise_level = config.sampler.guidance_scale, levels.pop()
        self.parameters = list(model.trainable_parameters().values())
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=options.lr,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        # the empty prompt is encoded once per run
        self.negative = self._encode([""])

    def iteration(
        self,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        timer: PhaseTimer,
        *,
        dense: bool,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
    ) -> StockIteration:
        """Sample, judge and train on B rows, in batches of the configured micro-batch.

        Args:
            prompts, metadata: of the B rows.
            timer: counts the phases rollout, lookahead, reward and update.
            dense: a reward per state instead of one per image.
            noise: initial latents [B, ...] float32; None = torch.randn.
            step_noise: noise of the steps [T, B, ...] float32; None = torch.randn.
        """
        size = self.config.sampler.micro_batch
        batches = [slice(start, start + size) for start in range(0, len(prompts), size)]
        texts, latents, log_probs, rewards = [], [], [], []
        for rows in batches:
            with timer("rollout"):
                texts.append(self.encode(prompts[rows]))
                states, scored = self.rollout(
                    texts[-1],
                    size,
                    None if noise is None else noise[rows],
                    None if step_noise is None else step_noise[:, rows],
                )
            latents.append(states)
            log_probs.append(scored)
            judge = self._judge_states if dense else self._judge_images
            rewards.append(judge(states, texts[-1], list(prompts[rows]), list(metadata[rows]), timer))
        with timer("update"):
            values = torch.cat(rewards)
            advantages = self._advantages(prompts, values, dense)
            loss = self._update(texts, latents, log_probs, advantages.to(self.model.device).split(size))
        return StockIteration(torch.cat(latents, 1), torch.cat(log_probs, 1), values, advantages, loss)

    def encode(self, prompts: Sequence[str]) -> Text:
        """Encode every row's prompt, with its copy of the empty one in front."""
        own = self._encode(list(prompts))
        if self.guidance_scale == 1.0:
            return own
        count = len(prompts)
        return Text(
            torch.cat([self.negative.embeds.repeat(count, 1, 1), own.embeds]),
            torch.cat([self.negative.pooled.repeat(count, 1), own.pooled]),
        )

    @torch.no_grad()
    def rollout(
        self, text: Text, batch: int, noise: Tensor | None = None, step_noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States [T+1, m, ...] and log-probabilities [T, m] of stochastic trajectories; noise as in `iteration`."""
        self.set_timesteps()
        latents = torch.randn(batch, *self.model.latent_shape, device=self.model.device) if noise is None else noise
        states, log_probs, level = [latents], [], self.noise_level
        for step, t in enumerate(self.scheduler.timesteps):
            velocity = self._velocity(latents, t.expand(batch), text)
            given = None if step_noise is None else step_noise[step]
            latents, log_prob, *_ = eager_step(self.scheduler, velocity, t.unsqueeze(0), latents, level, noise=given)
            states.append(latents)
            log_probs.append(log_prob)
        return torch.stack(states), torch.stack(log_probs)

    @torch.no_grad()
    def complete(self, latents: Tensor, start: int, text: Text) -> Tensor:
        """Euler's method from state `start` [m, ...] over all remaining steps to the clean latents [m, ...]."""
        for t in self.scheduler.timesteps[start:]:
            velocity = self._velocity(latents, t.expand(len(latents)), text)
            latents = eager_step(self.scheduler, velocity, t.unsqueeze(0), latents, 0.0).prev_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [m, 3, H, W] in [0, 1] of clean latents [m, ...], all in one pass of the autoencoder."""
        vae = self.model.pipeline.vae
        shifted = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(shifted).sample / 2 + 0.5).clamp(0, 1)

    def set_timesteps(self) -> None:
        """Put the sampler's grid into the pipeline's scheduler."""
        self.scheduler.set_timesteps(self.config.sampler.num_steps, device=self.model.device)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Text:
        pipeline, dtype = self.model.pipeline, self.model.network.dtype
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.family.max_sequence_length,
            device=self.model.device,
        )
        return Text(embeds.to(dtype), pooled.to(dtype))

    def _velocity(self, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        copies = self.model.forwards(self.guidance_scale)
        (output,) = self.model.network(
            hidden_states=torch.cat([latents] * copies).to(self.model.network.dtype),
            timestep=torch.cat([timestep] * copies),
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            return_dict=False,
        )
        if copies == 1:
            return output.float()
        uncond, cond = output.float().chunk(2)
        if self.config.objective.guidance_gradient == "conditional":
            uncond = uncond.detach()
        return uncond + self.guidance_scale * (cond - uncond)

    def _judge_images(
        self, states: Tensor, text: Text, prompts: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> Tensor:
        with timer("reward"):
            return self._score(self.decode(states[-1]), prompts, metadata).unsqueeze(1)

    def _judge_states(
        self, states: Tensor, text: Text, prompts: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> Tensor:
        scores = []
        for start in range(len(states) - 1):
            with timer("lookahead"):
                clean = self.complete(states[start], start, text)
            with timer("reward"):
                scores.append(self._score(self.decode(clean), prompts, metadata))
        with timer("reward"):
            image = self.decode(states[-1])
            self._score(image, prompts, metadata)
            scores.append(self._score(image, prompts, metadata))
        return torch.stack(scores, dim=1)

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.reward(images, prompts, metadata).values

    def _advantages(self, prompts: Sequence[str], rewards: Tensor, dense: bool) -> Tensor:
        """Rewards (or their gains) normalised over the samples with the same prompt, separately for every step."""
        values = rewards.double().numpy()
        values = np.diff(values, axis=1) if dense else values.repeat(self.config.sampler.num_steps, axis=1)
        advantages, names = np.zeros_like(values), np.array(prompts)
        for prompt in np.unique(names):
            group = values[names == prompt]
            advantages[names == prompt] = (group - group.mean(axis=0)) / (group.std(axis=0) + 1e-4)
        clip = self.config.credit.clip
        return torch.from_numpy(advantages).float().clamp(-clip, clip)

    def _update(
        self, texts: list[Text], latents: list[Tensor], log_probs: list[Tensor], advantages: Sequence[Tensor]
    ) -> float:
        share = 1.0 / (len(texts) * len(self.trained))
        total = torch.zeros((), device=self.model.device)
        self.optimizer.zero_grad(set_to_none=True)
        for text, states, old_log_probs, judged in zip(texts, latents, log_probs, advantages, strict=True):
            for step in self.trained:
                loss = self._loss(text, states[step : step + 2], old_log_probs[step], judged[:, step], step)
                (loss * share).backward()
                total += loss.detach() * share
        nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        return total.item()

    def _loss(self, text: Text, states: Tensor, old_log_prob: Tensor, advantages: Tensor, step: int) -> Tensor:
        objective = self.config.objective
        scored = self._replay(text, states, step)
        ratio = torch.exp(scored.log_prob - old_log_prob)
        clipped = torch.clamp(ratio, 1.0 - objective.clip_range, 1.0 + objective.clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if objective.kl_coef:
            with torch.no_grad():
                mean = self._replay(text, states, step, reference=True).mean
            distance = ((scored.mean - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
            loss = loss + objective.kl_coef * (distance / (2 * scored.std_dev**2)).mean()
        return loss

    def _replay(self, text: Text, states: Tensor, step: int, reference: bool = False) -> EagerStep:
        timestep = self.scheduler.timesteps[step].repeat(states.shape[1])
        with self.model.reference() if reference else nullcontext():
            velocity = self._velocity(states[0], timestep, text)
        return eager_step(self.scheduler, velocity, timestep, states[0], self.noise_level, prev_sample=states[1])
