"""Whether a run has seen the problems that its model is evaluated on."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.data.sources import absolute_sources, is_share, split_settings, split_sources

if TYPE_CHECKING:
    from rosd_fast.evaluation.model import EvaluatedModel


def seen_by_run(model: EvaluatedModel, data: str) -> list[str]:
    """A line for each source of `data` that the model's run trained on, or chose checkpoints by.

    Sources are compared by path, and files also by content.
    """
    config = model.run_config
    if config is None or model.run is None:
        return []
    lines = []
    dev = config.data.dev
    for source in _places(data):
        if dev is not None and not is_share(dev) and _contains(dev, source):
            lines.append(
                f"{source} is the development set by which {model.run.name} chooses its best "
                "checkpoint: the accuracy on it is too high; report one on a test set"
            )
        elif _contains(config.data.train, source):
            held = f", but for the {dev} that it held out" if dev and is_share(dev) else ""
            lines.append(f"{model.run.name} was trained on {source}{held}")
    return lines


def _places(text: str) -> list[str]:
    """The places of sources, with absolute paths and without settings."""
    return [split_settings(part)[0] for part in split_sources(absolute_sources(text))]


def _contains(text: str, place: str) -> bool:
    return any(_same(place, other) for other in _places(text))


def _same(place: str, other: str) -> bool:
    if place == other:
        return True
    first, second = Path(place), Path(other)
    try:
        return (
            first.is_file()
            and second.is_file()
            and first.stat().st_size == second.stat().st_size
            and filecmp.cmp(first, second, shallow=False)
        )
    except OSError:
        return False
