"""`rosd-fast eval`: a model's accuracy on a data set, by domain."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.config import (
    ChatConfig,
    Config,
    DataConfig,
    Device,
    Dtype,
    EngineConfig,
    EvalConfig,
    SampleConfig,
    Section,
    SelectConfig,
    same_as,
)
from rosd_fast.config.load import apply_args

if TYPE_CHECKING:
    from rosd_fast.types import Problem

POSITIONAL: tuple[str, ...] = ()
SPLIT = "data"


class Options(Section):
    """Sample answers to the problems of a data set and print their accuracy, by domain."""

    model: str = same_as(Config, "model")
    data: str = "quickstart:dev"
    """Problems: a .jsonl file or quickstart:SPLIT."""
    verifier: str | None = same_as(DataConfig, "verifier")
    problems: int = same_as(
        EvalConfig, "problems", description="Number of problems, the first ones; 0: all."
    )
    samples: int = same_as(EvalConfig, "samples")
    max_new_tokens: int = same_as(
        SampleConfig,
        "max_new_tokens",
        default=2048,
        description="Maximum number of tokens in an answer; it also ends at the model's context "
        "length.",
    )
    temperature: float = same_as(EvalConfig, "temperature")
    top_p: float = same_as(EvalConfig, "top_p")
    threshold: float = same_as(SelectConfig, "threshold")
    seed: int = same_as(Config, "seed", description="Seed of the samples.")
    dtype: Dtype = same_as(Config, "dtype")
    device: Device = same_as(Config, "device")
    trust_remote_code: bool = same_as(Config, "trust_remote_code")
    max_rows: int = same_as(EngineConfig, "max_rows")
    chat: ChatConfig = ChatConfig()


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Evaluate the model and print the table."""
    options = apply_args(Options(), given)

    from rosd_fast.config.chat import read_templates
    from rosd_fast.data.problems import load_problems

    options = options.model_copy(update={"chat": read_templates(options.chat)})
    problems = load_problems(options.data, verifier=options.verifier)
    problems = problems[: options.problems or None]
    metrics = asyncio.run(measure(options, problems))
    print_table(options, problems, metrics)
    return 0


async def measure(options: Options, problems: Sequence[Problem]) -> dict[str, float]:
    """The metrics of the data set; a terminal shows the number of tokens meanwhile."""
    from rich.console import Console

    from rosd_fast.config.chat import make_chats
    from rosd_fast.engines.local.engine import LocalEngine
    from rosd_fast.evaluation.records import Sampling
    from rosd_fast.evaluation.sample import sample_completions
    from rosd_fast.evaluation.training import split_metrics
    from rosd_fast.model.load import load_model
    from rosd_fast.utils.distributed import pick_device
    from rosd_fast.verify import VerifierPool

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

        completions = await sample_completions(
            engine,
            VerifierPool(),
            problems,
            split=SPLIT,
            sampling=Sampling(
                samples=options.samples,
                temperature=options.temperature,
                top_p=options.top_p,
                max_new_tokens=options.max_new_tokens,
                threshold=options.threshold,
                seed=options.seed,
            ),
            chat=make_chats(options.chat, loaded.tokenizer).eval,
            stop_token_ids=loaded.stop_token_ids,
            on_tokens=count,
        )
    return split_metrics(SPLIT, completions)


def print_table(
    options: Options, problems: Sequence[Problem], metrics: Mapping[str, float]
) -> None:
    """Print the accuracy by domain and over all problems."""
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
        f"{metrics[f'eval/{SPLIT}/tokens_mean']:.1f} tokens per answer, "
        f"{metrics[f'eval/{SPLIT}/truncated_frac']:.1%} cut off",
        highlight=False,
    )
