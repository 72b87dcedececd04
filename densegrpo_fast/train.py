"""Align a flow-matching image model with a reward for every denoising step: `python -m densegrpo_fast.train`.

    python -m densegrpo_fast.train                                    the embedded model, branches; minutes on a CPU
    python -m densegrpo_fast.train --config embedded_paper            DenseGRPO under its own settings
    python -m densegrpo_fast.train --config embedded_sparse           Flow-GRPO's sparse reward instead
    python -m densegrpo_fast.train --run.iterations 200 --resume      go on with a run
    python -m densegrpo_fast.train --config sd35_medium_pickscore --dry-run
    torchrun --nproc-per-node 2 -m densegrpo_fast.train               the same run on two processes (docs/scaling.md)

What an iteration does is in `training/trainer.py`. Options are parsed before torch is imported, so help and errors are
instant. Exit codes are in `common/exit_codes.py`.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import OF_SIGNALS, ExitCode, user_errors_exit
from densegrpo_fast.common.plugins import is_outside
from densegrpo_fast.common.progress import announce
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.models.supported import check_supported
from densegrpo_fast.rewards.registry import resolve_alias
from densegrpo_fast.training.prompts import check_inputs

if TYPE_CHECKING:
    from densegrpo_fast.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        config, flags = parse_arguments(sys.argv[1:] if arguments is None else list(arguments))
        if not flags.dry_run:
            check_inputs(config)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            # several processes say such things once, when they have met
            check_supported(config.model.path, config.model.revision)
            if flags.resume:
                _refuse_other_settings(config)
        announce(f"{config.preset}: loading torch and diffusers")
        return int(dry_run(config) if flags.dry_run else train(config, resume=flags.resume))


def train(config: Config, resume: bool = False) -> ExitCode:
    """Run (or continue) the training that `config` describes and write its run directory.

    Raises:
        UserError: anything the user can act on; the checkpoints so far are kept.
    """
    from densegrpo_fast.run_files.run_directory import holds_run
    from densegrpo_fast.training.processes import joined
    from densegrpo_fast.training.records import run_directory

    with joined(config) as world:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            # torchrun starts the processes again after one has failed
            resume = world.from_main(lambda: resume or holds_run(config.output_dir))
            config = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
        if resume:
            world.on_main(lambda: _refuse_other_settings(config))
        # the directory is locked before anything is loaded
        with run_directory(config, world, resume=resume) as directory:
            from densegrpo_fast.fidelity.auto import resolve
            from densegrpo_fast.training.models import check_device, default_device
            from densegrpo_fast.training.run import Run
            from densegrpo_fast.training.trainer import Trainer

            check_device(config, default_device())
            if world.size == 1:
                config, model = resolve(config, directory, resume=resume)
            else:
                # one process measures for all
                config, model = world.from_main(lambda: resolve(config, directory, resume=resume)[0]), None
            result = Run(Trainer(config, model=model, world=world), directory).go(resume=resume)
            if result.signal is not None:
                return OF_SIGNALS[result.signal]
            if world.main:
                print(result.summary)
    return ExitCode.OK


def _refuse_other_settings(config: Config) -> None:
    """Refuse to go on with a run under other settings, before anything is loaded."""
    from densegrpo_fast.run_files.checkpoint import refuse_other_settings
    from densegrpo_fast.run_files.run_directory import CHECKPOINTS

    # what the plan auto had chosen is read later
    if config.lookahead.plan != "auto":
        refuse_other_settings(config.output_dir / CHECKPOINTS, config.resume_settings())


def dry_run(config: Config) -> ExitCode:
    """One whole iteration on two samples of one prompt (or one for each process); writes nothing.

    A model that is not in the package is replaced by a tiny random one of the same classes, and rewards that need
    weights or a server by JPEG compressibility, so that every option is tried without them; the output says what was.
    """
    from densegrpo_fast.fidelity.auto import rehearse
    from densegrpo_fast.training.meter import PHASES
    from densegrpo_fast.training.models import tiny_config
    from densegrpo_fast.training.processes import joined
    from densegrpo_fast.training.trainer import Trainer

    with joined(config) as world:
        small, model = tiny_config(config, world.size), None
        if world.size == 1:
            small, model = rehearse(config, small)
        else:
            small = world.from_main(lambda: rehearse(config, small)[0])
        trainer = Trainer(small, tiny=True, model=model, world=world)
        record = trainer.step(0)
    if not world.main:
        return ExitCode.OK
    samples = small.data.num_prompts * small.sampler.group_size
    print(f"dry run of {config.preset}: one iteration of {samples} samples, {small.sampler.num_steps} steps")
    for name, words in _what_was_real(config, small, trainer).items():
        print(f"  {name:10} {words}")
    for phase in PHASES:
        print(f"  {phase:10} {record[f'time/{phase}']:7.2f} s  {record.get(f'nfe/{phase}', 0):5.0f} NFE")
    print(f"  largest |ratio - 1| {record['ratio_deviation']:.1e}, gradient norm {record['grad_norm']:.2e}")
    return ExitCode.OK


def _network(config: Config) -> str:
    """The network that a run of this configuration would train, as far as it is known without its weights."""
    from densegrpo_fast.training.outline import network_outline

    if config.model.path in EMBEDDED or is_outside(config.model.path):
        return "real"
    lora = config.lora
    try:
        found = network_outline(config.model.path, rank=config.adapter_rank, alpha=lora.alpha, targets=lora.targets)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return found or "not looked at: its configuration is on the hub"


def _what_was_real(config: Config, small: Config, trainer: Trainer) -> dict[str, str]:
    """For each part of the run, whether it is the configuration's own or what stood in for it."""
    names = [*config.reward.terms, *config.reward.observed]
    kinds = {name: resolve_alias(name, config.reward.options)[0] for name in names}
    tried = {name: resolve_alias(name, small.reward.options)[0] for name in names}
    own = [name for name in names if kinds[name] == tried[name]]
    replaced = [f"{tried[name]} in the place of {name}" for name in names if name not in own]
    of_iteration = f"{config.data.num_prompts} x {config.sampler.group_size}"
    used, path = (small.data.prompts, small.data.eval_prompts), config.model.path
    lacking = [source for source in (config.data.prompts, config.data.eval_prompts) if source not in used]
    prompts = f"{len(trainer.prompts.prompts)} for training, {len(trainer.held_out.prompts)} held out"
    outline = _network(config)
    return {
        "model": "real" if path in EMBEDDED else f"a tiny random one in the place of {path}",
        "network": outline,
        "rewards": "; ".join([*(["real: " + ", ".join(own)] if own else []), *replaced]),
        "prompts": f"scenes in the place of {', '.join(lacking)}: not there" if lacking else f"real: {prompts}",
        "samples": f"{small.data.num_prompts} x {small.sampler.group_size} in the place of {of_iteration}",
    }


if __name__ == "__main__":
    sys.exit(main())
