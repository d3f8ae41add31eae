"""The stages of a step: their names in metrics, in pictures and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from itertools import cycle
from typing import Self

from rosd_fast.report.colours import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
)

STEP_TIME = "time/step_s"
"""The metric with the seconds of the whole step, time between stages included."""

SPARE_COLOURS = ("#882255", "#44AA99", "#999933", "#332288")
"""Colours of stages that only another version of rosd-fast has."""


class Stage(StrEnum):
    """A stage of a step, in the order in which the stages run.

    The value is the label in pictures and on the terminal, and the name in the metric.
    """

    SAMPLE = "sample", BLUE
    VERIFY = "verify", PURPLE
    REFLECT = "reflect", ORANGE
    LOCATE = "locate", YELLOW
    BUILD = "build", INK
    PROBE = "probe", GREY
    TEACHER = "teacher", BROWN
    LEARN = "learn", GREEN
    SYNC = "sync", MUTED
    EVALUATE = "evaluate", SKY
    CHECKPOINT = "checkpoint", VERMILLION

    colour: str

    def __new__(cls, name: str, colour: str) -> Self:
        stage = str.__new__(cls, name)
        stage._value_ = name
        stage.colour = colour
        return stage

    @property
    def metric(self) -> str:
        """The metric with the seconds of the stage."""
        return f"time/{self.value}_s"


def stage_name(metric: str) -> str | None:
    """Return the stage whose seconds `metric` has, and None for any other metric.

    A stage that this version does not know is returned by its name: metrics of another version must
    not lose time.
    """
    if metric == STEP_TIME or not (metric.startswith("time/") and metric.endswith("_s")):
        return None
    return metric.removeprefix("time/").removesuffix("_s")


def in_order(names: Iterable[str]) -> list[str]:
    """The names without duplicates: stages in the order in which they run, then unknown ones."""
    found = set(names)
    return [*(stage for stage in Stage if stage in found), *sorted(found.difference(Stage))]


def stage_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each name: that of its stage, or a spare one where no stage has the name."""
    known = {stage.value: stage.colour for stage in Stage}
    spare = cycle(SPARE_COLOURS)
    return {name: known[name] if name in known else next(spare) for name in names}
