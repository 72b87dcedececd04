"""Every credit method by its name: which function computes it, and what that needs.

A method is a function that takes the `CreditInputs` it needs and the options it has, all by keyword, and returns
`Advantages` of shape [P, G, K] for the K steps that inject noise:

    def last_gain(lookahead_rewards, *, std, spread_floor, clip, sharpness):
        gains = reward_gains(lookahead_rewards)
        ...
        return normalize_groups(sharpness * gains, std=std, spread_floor=spread_floor, clip=clip)

One line makes it an option of training: in this package an entry of `_PACKAGE`, anywhere else

    register("last_gain", CreditMethod(last_gain, needs=("lookahead_rewards",), options=("sharpness",)))

before the configuration is read; or, with no registration at all, the `CreditMethod` itself by where it is:

    --credit.method mine.py:LAST_GAIN --credit.arguments '{sharpness: 2}'

`needs` are attributes of `CreditInputs`: with lookahead_rewards among them the lookahead is run, and with
branch_rewards the samples of a prompt branch from one trajectory (`sampler.branches`, without which such a method is
refused, and the others with it). A reward that is missing is NaN and must not reach an advantage.

`local_with` says when a step's advantages need the rewards of its two states alone, the one it leaves and the one it
leads to, of all samples. Such a method is local: a step can be credited, and trained, as soon as both are scored, and
of an iteration that trains some of the steps the other states have no rewards (NaN). Every other is whole and waits for
the trajectories' ends. Without a word of it a method is whole; it is local always with {},
or with the options that it names, as `dense` is unless it is normalised over all steps together:

    register("last_gain", CreditMethod(last_gain, needs=("lookahead_rewards",), local_with={}))

`options` are keys of the section `credit` or, for what that does not have, of `credit.arguments`; std,
spread_floor and clip come without being named. Functions of this package are imported when they are first called: this
file needs no torch, so that the configuration can read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from densegrpo_fast.common.errors import PluginError
from densegrpo_fast.common.plugins import Registry, fence, is_package_code, resolve, select_options
from densegrpo_fast.common.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.credit.inputs import CreditInputs
    from densegrpo_fast.credit.normalize import Advantages

INPUTS = (
    "rewards",
    "noisy",
    "latents",
    "velocities",
    "sigmas",
    "lookahead_rewards",
    "branch_rewards",
    "steps",
    "num_steps",
    "similarity",
    "progress",
)
"""What a method may need: the attributes of `CreditInputs`."""

_OF_TRAJECTORIES = ("latents", "velocities", "similarity")

COMMON = ("std", "spread_floor", "clip")
"""Options that every method takes."""

Scope = Literal["local", "whole"]
"""What a step's advantages are made of: the rewards of the two states around it, or those of others too."""


@dataclass(frozen=True)
class CreditMethod:
    """How advantages are computed, and from what.

    Attributes:
        compute: the function, or where it is as `module:name`.
        needs: attributes of `CreditInputs` that it takes.
        options: options that it takes besides `COMMON`.
        plan: the lookahead plan that defines its rewards; None = any plan approximates them.
        local_with: values of its options with which it is local, {} = whatever they are; None = it is whole.

    Raises:
        ValueError: it needs what there is none of, has a plan and no need of completions' rewards, or is local with
            options that it does not take.
    """

    compute: str | Callable[..., Advantages]
    needs: tuple[str, ...]
    options: tuple[str, ...] = ()
    plan: str | None = None
    local_with: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        unknown = [need for need in self.needs if need not in INPUTS]
        if unknown or not self.needs:
            raise ValueError(f"CreditMethod: needs must be some of {', '.join(INPUTS)}, got {list(self.needs)}")
        if self.uses_branches and (strange := {*self.needs} & {"lookahead_rewards", *_OF_TRAJECTORIES}):
            raise ValueError(
                f"CreditMethod: branches have no {', '.join(sorted(strange))}; it needs branch_rewards too"
            )
        if self.plan is not None and not (self.uses_lookahead or self.uses_branches):
            raise ValueError(
                f"CreditMethod: plan {self.plan!r} is of no use without lookahead_rewards or branch_rewards "
                "among the needs"
            )
        if strange := {*(self.local_with or ())} - {*self.options, *COMMON}:
            raise ValueError(f"CreditMethod: local_with has {', '.join(sorted(strange))}, which is none of its options")

    @property
    def uses_lookahead(self) -> bool:
        """Whether it needs the rewards of completed intermediate states."""
        return "lookahead_rewards" in self.needs

    @property
    def uses_states(self) -> bool:
        """Whether it needs the latents of trajectories, or what is computed from them."""
        return bool({*self.needs} & {*_OF_TRAJECTORIES})

    @property
    def uses_branches(self) -> bool:
        """Whether it needs the rewards of several branches of one state (`sampler.branches`)."""
        return "branch_rewards" in self.needs

    def scope(self, options: Mapping[str, Any]) -> Scope:
        """Whether it is local or whole with these options, at least those that `local_with` names."""
        if self.local_with is None:
            return "whole"
        return "local" if all(options[key] == value for key, value in self.local_with.items()) else "whole"

    def function(self) -> Callable[..., Advantages]:
        """The function itself."""
        return resolve(self.compute)


_HERE = __package__

_PACKAGE = {
    "sparse": CreditMethod(f"{_HERE}.sparse:sparse_advantages", ("rewards", "num_steps")),
    "dense": CreditMethod(
        f"{_HERE}.dense:dense_advantages", ("lookahead_rewards",), ("normalize",), local_with={"normalize": "step"}
    ),
    "value": CreditMethod(f"{_HERE}.value:value_advantages", ("lookahead_rewards",), local_with={}),
    # with discount 0 it is dense
    "return_to_go": CreditMethod(
        f"{_HERE}.return_to_go:return_advantages",
        ("lookahead_rewards",),
        ("discount", "normalize"),
        local_with={"discount": 0, "normalize": "step"},
    ),
    # also without the image's own term: a step counts only where the image has a reward
    "mixture": CreditMethod(
        f"{_HERE}.mixture:lookahead_mixture_advantages",
        ("rewards", "lookahead_rewards"),
        ("step_value", "discount", "terminal_coef", "dense_coef", "normalize"),
    ),
    "turning_point": CreditMethod(
        f"{_HERE}.turning_point:turning_point_advantages", ("lookahead_rewards",), ("consistent", "balance")
    ),
    "vgpo": CreditMethod(
        f"{_HERE}.vgpo:vgpo_advantages",
        ("lookahead_rewards", "steps"),
        ("discount", "absolute_coef", "absolute_steps"),
        plan="one_step",
    ),
    "coca": CreditMethod(
        f"{_HERE}.coca:coca_advantages",
        ("rewards", "similarity", "steps"),
        ("window", "alpha", "similarity_floor"),
    ),
    "branch": CreditMethod(f"{_HERE}.branch:branch_advantages", ("branch_rewards",), local_with={}),
    "granular": CreditMethod(
        f"{_HERE}.granular:granular_advantages",
        ("branch_rewards",),
        ("granularities",),
        plan="exact",
        local_with={},
    ),
}

METHODS = Registry(CreditMethod, "method", _PACKAGE)
names, register, find = METHODS.names, METHODS.register, METHODS.find


def local_methods() -> str:
    """The methods of trajectories that are local to a step, with the options that this takes, for people.

    With `credit.smoothing` or `credit.closeness` none of them is.
    """
    found = []
    for name in names():
        method = find(name)
        if method.local_with is not None and not method.uses_branches:
            options = ", ".join(f"{option} {value}" for option, value in method.local_with.items())
            found.append(f"{name} with {options}" if options else name)
    return "; ".join(found)


def advantages(name: str, inputs: CreditInputs, options: Mapping[str, Any]) -> Advantages:
    """Credit every step by the named method.

    Args:
        inputs: the iteration's.
        options: values by name, at least those that the method takes.

    Returns:
        values [P, G, T] float32, 0 at steps without noise; the shares are over the judged steps.

    Raises:
        ValueError: there is no such method, the lookahead that it needs was not run, or it lacks an option.
        PluginError: a method of one's own raised, or a method returns something else than finite advantages.
    """
    method = find(name)
    needed = {need: getattr(inputs, need) for need in method.needs}
    absent = [key for key, value in needed.items() if value is None]
    if absent:
        raise ValueError(f"credit method {name} needs {', '.join(absent)}, which this iteration does not have")
    chosen = select_options(f"credit method {name}", (*COMMON, *method.options), options)
    judged = _judged(name, method, needed | chosen, [*inputs.rewards.shape, inputs.num_steps])
    values = judged.values.new_zeros(*inputs.rewards.shape, len(inputs.noisy))
    values[..., list(inputs.steps)] = judged.values
    return replace(judged, values=values)


def advantages_of(lookahead_rewards: Tensor, method: str = "dense", **options: Any) -> Advantages:
    """Credit every step of samples that came from anywhere, all steps being stochastic: `densegrpo_fast.advantages`.

        advantages(rewards).values                         # DenseGRPO (arXiv 2601.20218, Eq 10)
        advantages(rewards, "return_to_go", discount=0.9, normalize="step")

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image; NaN = missing.
        method: of `credit.method`, registered, or `file.py:NAME`; one that needs more than rewards (coca, branch,
            granular) is refused.
        **options: of the method's function; those with a default may be left out.

    Returns:
        values [P, G, T] float32.

    Raises:
        ValueError: the shape or dtype of lookahead_rewards, an unknown method or option, or one that is lacking.
        PluginError: a method of one's own raised, or a method returns something else than finite advantages.
    """
    from densegrpo_fast.credit.normalize import normalize_groups

    shape = list(lookahead_rewards.shape)
    if len(shape) != 3 or shape[-1] < 2 or not lookahead_rewards.is_floating_point():
        raise ValueError(
            "advantages: lookahead_rewards must be floating point with shape [P, G, T+1] and T >= 1, "
            f"got {lookahead_rewards.dtype} with shape {shape}"
        )
    steps, credit = shape[-1] - 1, find(method)
    known = {
        "rewards": lookahead_rewards[..., -1],
        "lookahead_rewards": lookahead_rewards,
        "steps": tuple(range(steps)),
        "num_steps": steps,
        "noisy": (True,) * steps,
    }
    if absent := [need for need in credit.needs if need not in known]:
        raise ValueError(f"advantages: method {method} needs {', '.join(absent)}, not rewards alone")
    parameters = inspect.signature(credit.function()).parameters
    takes = {name: own for name, own in parameters.items() if name not in known and own.kind is not own.VAR_KEYWORD}
    names = list(dict.fromkeys((*takes, *COMMON, *credit.options)))
    for name in options:
        if name not in names:
            raise ValueError(
                f"advantages: method {method} has no option {name!r}{did_you_mean(name, names)} "
                f"(it takes {', '.join(names)})"
            )
    usual = inspect.signature(normalize_groups).parameters
    chosen = {name: usual[name].default for name in COMMON} | options
    if lacking := [name for name, own in takes.items() if own.default is own.empty and name not in chosen]:
        raise ValueError(f"advantages: method {method} needs the options {', '.join(lacking)}")
    return _judged(method, credit, {need: known[need] for need in credit.needs} | chosen, [*shape[:2], steps])


def _judged(name: str, method: CreditMethod, arguments: dict[str, Any], expected: list[int]) -> Advantages:
    """What a method's function returns, if that is finite advantages of the expected shape."""
    from densegrpo_fast.credit.normalize import Advantages  # brings torch, which the configuration does not need

    function = method.function()
    if not is_package_code(function):
        # it may write into them
        arguments = {name: value.clone() if hasattr(value, "clone") else value for name, value in arguments.items()}
    with fence(function, f"credit method {name}"):
        judged = function(**arguments)
    if not isinstance(judged, Advantages) or not hasattr(judged.values, "isfinite"):
        found = type(judged).__name__
        raise PluginError(f"credit method {name}: expected Advantages (densegrpo_fast.credit.normalize), got {found}")
    if list(judged.values.shape) != expected:
        raise PluginError(f"credit method {name}: expected advantages {expected}, got {list(judged.values.shape)}")
    if not judged.values.isfinite().all():
        raise PluginError(f"credit method {name}: expected finite advantages; a reward that is missing is NaN")
    return judged
