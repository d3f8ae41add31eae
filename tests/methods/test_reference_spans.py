"""The preset reference on recorded text: spans, masks and weights, each worked out by hand.

A case lists the sampled tokens. The public code decodes them, finds the quote, tokenizes the text
before it once more and trains from that number of tokens on. In the quickstart's vocabulary a space
before a word is part of the word's token, and a token of its own at the end of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from transformers import AutoTokenizer

from rosd_fast.batch.weights import micro_batch_mean
from rosd_fast.config import SelectConfig, SpanConfig
from rosd_fast.config.load import load_preset
from rosd_fast.methods.targets import distilled
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.rollout.select import select_groups
from rosd_fast.text.decode import decode
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Group, Problem, Reflection, Rollout, Verdict

COINS = "Ben| has| 1|2| coins|.| H|e| gives| 3| t|o| Mia|.|\n|S|o| 1|2| -| 3| =| 8|."  # 24 tokens
SUM = "3| x| 7| =| 2|1|.| 2|1| +| 9| =| 2|0|.| <|answer|>|2|0|</|answer|>"  # 23 tokens


@dataclass(frozen=True)
class Case:
    tokens: str  # separated by |, without the stop token that follows
    quote: str | None  # None for a correct rollout
    start: int | None  # the first trained token of the public code; None: nothing is trained
    ours: int | None  # of span.on_miss full without the bug
    why: str
    stop: bool = True  # whether the stop token follows


CASES = [
    # Problem 0.
    Case(SUM, "21 + 9 = 20", 8, 7, "the text before ends in a space: one token late"),
    Case(SUM, "3 x 7", 0, 0, "nothing is before it"),
    Case(SUM, " 21 + 9", 7, 7, "the quote is stripped only where it is missed: its space is in it"),
    Case(SUM, None, 0, 0, "a correct rollout is trained whole"),
    # Problem 1.
    Case(SUM, "21 - 9", 0, 0, "a miss silently trains the whole response"),
    Case(SUM, "7 = 21\n", 3, 2, "missed with its line break, found without it: 3 x and a space"),
    Case(SUM, "21", 5, 4, "the first of two occurrences: 3 x 7 = and a space"),
    Case(SUM, None, 0, 0, "correct"),
    # Problem 2.
    Case(COINS, "He gives", 7, 6, "a space again, before a word of two tokens"),
    Case(COINS, "So 12", 15, 15, "after a line break nothing moves"),
    Case(COINS, "en has", 1, 0, "a quote within a token: B is one token, so Ben is not trained"),
    Case(COINS, None, 0, 0, "correct"),
    # Problem 3: no rollout is correct, so its group is dropped.
    Case(SUM, "21 + 9", None, None, "dropped"),
    Case(SUM, "21", None, None, "dropped"),
    Case(SUM, "no such words", None, None, "dropped"),
    Case(COINS, "coins", None, None, "dropped"),
    # Problem 4.
    Case("2|1| +| 9| =| 3|0|.", None, 0, 0, "correct"),
    Case("2|1| +| 9| =| 2|0|.", ".", 7, 7, "no space before it: 2 1 + 9 = 2 0 are 7 tokens"),
    Case("Ben| has", "has", None, 1, "one late is past the end: nothing is trained", stop=False),
    Case("B|en| has", "has", 2, 2, "sampled as B, en, read as Ben, space: two errors cancel"),
]
GROUP = 4
TRAINED = [16, 24, 17, 24, 24, 21, 19, 24, 18, 10, 24, 25, 0, 0, 0, 0, 9, 2, 0, 2]
"""Trained tokens of each case: its length with the stop token, less its start. 259 in all."""
WEIGHTS = [
    *(Fraction(259, 10 * 40),) * 2,  # 16 + 24 tokens
    *(Fraction(259, 10 * 41),) * 2,  # 17 + 24
    *(Fraction(259, 10 * 45),) * 2,  # 24 + 21
    *(Fraction(259, 10 * 43),) * 2,  # 19 + 24
    *(Fraction(259, 10 * 28),) * 2,  # 18 + 10
    *(Fraction(259, 10 * 49),) * 2,  # 24 + 25
    *(None,) * 4,  # two micro-batches of the dropped group count among the ten
    *(Fraction(259, 10 * 11),) * 2,  # 9 + 2
    *(None, Fraction(259, 10 * 2)),  # 0 + 2
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def token_bytes(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer)


@pytest.fixture(scope="module")
def recorded(
    tokenizer: Any, token_bytes: TokenBytes
) -> tuple[list[Group], dict[str, Verdict], dict[str, Reflection]]:
    """The cases as the groups, verdicts and reflections of one step."""
    vocabulary: dict[str, int] = {}
    for token in range(len(tokenizer)):
        piece = token_bytes.of([token])[0].decode(errors="replace")
        vocabulary.setdefault(piece, token)
    groups, verdicts, reflections = [], {}, {}
    for first in range(0, len(CASES), GROUP):
        problem = Problem(id=f"p{first}", domain="d", prompt="x", answer="30", verifier="number")
        rollouts = []
        for index, case in enumerate(CASES[first : first + GROUP]):
            ids = [vocabulary[piece] for piece in case.tokens.split("|")]
            ids += [tokenizer.eos_token_id] if case.stop else []
            rollout = Rollout(
                id=f"{problem.id}/{index}",
                problem_id=problem.id,
                prompt_ids=(1,),
                completion_ids=tuple(ids),
                logprobs=(0.0,) * len(ids),
                text=decode(tokenizer, ids),
                finish_reason="stop",
                policy_version=0,
            )
            rollouts.append(rollout)
            success = case.quote is None
            verdicts[rollout.id] = Verdict(
                rollout_id=rollout.id, score=float(success), success=success, answer=None
            )
            reflections[rollout.id] = Reflection(
                rollout_id=rollout.id,
                demonstration_id=None,
                correct=success,
                text="",
                quote=case.quote,
                explanation="an idea",
                well_formed=True,
                num_tokens=1,
            )
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    return groups, verdicts, reflections


def test_spans_masks_and_weights_are_those_of_the_public_code(
    recorded: Any, tokenizer: Any, token_bytes: TokenBytes
) -> None:
    groups, verdicts, reflections = recorded
    options = load_preset("reference")
    kept = select_groups(groups, verdicts, options.select).kept
    spans = locate_errors(
        kept,
        verdicts,
        reflections,
        token_bytes=token_bytes,
        config=options.span,
        reencode_with=tokenizer if options.compat.reencode_span else None,
    ).spans
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    starts = [spans[r.id].start if r.id in spans else None for r in rollouts]
    assert starts == [case.start for case in CASES]
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    assert [spans[r.id].end for r in rollouts if r.id in spans] == [
        length for length, start in zip(lengths, starts, strict=True) if start is not None
    ]
    trained = [0 if start is None else n - start for n, start in zip(lengths, starts, strict=True)]
    assert trained == TRAINED
    samples = [distilled(r, spans[r.id], (2,)) for r in rollouts if r.id in spans]
    ids = [rollout.id for rollout in rollouts]
    weighted = micro_batch_mean(samples, ids, options.compat.micro_batch_rollouts)
    weights = {sample.rollout_id: sample.weight for sample in weighted}
    assert [weights.get(rollout_id) for rollout_id in ids] == pytest.approx(
        [None if weight is None else float(weight) for weight in WEIGHTS]
    )
    # If every token had divergence 1, eight of ten micro-batches would have a mean of 1.
    loss = sum(sample.weight * sample.num_tokens for sample in weighted) / sum(TRAINED)
    assert loss == pytest.approx(0.8)


def test_without_the_bug_a_span_begins_at_the_quote(recorded: Any, token_bytes: TokenBytes) -> None:
    groups, verdicts, reflections = recorded
    config = SpanConfig(on_miss="full")
    kept = select_groups(groups, verdicts, SelectConfig()).kept
    spans = locate_errors(kept, verdicts, reflections, token_bytes=token_bytes, config=config).spans
    ids = [rollout.id for group in groups for rollout in group.rollouts]
    assert [spans[i].start if i in spans else None for i in ids] == [case.ours for case in CASES]
