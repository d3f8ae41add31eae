"""The learning rate of each update: a warm-up, then constant or falling.

It depends only on the number of updates so far, on the horizon (the number of updates of the run)
and on the options. So a resumed run keeps its curve, and one that is resumed with more steps
follows the curve of the longer run from there on.
"""

from __future__ import annotations

import math

from rosd_fast.config import Config, OptimConfig


def num_updates(config: Config) -> int:
    """The number of optimizer updates of the run, the horizon of its schedule."""
    return config.steps * config.optim.updates_per_step


def learning_rate(update: int, horizon: int, options: OptimConfig) -> float:
    """The learning rate of an update.

    update: number of updates before it. horizon: number of updates of the run; after it the rate
    stays where the schedule ends.
    """
    warmup = warmup_updates(horizon, options)
    if update < warmup:
        return options.lr * ((update + 1) / warmup)
    falling = max(0, horizon - warmup)
    if options.schedule == "wsd":
        falling = min(falling, round(options.decay_frac * horizon))
    start = horizon - falling
    # The share of the fall that is done: 0 for the first update of it, 1 after the last one.
    done = 1.0 if update >= horizon else max(0.0, (update - start) / max(1, falling))
    return options.lr * factor(done, options)


def factor(done: float, options: OptimConfig) -> float:
    """The share of `optim.lr` after the share `done` of the fall."""
    if options.schedule == "constant":
        return 1.0
    left = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
    return options.min_lr_frac + (1 - options.min_lr_frac) * left


def warmup_updates(horizon: int, options: OptimConfig) -> int:
    """The number of updates of the warm-up."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return round((options.warmup_frac or 0.0) * horizon)


def describe_change(
    update: int, old_horizon: int, horizon: int, options: OptimConfig
) -> str | None:
    """One line on what a new horizon does to the rates from `update` on; None: nothing.

    old_horizon: number of updates that the run had before.
    """
    ahead = range(update, max(old_horizon, horizon))
    if all(
        learning_rate(k, horizon, options) == learning_rate(k, old_horizon, options) for k in ahead
    ):
        return None
    was, now = (learning_rate(update, length, options) for length in (old_horizon, horizon))
    return (
        f"the learning rate follows the new length of {horizon} updates, not {old_horizon}: "
        f"it is {now:.3g} now and would have been {was:.3g}"
    )
