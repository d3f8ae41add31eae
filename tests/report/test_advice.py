"""What a run with nothing to learn from says, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rosd_fast.report.advice import AnswerWatch, LearningWatch, advice, describe_unanswered
from rosd_fast.types import Group, Problem, Rollout, Verdict

IDLE = {
    "step": 1,
    "rollout/trained_frac": 0.0,
    "rollout/accuracy": 0.0,
    "rollout/answer_found_frac": 0.9,
    "rollout/truncated_frac": 0.0,
    "select/num_groups": 4.0,
}
HOPELESS = IDLE | {"select/num_no_success": 4.0, "select/num_dropped_no_success": 4.0}
KEPT = IDLE | {"select/num_no_success": 4.0}
RIGHT = IDLE | {"rollout/accuracy": 1.0, "select/num_all_correct": 4.0}
LEARNING = RIGHT | {"rollout/trained_frac": 0.5}
REFLECTED = IDLE | {"rollout/accuracy": 0.5, "reflect/num_reflections": 16.0}


@pytest.mark.parametrize(
    ("changes", "seen", "fix", "not_said"),
    [
        (HOPELESS, "no rollout is right", "on_no_success to reference or answer", "temperature"),
        (
            HOPELESS | {"select/num_dropped_no_success": 0.0, "select/num_dropped_no_reference": 4},
            "no rollout is right",
            'a "reference"',
            "on_no_success",
        ),
        # A method that needs no success, such as grpo.
        (
            HOPELESS | {"select/num_dropped_no_success": 0.0},
            "no rollout is right",
            "sample.group_size",
            "on_no_success",
        ),
        (
            HOPELESS | {"rollout/truncated_frac": 0.625},
            "62% of the rollouts reach sample.max_new_tokens",
            "raise it",
            "data.answer_instruction",
        ),
        (
            HOPELESS | {"rollout/answer_found_frac": 0.0},
            "the verifier found no answer in any rollout: see with rosd-fast data",
            "data.answer_instruction",
            "max_new_tokens",
        ),
        (RIGHT, "every rollout is right", "sample.temperature", "on_no_success"),
        (
            IDLE | {"select/num_all_correct": 1.0, "select/num_no_success": 3.0},
            "6 of 8 groups are all wrong and the others all right",
            "between the two",
            "harder",
        ),
        (
            REFLECTED | {"reflect/found_frac": 0.25},
            "75% of the quotes are not in their rollouts",
            "reflect.mode to verbatim",
            "leak",
        ),
        (REFLECTED | {"reflect/refused_frac": 1.0}, "100% of the explanations", "leak", "mode"),
        (
            IDLE | {"rollout/accuracy": 0.5, "select/num_no_demonstration": 3.0},
            "6 rollouts have no correct sibling",
            "on_lone_success to reference",
            "on_no_success",
        ),
        # select.on_no_success keep: rosd writes no reflection, and sdpo has nothing to show.
        (
            KEPT | {"reflect/num_reflections": 0.0},
            "no rollout is right",
            "on_no_success to reference or answer",
            "on_lone_success",
        ),
        (
            KEPT | {"select/num_no_demonstration": 8.0},
            "16 rollouts have no correct sibling",
            "on_no_success to reference",
            "on_lone_success",
        ),
        # Kept with a replacement, which is nobody's mistake.
        (
            KEPT | {"reflect/num_reflections": 0.0, "select/num_rescued": 4.0},
            "no rollout is right",
            "sample.group_size",
            "on_no_success",
        ),
        (
            REFLECTED | {"control/num_unpaired": 3.0, "control/num_reflections": 0.0},
            "reflections to exchange",
            "problems_per_step",
            "leak",
        ),
        (
            IDLE | {"rollout/accuracy": 0.5},
            "no rollout gave a sample",
            "select/*",
            "data.answer_instruction",
        ),
    ],
)
def test_advice(changes: dict[str, Any], seen: str, fix: str, not_said: str) -> None:
    text = advice([changes, changes])
    assert text is not None and "\n" not in text
    assert text.startswith("nothing to learn from in the last 2 steps: ")
    assert seen in text and fix in text and not_said not in text


def test_no_advice_while_there_is_something_to_learn() -> None:
    assert advice([HOPELESS, LEARNING]) is None
    assert advice([LEARNING | {"rollout/accuracy": 0.0}]) is None


def test_answers_that_are_never_found_are_said_even_where_every_rollout_is_trained() -> None:
    mute = LEARNING | {"rollout/accuracy": 0.0, "rollout/answer_found_frac": 0.0}
    text = advice([mute])
    assert text is not None and text.startswith("no answer was found in the last step: ")
    assert "data.answer_instruction" in text
    assert advice([mute, LEARNING]) is None
    assert advice([mute | {"rollout/accuracy": 0.1}]) is None  # a verifier that names no answer
    assert "any rollout (no answer tag: 3 of 4 rollouts): see" in (
        advice([mute], "no answer tag: 3 of 4 rollouts") or ""
    )
    assert "no answer tag" not in (advice([HOPELESS], "no answer tag: 1 of 4 rollouts") or "")


def test_it_is_said_once_and_again_after_something_was_learned() -> None:
    watch = LearningWatch(2)
    rows = [HOPELESS, HOPELESS, HOPELESS, LEARNING, RIGHT, RIGHT, RIGHT]
    said = [watch.see(row) is not None for row in rows]
    assert said == [False, True, False, False, False, True, False]


def test_evaluations_between_steps_do_not_count() -> None:
    watch = LearningWatch(2)
    evaluation = {"step": 0, "eval/dev/accuracy": 0.5}
    assert [watch.see(row) for row in (evaluation, HOPELESS, evaluation)] == [None] * 3
    assert watch.see(HOPELESS) is not None


def test_a_resumed_run_remembers_its_last_steps() -> None:
    assert LearningWatch(2, [LEARNING, HOPELESS]).see(HOPELESS) is not None
    assert LearningWatch(2, [HOPELESS, LEARNING]).see(HOPELESS) is None
    old = {"step": 1, "rollout/accuracy": 0.0}  # of a version without these metrics
    assert LearningWatch(2, [old, old]).see(HOPELESS) is None
    assert LearningWatch(0, [HOPELESS]).see(HOPELESS) is None


MUTE = LEARNING | {"rollout/accuracy": 0.0, "rollout/answer_found_frac": 0.0}


def test_a_run_without_answers_should_end_after_so_many_steps_in_a_row() -> None:
    watch = AnswerWatch(2)
    rows = [MUTE, LEARNING, MUTE, MUTE | {"rollout/accuracy": 0.1}, MUTE]
    assert [watch.see(row) for row in rows] == [None] * 5
    text = watch.see(MUTE, "no answer tag: 4 of 4 rollouts; one ends in 'so 72.'")
    assert text is not None and "\n" not in text
    assert text.startswith(
        "no rollout gave an answer in the last 2 steps (no answer tag: 4 of 4 rollouts; one ends "
        "in 'so 72.'), so"
    )
    assert "data.answer_instruction" in text and "select.stop_after_steps 0" in text
    assert "sample.max_new_tokens" not in text
    assert "100% of the rollouts reach sample.max_new_tokens: raise it" in (
        watch.see(MUTE | {"rollout/truncated_frac": 1.0}) or ""
    )
    never = AnswerWatch(0)
    assert [never.see(MUTE) for _ in range(9)] == [None] * 9


def verified(texts: Mapping[str, str | None]) -> tuple[list[Group], dict[str, Verdict]]:
    """A group of rollouts with these texts, and what the verifier says why there is no answer."""
    rollouts = tuple(
        Rollout(
            id=f"a/{index}",
            problem_id="a",
            prompt_ids=(1,),
            completion_ids=(2,),
            logprobs=(0.0,),
            text=text,
            finish_reason="stop",
            policy_version=0,
        )
        for index, text in enumerate(texts)
    )
    verdicts = {
        rollout.id: Verdict(
            rollout_id=rollout.id,
            score=0.0,
            success=False,
            answer="7" if reason == "wrong" else None,
            reason=reason,
        )
        for rollout, reason in zip(rollouts, texts.values(), strict=True)
    }
    problem = Problem(id="a", domain="d", prompt="?", answer="8", verifier="number")
    return [Group(problem=problem, rollouts=rollouts)], verdicts


def test_the_most_frequent_reason_is_said_with_the_end_of_a_completion() -> None:
    no_tag = "no answer tag"
    texts = {"So it is\n\x1b[31m72.\n": no_tag, "7": "wrong", "x": "died", "long " * 99: no_tag}
    said = describe_unanswered(*verified(texts))
    assert said == r"no answer tag: 2 of 4 rollouts; one ends in 'So it is\n\x1b[31m72.'"
    said = describe_unanswered(*verified({"long " * 99: None}))
    assert said.startswith("no answer: 1 of 1 rollouts; one ends in '...")
    assert len(said) < 110
    assert describe_unanswered(*verified({" ": no_tag})).endswith("rollouts; one is empty")
    assert describe_unanswered(*verified({"7": "wrong"})) == ""
