"""Settings that follow from those of a run: of its learner, and of its dry run."""

from __future__ import annotations

from densegrpo_fast.calibration.staircase import Staircase
from densegrpo_fast.config import Config
from densegrpo_fast.objective.policy import ObjectiveSettings
from densegrpo_fast.training.learner import LearnerOptions


def learner_options(config: Config) -> LearnerOptions:
    """The part of the configuration that the learner needs."""
    optimizer = config.optimizer
    return LearnerOptions(
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        weight_decay=optimizer.weight_decay,
        eps=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        updates_per_iteration=optimizer.updates_per_iteration,
        warmup=optimizer.warmup,
        ema_decay=config.ema.decay,
        ema_every=config.ema.every,
        objective=ObjectiveSettings(**config.objective.model_dump(exclude={"trained_steps"})),
        micro_batch=config.sampler.micro_batch,
        max_bad_steps=config.run.max_bad_steps,
    )


def shrink(config: Config) -> Config:
    """The configuration of a dry run: two samples of one prompt, and a reward that needs no weights."""
    settings = config.model_dump()
    settings["data"] |= {"num_prompts": 1}
    settings["sampler"] |= {"group_size": 2, "micro_batch": 2}
    if config.sampler.branches is not None:
        settings["sampler"] |= {"branches": 2, "micro_batch": 1}
    settings["optimizer"] |= {"updates_per_iteration": 1}
    settings["calibration"] |= {"samples": Staircase.enough, "rounds": 1}
    if config.model.path != "embedded":
        settings["model"] |= {"height": 0, "width": 0}
        # the levels stay; the tiny model that takes the place of this one has a schedule of its own
        settings["sampler"] |= {"calibration": None}
        settings["reward"] |= {"terms": {"jpeg_compressibility": 1.0}, "observed": [], "options": {}}
        settings["data"] |= {"prompts": "scenes", "eval_prompts": "scenes"}
    return Config.model_validate(settings)
