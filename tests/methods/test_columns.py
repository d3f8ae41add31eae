"""Columns of a data set that change what the teacher reads, and how much a problem counts."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError
from rosd_fast.methods.opd import Opd
from rosd_fast.methods.opsd import Opsd
from rosd_fast.methods.rosd import Rosd
from rosd_fast.methods.sdpo import Sdpo
from rosd_fast.report.progress import Hidden
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Reflection


class Model:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = (tokenizer.eos_token_id,)


def method_of(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    config = apply_args(Config(), {"reflect.mode": "free"} | named)
    chats = make_chats(config.chat, tokenizer)
    return kind(config, Model(tokenizer), TokenBytes(tokenizer), chats)


def prompts(tokenizer: Any, method: Any, made: Any, annotations: Any = None) -> dict[str, str]:
    """The user turn of each teacher prompt, by rollout."""
    group, verdicts = made
    built = method.build([group], verdicts, annotations or {}, Hidden())
    return {
        sample.rollout_id: tokenizer.decode(sample.teacher_prompt_ids)
        .removeprefix("<|user|>")
        .removesuffix("<|end|><|assistant|>")
        for sample in built.samples
    }


def test_the_teacher_of_opd_reads_its_own_prompt(tokenizer, make_group):
    made = make_group(["4", "5"], [1.0, 0.0], teacher_prompt="Think: {problem} Use {x}.")
    method = method_of(Opd, tokenizer, teacher__model="other")
    assert prompts(tokenizer, method, made) == dict.fromkeys(
        ["p0/0", "p0/1"], "Think: 2 + 2 = ? Use {x}."
    )
    plain = prompts(tokenizer, method, make_group(["4"], [1.0]))
    assert plain == {"p0/0": "2 + 2 = ?"}


@pytest.mark.parametrize("kind", [Opsd, Sdpo])
def test_a_prompt_without_a_solution_needs_none(tokenizer, make_group, kind):
    made = make_group(["4", "5"], [1.0, 0.0], teacher_prompt=r"Recall \frac{a}{b}. {problem}")
    found = prompts(tokenizer, method_of(kind, tokenizer), made)
    assert found == dict.fromkeys(["p0/0", "p0/1"], r"Recall \frac{a}{b}. 2 + 2 = ?")


def test_a_prompt_with_a_solution_gets_it(tokenizer, make_group):
    row = {"teacher_prompt": "{problem} Known: {demonstration}", "reference": "2 and 2 is 4"}
    made = make_group(["5"], [0.0], **row)
    method = method_of(Opsd, tokenizer)
    assert prompts(tokenizer, method, made) == {"p0/0": "2 + 2 = ? Known: 2 and 2 is 4"}
    method.check_problems([made[0].problem])
    bare = make_group(["5"], [0.0], teacher_prompt="{problem} Known: {demonstration}")
    with pytest.raises(UserError, match="no reference solution"):
        method.check_problems([bare[0].problem])


def test_the_teacher_of_rosd_reads_the_reflection_in_it(tokenizer, make_group):
    made = make_group(["It is 5."], [0.0], teacher_prompt="{explanation} So: {problem}")
    reflection = Reflection(
        rollout_id="p0/0",
        demonstration_id=None,
        correct=False,
        text="",
        quote="is 5",
        explanation="Count.",
        well_formed=True,
        num_tokens=3,
    )
    found = prompts(tokenizer, method_of(Rosd, tokenizer), made, {"p0/0": reflection})
    assert found == {"p0/0": "Count. So: 2 + 2 = ?"}


def test_feedback_of_the_data_set_replaces_what_the_verifier_says(tokenizer, make_group):
    options = {
        "teacher__show_feedback": "true",
        "teacher__solution_template": "{problem} {demonstration} {feedback}",
    }
    method = method_of(Sdpo, tokenizer, **options)
    texts, scores = ["5", "4", "4"], [0.0, 1.0, 1.0]
    told = prompts(tokenizer, method, make_group(texts, scores, feedback="Off by one."))
    assert told["p0/0"] == "2 + 2 = ? 4 Off by one."
    assert told["p0/1"] == "2 + 2 = ? 4 "
    plain = prompts(tokenizer, method, make_group(texts, scores))
    assert plain["p0/0"] == "2 + 2 = ? 4 No answer was found."
