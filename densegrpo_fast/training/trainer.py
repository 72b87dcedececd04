"""The trainer: one GRPO iteration, the parts it is made of, and a whole run.

from densegrpo_fast import Trainer, load_config

Trainer(load_config("embedded_dense")).run()  # as `python -m densegrpo_fast.train` does, with all its files

trainer = Trainer(load_config("embedded_dense"))
for iteration in range(10):
    print(trainer.step(iteration)["reward"])  # without any file
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.progress import announce
from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.credit.closeness import with_closeness
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.credit.smoothing import smooth_rewards
from densegrpo_fast.flow.dynamics import C, StepCoefficients
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.models.check import check_model
from densegrpo_fast.models.loading import Weights
from densegrpo_fast.models.lora import base_fingerprint
from densegrpo_fast.rewards.base import Reward, RewardMixture
from densegrpo_fast.run_files.strip import Strip
from densegrpo_fast.sampling.branches import branch_rollout
from densegrpo_fast.sampling.lookahead import Completions
from densegrpo_fast.sampling.rollout import Rollout, Trajectory, TrajectorySampler, initial_noise, rollout
from densegrpo_fast.training.callbacks import Callback
from densegrpo_fast.training.costs import CostReport
from densegrpo_fast.training.distributed import Traffic, World, equal_weights, iteration_share
from densegrpo_fast.training.evaluation import Evaluation, HeldOut
from densegrpo_fast.training.handing import hand_out, whole_weights
from densegrpo_fast.training.iteration_record import iteration_record, of_all_processes
from densegrpo_fast.training.learner import Learner, LearnerOptions
from densegrpo_fast.training.lookahead import build_lookahead, completion_ways
from densegrpo_fast.training.memory import peak_metrics, shard_mode, start_peak
from densegrpo_fast.training.meter import Meter, MeteredModel, MeteredReward, PhaseTimer
from densegrpo_fast.training.models import build_model, default_device, synchronizer
from densegrpo_fast.training.monitor import LookaheadMonitor
from densegrpo_fast.training.noise_levels import NoiseLevels
from densegrpo_fast.training.prompts import PromptBatch, TrainingPrompts, check_inputs
from densegrpo_fast.training.records import run_directory
from densegrpo_fast.training.rewarding import (
    RewardBatch,
    RewardComputer,
    build_observer,
    check_missing,
    configured_reward,
)
from densegrpo_fast.training.run import Run, RunResult
from densegrpo_fast.training.schedule import IterationSteps, Schedule
from densegrpo_fast.training.sharding import ShardMode, shard
from densegrpo_fast.training.strategies import Experience, UpdateStrategy, strategy_of
from densegrpo_fast.training.strips import StripRecorder


class Trainer:
    """Trains a model's adapter by GRPO with a reward for every denoising step.

    Args:
        config: the run's, as `load_config` returns it.
        tiny: whether a model that is not in the package is replaced by a tiny random one, as in a dry run.
        strategy: order of the phases; None = what `optimizer.update` names.
        model: ready made, with its adapter, in the place of the one that the configuration names.
        reward: likewise, a mixture or a function of pictures, prompts and metadata; it scores held-out pictures, too.
        callbacks: what `run` calls after each iteration and evaluation, in this order.
        world: the processes that share the run, each with a trainer of the same settings and weights; None = this one
            alone.

    Raises:
        UserError: the model, a reward or a prompt file cannot be loaded, or does not fit the configuration.

    Attributes:
        stop_reason: why the run ends after this iteration; None while it goes on.
    """

    def __init__(
        self,
        config: Config,
        *,
        tiny: bool = False,
        strategy: UpdateStrategy | None = None,
        model: FlowModel | None = None,
        reward: RewardMixture | Reward | None = None,
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
    ):
        if not isinstance(config, Config):
            raise UsageError(
                f"Trainer: expected a configuration, as load_config({config!r}) returns it, got {config!r}"
            )
        self.config, self.strategy = config, strategy_of(config) if strategy is None else strategy
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise UsageError(f"Trainer: expected callbacks derived from densegrpo_fast.Callback, got {callback!r}")
        self.callbacks = tuple(callbacks)
        self.stop_reason: str | None = None
        self.world = World() if world is None else world
        self.share = iteration_share(self.world, config)
        self.prompts = TrainingPrompts.of(config)
        self.held_out = HeldOut.of(config)
        if reward is None:
            check_inputs(config)
            announce(f"loading the rewards {', '.join([*config.reward.terms, *config.reward.observed])}")
            self.reward = configured_reward(config)
            self.observed = build_observer(config, self.reward)
        else:
            if not isinstance(reward, RewardMixture):
                reward = RewardMixture({"reward": (reward, 1.0)}, config.reward.timeout, config.reward.frames)
            self.reward = reward
            self.observed = self.reward
        if model is None and not tiny:
            announce(f"loading the model {config.model.path}")
        weights: Weights = "placed" if self.world.size == 1 else "on_host" if self.world.main else "awaited"
        self.model = build_model(config, default_device(), tiny, weights) if model is None else model
        if self.trains_all and not (
            all(parameter.requires_grad for parameter in self.model.network.parameters())
            and (self.model.reference_network is not None or not config.objective.kl_coef)
        ):
            raise UsageError("model.train: full needs a model that models.whole_network.train_whole has made ready")
        # what is checked in a moment, before what takes long
        self.schedule = Schedule(config, self.model)
        self.base_weights: str | None = None
        read = whole_weights(self.model, self.world) if self.model.awaits_weights else None
        if read is not None:
            self.base_weights = self.world.from_main(lambda: base_fingerprint(self.model.network))
        elif self.world.size > 1:
            self.base_weights = equal_weights(self.world, self.model)
        elif self.model.computed_in is not None:
            self.base_weights = base_fingerprint(self.model.network)
        mode: ShardMode = "none" if self.world.size == 1 else shard_mode(config, self.model, self.observed, self.world)
        self.shards = shard(self.model, config, self.world, mode)
        if read is not None:
            hand_out(self.model, read, self.world)
        if model is not None:
            check_model(model, self.held_out.prompts[0], config.sampler.guidance_scale, config.sampler.num_steps)
        self.meter, self.timer = Meter(), PhaseTimer(synchronizer(self.model.device))
        self.policy = MeteredModel(self.model, self.meter)
        share = self.share if self.world.size > 1 else None
        self.learner = Learner(self.policy, LearnerOptions.of(config), share)
        self.lookahead = build_lookahead(config, self.model, share)
        if self.lookahead is not None:
            self.lookahead.model = MeteredModel(self.lookahead.model, self.meter, lookahead=True)
        self.rewards = RewardComputer(config, self.policy, self.reward, self.lookahead, self.meter, self.share)
        self.monitor = LookaheadMonitor(config, self.policy, self.rewards)
        metered = MeteredReward(self.reward, self.meter)
        self.noise_levels = NoiseLevels(config, self.policy, metered, self.prompts.prompts, self.world)
        self.costs = CostReport(config, self.model, self.lookahead, self.meter)
        self._observations: dict[str, float] = {}

    def step(self, iteration: int) -> dict[str, Any]:
        """One iteration (from 0): prompts -> rollout -> lookahead -> rewards -> credit -> update.

        Returns:
            Its record, as a line of metrics.jsonl has it (docs/metrics.md).

        Raises:
            RewardError: a reward failed; NonFiniteError: too many updates in a row were not finite; SetupError: the
                memory does not even allow a single row.
        """
        self._begin()
        batch = self.prompts.batch(iteration)
        if self.noise_levels.due(iteration):
            self.calibrate(iteration)
        steps = self.schedule.at(iteration, self.noise_levels.levels)
        experience = self.strategy.run(self, batch, steps, iteration)
        return self._record(iteration, experience, steps)

    def step_with_strip(self, iteration: int) -> tuple[dict[str, Any], Strip | None]:
        """`step`, and what its first prompt's samples looked like at every step.

        Returns:
            The record, and the strip; None if none of the samples has a reward, or this process does not hold all of
            them.
        """
        if not self.holds_a_prompt():
            return self.step(iteration), None
        batch = self.prompts.batch(iteration)
        self.rewards.strip = recorder = StripRecorder(batch.prompts[0], batch.group_size)
        try:
            return self.step(iteration), recorder.strip()
        finally:
            self.rewards.strip = None

    def calibrate(self, iteration: int) -> None:
        """Find the noise level of each step again, on the policy as it is."""
        with self.phase("calibration"):
            self._observations |= self.noise_levels.calibrate(iteration)

    @torch.no_grad()
    def sample(self, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Rollout:
        """Roll the policy out on B = P*G samples, or this process's share of them; all noise is a function of (seed,
        iteration, sample).

        With `sampler.branches` C, sample p*G + n*C + c is branch c of trajectory n of prompt p. What the lookahead
        needs is kept. If the memory runs out, the same noise is rolled out again with fewer rows per forward.
        """
        branches = self.config.sampler.branches
        with self.phase("rollout"):
            inputs, options = self._sampling(batch, steps, iteration)
            if branches is not None:
                branched = partial(branch_rollout, *inputs, branches=branches, **options)
                return self.learner.rows.fitting(lambda rows: branched(micro_batch=rows))
            options |= self._kept_for_the_lookahead()
            trajectory = self.learner.rows.fitting(lambda rows: rollout(*inputs, micro_batch=rows, **options))
            return self.shared_and_completed(trajectory, steps.completed)

    @torch.no_grad()
    def sampler(self, batch: PromptBatch, steps: IterationSteps, iteration: int) -> TrajectorySampler:
        """What takes the steps of `sample`'s trajectories one by one."""
        with self.phase("rollout"):
            inputs, options = self._sampling(batch, steps, iteration)
            options |= self._kept_for_the_lookahead()
            return TrajectorySampler(*inputs, micro_batch=self.learner.rows.rows, **options)

    def shared_and_completed(self, trajectory: Trajectory, completed: tuple[int, ...]) -> Trajectory:
        """A trajectory that knows which samples share their noise, and which states are to be completed."""
        shares = self.config.sampler.shared_noise and self.share.holds_blocks_of(self.config.sampler.group_size)
        shared = self.config.sampler.group_size if shares else 1
        return replace(trajectory, shared=shared, completed_states=completed)

    def _sampling(
        self, batch: PromptBatch, steps: IterationSteps, iteration: int
    ) -> tuple[tuple[FlowModel, Tensor, Conditioning, StepCoefficients], dict[str, Any]]:
        """Arguments of a rollout: those by position, and those by name. The lookahead follows the policy up to here."""
        if self.lookahead is not None:
            with self.phase("lookahead"):
                self.lookahead.model.refresh()
        options = self.config.sampler
        branches = options.branches or 1
        index = torch.arange(0, len(batch.prompts), branches, device=self.model.device)
        conditioning = self.policy.encode(batch.prompts)
        if self.world.size > 1:
            index = index[self.share.rows.to(index.device)]
            conditioning = conditioning.select(torch.tensor(self.share.samples(branches), device=index.device))
        first = index - index % options.group_size if options.shared_noise else index
        noise = initial_noise(self.policy, first, seed=self.config.seed, iteration=iteration)
        return (self.policy, noise, conditioning, steps.coefficients), {
            "sample_index": index,
            "seed": self.config.seed,
            "iteration": iteration,
            "guidance_scale": options.guidance_scale,
        }

    def _kept_for_the_lookahead(self) -> dict[str, Any]:
        return {
            "keep_guidance": self.config.uses_lookahead and self.config.lookahead.guidance == "reuse",
            "cache": None if self.lookahead is None else self.lookahead.cache,
        }

    def complete(self, rollout: Rollout) -> Completions:
        """The clean latents that the ODE reaches from the rollout's states; without a lookahead its ends alone."""
        if self.lookahead is None:
            return Completions.ends(rollout)
        lookahead, ways = self.lookahead, completion_ways(self.config, self.lookahead)

        def completed(_: int) -> Completions:
            evaluated = rollout.evaluated(lookahead)
            return Completions.joined([way.completions(evaluated) for way in ways])

        with self.phase("lookahead"):
            return lookahead.rows.fitting(completed)

    def score(
        self, rollout: Rollout, completions: Completions, batch: PromptBatch, *, complete: bool = True
    ) -> RewardBatch:
        """Decode the completions and score their pictures; of all samples, in every process.

        Args:
            complete: whether these are all of an iteration's, of which not too many may be missing.
        """
        with self.phase("reward"):
            rewards = self.rewards.score(rollout, completions, batch)
        if complete:
            check_missing(rewards.scores, self.rewards.max_missing)
        return rewards

    def observe(self, rollout: Rollout, rewards: RewardBatch, batch: PromptBatch, iteration: int) -> None:
        """Compare one prompt's rewards with exact ones, for the record."""
        with self.phase("monitor"):
            self._observations |= self.monitor.check(rollout, rewards, batch, iteration)

    def credit(self, rollout: Rollout, rewards: RewardBatch, iteration: int = 0) -> Advantages:
        """Advantages [P, G, T] by the configured credit method, and what `credit.closeness` adds in this iteration."""
        credit, coefficients = self.config.credit, rollout.coefficients
        final, by_state = rewards.rewards, rewards.lookahead_rewards
        if rewards.branch_rewards is not None:
            final = rewards.branch_rewards[..., -1].flatten(1, 2).nanmean(-1)
        if by_state is not None:
            # the state before each noisy step, and the image; those after a noise-free step are one of them
            by_state = by_state[..., [*coefficients.noisy, True]]
            if credit.smoothing:
                std = coefficients.table[list(coefficients.noisy), C].to(by_state.device)
                by_state = smooth_rewards(by_state, std, credit.smoothing)
        latents, velocities = rollout.latents, rollout.velocities
        if credit.closeness or registry.find(credit.method).uses_states:
            latents, velocities = self.share.gather(latents, dim=1), self.share.gather(velocities, dim=1)
        inputs = CreditInputs(
            rewards=final,
            noisy=coefficients.noisy,
            latents=latents,
            velocities=velocities,
            sigmas=coefficients.sigmas,
            lookahead_rewards=by_state,
            branch_rewards=rewards.branch_rewards,
            progress=iteration / self.config.run.iterations,
        )
        advantages = registry.advantages(credit.method, inputs, credit.method_options())
        if credit.closeness:
            advantages = with_closeness(advantages, inputs, weight=credit.closeness, clip=credit.clip)
        return advantages

    def update(self, rollout: Rollout, advantages: Advantages, steps: IterationSteps) -> dict[str, float]:
        """Train the adapter on the trained steps of all samples; metrics of the update."""
        with self.phase("update"):
            values = self.own_advantages(rollout, advantages)
            return self.learner.update(rollout, values, steps.trained, steps.weights, steps.draw_weights)

    def own_advantages(self, rollout: Rollout, advantages: Advantages) -> Tensor:
        """[B, T] of the rollout's samples, on the model's device."""
        values = advantages.values.flatten(0, 1)
        if self.world.size > 1:
            values = values[self.share.samples(rollout.branches)]
        return values.to(self.model.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the context, seconds and costs count for a phase."""
        with self.timer(name), self.meter(name):
            yield

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs, by group and name."""
        return self.learner.tensors() | {"rng": {"torch": torch.get_rng_state()}}

    def state(self) -> dict[str, Any]:
        """The counters that go with `tensors`, as JSON data."""
        return {"learner": self.learner.state(), "noise_level": self.noise_levels.state()}

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continue from `tensors` and `state` of a checkpoint.

        Raises:
            CheckpointError: they belong to another model or another number of steps.
        """
        self.learner.restore(tensors, state["learner"])
        self.noise_levels.restore(state.get("noise_level"))
        torch.set_rng_state(tensors["rng"]["torch"])

    def run(self, *, resume: bool = False) -> RunResult:
        """Train for `run.iterations` and write the run directory, as the train command does.

        Args:
            resume: continue the run in the directory.

        Raises:
            UserError: anything the user can act on; the checkpoints so far are kept.
        """
        with run_directory(self.config, self.world, resume=resume) as directory:
            return Run(self, directory).go(resume=resume)

    def stop(self, reason: str) -> None:
        """End `run` after this iteration as after its last: checkpoint, evaluation, adapter and report.

        Of several processes what the main one says counts for all.

        Args:
            reason: what the user is told.
        """
        self.stop_reason = reason

    @property
    def trains_all(self) -> bool:
        """Whether all weights of the network are trained, and not an adapter."""
        return self.config.model.train == "full"

    def holds_a_prompt(self) -> bool:
        """Whether the rows of this process begin with all samples of the first prompt."""
        count = self.config.sampler.group_size // (self.config.sampler.branches or 1)
        return self.share.rows[:count].tolist() == list(range(count))

    def evaluate(self) -> Evaluation:
        """Scores and pictures of the held-out prompts, with the running average of the weights if one is kept."""
        with self.learner.averaged():
            return self.held_out.evaluate(self.model, self.observed, self.world)

    def _begin(self) -> None:
        self.timer.reset()
        self.world.traffic = Traffic()
        self.meter.reset()
        self._observations = {}
        start_peak(self.model.device)

    def _record(self, iteration: int, experience: Experience, steps: IterationSteps) -> dict[str, Any]:
        samples, seconds = experience.advantages.values[..., 0].numel(), self.timer.seconds()
        self.meter.add_up(self.world)
        costs = self.costs.metrics(steps.coefficients.num_steps, len(steps.trained), samples)
        record = iteration_record(
            iteration + 1,
            steps,
            experience.rewards,
            experience.advantages,
            experience.update | costs,
            seconds,
        )
        record |= self.noise_levels.metrics() | self._observations | peak_metrics(self.model.device)
        record["cpu_seconds"] = self.timer.cpu_seconds()
        return record if self.world.size == 1 else record | of_all_processes(self.world, record, samples)
