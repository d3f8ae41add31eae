"""Options of data sets, verifiers and evaluation, which several commands share."""

from __future__ import annotations

from typing import Literal

from rosd_fast.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    same_as,
)


class ColumnsConfig(Section):
    """The column of the data set that each field of a problem is read from; None: recognized."""

    prompt: str | None = None
    """Problem: text, or the turns of a conversation."""
    answer: str | None = None
    """Right answer."""
    system: str | None = None
    """System turn."""
    reference: str | None = None
    """Worked solution."""
    verifier: str | None = None
    """Name of the verifier."""
    domain: str | None = None
    """Name under which metrics are grouped."""
    id: str | None = None
    """Name of the problem, unique in the data set."""
    weight: str | None = None
    """Factor of the problem's loss."""
    teacher_prompt: str | None = None
    """User turn of the teacher, in place of its template's."""
    feedback: str | None = None
    """What a solver of a wrong rollout is told, in place of what the verifier says."""


class DataConfig(Section):
    """Where problems come from (see docs/data.md)."""

    train: str = "quickstart:train"
    """Training problems: files, folders, hub ids, quickstart:train or reasoning_gym:TASK,
    comma-separated, each with settings of its own after @, as in
    a.jsonl,b.parquet@weight=0.5@verifier=math."""
    dev: str | None = "quickstart:dev"
    """In-domain development problems to evaluate on: a source like data.train, or a share of the
    training problems to hold out, as in 10%; None: no in-domain evaluation."""
    dev_ood: str | None = None
    """Out-of-domain development problems to evaluate on; None: no out-of-domain evaluation."""
    verifier: str | None = None
    """Verifier for problems that name none (see docs/verifiers.md), or FILE.py:FUNCTION."""
    answer_instruction: str = "auto"
    """How the model is told to answer, at the end of each prompt: auto, by the verifier's sentence
    unless the prompt says it already; off, not at all; any other text, as it is."""
    overlap: Literal["drop", "keep"] = "drop"
    """What happens to problems that are in two splits.
    drop: training leaves out what is in a development split too, and data.dev_ood what is in
    data.dev.
    keep: they stay."""
    split_seed: NonNegativeInt = 0
    """Seed of the share that is held out (data.dev 10%)."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row that is not a problem.
    error: the run ends before it starts, and names the row.
    skip: it is left out, and counted; so is a problem whose prompt is too long."""
    check_rows: NonNegativeInt = 20_000
    """Number of rows of a data set that are checked before the run starts, spread evenly. The
    others are checked when their step comes, and left out if they are bad. 0: all."""
    columns: ColumnsConfig = ColumnsConfig()
    shuffle: bool = True
    """Shuffle the problems in every epoch, by the seed."""

    @property
    def holds_out(self) -> bool:
        """Whether data.dev is a share of the training problems, so that it decides on these."""
        return self.dev is not None and self.dev.rstrip().endswith("%")


class SourceConfig(Section):
    """The problems of a command that reads one data set; the options mean what a run's mean."""

    source: str | None = None
    """Problems: files, folders, hub ids, quickstart:SPLIT or reasoning_gym:TASK, comma-separated,
    each with settings of its own after @, as in a.jsonl,b.parquet@verifier=math."""
    verifier: str | None = same_as(DataConfig, "verifier")
    answer_instruction: str = same_as(DataConfig, "answer_instruction")
    bad_rows: Literal["error", "skip"] = same_as(DataConfig, "bad_rows")
    columns: ColumnsConfig = same_as(DataConfig, "columns")

    def as_training(self) -> DataConfig:
        """The options of a run that trains on these problems and has no development splits.

        Raises ValueError when `source` is None.
        """
        if self.source is None:
            raise ValueError("there is no source to train on")
        same = {name: getattr(self, name) for name in SourceConfig.model_fields if name != "source"}
        return DataConfig(train=self.source, dev=None, dev_ood=None, **same)


class VerifyConfig(Section):
    """The processes in which verifiers run."""

    workers: NonNegativeInt = 0
    """Number of worker processes; 0: one per core, at most 8."""
    timeout_s: PositiveFloat = 10.0
    """Seconds that a verifier may take for a completion; then the score is 0."""
    memory_mib: PositiveInt = 2048
    """Memory of a worker process in MiB."""
    run_code: bool = False
    """Run code that the model writes (verifier code), under bubblewrap without network."""


class EvalConfig(Section):
    """Evaluation on the development splits: before training, every few steps, and at the end."""

    every: NonNegativeInt = 10
    """Steps between evaluations; 0: only before training and at the end."""
    problems: NonNegativeInt = 0
    """Number of problems per split to evaluate on, the first ones; 0: all."""
    samples: PositiveInt = 4
    """Rollouts per problem; the accuracy is their mean (mean@k)."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature in evaluation; 0: greedy, with one rollout per problem."""
    top_p: Probability = 1.0
    """Nucleus sampling in evaluation."""
    overlap: bool = False
    """Evaluate a step on the servers while the next one samples and learns (engine.kind sglang)."""
