"""Align a flow-matching image model with dense rewards: `python -m densegrpo_fast.train`.

    python -m densegrpo_fast.train                                    the embedded model, minutes on a laptop CPU
    python -m densegrpo_fast.train --config embedded_sparse           Flow-GRPO's sparse reward instead
    python -m densegrpo_fast.train --run.iterations 200 --resume      go on with a run
    python -m densegrpo_fast.train --config sd35_medium_pickscore --dry-run

One iteration is a straight line, and so is `train` below: prompts, rollout, lookahead, rewards, credit, update.
Exit codes are in `exit_codes.py`. Options are parsed before torch is imported, so help and errors are instant.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging
import sys
from collections.abc import Sequence

from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.config.yaml_files import dump_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        config, flags = load_config(sys.argv[1:] if arguments is None else list(arguments))
        return int(dry_run(config) if flags.dry_run else train(config, resume=flags.resume))


def train(config: Config, resume: bool = False) -> ExitCode:
    """Run (or continue) the training that `config` describes and write its run directory.

    Raises:
        UserError: anything the user can act on, with its exit code; the checkpoints so far are kept.
    """
    from densegrpo_fast.run_files.alarms import Alarms, alarms_for
    from densegrpo_fast.run_files.loggers import Loggers, RunFacts
    from densegrpo_fast.run_files.metrics import MetricsLog, PhaseTimer, Progress
    from densegrpo_fast.run_files.records import RunRecords, iteration_record
    from densegrpo_fast.run_files.run_directory import open_run_directory
    from densegrpo_fast.run_files.signals import GracefulStop
    from densegrpo_fast.training import builders
    from densegrpo_fast.training.costs import CostLog
    from densegrpo_fast.training.experience import RewardComputer, draw_fitting
    from densegrpo_fast.training.learner import Learner
    from densegrpo_fast.training.memory import peak_metrics, start_peak
    from densegrpo_fast.training.monitor import LookaheadMonitor
    from densegrpo_fast.training.noise_levels import NoiseLevels
    from densegrpo_fast.training.preparation import check_device, prepare

    check_device(config, builders.default_device())
    with open_run_directory(config.output_dir, resume=resume, overwrite=config.run.overwrite) as directory:
        prompts, held_out = builders.build_prompts(config), builders.build_held_out(config)
        reward = builders.build_reward(config.reward.terms, config.reward.options)
        observed = builders.build_observer(config, reward)
        model = builders.build_model(config, builders.default_device())
        learner = Learner(model, builders.learner_options(config))
        lookahead = builders.build_lookahead(config, model)
        judge = RewardComputer(config, model, reward, lookahead)
        guard = LookaheadMonitor(config, model, reward, lookahead)
        costs = CostLog(config, model, lookahead)
        builders.build_coefficients(config, model)  # a sampler that cannot be is refused before anything is drawn
        levels = NoiseLevels(config, model, reward)
        prepare(config, model, judge.lookahead, prompts.used(config.run.iterations) + held_out.prompts, observed)
        records = RunRecords(directory, config, model, learner, levels, guard.refresher)
        timer = PhaseTimer(builders.synchronizer(model.device))

        size = f"{config.data.num_prompts} prompts x {config.sampler.group_size} samples"
        print(f"{config.preset}: {config.run.iterations} iterations of {size}, into {directory}", flush=True)
        with MetricsLog(directory / "metrics.jsonl") as log, GracefulStop() as stop:
            start = records.restore(log) if resume else 0
            log.also(Loggers(config.run.loggers, RunFacts(directory, config.model_dump(mode="json"), start)))
            alarms = Alarms(alarms_for(config), past=log.records())
            if start == 0:
                records.begin(dump_yaml(config.self_contained()))
                evaluation = held_out.evaluate(model, observed)
                records.evaluated("before", evaluation, held_out)
                log.show({"iteration": 0} | evaluation.metrics())
            with Progress(config.run.iterations, start) as progress:
                for iteration in range(start, config.run.iterations):
                    timer.reset()
                    costs.reset()
                    start_peak(model.device)
                    rows, metadata = prompts.rows(iteration, config.sampler.group_size)
                    observations = {}
                    if levels.due(iteration):
                        with timer("calibration"):
                            observations = levels.calibrate(iteration, costs)
                    with timer("rollout"):
                        noisy = builders.noisy_steps(config, iteration)
                        coefficients = builders.build_coefficients(config, model, noisy, levels.levels)
                        trajectory = draw_fitting(
                            learner.rows, config, model, rows, coefficients, iteration, cache=judge.cache
                        )
                    outcome = judge.judge(trajectory, rows, metadata, timer)
                    if guard.due(iteration):
                        with timer("monitor"):
                            observations |= guard.check(trajectory, rows, metadata, outcome, iteration, costs)
                    with timer("update"):
                        advantages = outcome.advantages.values.flatten(0, 1).to(model.device)
                        steps = builders.trained_steps(config, iteration)
                        weights = builders.build_step_weights(config, model, levels.levels)
                        update = learner.update(trajectory, advantages, steps, weights)

                    done = iteration + 1
                    costs.iteration(
                        judge.cost(trajectory, len(steps)), judge.sparse_cost(trajectory, len(steps)), len(rows)
                    )
                    record = iteration_record(done, trajectory, outcome, update, costs.metrics(), timer.seconds())
                    record |= levels.metrics() | observations | peak_metrics(model.device)
                    record["cpu_seconds"] = timer.cpu_seconds()
                    if records.due(config.evaluation.every, done):
                        with learner.averaged():
                            evaluation = held_out.evaluate(model, observed)
                        record |= evaluation.metrics()
                        records.samples(f"iteration-{done:05d}", evaluation.images, held_out)
                    if alarmed := alarms.check(record):
                        record["alarms"] = alarmed
                    log.append(record)
                    progress.update(done, reward=record["reward"])
                    if stop.requested or records.due(config.run.checkpoint_every, done):
                        records.checkpoint(done, log)
                    if stop.requested:
                        progress.write(f"stopped after iteration {done}; continue with --resume")
                        return stop.exit_code
            records.checkpoint(config.run.iterations, log)
            with learner.averaged():
                evaluation = held_out.evaluate(model, observed)
                records.evaluated("after", evaluation, held_out)
                log.show({"iteration": config.run.iterations} | evaluation.metrics())
                print(records.finish(log))
    return ExitCode.OK


def dry_run(config: Config) -> ExitCode:
    """One whole iteration on two samples of one prompt; writes nothing.

    A model that is not in the package is replaced by a tiny random one of the same classes, and its reward by JPEG
    compressibility, so that every option is tried without weights.
    """
    from densegrpo_fast.run_files.metrics import PhaseTimer
    from densegrpo_fast.run_files.records import PHASES, iteration_record
    from densegrpo_fast.training import builders
    from densegrpo_fast.training.costs import CostLog
    from densegrpo_fast.training.experience import RewardComputer, draw
    from densegrpo_fast.training.learner import Learner
    from densegrpo_fast.training.noise_levels import NoiseLevels

    small = builders.shrink(config)
    model = builders.build_model(small, builders.default_device(), dry_run=True)
    reward = builders.build_reward(small.reward.terms, small.reward.options)
    judge = RewardComputer(small, model, reward, builders.build_lookahead(small, model))
    learner, timer = (
        Learner(model, builders.learner_options(small)),
        PhaseTimer(builders.synchronizer(model.device)),
    )
    rows, metadata = builders.build_prompts(small).rows(0, small.sampler.group_size)
    builders.build_held_out(small)  # for what may be wrong with its prompts
    levels, costs = NoiseLevels(small, model, reward), CostLog(small, model, judge.lookahead)
    if levels.due(0):
        with timer("calibration"):
            levels.calibrate(0, costs)
    with timer("rollout"):
        coefficients = builders.build_coefficients(small, model, levels=levels.levels)
        trajectory = draw(small, model, rows, coefficients, 0, cache=judge.cache)
    outcome = judge.judge(trajectory, rows, metadata, timer)
    with timer("update"):
        advantages, steps = outcome.advantages.values.flatten(0, 1).to(model.device), builders.trained_steps(small, 0)
        weights = builders.build_step_weights(small, model, levels.levels)
        update = learner.update(trajectory, advantages, steps, weights)
    costs.iteration(judge.cost(trajectory, len(steps)), judge.sparse_cost(trajectory, len(steps)), len(rows))
    record = iteration_record(1, trajectory, outcome, update, costs.metrics(), timer.seconds())
    print(f"dry run of {config.preset}: one iteration of {len(rows)} samples, {small.sampler.num_steps} steps")
    for phase in PHASES:
        print(f"  {phase:10} {record[f'time/{phase}']:7.2f} s  {record.get(f'nfe/{phase}', 0):5.0f} NFE")
    print(f"  largest |ratio - 1| {record['ratio_deviation']:.1e}, gradient norm {record['grad_norm']:.2e}")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
