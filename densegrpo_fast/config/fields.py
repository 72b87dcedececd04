"""What the option groups are made of: their base class, and the types of options that several groups use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from densegrpo_fast.common.plugins import Registry, is_outside
from densegrpo_fast.common.suggest import did_you_mean

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]*$")]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
StepIndex = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    """Base of all option groups: unknown keys, NaN, infinities and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def once(what: str) -> AfterValidator:
    """The check that no entry of a list stands there twice."""

    def check(values: list[str]) -> list[str]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected every {what} once")
        return values

    return AfterValidator(check)


def named_in(registry: Registry[Any]) -> AfterValidator:
    """The check that a name is registered, or has the form of one from outside of the package."""

    def check(name: str) -> str:
        known = registry.names()
        if name not in known and not is_outside(name):
            raise ValueError(
                f'unknown {registry.what} "{name}"{did_you_mean(name, known)} '
                f"(known: {', '.join(known)}; your own {registry.kind.__name__}: module:NAME or path.py:NAME)"
            )
        return name

    return AfterValidator(check)
