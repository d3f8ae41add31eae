"""What a run with nothing to learn from says, and when."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.report.advice import LearningWatch, advice

IDLE = {
    "step": 1,
    "rollout/trained_frac": 0.0,
    "rollout/accuracy": 0.0,
    "rollout/answered_frac": 0.9,
    "rollout/truncated_frac": 0.0,
    "select/num_groups": 4.0,
}
HOPELESS = IDLE | {"select/num_no_success": 4.0, "select/num_dropped_no_success": 4.0}
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
            "<answer>",
        ),
        (
            HOPELESS | {"rollout/answered_frac": 0.0},
            "the verifier found no answer in any rollout",
            "<answer>...</answer>",
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
            "on_lone_success",
            "mode",
        ),
        (
            REFLECTED | {"control/num_unpaired": 3.0, "control/num_reflections": 0.0},
            "reflections to exchange",
            "problems_per_step",
            "leak",
        ),
        (IDLE | {"rollout/accuracy": 0.5}, "no rollout gave a sample", "select/*", "<answer>"),
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
    mute = LEARNING | {"rollout/accuracy": 0.0, "rollout/answered_frac": 0.0}
    text = advice([mute])
    assert text is not None and text.startswith("no answer was found in the last step: ")
    assert "<answer>" in text
    assert advice([mute, LEARNING]) is None
    assert advice([mute | {"rollout/accuracy": 0.1}]) is None  # a verifier that names no answer


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
