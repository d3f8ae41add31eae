"""The stages of a step: their metrics, labels and colours."""

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
"""The metric of the whole step in seconds, including the time between stages."""

SPARE_COLOURS = ("#882255", "#44AA99", "#999933", "#332288")
"""Colours of stages that this version does not know."""


class Stage(StrEnum):
    """The stages of a step, in the order in which they run.

    The value is the label in plots and on the terminal.
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
        """The name of the metric that holds the seconds of the stage."""
        return f"time/{self.value}_s"


def stage_name(metric: str) -> str | None:
    """Return the name of the stage that `metric` times, or None if it times no stage.

    The name may be one that this version does not know, as a run of another version may have other
    stages.
    """
    if metric == STEP_TIME or not (metric.startswith("time/") and metric.endswith("_s")):
        return None
    return metric.removeprefix("time/").removesuffix("_s")


def in_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names: known stages in the order in which they run, then the others."""
    found = set(names)
    return [*(stage for stage in Stage if stage in found), *sorted(found.difference(Stage))]


def stage_colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each stage; an unknown stage gets a spare colour."""
    known = {stage.value: stage.colour for stage in Stage}
    spare = cycle(SPARE_COLOURS)
    return {name: known[name] if name in known else next(spare) for name in names}
