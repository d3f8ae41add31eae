"""Reflections where models think: prompts, grammars, what is shown, and spans after thinking."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from rosd_fast.config import ChatConfig, ReflectConfig, SpanConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.engines.local.grammar_mask import GrammarCompiler, allowed_tokens
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.reflect import reflect
from rosd_fast.reflection.requests import ReflectionTask, build_reflection_requests
from rosd_fast.text.chat import Chats
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Generation, GenerationRequest, Group, Problem, Rollout, Verdict
from tests.chat_templates import OPENED, SWITCHED, THINK_TOKENS, with_template

THOUGHT = "It may be 5.\n\nSo we add the ones first and get 5.\n</think>\n\n"
WRONG = THOUGHT + "We add 2 and 2. So the answer is 5."
CORRECT = "It may be 4.\n\nSo 4.\n</think>\n\nThe answer is 4."
TEMPLATE = "{problem}\nGood: {demonstration}\nBad: {rollout}\nQuote."


def make_group(tokenizer: Any, texts: Sequence[str]) -> tuple[Group, dict[str, Verdict]]:
    """A group whose first rollout is wrong; its completions are the texts' ids and a stop token."""
    problem = Problem(id="p", domain="sums", prompt="2 + 2 = ?", answer="4", verifier="number")
    rollouts = []
    for index, text in enumerate(texts):
        ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
        rollouts.append(
            Rollout(
                id=f"p/{index}",
                problem_id="p",
                prompt_ids=(1,),
                completion_ids=ids,
                logprobs=(0.0,) * len(ids),
                text=text,
                finish_reason="stop",
                policy_version=0,
            )
        )
    verdicts = {
        r.id: Verdict(rollout_id=r.id, score=float(n > 0), success=n > 0, answer=None)
        for n, r in enumerate(rollouts)
    }
    return Group(problem=problem, rollouts=tuple(rollouts)), verdicts


@pytest.fixture(scope="module", params=[THINK_TOKENS, []], ids=["ids", "text"])
def opened(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A tokenizer whose template opens thinking; the tags are tokens, or not."""
    return with_template(tokenizer, OPENED, tokens=request.param)


def chats_of(tokenizer: Any, thinking: str = "keep", **roles: Any) -> Chats:
    return make_chats(ChatConfig.model_validate({"thinking": thinking} | roles), tokenizer)


def tasks_of(
    chats: Chats, texts: Sequence[str] = (WRONG, CORRECT), **options: Any
) -> list[ReflectionTask]:
    given: dict[str, Any] = {"wrong_template": TEMPLATE, "sentence_template": TEMPLATE}
    group, verdicts = make_group(chats.tokenizer, texts)
    return build_reflection_requests(
        [group],
        verdicts,
        config=ReflectConfig.model_validate(given | options),
        chats=chats,
        stop_token_ids=(chats.tokenizer.eos_token_id,),
        seed=0,
        step=1,
    )


def prompt_of(chats: Chats, task: ReflectionTask) -> str:
    return chats.tokenizer.decode(task.request.prompt_ids)


def test_thinking_is_closed_before_the_opening_tag(opened: Any) -> None:
    chats = chats_of(opened)
    wrong, right = tasks_of(chats)
    block = "<|assistant|><think>\n\n</think>\n\n"
    assert prompt_of(chats, wrong).endswith(f"{block}<error_quote>")
    assert prompt_of(chats, right).endswith(f"{block}<explanation>")
    assert (wrong.opening, wrong.thinking) == ("<error_quote>", None)
    assert str(wrong.request.grammar).splitlines()[1].startswith("start: quote")


def allows(tokenizer: Any, grammar: str, text: str) -> bool:
    """Whether a grammar allows the ids of a text, one after the other."""
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    constraint = compiler.constraint(grammar, [tokenizer.eos_token_id], where="test")
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not allowed_tokens([constraint], len(tokenizer))[0, token]:
            return False
        constraint.take(token)
    return True


def test_the_reflector_closes_thinking_that_its_prompt_opens(opened: Any) -> None:
    chats = chats_of(opened)
    wrong, _ = tasks_of(chats, think=True)
    assert prompt_of(chats, wrong).endswith("<|assistant|><think>\n")
    assert wrong.opening == "" and wrong.thinking is not None
    grammar = str(wrong.request.grammar)
    assert grammar.splitlines()[1].startswith('start: thoughts "<error_quote>" quote')
    answer = "<error_quote>We add 2 and 2.</error_quote><explanation>Add.</explanation>"
    assert allows(opened, grammar, f"Let me see.</think>\n\n{answer}")


@pytest.mark.parametrize("think", [False, True])
def test_reflect_think_decides_whatever_the_arguments_say(tokenizer: Any, think: bool) -> None:
    switched = with_template(tokenizer, SWITCHED, tokens=THINK_TOKENS)
    chats = chats_of(switched, kwargs="enable_thinking=false")
    wrong, _ = tasks_of(chats, think=think)
    prompt = prompt_of(chats, wrong)
    if think:
        assert prompt.endswith("<|assistant|>\n")
        assert 'start: thoughts? "<error_quote>"' in str(wrong.request.grammar)
    else:
        assert prompt.endswith("<|assistant|>\n<think>\n\n</think>\n\n<error_quote>")
    always = SWITCHED.replace("enable_thinking is defined and enable_thinking is false", "true")
    forced = chats_of(tokenizer, reflector={"template": always})
    wrong, _ = tasks_of(forced, think=think)  # it closes thinking, whatever it is told
    assert prompt_of(forced, wrong).endswith("</think>\n\n<error_quote>")


@pytest.mark.parametrize(
    ("policy", "good", "bad"),
    [
        ("keep", CORRECT, WRONG),
        ("strip", "The answer is 4.", "We add 2 and 2. So the answer is 5."),
        ("last", CORRECT.partition("\n\n")[2], WRONG.partition("\n\n")[2]),
    ],
)
def test_what_the_reflector_is_shown_and_may_quote(
    opened: Any, policy: str, good: str, bad: str
) -> None:
    chats = chats_of(opened, policy)
    wrong, _ = tasks_of(chats)
    assert f"\nGood: {good}\nBad: {bad}\nQuote." in prompt_of(chats, wrong)
    assert f'"substring_words": {json.dumps(bad)}' in str(wrong.request.grammar)


def test_a_rollout_that_only_thinks_is_neither_shown_nor_reflected_on(opened: Any) -> None:
    texts = ("It may be 5", "so 4 it is, <answer>4</answer>", CORRECT)
    kept = tasks_of(chats_of(opened), texts)
    assert [task.rollout_id for task in kept] == ["p/0", "p/1", "p/2"]
    assert kept[0].demonstration_id == "p/1"
    assert [task.rollout_id for task in tasks_of(chats_of(opened, "strip"), texts)] == ["p/2"]
    wrong, *_ = tasks_of(chats_of(opened, "strip"), (WRONG, *texts[1:]))
    assert wrong.demonstration_id == "p/2"


class Answers:
    """An engine that answers every request with one text."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids = tuple(tokenizer.encode(text, add_special_tokens=False))

    async def generate(
        self, requests: Sequence[GenerationRequest], *, on_tokens: Any = None
    ) -> list[Generation]:
        return [
            Generation(
                request_id=request.id,
                index=0,
                completion_ids=self.ids,
                logprobs=(0.0,) * len(self.ids),
                finish_reason="stop",
                policy_version=0,
            )
            for request in requests
        ]


def spans_of(
    chats: Chats,
    answer: str,
    *,
    span: SpanConfig,
    texts: Sequence[str] = (WRONG, CORRECT),
    **options: Any,
) -> tuple[dict[str, str], dict[str, float]]:
    """(the distilled text by rollout id, the metrics of locating) when the reflector says this."""
    group, verdicts = make_group(chats.tokenizer, texts)
    given: dict[str, Any] = {"wrong_template": TEMPLATE, "sentence_template": TEMPLATE}
    engine: Any = Answers(chats.tokenizer, answer)
    reflections = asyncio.run(
        reflect(
            [group],
            verdicts,
            engine=engine,
            config=ReflectConfig.model_validate(given | options),
            chats=chats,
            stop_token_ids=(),
            seed=0,
            step=1,
        )
    )
    located = locate_errors(
        [group],
        verdicts,
        reflections,
        token_bytes=TokenBytes(chats.tokenizer),
        config=span,
        thinking=None if span.thinking else chats.thinking_lengths([group]),
    )
    ids = {rollout.id: rollout.completion_ids for rollout in group.rollouts}
    texts_of = {
        name: chats.tokenizer.decode(ids[name][found.start : found.end])
        for name, found in located.spans.items()
    }
    return texts_of, located.metrics()


def quoting(quote: str) -> str:
    return f"{quote}</error_quote><explanation>Add.</explanation>"


def test_spans_begin_after_thinking(opened: Any) -> None:
    found, metrics = spans_of(chats_of(opened), quoting("get 5."), span=SpanConfig())
    assert found == {"p/1": "\n\nThe answer is 4.<|end|>"}  # the quote is in thinking
    assert metrics["reflect/in_thinking_frac"] == 1 and metrics["reflect/found_frac"] == 0
    found, metrics = spans_of(chats_of(opened), quoting("answer is 5."), span=SpanConfig())
    assert found["p/0"] == " answer is 5.<|end|>"
    assert metrics["reflect/in_thinking_frac"] == 0 and metrics["reflect/found_frac"] == 1
    full = SpanConfig(on_miss="full")
    assert spans_of(chats_of(opened), quoting("no such"), span=full)[0]["p/0"] == (
        "\n\nWe add 2 and 2. So the answer is 5.<|end|>"
    )
    asked = SpanConfig(thinking=True)
    found, metrics = spans_of(chats_of(opened), quoting("get 5."), span=asked)
    assert found == {
        "p/0": " get 5." + WRONG.partition("get 5.")[2] + "<|end|>",
        "p/1": CORRECT + "<|end|>",
    }
    assert "reflect/in_thinking_frac" not in metrics


def test_a_quote_that_thinking_has_too_is_found_after_it(opened: Any) -> None:
    texts = ("We add 2 and 2.\n</think>\n\nNow. We add 2 and 2. So 5.", CORRECT)
    span = SpanConfig(granularity="span")
    found, metrics = spans_of(chats_of(opened), quoting("We add 2 and 2."), span=span, texts=texts)
    assert found["p/0"].strip() == "We add 2 and 2."
    assert metrics["reflect/ambiguous_frac"] == 0
    assert metrics["reflect/span_start_frac"] > 0.5


def test_nothing_is_distilled_of_a_rollout_that_only_thinks(opened: Any) -> None:
    texts = (WRONG, "so 4 it is, <answer>4</answer>")
    found, _ = spans_of(chats_of(opened), quoting("answer is 5."), span=SpanConfig(), texts=texts)
    assert list(found) == ["p/0"]


@pytest.mark.parametrize("policy", ["keep", "strip", "last"])
def test_sentences_are_counted_in_what_is_shown(opened: Any, policy: str) -> None:
    chats = chats_of(opened, policy)
    wrong, _ = tasks_of(chats, mode="sentence")
    number = wrong.sentences.index("So the answer is 5.") + 1
    assert (number == 2) == (policy == "strip")
    answer = f"{number}</error_sentence><explanation>Add.</explanation>"
    span = SpanConfig(granularity="sentence")
    found, _ = spans_of(chats, answer, span=span, mode="sentence")
    assert found["p/0"].strip() == "So the answer is 5."


def test_a_reflection_is_read_after_its_own_thinking(opened: Any) -> None:
    thought = "<error_quote>We add</error_quote> is it? no</think>\n\n<error_quote>"
    answer = thought + quoting("answer is 5.")
    found, _ = spans_of(chats_of(opened), answer, span=SpanConfig(), think=True)
    assert found["p/0"] == " answer is 5.<|end|>"


def test_nothing_changes_where_no_one_thinks(tokenizer: Any) -> None:
    texts = ("We add 2 and 2. So the answer is 5.", "The answer is 4.")
    for policy in ("keep", "strip", "last"):
        chats = chats_of(tokenizer, policy)
        found, metrics = spans_of(chats, quoting("answer is 5."), span=SpanConfig(), texts=texts)
        assert found == {"p/0": " answer is 5.<|end|>", "p/1": "The answer is 4.<|end|>"}
        assert "reflect/in_thinking_frac" not in metrics
