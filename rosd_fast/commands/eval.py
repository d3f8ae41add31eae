"""`rosd-fast eval`: a model's accuracy on a data set, by domain."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rosd_fast.config import (
    EvalConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Section,
)
from rosd_fast.config.load import apply_args

if TYPE_CHECKING:
    from rosd_fast.types import Problem

POSITIONAL: tuple[str, ...] = ()
SPLIT = "data"


class Options(Section):
    """Sample answers to the problems of a data set, and print how many are right, by domain."""

    model: str = "quickstart"
    """quickstart, smollm2, a model folder such as a run's checkpoint, or a Hugging Face hub id."""
    data: str = "quickstart:dev"
    """Problems: a .jsonl file, or quickstart:SPLIT."""
    verifier: str | None = None
    """Verifier for problems that name none (number, choice, exact, contains)."""
    problems: NonNegativeInt = 0
    """Only the first this many problems; 0: all."""
    samples: PositiveInt = 4
    """Answers sampled for each problem; the figure is their mean accuracy."""
    max_new_tokens: PositiveInt = 2048
    """Tokens an answer may have; it also ends where the model's context does."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0: greedy."""
    top_p: Probability = 1.0
    """Nucleus sampling."""
    threshold: Probability = 1.0
    """An answer is right when its score is at least this."""
    seed: NonNegativeInt = 0
    """Fixes the draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where present."""
    trust_remote_code: bool = False
    """Allow a model folder to run Python code of its own."""
    max_rows: PositiveInt = 256
    """Answers decoded side by side; more wait their turn."""


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Evaluate and print the table."""
    options = apply_args(Options(), given)

    from rosd_fast.data.problems import load_problems

    problems = load_problems(options.data, verifier=options.verifier)
    problems = problems[: options.problems or None]
    metrics = asyncio.run(measure(options, problems))
    print_table(options, problems, metrics)
    return 0


async def measure(options: Options, problems: Sequence[Problem]) -> dict[str, float]:
    """The metrics of `evaluate`, with a counter of tokens on a terminal."""
    from rich.console import Console

    from rosd_fast.engines.local.engine import LocalEngine
    from rosd_fast.evaluate import evaluate
    from rosd_fast.model.load import load_model
    from rosd_fast.utils.distributed import pick_device

    loaded = load_model(
        options.model,
        dtype=options.dtype,
        device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    engine = LocalEngine(loaded.model, max_rows=options.max_rows)
    num_tokens = 0
    with Console(stderr=True).status(f"sampling {len(problems)} problems") as status:

        def count(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            status.update(f"sampling {len(problems)} problems: {num_tokens:,} tokens")

        return await evaluate(
            engine,
            problems,
            split=SPLIT,
            config=eval_config(options),
            max_new_tokens=options.max_new_tokens,
            model=loaded,
            threshold=options.threshold,
            seed=options.seed,
            on_tokens=count,
        )


def eval_config(options: Options) -> EvalConfig:
    """The options of a run's evaluation with the same meaning."""
    return EvalConfig(**options.model_dump(include={"samples", "temperature", "top_p"}))


def print_table(
    options: Options, problems: Sequence[Problem], metrics: Mapping[str, float]
) -> None:
    """Accuracy by domain and in all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    counts = Counter(problem.domain for problem in problems)
    samples = 1 if options.temperature == 0 else options.samples
    table = Table(title=Text(f"{options.model} on {options.data}, mean@{samples}"))
    table.add_column("domain")
    table.add_column("problems", justify="right")
    table.add_column("accuracy", justify="right")
    for domain, count in sorted(counts.items()):
        table.add_row(Text(domain), f"{count:,}", f"{metrics[f'eval/{SPLIT}/{domain}']:.1%}")
    table.add_section()
    table.add_row("all", f"{len(problems):,}", f"{metrics[f'eval/{SPLIT}/accuracy']:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"{metrics[f'eval/{SPLIT}/tokens_mean']:.1f} tokens an answer, "
        f"{metrics[f'eval/{SPLIT}/truncated_frac']:.1%} cut off",
        highlight=False,
    )
