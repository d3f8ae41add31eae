"""The panels of the plots: each is a function (axes, rows) that draws one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rosd_fast.report.colours import (
    BLUE,
    CYCLE,
    FAINT,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILLION,
)
from rosd_fast.report.series import domains, series, stage_times
from rosd_fast.report.stages import stage_colours
from rosd_fast.report.style import (
    Rows,
    finish,
    line,
    name_ends,
    near_one,
    percent,
    plain,
    trend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy(ax: Axes, rows: Rows, *, samples: int | None = None) -> None:
    """Draw accuracy on the development sets, and behind it that of the training rollouts."""
    training = series(rows, "rollout/accuracy")
    dev = series(rows, "eval/dev/accuracy").finite()
    ood = series(rows, "eval/ood/accuracy").finite()
    line(ax, dev, BLUE, "in domain", width=2.4, marker="o", markers=True)
    name_ends(ax, dev, BLUE, beside=ood)
    line(ax, ood, VERMILLION, "out of domain", width=2.4, marker="s", markers=True)
    name_ends(ax, ood, VERMILLION, beside=dev)
    trend(ax, training, GREY, "training rollouts", width=1.2)
    limits = [*interval_band(ax, rows, "dev", BLUE), *interval_band(ax, rows, "ood", VERMILLION)]
    kind = "accuracy" if samples is None else f"accuracy (mean@{samples})"
    if limits:
        kind += ", bands: 95%"
    finish(ax, rows, "Accuracy on the development sets", kind)
    percent(ax, [*training.values, *dev.values, *ood.values, *limits], least_range=0.3)


def interval_band(ax: Axes, rows: Rows, split: str, colour: str) -> tuple[float, ...]:
    """Draw the 95% interval of a split's accuracy where the rows have it; return its limits."""
    low, high = (series(rows, f"eval/{split}/accuracy_{end}").finite() for end in ("low", "high"))
    if not low or low.steps != high.steps:
        return ()
    ax.fill_between(low.steps, low.values, high.values, color=colour, alpha=0.13, linewidth=0)
    return (*low.values, *high.values)


def domain_accuracy(ax: Axes, rows: Rows, *, split: str, title: str) -> None:
    """Draw the accuracy per domain of one split."""
    values: list[float] = []
    for i, domain in enumerate(domains(rows, split)):
        shown = series(rows, f"eval/{split}/{domain}").finite()
        line(
            ax, shown, CYCLE[i % len(CYCLE)], plain(domain), marker="osD^vPX*"[i % 8], markers=True
        )
        values += shown.values
    finish(ax, rows, title, "accuracy")
    percent(ax, values, least_range=0.3)


def divergence(ax: Axes, rows: Rows) -> None:
    """Draw the divergence from the teacher."""
    trend(ax, series(rows, "loss/divergence"), BLUE)
    finish(
        ax,
        rows,
        "Divergence from the teacher",
        "nats / token",
        log=True,
        note="mean over distilled tokens",
    )


def grad_norm(ax: Axes, rows: Rows) -> None:
    """Draw the global gradient norm before clipping."""
    trend(ax, series(rows, "loss/grad_norm"), VERMILLION)
    finish(
        ax, rows, "Gradient norm", "L2 norm", log=True, note="of all parameters, before clipping"
    )


def entropies(ax: Axes, rows: Rows) -> None:
    """Draw the entropy of student and teacher at trained tokens."""
    trend(ax, series(rows, "loss/student_entropy"), BLUE, "student")
    trend(ax, series(rows, "loss/teacher_entropy"), ORANGE, "teacher")
    trend(ax, series(rows, "policy/entropy_mean"), PURPLE, "student (policy loss)")
    finish(ax, rows, "Entropy at trained tokens", "nats / token")


def importance_weight(ax: Axes, rows: Rows) -> None:
    """Draw how far the trained weights have moved from those that sampled."""
    near_one(ax, rows, "loss/importance_weight_mean", "Importance weight", "mean weight")


def distilled(ax: Axes, rows: Rows) -> None:
    """Draw the share of rollouts that give a training signal."""
    has_policy = bool(series(rows, "policy/loss"))
    if series(rows, "loss/divergence") or not has_policy:
        trend(ax, series(rows, "rollout/distilled_frac"), BLUE, "rollouts distilled")
    if has_policy:
        trend(ax, series(rows, "rollout/trained_frac"), PURPLE, "rollouts trained")
    trend(ax, series(rows, "rollout/groups_kept_frac"), GREEN, "groups kept")
    trend(ax, series(rows, "rollout/accuracy"), ORANGE, "rollouts correct")
    finish(ax, rows, "Share of rollouts that train", "share")
    percent(ax)


def trained_tokens(ax: Axes, rows: Rows) -> None:
    """Draw the number of trained tokens per step."""
    policy = series(rows, "loss/num_policy_tokens")
    if series(rows, "loss/divergence") or not policy:
        label = "distilled" if policy else None
        trend(ax, series(rows, "loss/num_distilled_tokens"), BLUE, label)
    trend(ax, policy, PURPLE, "policy loss")
    finish(
        ax,
        rows,
        "Trained tokens per step",
        "tokens",
        from_zero=True,
        note="the loss is the mean over them",
    )


def span_start(ax: Axes, rows: Rows) -> None:
    """Draw where in the rollout the located error begins."""
    trend(ax, series(rows, "reflect/span_start_frac"), BLUE)
    finish(
        ax,
        rows,
        "Where the located error begins",
        "position in the rollout",
        note="mean over located quotes; 0%: first token, 100%: end",
    )
    percent(ax)


def span_length(ax: Axes, rows: Rows) -> None:
    """Draw the length of distilled spans."""
    trend(ax, series(rows, "reflect/span_tokens"), GREEN)
    finish(ax, rows, "Span length", "tokens", from_zero=True, note="mean over distilled rollouts")


def reflection_quality(ax: Axes, rows: Rows) -> None:
    """Draw the share of reflections that are well formed, and of quotes found in the rollout."""
    trend(ax, series(rows, "reflect/well_formed_frac"), BLUE, "well formed")
    trend(ax, series(rows, "reflect/found_frac"), GREEN, "quote found")
    trend(ax, series(rows, "reflect/ambiguous_frac"), ORANGE, "ambiguous")
    trend(ax, series(rows, "reflect/truncated_frac"), PURPLE, "cut")
    trend(ax, series(rows, "reflect/leak_frac"), VERMILLION, "leaked")
    finish(ax, rows, "Quality of reflections", "share")
    percent(ax)


def time_per_step(ax: Axes, rows: Rows) -> None:
    """Draw the seconds per step, stacked by stage."""
    times = stage_times(rows)
    per_bar = max(times.num_steps, default=1)
    large, small = _large_stages(times.totals)
    colours = stage_colours(times.totals)
    bottom, widths = [0.0] * len(times.steps), [0.86 * count for count in times.num_steps]
    layers = [*((stage, colours[stage], [stage]) for stage in large), ("other", FAINT, small)]
    for label, colour, stages in layers:
        heights = [sum(times.seconds[s][i] for s in stages) for i in range(len(bottom))]
        if not any(heights):
            continue
        ax.bar(times.steps, heights, widths, bottom=bottom, color=colour, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    title = f"Time per step, mean of {per_bar} steps" if per_bar > 1 else "Time per step"
    finish(ax, rows, title, "seconds", from_zero=True)


def time_shares(ax: Axes, rows: Rows) -> None:
    """Draw the time of the whole run by stage."""
    totals = stage_times(rows).totals
    whole = sum(totals.values())
    stages = list(totals)[::-1]  # the first stage at the top
    colours = stage_colours(totals)
    bars = ax.barh(stages, [totals[s] for s in stages], 0.7, color=[colours[s] for s in stages])
    labels = [f"{_duration(totals[s])} · {_share(totals[s] / whole)}" for s in stages]
    ax.bar_label(bars, labels, padding=4, color=INK, fontsize=8.5)
    if stages:
        ax.set_xlim(0, 1.3 * max(totals.values()))  # room for the labels
    finish(ax, rows, "Time of the whole run", "", steps=False, note=f"{_duration(whole)} in total")
    ax.set_xlabel("seconds", color=MUTED, fontsize=9)
    ax.grid(visible=False, axis="y")


def throughput(ax: Axes, rows: Rows) -> None:
    """Draw the tokens per second of sampling and of learning."""
    trend(ax, series(rows, "perf/rollout_tokens_per_s"), BLUE, "sampled")
    trend(ax, series(rows, "perf/learn_tokens_per_s"), GREEN, "learned from")
    finish(ax, rows, "Throughput", "tokens / s", from_zero=True)


def cache(ax: Axes, rows: Rows) -> None:
    """Draw the share of prompt tokens served from the KV cache, and the share that could be."""
    shareable = series(rows, "rollout/shareable_frac")
    trend(ax, shareable, GREY, "could be cached", width=1.2)
    trend(ax, series(rows, "rollout/cached_frac"), BLUE, "was cached")
    finish(ax, rows, "Prompt tokens served from the KV cache", "share of prompt tokens")
    percent(ax)


def logprob_gap(ax: Axes, rows: Rows) -> None:
    """Draw the gap between the log-probabilities of the engine and of the trainer."""
    trend(ax, series(rows, "loss/logprob_gap_max"), ORANGE, "largest")
    trend(ax, series(rows, "loss/logprob_gap_mean"), BLUE, "mean")
    trend(ax, series(rows, "policy/logprob_gap_mean"), PURPLE, "mean (policy loss)")
    finish(ax, rows, "Log-probability gap, engine to trainer", "nats", log=True)


def _large_stages(totals: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Return the stages with at least 2% of the time, and the others, too small to see."""
    whole = sum(totals.values())
    large = [stage for stage, total in totals.items() if total >= 0.02 * whole]
    return large, [stage for stage in totals if stage not in large]


def _duration(seconds: float) -> str:
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else "<1%"
