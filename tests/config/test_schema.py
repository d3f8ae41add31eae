"""What the option definitions promise: a text for each, and checks that name an option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rosd_fast.config import Config, LossConfig, Section, same_as
from rosd_fast.config.checks import conflict


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


FIELDS = dict(fields_of(Config))


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_a_text_whose_further_lines_are_its_values(name: str) -> None:
    field = FIELDS[name]
    assert field.description and field.description.rstrip().endswith(".")
    values = [line.partition(":")[0] for line in field.description.split("\n")[1:]]
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        assert set(values) <= set(get_args(kind))
    else:
        assert all(re.fullmatch(r"None|\d+", value) for value in values)


def test_lines_of_a_text_are_joined_unless_they_begin_with_a_value() -> None:
    class Options(Section):
        level: int = 0
        """A text over
        two lines.
        none: nothing, which
        is explained: here."""

    text = Options.model_fields["level"].description
    assert text == "A text over two lines.\nnone: nothing, which is explained: here."


def test_same_as_changes_nothing_in_the_section() -> None:
    before = LossConfig().temperature
    field = same_as(LossConfig, "temperature", default=3.0)
    assert field.default == 3.0 and LossConfig().temperature == before
    assert LossConfig.model_fields["temperature"].default == before


def test_a_conflict_begins_with_an_option_that_exists() -> None:
    config = Config().model_copy(
        update={
            "loss": LossConfig().model_copy(update={"sparsity": "mass", "strategy": "reference"})
        }
    )
    message = conflict(config)
    assert message is not None and message.split()[0] in FIELDS
    assert conflict(Config()) is None
