"""The settings under which iterations and lookaheads are compared, most of them pinned, and the options that remain."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benches.common.operations import schedule_of
from benches.common.record import RESULTS, pairwise_ratio
from benches.iteration.models import EMBEDDED_RANDOM, SD35_RANDOM, model_options
from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.fidelity.options import _plan as read_plan
from densegrpo_fast.sampling.plan import make_plan

SPARSE, SPARSE_RETAINED, DENSE_FAST = "sparse", "sparse_retained", "dense_fast"
DENSE_TRAJECTORIES, DENSE_EXACT = "dense_trajectories", "dense_exact"
DRAWN = DENSE_DRAWN, DENSE_STREAMED = "dense_drawn", "dense_streamed"
STOCK = STOCK_SPARSE, STOCK_DENSE = "stock_sparse", "stock_dense"
NAMES = (SPARSE, SPARSE_RETAINED, DENSE_FAST, DENSE_TRAJECTORIES, *DRAWN, DENSE_EXACT, *STOCK)

DRAWN_STEPS = 4
"""Of nine, that dense_drawn and dense_streamed train."""

KL_COEF = 0.01
PINNED: dict[str, Any] = {
    "sampler.num_steps": 10,
    "sampler.guidance_scale": 4.5,
    "sampler.dynamics": "flow_sde",
    "trained_steps": 9,
    "optimizer.updates_per_iteration": 1,
    "model.prompt_cache": None,
}
"""What must hold in every variant, whatever was asked for; with the KL term, or without it in all of them."""
STOCK_PINNED: dict[str, Any] = {"model.vae_dtype": "float32", "model.vae_decode": "whole"}
"""What must hold in the baseline besides, whatever ours does: how the published codebases decode."""
FAST_PRESET = "embedded_paper_fast"
"""The preset whose lookahead dense_fast has unless something else is asked for."""


@dataclass(frozen=True)
class Protocol:
    """What is chosen for a measurement; everything else is pinned.

    Attributes:
        model: "embedded", a pipeline directory, or a name of `models.py`.
        prompts: P.
        group_size: G.
        plan: of dense_fast and dense_trajectories, as `densegrpo_fast.fidelity --plans` takes it: "nodes:4,7",
            "paths:2,3:3:-:-" or a plan's name.
        guidance, decoder: of their lookahead.
        copy_dtype: of the model's copy that it evaluates; "null" for no copy.
        vae_dtype: of the full decoder of sparse, dense_fast and dense_trajectories; the others' is float32.
        cache: of dense_trajectories', as in the configuration; "null" for none.
        overrides: further options of all variants, as `key=value`, such as a micro-batch that fits the memory.
    """

    model: str = "embedded"
    prompts: int = 3
    group_size: int = 16
    plan: str = "exact_but_last"
    guidance: str = "full"
    decoder: str = "full"
    copy_dtype: str = "float32"
    vae_dtype: str = "bfloat16"
    cache: str = "null"
    overrides: tuple[str, ...] = ()

    def config(self, name: str, *, kl: bool) -> Config:
        """The resolved configuration of a variant.

        Raises:
            UserError: an option is wrong, or differs from what the protocol pins.
        """
        if name in (DENSE_FAST, DENSE_TRAJECTORIES, *DRAWN):
            lookahead = _plan(self.plan) | {
                "lookahead.guidance": self.guidance,
                "lookahead.decoder": self.decoder,
                "lookahead.copy_dtype": self.copy_dtype,
            }
        else:
            lookahead = _plan("exact") | {"lookahead.guidance": "full", "lookahead.decoder": "full"}
        if name == DENSE_TRAJECTORIES:
            lookahead |= {"lookahead.cache": self.cache}
        methods = {DENSE_FAST: "branch"} | dict.fromkeys((SPARSE, SPARSE_RETAINED, STOCK_SPARSE), "sparse")
        fixed = lookahead | {
            "model.vae_dtype": "float32" if name == DENSE_EXACT else self.vae_dtype,
            "data.num_prompts": self.prompts,
            "sampler.group_size": self.group_size,
            "credit.method": methods.get(name, "dense"),
            "objective.kl_coef": KL_COEF if kl else 0.0,
            # the policy stays what it was, so that every round scores pictures of the same kind
            "optimizer.lr": 1e-6,
            "ema.every": 0,
            # now and then an iteration checks its lookahead by an exact one; what is timed is all the others
            "lookahead.monitor_every": 0,
        }
        chosen = model_options(self.model) | {"sampler.micro_batch": self.prompts * self.group_size}
        for text in self.overrides:
            key, equals, value = text.removeprefix("--").partition("=")
            if not equals or key in fixed:
                problem = "is set by the protocol" if equals else "must be KEY=VALUE"
                raise UsageError(f"--override: {text} {problem}")
            chosen[key] = value
        if name in STOCK:
            fixed |= STOCK_PINNED
        if name in DRAWN:
            fixed |= {"objective.trained_steps": DRAWN_STEPS, "objective.step_sampling": "importance"}
            fixed["optimizer.update"] = "streamed" if name == DENSE_STREAMED else "replayed"
        if name == DENSE_FAST:
            # one noise-free trajectory per prompt, and of those no more in a forward than the other variants have rows
            fixed["sampler.branches"] = self.group_size
            chosen["sampler.micro_batch"] = math.gcd(self.prompts, int(chosen["sampler.micro_batch"]))
        arguments = [f"{key}={value}" for key, value in (chosen | fixed).items()]
        config = parse_arguments(["--config", "embedded_paper", *arguments])[0]
        expected = PINNED | STOCK_PINNED | {"objective.kl_coef": fixed["objective.kl_coef"]}
        if name in DRAWN:
            expected["trained_steps"] = DRAWN_STEPS
        found = pinned(config) | (stock_pinned(config) if name in STOCK else {})
        wrong = [f"{key} is {value}, not {expected[key]}" for key, value in found.items() if value != expected[key]]
        if wrong:
            raise UsageError(f"the protocol pins other settings: {'; '.join(wrong)}")
        return config


def pinned(config: Config) -> dict[str, Any]:
    """The settings that the protocol pins, as a configuration resolved them."""
    return {
        "sampler.num_steps": config.sampler.num_steps,
        "sampler.guidance_scale": config.sampler.guidance_scale,
        "sampler.dynamics": config.sampler.dynamics,
        "trained_steps": len(schedule_of(config).trained_steps(0)),
        "optimizer.updates_per_iteration": config.optimizer.updates_per_iteration,
        "model.prompt_cache": config.model.prompt_cache,
        "objective.kl_coef": config.objective.kl_coef,
    }


def stock_pinned(config: Config) -> dict[str, Any]:
    """The settings that the protocol pins in the baseline besides, as a configuration resolved them."""
    return {"model.vae_dtype": config.model.vae_dtype, "model.vae_decode": config.model.vae_decode}


def fast_settings(config: Config) -> dict[str, Any]:
    """What dense_fast is, as its configuration resolved it; `preset` = `FAST_PRESET` if it is what that has, else None.

    The number of branches is left out of that: it is the group's size.
    """
    ahead, model = config.lookahead, config.model
    preset = parse_arguments(["--config", FAST_PRESET])[0]
    asked, wanted = (one.model_dump(exclude={"monitor_every"}) for one in (ahead, preset.lookahead))
    same = (asked, model.vae_dtype) == (wanted, preset.model.vae_dtype)
    return {
        "preset": FAST_PRESET if same else None,
        "branches": config.sampler.branches,
        "plan": make_plan(ahead.plan, config.sampler.num_steps, ahead.nodes, ahead.n or 1, ahead.paths).name,
        "guidance": ahead.guidance,
        "copy_dtype": ahead.copy_dtype,
        "decoder": ahead.decoder,
        "vae_dtype": model.vae_dtype,
    }


def _plan(text: str) -> dict[str, Any]:
    try:
        plan = read_plan(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--plan: {error}") from None
    assert isinstance(plan, partial)
    (kind,), given = plan.args, plan.keywords
    return {
        "lookahead.plan": kind,
        "lookahead.nodes": given.get("points", []),
        "lookahead.n": given.get("n", "null"),
        "lookahead.paths": given.get("paths", []),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options of `Protocol`, `--rounds`, `--warmup` and `--output`."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    default, add = Protocol(), made.add_argument
    add(
        "--model",
        default=default.model,
        help=f"embedded, a pipeline directory, {EMBEDDED_RANDOM}, or {SD35_RANDOM} (needs CUDA)",
    )
    add("--prompts", type=int, default=default.prompts, help="prompts per iteration; default: %(default)s")
    add("--group-size", type=int, default=default.group_size, help="samples per prompt; default: %(default)s")
    both = "of dense_fast and dense_trajectories"
    add(
        "--plan",
        default=default.plan,
        help=f"{both}: nodes:4,7, n_step:2, one_step, ..., or the later steps of every state, as in paths:2,3:3:-:-; "
        "default: %(default)s",
    )
    add("--guidance", choices=("full", "cond_only", "reuse"), default=default.guidance, help=f"{both}; default: full")
    add("--decoder", choices=("preview", "full"), default=default.decoder, help=f"{both}; default: full")
    add(
        "--copy-dtype",
        default=default.copy_dtype,
        metavar="DTYPE",
        help="precision of a copy, its adapter merged, that both evaluate; null = none; default: %(default)s",
    )
    add(
        "--vae-dtype",
        choices=("float32", "bfloat16"),
        default=default.vae_dtype,
        help="precision of the full decoder of both and of sparse; default: %(default)s",
    )
    add("--cache", default=default.cache, metavar="SPEC", help="features that dense_trajectories takes over")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="further options of all variants")
    add("--rounds", type=int, default=5, choices=range(1, 1001), metavar="N", help="timed rounds; default: %(default)s")
    add(
        "--warmup",
        type=int,
        default=1,
        choices=range(1001),
        metavar="N",
        help="rounds before them; default: %(default)s",
    )
    add("--output", type=Path, help="JSON file; default: results/<bench>_<cpu or gpu>.json")
    return made


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The protocol that a command line asks for.

    Raises:
        UserError: the model needs a GPU.
    """
    if options.model == SD35_RANDOM and not torch.cuda.is_available():
        raise SetupError(f"--model {SD35_RANDOM} needs a CUDA device")
    names = [field.name for field in fields(Protocol) if field.name != "overrides"]
    return Protocol(**{name: getattr(options, name) for name in names}, overrides=tuple(options.override))


def default_output(stem: str) -> Path:
    """Where a bench's result lies for this machine's device."""
    return RESULTS / f"{stem}_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"


def ratios(seconds: Mapping[str, Sequence[float]], pairs: Sequence[str]) -> dict[str, float]:
    """For every "a/b" the median over rounds of a's time over b's."""
    return {pair: pairwise_ratio(*(seconds[name] for name in pair.split("/"))) for pair in pairs}
