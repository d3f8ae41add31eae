"""The panels of losses that need no teacher: policy gradient and likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rosd_fast.report.colours import BLUE, ORANGE, PURPLE
from rosd_fast.report.series import series
from rosd_fast.report.style import Rows, finish, near_one, percent, trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def policy_loss(ax: Axes, rows: Rows) -> None:
    """Draw the weighted sum of the losses."""
    trend(ax, series(rows, "policy/loss"), PURPLE)
    finish(ax, rows, "Policy loss", "loss", note="weighted advantages, or -log p of the likelihood")


def logprob(ax: Axes, rows: Rows) -> None:
    """Draw the log-probability that the student gives to the trained tokens."""
    trend(ax, series(rows, "policy/logprob_mean"), BLUE)
    finish(ax, rows, "Log-probability of trained tokens", "nats / token", note="mean over them")


def ratio(ax: Axes, rows: Rows) -> None:
    """Draw how far the trained weights have moved from those that sampled."""
    near_one(ax, rows, "policy/ratio_mean", "Probability ratio", "mean ratio")


def clipping(ax: Axes, rows: Rows) -> None:
    """Draw the share of tokens whose gradient is cut off, as their ratio left the bounds."""
    clipped = series(rows, "policy/clipped_frac")
    trend(ax, clipped, ORANGE)
    finish(ax, rows, "Clipped tokens", "share of tokens", note="beyond policy.clip_low, clip_high")
    percent(ax, [0.0, *clipped.values], least_range=0.1)
