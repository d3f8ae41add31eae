"""`rosd-fast data`: check a data set, show what is in it and the prompts that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from rosd_fast.config import (
    ChatConfig,
    Config,
    DataConfig,
    NonNegativeInt,
    Section,
    SourceConfig,
    VerifyConfig,
    same_as,
)

if TYPE_CHECKING:
    pass

POSITIONAL = ("data.source",)
ALIASES = {"source": "data.source", "data": "data.source", "verifier": "data.verifier"}
RUN_OPTIONS = ("method", "model", "trust_remote_code")  # that a run has under the same name
BAD_ROWS = 1  # exit code of a data set that has some


class DataSection(SourceConfig):
    """The problems to check, and the splits that a run would make of them."""

    dev: str | None = same_as(DataConfig, "dev", default=None)
    dev_ood: str | None = same_as(DataConfig, "dev_ood")
    overlap: Literal["drop", "keep"] = same_as(DataConfig, "overlap")
    split_seed: NonNegativeInt = same_as(DataConfig, "split_seed")


class Options(Section):
    """Check every row of a data set; print what it was recognized as, counts, lengths, repeated
    problems, bad rows, examples and how the verifier scores. The exit code is 1 with bad rows."""

    data: DataSection = DataSection()
    verify: VerifyConfig = VerifyConfig()
    model: str | None = None
    """Also print the lengths of the prompts in tokens of this model, and its prompts."""
    trust_remote_code: bool = same_as(Config, "trust_remote_code")
    show: NonNegativeInt = 3
    """Number of examples, the first problems. With a model, a preset or a file: the prompts of
    every role for each of them, and the known traps of the chat template; no weights are needed.
    When the number is given: with token ids."""
    method: str | None = None
    """Method whose prompts are shown; None: that of the presets or the file, else rosd."""
    preset: tuple[str, ...] = ()
    """Presets of the run whose prompts are shown."""
    config: str | None = None
    """A TOML file with the options of that run."""
    chat: ChatConfig = ChatConfig()


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Check the data set and print what is in it."""
    options = apply_args(Options(), given)
    if options.data.source is None:
        raise UserError("no data set is named", fix="Name one: rosd-fast data FILE.jsonl")

    from rich.console import Console

    from rosd_fast.commands import data_view as view
    from rosd_fast.data.instruct import describe_instructions
    from rosd_fast.data.problems import open_problems
    from rosd_fast.data.report import histogram
    from rosd_fast.verify import Limits, VerifierPool

    console = Console(highlight=False)
    problems = open_problems(options.data.source, data=options.data.as_training())
    limits = Limits(**options.verify.model_dump())
    with VerifierPool(limits) as pool:
        summary = read_all(problems, pool)
        view.print_sources(console, problems, faults=len(summary.faults))
        view.print_faults(console, summary.faults)
        if not len(summary.indices):
            return BAD_ROWS
        view.print_groups(console, summary)
        view.print_instructions(console, summary, describe_instructions(summary.instructions))
        longest = problems.where(int(summary.indices[summary.lengths.argmax()]))
        view.print_lengths(
            console, summary.lengths, histogram(summary.lengths), unit="characters", longest=longest
        )
        print_repetitions(console, problems, summary)
    return BAD_ROWS if summary.faults else 0
