"""The evaluation of a run: the metrics of its development splits.

The seed stays the same during a run, so the evaluations before and after training are paired: only
the weights differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.evaluation.records import Completion, Sampling
from rosd_fast.evaluation.result import figures, group_by_domain
from rosd_fast.evaluation.sample import sample_completions
from rosd_fast.report.metrics import EVAL_TOTALS
from rosd_fast.report.stages import Stage

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.inputs import Inputs
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Problem


async def evaluate_splits(
    inputs: Inputs, engines: Engines, progress: Progress | Hidden
) -> dict[str, float]:
    """Return the metrics of the development splits, always with the same draws.

    progress: `Hidden` where the next step runs at the same time.

    Raises UserError when a split has no problem, when a domain has the name of another metric, and
    when a prompt does not fit the model's context.
    """
    metrics: dict[str, float] = {}
    version = engines.student.policy_version
    with progress.stage(Stage.EVALUATE):
        for split, problems in inputs.dev_splits.items():
            check_split(split, problems)
            completions = await sample_completions(
                engines.student,
                engines.verifiers,
                problems,
                split=split,
                sampling=run_sampling(inputs.config),
                chat=inputs.chats.eval,
                stop_token_ids=inputs.model.stop_token_ids,
                background=inputs.config.eval.overlap,
                on_tokens=progress.tokens,
            )
            metrics |= split_metrics(split, completions)
    if engines.student.policy_version != version:
        raise ValueError(f"an evaluation of version {version} got other weights on the way")
    return metrics


def run_sampling(config: Config) -> Sampling:
    """How a run's evaluation samples."""
    return Sampling(
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=config.sample.max_new_tokens,
        threshold=config.select.threshold,
        seed=config.seed,
    )


def check_split(split: str, problems: Sequence[Problem]) -> None:
    """Raise UserError for a split whose metrics would be missing or ambiguous."""
    if not problems:
        raise UserError("has no problems to evaluate on", where=f"the {split} split")
    for problem in problems:
        if problem.domain in EVAL_TOTALS:
            raise UserError(
                f"the domain {problem.domain!r} has the name of a metric of eval/{split}",
                where=f"problem {problem.id}",
                fix="Give the domain another name.",
            )


def split_metrics(split: str, completions: Sequence[Completion]) -> dict[str, float]:
    """Return the metrics of one split.

    eval/{split}/accuracy        share of completions that succeed, in [0, 1]: mean@k
    eval/{split}/accuracy_low    lower limit of its 95% interval over problems
    eval/{split}/accuracy_high   upper limit
    eval/{split}/{domain}        the accuracy within a domain
    eval/{split}/truncated_frac  share of completions cut at the maximum number of tokens
    eval/{split}/tokens_mean     mean number of tokens per completion
    """
    total = figures(completions)
    metrics = {
        "accuracy": total.accuracy.value,
        "accuracy_low": total.accuracy.low,
        "accuracy_high": total.accuracy.high,
        "truncated_frac": total.truncated_frac.value,
        "tokens_mean": total.tokens_mean.value,
    }
    for domain, own in group_by_domain(completions).items():
        metrics[domain] = sum(c.success for c in own) / len(own)
    return {f"eval/{split}/{name}": value for name, value in metrics.items()}
