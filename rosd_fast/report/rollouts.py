"""`rollouts/step_*.jsonl`: the rollouts of a step with all results, one JSON object per line."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.files import write_atomic

if TYPE_CHECKING:
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import (
        ErrorSpan,
        Group,
        Problem,
        Reflection,
        Rollout,
        TrainSample,
        Verdict,
    )

FIELDS = (
    "step",
    "problem",
    "rollout_id",
    "completion",
    "completion_ids",
    "score",
    "success",
    "extracted_answer",
    "finish_reason",
    "policy_version",
    "group_dropped",
    "reflection",
    "span",
    "divergence",
)
"""The fields of each row. A row written with `token_bytes` also has "tokens"; that of a rollout
whose tokens have a loss without a teacher has "policy": its range of tokens, advantage (null:
likelihood) and log-probabilities."""


def rollouts_path(run: str | Path, step: int) -> Path:
    """Return the path of the rollouts of a step: `RUN/rollouts/step_000010.jsonl`."""
    return Path(run) / "rollouts" / f"step_{step:06d}.jsonl"


def write_rollouts(
    path: str | Path,
    *,
    step: int,
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    reflections: Mapping[str, Reflection],
    spans: Mapping[str, ErrorSpan],
    per_token: Mapping[str, Sequence[float]],
    token_bytes: TokenBytes | None = None,
    kept: Iterable[Group] | None = None,
    samples: Sequence[TrainSample] = (),
    logprobs: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write one line per rollout, atomically, and return the path.

    The mappings are by rollout id; all but `verdicts` may lack a rollout.

    groups: all groups of the step, including dropped ones.
    per_token: the divergence of each distilled token in nats.
    token_bytes: adds the text of each token ("tokens"), which the token page needs.
    kept: the groups that were selected; None: those with a reflection.
    samples: what was trained; only those that are not distilled are read.
    logprobs: the student's log-probability of each token of these; a rollout that has none was left
        out of the update, as its advantage is 0.
    """
    policy = {sample.rollout_id: sample for sample in samples if not sample.is_distilled}
    kept_ids = None if kept is None else {group.problem.id for group in kept}
    lines = []
    for group in groups:
        if kept_ids is None:
            dropped = not any(rollout.id in reflections for rollout in group.rollouts)
        else:
            dropped = group.problem.id not in kept_ids
        for rollout in group.rollouts:
            texts = (
                None if token_bytes is None else token_texts(token_bytes.of(rollout.completion_ids))
            )
            row = {
                "step": step,
                "problem": _problem_row(group.problem),
                **_rollout_row(rollout, verdicts[rollout.id], texts),
                "group_dropped": dropped,
                "reflection": _reflection_row(reflections.get(rollout.id)),
                "span": _span_row(spans.get(rollout.id), texts),
                "divergence": _divergence(per_token.get(rollout.id), spans.get(rollout.id)),
            }
            if rollout.id in policy:
                row["policy"] = _policy_row(policy[rollout.id], (logprobs or {}).get(rollout.id))
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
    # A lone surrogate in a prompt of the user becomes \ud800, as JSON writes it.
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return write_atomic(Path(path), data)


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a rollout file. Raises UserError if the file is missing or damaged."""
    path = Path(path)
    rows = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"is not JSON ({error})", where=f"{path}:{number}") from None
                missing = [name for name in FIELDS if not isinstance(row, dict) or name not in row]
                if missing:
                    raise UserError(f"has no {missing[0]}", where=f"{path}:{number}")
                rows.append(row)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return rows


def write_skipped(run: Path, step: int, samples: Sequence[TrainSample]) -> Path:
    """Write the samples of a skipped step to `RUN/skipped/step_*.jsonl`, one JSON object per line.

    Returns the path. These are the samples whose loss or gradient was not finite.
    """
    path = run / "skipped" / f"step_{step:06d}.jsonl"
    data = "".join(f"{json.dumps(asdict(sample))}\n" for sample in samples)
    return write_atomic(path, data.encode())


def token_texts(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each token; joined, the texts decode all bytes.

    A character that spans several tokens belongs to the token with its last byte. Bytes that are
    not UTF-8 become U+FFFD.
    """
    try:  # nearly always each token is text by itself
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [decoder.decode(piece) for piece in pieces]
        texts[-1] += decoder.decode(b"", final=True)
        return texts


def _problem_row(problem: Problem) -> dict[str, Any]:
    return {
        "id": problem.id,
        "domain": problem.domain,
        "system": problem.system,
        "prompt": problem.prompt,
        "answer": problem.answer,
    }


def _rollout_row(rollout: Rollout, verdict: Verdict, texts: list[str] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rollout_id": rollout.id,
        "completion": rollout.text,
        "completion_ids": list(rollout.completion_ids),
        "score": verdict.score,
        "success": verdict.success,
        "extracted_answer": verdict.answer,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
    }
    if texts is not None:
        row["tokens"] = texts
    return row


def _reflection_row(reflection: Reflection | None) -> dict[str, Any] | None:
    if reflection is None:
        return None
    return {
        "mode": reflection.mode,
        "demonstration_id": reflection.demonstration_id,
        "text": reflection.text,
        "quote": reflection.quote,
        "sentence": reflection.sentence,
        "explanation": reflection.explanation,
        "refused": reflection.refused,
        "well_formed": reflection.well_formed,
        "num_tokens": reflection.num_tokens,
    }


def _span_row(span: ErrorSpan | None, texts: list[str] | None) -> dict[str, Any] | None:
    if span is None:
        return None
    text = None if texts is None else "".join(texts[span.start : span.end])
    return {"start": span.start, "end": span.end, "source": span.source, "text": text}


def _divergence(
    values: Sequence[float] | None, span: ErrorSpan | None
) -> list[float | None] | None:
    """Return the divergence of each distilled token to six digits, None where it is not finite."""
    if values is None:
        return None
    assert span is not None and len(values) == span.end - span.start, (
        f"{len(values)} divergences for the span {span}"
    )
    return _six_digits(values)


def _policy_row(sample: TrainSample, logprobs: Sequence[float] | None) -> dict[str, Any]:
    return {
        "start": sample.start,
        "end": sample.end,
        "advantage": None if sample.advantage is None else float(f"{sample.advantage:.6g}"),
        "logprob": None if logprobs is None else _six_digits(logprobs),
    }


def _six_digits(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
