"""How often the 95% intervals of an evaluation hold the truth, by simulation.

    python bench/coverage.py          # prints the tables of docs/evaluation.md; half a minute

A draw is an evaluation: n problems of a population with a known mean, k completions of each. The
coverage is the share of 10,000 draws whose interval holds the population's mean. A population of
problems is a Beta distribution of the probability that a completion is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rosd_fast.stats import difference_interval, mean_interval, pass_at

DRAWS = 10_000
PROBLEMS = (10, 20, 50, 200)
SAMPLES = (1, 4, 16)
BETAS: Mapping[str, tuple[float, float]] = {
    "all near 0.5": (500, 500),
    "all near 0.1": (100, 900),
    "bell around 0.5": (2, 2),
    "bell around 0.8": (8, 2),
    "U around 0.5": (0.5, 0.5),
    "U around 0.3": (0.3, 0.7),
    "U around 0.9": (0.9, 0.1),
    "most near 0, mean 0.1": (0.5, 4.5),
    "near 0, mean 0.05": (1, 19),
    "near 1, mean 0.95": (19, 1),
}
PAIRS: Mapping[str, tuple[str, float]] = {
    "unrelated models, equally good": ("unrelated", 0.0),
    "U around 0.5, a tenth of the failures mended": ("mended", 0.1),
    "U around 0.5, three tenths mended": ("mended", 0.3),
    "bell around 0.5, a tenth mended": ("bell", 0.1),
    "U around 0.5, a tenth of the problems redrawn": ("redrawn", 0.1),
    "U around 0.5, a tenth of the problems solved": ("solved", 0.1),
}
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The share of draws whose interval holds the truth, and the intervals' mean width."""

    population: str
    figure: str  # "mean", "pass@4" or "difference"
    truth: float
    samples: int
    problems: int
    share: float
    width: float


def measure_means(draws: int = DRAWS) -> Iterator[Coverage]:
    """The coverage of mean@k in every population."""
    for population, (a, b) in BETAS.items():
        rng = generator(population)
        chance = rng.beta(a, b, (draws, max(PROBLEMS)))
        for samples in SAMPLES:
            values = rng.binomial(samples, chance) / samples
            for problems in PROBLEMS:
                yield coverage(
                    mean_interval(values[:, :problems], samples=samples),
                    population=population,
                    figure="mean",
                    truth=a / (a + b),
                    samples=samples,
                    problems=problems,
                )


def measure_pass_at(draws: int = DRAWS, *, samples: int = 16) -> Iterator[Coverage]:
    """The coverage of pass@2, pass@4 and pass@8 from 16 samples."""
    for population, (a, b) in BETAS.items():
        rng = generator(population)
        right = rng.binomial(samples, rng.beta(a, b, (draws, max(PROBLEMS))))
        for j in (2, 4, 8):
            steps = np.arange(j)
            truth = 1 - float(np.prod((b + steps) / (a + b + steps)))  # 1 - E (1 - p)^j of a Beta
            table = pass_at(np.arange(samples + 1), samples, j)
            for problems in PROBLEMS:
                yield coverage(
                    mean_interval(table[right[:, :problems]], samples=samples),
                    population=population,
                    figure=f"pass@{j}",
                    truth=truth,
                    samples=samples,
                    problems=problems,
                )


def measure_differences(draws: int = DRAWS) -> Iterator[Coverage]:
    """The coverage of the paired difference of two models."""
    for population, (kind, size) in PAIRS.items():
        rng = generator(population)
        first, second, truth = draw_pair(rng, kind, size, (draws, max(PROBLEMS)))
        for samples in SAMPLES:
            right = rng.binomial(samples, second) - rng.binomial(samples, first)
            values = right / samples
            for problems in PROBLEMS:
                yield coverage(
                    difference_interval(values[:, :problems]),
                    population=population,
                    figure="difference",
                    truth=truth,
                    samples=samples,
                    problems=problems,
                )


def draw_pair(
    rng: np.random.Generator, kind: str, size: float, shape: tuple[int, int]
) -> tuple[Floats, Floats, float]:
    """(a model's probabilities, those of another on the same problems, the mean difference)."""
    a = 2.0 if kind == "bell" else 0.5
    first, fresh = rng.beta(a, a, shape), rng.beta(a, a, shape)
    chosen = rng.random(shape) < size
    if kind == "unrelated":
        return first, fresh, 0.0
    if kind == "redrawn":
        return first, np.where(chosen, fresh, first), 0.0
    if kind == "solved":
        return first, np.where(chosen, 1, first), size / 2
    return first, first + (1 - first) * size, size / 2


def generator(population: str) -> np.random.Generator:
    """A generator of its own for each population, the same in every process."""
    return np.random.default_rng(zlib.crc32(population.encode()))


def coverage(
    interval: tuple[Floats, Floats],
    *,
    population: str,
    figure: str,
    truth: float,
    samples: int,
    problems: int,
) -> Coverage:
    """Count the intervals that hold the truth."""
    low, high = interval
    return Coverage(
        population=population,
        figure=figure,
        truth=truth,
        samples=samples,
        problems=problems,
        share=float(((low <= truth) & (truth <= high)).mean()),
        width=float((high - low).mean()),
    )


def table(rows: list[Coverage], columns: str) -> str:
    """A Markdown table: a line per population and k (or j), a column per number of problems."""
    lines = [
        f"| population | {columns} | {' | '.join(f'n = {n}' for n in PROBLEMS)} |",
        f"|---|--:|{'--:|' * len(PROBLEMS)}",
    ]
    keys = dict.fromkeys((row.population, row.samples, row.figure) for row in rows)
    for population, samples, figure in keys:
        own = [
            row
            for row in rows
            if (row.population, row.samples, row.figure) == (population, samples, figure)
        ]
        cells = [
            f"{row.share:.1%}" if 0.93 <= row.share <= 0.97 else f"**{row.share:.1%}**"
            for row in own
        ]
        label = figure.removeprefix("pass@") if figure.startswith("pass") else samples
        lines.append(f"| {population} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    for title, rows, columns in (
        ("mean@k", measure_means(), "k"),
        ("pass@j of 16 samples", measure_pass_at(), "j"),
        ("paired difference of mean@k", measure_differences(), "k"),
    ):
        print(f"### {title}\n\n{table(list(rows), columns)}\n")


if __name__ == "__main__":
    main()
