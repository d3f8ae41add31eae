"""The stages in the order in which they run; nothing of torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stage as the command sees it.

    name: of its module in `day_one.stages`, and of its file of results.
    weight: its share of the time that is left, among the stages from it on.
    interpreted: whether, on a CPU, its kernels run in Triton's interpreter.
    """

    name: str
    title: str
    weight: float
    interpreted: bool = False


STAGES = (
    Entry(name="machine", title="Machine, versions and ceilings", weight=6),
    Entry(name="numerics", title="Numerics against float64", weight=20, interpreted=True),
    Entry(name="loss", title="The loss against its peers", weight=18),
    Entry(name="tune", title="Block sizes", weight=18, interpreted=True),
    Entry(name="learner", title="The learner", weight=14),
    Entry(name="quickstart", title="The quickstart", weight=16),
    Entry(name="tools", title="compute-sanitizer and ncu", weight=8),
)
BY_NAME = {entry.name: entry for entry in STAGES}
