"""Reflection requests, their budget, and how the answers are parsed."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import ChatConfig, ReflectConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.errors import UserError
from rosd_fast.reflection.parse import parse_reflection
from rosd_fast.reflection.reflect import reflect, reflection_metrics
from rosd_fast.reflection.requests import build_reflection_requests
from rosd_fast.text.prompts import ELLIPSIS
from rosd_fast.types import Generation

SHORT: dict[str, Any] = {
    "wrong_template": (
        "{problem}\nGood: {demonstration}\nBad: {rollout}\n{answer_note}Quote the error."
    ),
    "correct_template": "{problem}\nGood: {rollout}\n{answer_note}Explain.",
}


def build(
    tokenizer,
    group,
    verdicts,
    *,
    chat: ChatConfig | None = None,
    on_no_success="skip",
    cut_right=False,
    **options,
):
    return build_reflection_requests(
        [group],
        verdicts,
        config=ReflectConfig(**(SHORT | options)),
        chats=make_chats(chat or ChatConfig(), tokenizer),
        stop_token_ids=(tokenizer.eos_token_id,),
        seed=7,
        step=3,
        on_no_success=on_no_success,
        cut_right=cut_right,
    )


def prompts(tokenizer, tasks):
    return [tokenizer.decode(task.request.prompt_ids) for task in tasks]


@pytest.fixture(scope="module")
def step(make_group):
    texts = ["2 + 2 = 5", "so 2 + 2 is 4, a long way round", "4"]
    return make_group(texts, [0.0, 1.0, 1.0], system="Be brief.")


def test_a_quote_that_was_cut_within_a_character():
    text = "<error_quote> 3 天\ufffd</error_quote><explanation>why</explanation>"
    parsed = parse_reflection(text, correct=False)
    assert parsed.quote == "3 天" and parsed.tolerated == ("cut",) and parsed.well_formed
    nothing = parse_reflection(text.replace(" 3 天", ""), correct=False)
    assert nothing.quote is None and not nothing.well_formed


def test_requests(tokenizer, step):
    tasks = build(tokenizer, *step, temperature=0.7, top_p=0.9, max_new_tokens=33)
    head = "<|system|>Be brief.<|end|><|user|>2 + 2 = ?"
    assert prompts(tokenizer, tasks) == [
        f"{head}\nGood: so 2 + 2 is 4, a long way round\nBad: 2 + 2 = 5\nQuote the error."
        "<|end|><|assistant|><error_quote>",
        f"{head}\nGood: so 2 + 2 is 4, a long way round\nExplain.<|end|><|assistant|><explanation>",
        f"{head}\nGood: 4\nExplain.<|end|><|assistant|><explanation>",
    ]
    assert [task.rollout_id for task in tasks] == ["p0/0", "p0/1", "p0/2"]
    assert [task.demonstration_id for task in tasks] == ["p0/1", None, None]
    assert [task.correct for task in tasks] == [False, True, True]
    request = tasks[0].request
    assert (request.id, request.seed, request.n) == ("step3/reflect/p0/0", 7, 1)
    params = request.params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.7, 0.9, 33)
    assert params.stop_token_ids == (tokenizer.eos_token_id,)


def test_choices(tokenizer, step):
    shortest = build(tokenizer, *step, demonstration="shortest", on_correct="skip")
    assert [(task.rollout_id, task.demonstration_id) for task in shortest] == [("p0/0", "p0/2")]
    noted = build(tokenizer, *step, show_answer=True, answer_note="It is {answer}. ")
    assert all("\nIt is 4. " in prompt for prompt in prompts(tokenizer, noted))


def test_a_random_demonstration_is_the_same_each_time(tokenizer, make_group):
    step = make_group(["no", *"abcdefgh"], [0.0, *[1.0] * 8])
    chosen = [
        next(task.demonstration_id for task in build(tokenizer, *step, demonstration="random"))
        for _ in range(2)
    ]
    assert chosen[0] == chosen[1]
    others = set()
    for name in "abcdef":
        group, verdicts = make_group(["no", *"abcdefgh"], [0.0, *[1.0] * 8], id=name)
        tasks = build(tokenizer, group, verdicts, demonstration="random")
        others.add(str(tasks[0].demonstration_id).rpartition("/")[2])
    assert len(others) > 1


def test_modes(tokenizer, make_group):
    text = "Add 3.5 to 2. It is\nsix. So 6."
    step = make_group([text, "4"], [0.0, 1.0])
    free = build(tokenizer, *step, mode="free")
    assert [task.request.grammar for task in free] == [None, None]
    verbatim = build(tokenizer, *step, mode="verbatim")
    assert f'"substring_words": {json.dumps(text)}' in str(verbatim[0].request.grammar)
    assert "error_quote" not in str(verbatim[1].request.grammar)
    openings = ["<error_quote>", "<explanation>"]
    for tasks, tags in ((free, ["", ""]), (verbatim, openings)):
        assert [task.opening for task in tasks] == tags
        for prompt, tag in zip(prompts(tokenizer, tasks), tags, strict=True):
            assert prompt.endswith(f"<|assistant|>{tag}")
    thinking = build(tokenizer, *step, mode="verbatim", think=True)
    for task, tag in zip(thinking, openings, strict=True):
        assert task.opening == "" and f'start: thoughts? "{tag}" ' in str(task.request.grammar)
    template = SHORT["wrong_template"]
    numbered = build(tokenizer, *step, mode="sentence", sentence_template=template)
    assert (
        "Bad: [1] Add 3.5 to 2.\n[2] It is\n[3] six.\n[4] So 6.\n"
        in prompts(tokenizer, numbered)[0]
    )
    assert numbered[0].sentences == ("Add 3.5 to 2.", "It is", "six.", "So 6.")
    assert 'number: "1" | "2" | "3" | "4"\n' in str(numbered[0].request.grammar)


def test_only_sentences_that_are_shown_can_be_named(tokenizer, make_group):
    wrong = " ".join(f"Step {number} is wrong." for number in range(60))
    step = make_group([wrong, "4"], [0.0, 1.0])
    template = SHORT["wrong_template"]
    options = {"mode": "sentence", "sentence_template": template, "max_prompt_tokens": 120}
    (task, _) = build(tokenizer, *step, **options)
    assert task.prompt_cut and len(task.sentences) == 60
    (rule,) = re.findall(r"^number: (.*)$", str(task.request.grammar), re.MULTILINE)
    numbers = [int(name.strip('"')) for name in rule.split(" | ")]
    prompt = prompts(tokenizer, [task])[0]
    assert 0 < len(numbers) < 60
    whole = [f"[{number}] Step {number - 1} is wrong.\n" in prompt for number in numbers]
    assert whole.count(False) <= 1  # the cut is in one of them
    assert all(f"[{number}] " in prompt for number in numbers)


@pytest.mark.parametrize("mode", ["verbatim", "sentence"])
@pytest.mark.parametrize("text", ["", " \n", "</error_quote>"])
def test_no_request_when_nothing_can_be_named(tokenizer, make_group, mode, text):
    tasks = build(tokenizer, *make_group([text, "4"], [0.0, 1.0]), mode=mode)
    named = mode == "sentence" and text.strip()
    assert [task.correct for task in tasks] == ([False, True] if named else [True])


def test_a_wrong_rollout_without_a_correct_sibling(tokenizer, make_group):
    step = make_group(["5", "6"], [0.0, 0.0])
    assert build(tokenizer, *step) == []
    alone = build(tokenizer, *step, wrong_template="{problem} {rollout} Quote.")
    assert [task.demonstration_id for task in alone] == [None, None]


HEAD = "<|user|>2 + 2 = ?\nGood: "
TAIL = "Quote the error.<|end|><|assistant|><error_quote>"


def test_a_reference_solution_replaces_the_sibling(tokenizer, make_group):
    group, verdicts = make_group(["It is 5."], [0.0], reference="Two and two {rollout}.")
    (task,) = build(tokenizer, group, verdicts, on_no_success="reference")
    assert task.demonstration_id == "reference"
    shown = f"{HEAD}Two and two {{rollout}}.\nBad: It is 5.\n{TAIL}"
    assert prompts(tokenizer, [task]) == [shown]
    assert build(tokenizer, group, verdicts) == []
    bare, verdicts = make_group(["It is 5."], [0.0])
    assert build(tokenizer, bare, verdicts, on_no_success="reference") == []
    # Where there is a sibling, it is shown.
    mixed = make_group(["It is 5.", "4"], [0.0, 1.0], reference="Two and two.")
    tasks = build(tokenizer, *mixed, on_no_success="reference")
    assert [task.demonstration_id for task in tasks] == ["p0/1", None]


def test_the_right_answer_replaces_the_sibling(tokenizer, make_group):
    step = make_group(["It is 5."], [0.0])
    (task,) = build(tokenizer, *step, on_no_success="answer")
    assert task.demonstration_id == "answer"
    shown = f"{HEAD}The right answer is 4.\nBad: It is 5.\n{TAIL}"
    assert prompts(tokenizer, [task]) == [shown]
    # A template without a demonstration has it in its note, which is empty for other groups.
    template = {"wrong_template": "{problem}\nBad: {rollout}\n{answer_note}"}
    noted = build(tokenizer, *step, on_no_success="answer", **template)
    text = "<|user|>2 + 2 = ?\nBad: It is 5.\nThe right answer is 4."
    assert prompts(tokenizer, noted) == [f"{text}<|end|><|assistant|><error_quote>"]
    mixed = make_group(["It is 5.", "4"], [0.0, 1.0])
    other = build(tokenizer, *mixed, on_no_success="answer", **template)[0]
    assert "right answer" not in tokenizer.decode(other.request.prompt_ids)


def test_texts_are_never_read_as_templates(tokenizer, make_group):
    step = make_group(
        ["{problem}{demonstration}", "{rollout}{answer_note} \\1 {x}"],
        [0.0, 1.0],
        prompt="Set {rollout} and {answer}",
        answer="{problem}",
    )
    tasks = build(tokenizer, *step, show_answer=True, answer_note="[{answer}]")
    assert prompts(tokenizer, tasks)[0] == (
        "<|user|>Set {rollout} and {answer}\nGood: {rollout}{answer_note} \\1 {x}\n"
        "Bad: {problem}{demonstration}\n[{problem}]Quote the error.<|end|><|assistant|>"
        "<error_quote>"
    )


@pytest.mark.parametrize("budget", [85, 100, 150])
def test_rollouts_lose_their_middle_over_the_budget(tokenizer, make_group, budget):
    wrong = "begin " + "the wrong rate was used " * 40 + "finish"
    right = "start " + "add the ones first " * 40 + "done"
    step = make_group([wrong, right, "4"], [0.0, 1.0, 1.0], system="Be brief.")
    tasks = build(tokenizer, *step, max_prompt_tokens=budget)
    assert all(len(task.request.prompt_ids) <= budget for task in tasks)
    first, second, third = prompts(tokenizer, tasks)
    for prompt in (first, second):
        assert prompt.startswith("<|system|>Be brief.<|end|><|user|>2 + 2 = ?\nGood: s")
        assert len(tokenizer.encode(prompt)) > budget - 8  # no more is cut than needed
    assert first.endswith("Quote the error.<|end|><|assistant|><error_quote>")
    assert [task.prompt_cut for task in tasks] == [True, True, False]
    assert first.count(ELLIPSIS) == 2 and second.count(ELLIPSIS) == 1 and third.count(ELLIPSIS) == 0
    good, bad = first.split("\nGood: ")[1].split("\nQuote")[0].split("\nBad: ")
    for text, whole in ((good, right), (bad, wrong)):
        head, tail = text.split(ELLIPSIS)
        assert whole.startswith(head) and whole.endswith(tail) and abs(len(head) - len(tail)) <= 1


def test_the_public_code_cuts_the_end_of_the_user_turn(tokenizer, make_group):
    """The wrong rollout and the instruction are gone, and the generation prompt stays."""
    wrong, right = "the wrong rate was used " * 40, "add the ones first " * 40
    step = make_group([wrong, right], [0.0, 1.0])
    options = {"mode": "free", "cut_right": True}
    first, _ = build(tokenizer, *step, **options, max_prompt_tokens=100)
    (prompt, _) = prompts(tokenizer, [first, first])
    assert 96 < len(first.request.prompt_ids) <= 100 and first.prompt_cut
    user = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    assert f"2 + 2 = ?\nGood: {right}".startswith(user) and "Bad" not in user
    whole = build(tokenizer, *step, mode="free")
    assert build(tokenizer, *step, **options) == whole


def test_a_problem_over_the_budget_is_a_user_error(tokenizer, make_group):
    step = make_group(["5", "4"], [0.0, 1.0], id="sums:9", prompt="add the ones " * 30)
    with pytest.raises(UserError, match=r"problem sums:9: .*budget of 40.*reflect\.max_prompt_tok"):
        build(tokenizer, *step, max_prompt_tokens=40)


class ScriptedEngine:
    """Answers each request with the text at its rollout's index."""

    def __init__(self, tokenizer, texts, *, reverse=False):
        self.tokenizer, self.texts, self.reverse = tokenizer, texts, reverse
        self.calls = 0

    async def generate(self, requests, *, on_tokens=None):
        self.calls += 1
        result = []
        for request in requests:
            text = self.texts[int(request.id.rsplit("/", 1)[1])]
            ids = (*self.tokenizer.encode(text), self.tokenizer.eos_token_id)
            if on_tokens is not None:
                on_tokens(len(ids))
            result.append(
                Generation(
                    request_id=request.id,
                    index=0,
                    completion_ids=ids,
                    logprobs=(0.0,) * len(ids),
                    finish_reason="stop",
                    policy_version=1,
                )
            )
        return result[::-1] if self.reverse else result


def run_reflect(tokenizer, engine, group, verdicts, mode: Any = "free", **options):
    return asyncio.run(
        reflect(
            [] if group is None else [group],
            verdicts,
            engine=engine,
            config=ReflectConfig(**SHORT, mode=mode),
            chats=make_chats(ChatConfig(), tokenizer),
            stop_token_ids=(tokenizer.eos_token_id,),
            seed=0,
            step=1,
            **options,
        )
    )


def test_reflect(tokenizer, step):
    texts = [
        "<error_quote>= 5</error_quote>\n<explanation>It is 4 .</explanation>",
        "<explanation>Count.</explanation>",
        "no idea",
    ]
    counted = []
    engine = ScriptedEngine(tokenizer, texts)
    reflections = run_reflect(tokenizer, engine, *step, on_tokens=counted.append)
    assert list(reflections) == ["p0/0", "p0/1", "p0/2"]
    wrong, right, none = reflections.values()
    assert (wrong.quote, wrong.explanation, wrong.text) == ("= 5", "It is 4 .", texts[0])
    assert (wrong.demonstration_id, wrong.correct, wrong.well_formed) == ("p0/1", False, True)
    assert (right.quote, right.explanation, right.correct) == (None, "Count.", True)
    assert (none.explanation, none.well_formed) == (None, False)
    assert [reflection.num_tokens for reflection in reflections.values()] == counted
    shares = {"well_formed": 2 / 3, "leak": 1 / 3, "empty": 1 / 3, "refused": 1 / 3}
    names = ("well_formed", "tolerated", "truncated", "leak", "empty", "copied", "refused")
    assert reflection_metrics(reflections) == {
        "reflect/num_reflections": 3.0,
        **{f"reflect/{name}_frac": pytest.approx(shares.get(name, 0)) for name in names},
        "reflect/tokens_mean": sum(counted) / 3,
    }
    assert (wrong.leaks, wrong.refused, none.refused) == (True, None, "empty")


def test_the_opening_tag_in_the_prompt_is_part_of_the_text(tokenizer, step):
    texts = ["= 5</error_quote><explanation>Add.</explanation>", "Add.</explanation>", "Add."]
    engine = ScriptedEngine(tokenizer, texts)
    wrong, right, cut = run_reflect(tokenizer, engine, *step, mode="verbatim").values()
    assert wrong.text == f"<error_quote>{texts[0]}" and right.text == f"<explanation>{texts[1]}"
    assert (wrong.quote, wrong.explanation, wrong.well_formed) == ("= 5", "Add.", True)
    assert (right.explanation, right.well_formed) == ("Add.", True)
    assert (cut.explanation, cut.tolerated) == ("Add.", ("unclosed",))


def test_no_groups_make_no_requests(tokenizer):
    engine = ScriptedEngine(tokenizer, [])
    assert run_reflect(tokenizer, engine, None, {}) == {} and engine.calls == 0
    assert reflection_metrics({}) == {"reflect/num_reflections": 0.0}


def test_answers_to_other_requests_are_refused(tokenizer, step):
    engine = ScriptedEngine(tokenizer, ["a", "b", "c"], reverse=True)
    with pytest.raises(ValueError, match="not, in order"):
        run_reflect(tokenizer, engine, *step)


def triple(parsed):
    return parsed.quote, parsed.explanation, parsed.well_formed


Q, E = "<error_quote>a b</error_quote>", "<explanation>why</explanation>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{Q}\n{E}", ("a b", "why", True)),
        (f"Well: {Q} so {E} done", ("a b", "why", True)),
        (f"{Q}{E}".upper(), ("A B", "WHY", True)),
        (f"{Q}\n<explanation>why", ("a b", "why", False)),
        (f"{Q}\n<explanation>why</explan", ("a b", "why", False)),
        (f"{Q}\n<explanation>1 </ 2 < x", ("a b", "1 </ 2 < x", False)),
        (f"{Q}\n<explanation>", ("a b", None, False)),
        (f"{Q}\n<explanation> \n</explanation>", ("a b", None, False)),
        (f"{E}{Q}", ("a b", "why", False)),
        (f"<error_quote>\n a b\r\n</error_quote>{E}", ("a b", "why", True)),
        (f"<error_quote> </error_quote>{E}", (None, "why", False)),
        (f"<error_quote>a b{E}", (None, "why", False)),
        (Q, ("a b", None, False)),
        (E, (None, "why", False)),
        ("", (None, None, False)),
        (f"<error_quote>so {E}</error_quote>{E}", (f"so {E}", "why", True)),
        (
            f"<error_quote>x <answer>4</answer></error_quote>{E}",
            ("x <answer>4</answer>", "why", True),
        ),
        (f"{Q}<error_quote>c</error_quote>{E}{E}", ("a b", "why", True)),
    ],
)
def test_parse_reflections_on_wrong_rollouts(text, expected):
    assert triple(parse_reflection(text, correct=False)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (E, (None, "why", True)),
        (f"{Q}{E}", (None, "why", True)),
        ("<explanation>why", (None, "why", False)),
        ("why", (None, None, False)),
    ],
)
def test_parse_reflections_on_correct_rollouts(text, expected):
    assert triple(parse_reflection(text, correct=True)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{Q}{E}", ()),
        (f"{Q}{E}".upper(), ("case",)),
        (f"{Q}<explanation>why", ("unclosed",)),
        (f"{Q}<Explanation>why</expl", ("case", "unclosed")),
        ("<explanation>", ()),
    ],
)
def test_tolerated_departures_from_the_format_are_reported(text, expected):
    assert parse_reflection(text, correct=False).tolerated == expected


@pytest.mark.parametrize(
    ("name", "quote", "number", "well_formed"),
    [
        ("2", "Then 4.", 2, True),
        (" 1 ", "Add 3.5.", 1, True),
        ("0", None, None, False),
        ("3", None, None, False),
        ("two", None, None, False),
        ("9" * 12, None, None, False),
    ],
)
def test_parse_the_number_of_a_sentence(name, quote, number, well_formed):
    text = f"<error_sentence>{name}</error_sentence>{E}"
    parsed = parse_reflection(text, correct=False, sentences=["Add 3.5.", "Then 4."])
    assert (parsed.quote, parsed.sentence) == (quote, number)
    assert (parsed.explanation, parsed.well_formed) == ("why", well_formed)


@given(text=st.text("<>/ae \n") | st.text())
def test_parsing_never_fails(text):
    for correct in (False, True):
        quote, explanation, well_formed = triple(parse_reflection(text, correct=correct))
        assert quote != "" and explanation != ""
        assert not well_formed or (explanation and (correct or quote))


@given(quote=st.text(min_size=1), explanation=st.text(min_size=1))
def test_parsing_gives_back_what_was_written(quote, explanation):
    text = f"<error_quote>{quote}</error_quote>\n<explanation>{explanation}</explanation>"
    assert triple(parse_reflection(text, correct=False)) == (
        quote.strip() or None,
        explanation.strip() or None,
        bool(quote.strip() and explanation.strip()),
    )
