"""What a section of options is made of: its base class, and the ranges that numbers have."""

from __future__ import annotations

import re
from copy import copy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A group of options. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = re.sub(r"\n(?!\w+: )", " ", field.description or "") or None


def same_as(section: type[Section], name: str, **changes: Any) -> Any:
    """The definition of an option of `section`, for a command that has the same option.

    It brings range, text and default. changes: attributes that differ, as in `default=3`.
    """
    field = copy(section.model_fields[name])
    for attribute, value in changes.items():
        setattr(field, attribute, value)
    return field
