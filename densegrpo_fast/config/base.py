"""What all option groups share: strictness, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]*$")]
PositiveInt = Annotated[int, Field(ge=1)]
StepIndex = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all option groups: unknown keys, NaN, infinities and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
