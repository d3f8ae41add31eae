"""Reflection prompts over their budget: cut as little as possible, with few renders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosd_fast.config import ChatConfig, ReflectConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.reflection import requests
from rosd_fast.text.prompts import ELLIPSIS, SLACK, cut_middle, fit_prompt
from rosd_fast.text.sizes import TextSize, encoded_size, sampled_size
from rosd_fast.text.token_bytes import TokenBytes

CHATTING = ("tokenizer", "smollm2_tokenizer", "sentencepiece_tokenizer")
TOKENIZERS = (*CHATTING, "prefix_space_tokenizer", "metaspace_tokenizer")
# Words, numbers, and what a tokenizer may join, split, or take for something else.
PIECES = (
    "First, we add. ",
    "the wrong step ",
    "3.5 + 41234 = ",
    "naïve café ",
    "日本語",
    "👩‍🔬🧮",
    "\n\n",
    "    ",
    "<|end|>",
    "<think>",
    ELLIPSIS,
    "responsibilities ",
    "a",
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def bisected(
    render: Callable[[int], tuple[int, ...]], *, longest: int, max_tokens: int, size: Any
) -> tuple[int, tuple[int, ...]] | None:
    """`fit_prompt` without sizes: every cut is rendered."""
    ids = render(longest)
    if len(ids) <= max_tokens:
        return longest, ids
    if longest <= 1 or len(best := render(1)) > max_tokens:
        return None
    low, high = 1, longest
    while high - low > 1:
        middle = (low + high) // 2
        ids = render(middle)
        if len(ids) <= max_tokens:
            low, best = middle, ids
        else:
            high = middle
    return low, best


def checked(
    render: Callable[[int], tuple[int, ...]],
    *,
    longest: int,
    max_tokens: int,
    size: Callable[[int], int],
) -> tuple[int, tuple[int, ...]] | None:
    """`fit_prompt`, compared with every cut that is rendered."""
    sizes = [size(keep) for keep in range(longest + 1)]
    assert sizes == sorted(sizes)
    options: dict[str, Any] = {"longest": longest, "max_tokens": max_tokens, "size": size}
    fitted, reference = fit_prompt(render, **options), bisected(render, **options)
    if fitted is None or reference is None:
        assert fitted == reference
        return fitted
    keep, ids = fitted
    assert ids == render(keep) and len(ids) <= max_tokens
    assert (keep == longest) == (reference[0] == longest)
    if keep < longest:
        is_full = len(ids) >= max_tokens - max_tokens // SLACK
        assert is_full or len(render(keep + 1)) > max_tokens
    return fitted


@pytest.mark.parametrize("name", CHATTING)
@pytest.mark.parametrize("known", [True, False])
@given(data=st.data())
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_more_is_cut_than_needed(
    request: pytest.FixtureRequest, make_group: Any, name: str, known: bool, data: Any
) -> None:
    """known: whether the tokens of the rollouts are given."""
    tokenizer = request.getfixturevalue(name)
    texts = [data.draw(TEXTS), data.draw(TEXTS), data.draw(TEXTS)]
    group, verdicts = make_group(texts, [0.0, 1.0, 1.0])
    budget = data.draw(st.integers(180, 1400))
    mode = data.draw(st.sampled_from(["verbatim", "sentence", "free"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "fit_prompt", checked)
        tasks = requests.build_reflection_requests(
            [group],
            verdicts,
            config=ReflectConfig(
                mode=mode,
                max_prompt_tokens=budget,
                wrong_template="{problem}\n{demonstration}\n{rollout}\n{answer_note}Quote.",
                sentence_template="{problem}\n{demonstration}\n{rollout}\n{answer_note}Count.",
                correct_template="{problem}\n{rollout}\n{answer_note}Explain.",
            ),
            chats=make_chats(ChatConfig(), tokenizer),
            stop_token_ids=(),
            seed=0,
            step=1,
            token_bytes=TokenBytes(tokenizer) if known else None,
        )
    assert all(len(task.request.prompt_ids) <= budget for task in tasks)


def test_sampled_tokens_that_no_text_is_encoded_to(tokenizer: Any, make_group: Any) -> None:
    """A model may spell words letter by letter: their text is much shorter than they are."""
    group, verdicts = make_group(
        ["the wrong rate was used " * 60, "add the ones first " * 60], [0, 1]
    )
    spelled = []
    for rollout in group.rollouts:
        ids = [token for char in rollout.text for token in tokenizer.encode(char)]
        assert len(ids) > 1.5 * len(rollout.completion_ids)
        spelled.append(replace(rollout, completion_ids=tuple(ids), logprobs=(0.0,) * len(ids)))
    group = replace(group, rollouts=tuple(spelled))
    options: dict[str, Any] = {
        "chats": make_chats(ChatConfig(), tokenizer),
        "stop_token_ids": (),
        "seed": 0,
        "step": 1,
    }
    for budget in (500, 700, 5000):
        config = ReflectConfig(max_prompt_tokens=budget)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(requests, "fit_prompt", checked)
            first, second = requests.build_reflection_requests(
                [group], verdicts, config=config, token_bytes=TokenBytes(tokenizer), **options
            )
        assert first.prompt_cut == (budget < 5000)
        assert not second.prompt_cut or budget < 5000


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sizes(request: pytest.FixtureRequest, name: str) -> None:
    """Read off sampled tokens, sizes are nearly those of the encoded text."""
    tokenizer = request.getfixturevalue(name)
    text = "First, we add 3.5 and 4 to get 7.5. naïve café, 日本語 then we divide by 2."
    ids = tokenizer.encode(text, add_special_tokens=False)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampled, encoded = sampled_size(TokenBytes(tokenizer), ids, text), encoded_size(tokenizer, text)
    assert len(sampled.ends) == len(encoded.ends) == len(ids)
    assert sampled.ends[-1] == encoded.ends[-1] == len(text)
    for keep in range(len(text) + 1):
        assert abs(sampled.middle_cut(keep) - encoded.middle_cut(keep)) <= 4
        head = cut_middle(text, keep).partition(ELLIPSIS)[0]
        assert abs(encoded.head(len(head)) - encoded_size(tokenizer, head).head(len(head))) <= 6
        assert encoded.middle_cut(keep) >= encoded.middle_cut(max(0, keep - 1))
    assert encoded.middle_cut(len(text)) == len(ids)


def test_the_size_of_a_text_without_its_first_characters(tokenizer: Any) -> None:
    ids = tokenizer.encode("  \n the wrong step")
    text = "the wrong step"
    size = sampled_size(TokenBytes(tokenizer), ids, text)
    assert size.ends[-1] == len(text) and size.head(3) >= 1


def test_the_size_of_nothing() -> None:
    assert TextSize([]).head(5) == TextSize([]).middle_cut(5) == 0
