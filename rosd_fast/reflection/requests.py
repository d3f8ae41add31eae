"""What the reflector is asked: one request per rollout.

A wrong rollout is shown beside a correct sibling, its demonstration; where there is none,
`select.on_no_success` says what replaces it. A prompt over the budget loses the middle of the
rollouts in it, never the problem or the instruction.

In the modes `verbatim` and `sentence` a request has a grammar (`grammar.py`), and its prompt ends
with the reflection's opening tag; thinking that the chat template opens is closed before it. With
`reflect.think` the reflector thinks first, and the opening tag is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.reflection.grammar import (
    Think,
    explanation_grammar,
    opening_tag,
    sentence_grammar,
    verbatim_grammar,
)
from rosd_fast.rollout.siblings import (
    ANSWER,
    REFERENCE,
    Demonstration,
    choose_demonstration,
)
from rosd_fast.text.prompts import (
    cut_middle,
    fill_template,
    fit_prompt,
    placeholders,
)
from rosd_fast.text.sentences import sentences
from rosd_fast.text.sizes import TextSize, encoded_size, sampled_size
from rosd_fast.text.thinking import THINK, Tags
from rosd_fast.text.token_bytes import ends_words
from rosd_fast.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig
    from rosd_fast.text.chat import ChatFormat, Chats
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import Group, Problem, Rollout, Verdict

NUMBERED = re.compile(r"^\[(\d+)\] .*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReflectionTask:
    """What the reflector is asked about one rollout."""

    rollout_id: str
    demonstration_id: str | None  # as in `Reflection`
    correct: bool  # whether the rollout is correct
    request: GenerationRequest
    prompt_cut: bool  # whether the middle of a rollout was left out
    opening: str = ""  # the reflection's first tag, which ends the prompt
    sentences: tuple[str, ...] = ()  # of the rollout, in mode sentence
    shown_from: int = 0  # the rollout's token at which the text begins that the prompt shows
    thinking: Tags | None = None  # tags of the thinking that the prompt ends in; None: in none


def build_reflection_requests(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    config: ReflectConfig,
    chats: Chats,
    stop_token_ids: Sequence[int],
    seed: int,
    step: int,
    on_no_success: str = "skip",
    cut_right: bool = False,
    token_bytes: TokenBytes | None = None,
) -> list[ReflectionTask]:
    """One task per rollout, in order.

    A correct rollout has none when `config.on_correct` is skip. A wrong one has none when the
    template shows a demonstration and there is none, or when nothing in the rollout can be quoted
    or shown. Raises UserError when a problem and the template alone are over
    `config.max_prompt_tokens`.

    on_no_success: `select.on_no_success`, for groups without a correct rollout.
    cut_right: cut the end of overlong user turns, as the public code does (a known bug).
    token_bytes: tell how long the rollouts are in tokens; None: they are encoded for that.
    """
    chat, think = reflection_format(chats.reflector, config)
    builder = _TaskBuilder(
        config=config,
        chats=chats,
        chat=chat,
        think=think,
        spaced=ends_words(chats.tokenizer),
        stop_token_ids=tuple(stop_token_ids),
        seed=seed,
        step=step,
        cut_right=cut_right,
        token_bytes=token_bytes,
        sizes={},
    )
    tasks = []
    for group in groups:
        demonstration = _demonstration(
            group, verdicts, config, on_no_success, chats, key=f"{seed}/{step}/{group.problem.id}"
        )
        builder.note_sizes(group)
        for rollout in group.rollouts:
            correct = verdicts[rollout.id].success
            task = builder.task(group.problem, rollout, demonstration, correct=correct)
            if task is not None:
                tasks.append(task)
    return tasks


def _demonstration(
    group: Group,
    verdicts: Mapping[str, Verdict],
    config: ReflectConfig,
    on_no_success: str,
    chats: Chats,
    *,
    key: str,
) -> Demonstration | None:
    """The correct solution that is shown beside the wrong rollouts of a group, or its replacement.

    key: seeds the choice among correct rollouts.
    """
    sibling = choose_demonstration(group, verdicts, config.demonstration, key=key, chats=chats)
    if sibling is not None:
        return Demonstration(id=sibling.id, text=chats.shown(sibling)[0])
    if on_no_success == "reference" and group.problem.reference:
        return Demonstration(id=REFERENCE, text=group.problem.reference)
    if on_no_success == "answer":
        return Demonstration(id=ANSWER, text=_answer_note(group.problem, config))
    return None


def _answer_note(problem: Problem, config: ReflectConfig) -> str:
    return fill_template(config.answer_note, {"answer": problem.answer})


@dataclass(frozen=True, slots=True, kw_only=True)
class _TaskBuilder:
    """What the tasks of a step have in common."""

    config: ReflectConfig
    chats: Chats
    chat: ChatFormat  # of reflections
    think: Think | None  # as for the grammars
    spaced: bool  # as for the grammars
    stop_token_ids: tuple[int, ...]
    seed: int
    step: int
    cut_right: bool
    token_bytes: TokenBytes | None
    sizes: dict[str, TextSize]  # of the texts so far

    def task(
        self,
        problem: Problem,
        rollout: Rollout,
        demonstration: Demonstration | None,
        *,
        correct: bool,
    ) -> ReflectionTask | None:
        """The task on one rollout, if it has one (see `build_reflection_requests`)."""
        config = self.config
        if correct and config.on_correct == "skip":
            return None
        template = template_of(config, correct=correct)
        if not self.chats.shows(rollout):
            return None
        text, shown_from = self.chats.shown(rollout)
        texts, parts = {"rollout": text}, ()
        if config.mode == "sentence" and not correct:
            parts = split_sentences(text)
            texts["rollout"] = number_sentences(parts)
        shown = demonstration if "demonstration" in placeholders(template) else None
        note = _answer_note(problem, config) if config.show_answer else ""
        if shown is not None:
            texts["demonstration"] = shown.text
        elif "demonstration" in placeholders(template):
            return None
        elif demonstration is not None and demonstration.id == ANSWER:
            shown, note = demonstration, demonstration.text
        opening = opening_tag(config.mode, correct=correct, think=self.think)
        keep, prompt_ids, prompt_cut = self._prompt(problem, template, texts, note, opening)
        grammar = None
        if config.mode != "free":
            visible = cut_middle(texts["rollout"], keep)
            grammar = self._grammar(text, visible, correct=correct)
            if grammar is None:
                return None
        return ReflectionTask(
            rollout_id=rollout.id,
            demonstration_id=None if shown is None else shown.id,
            correct=correct,
            request=GenerationRequest(
                id=f"step{self.step}/reflect/{rollout.id}",
                prompt_ids=prompt_ids,
                params=self._params,
                seed=self.seed,
                grammar=grammar,
                affinity=problem.id,
            ),
            prompt_cut=prompt_cut,
            sentences=parts,
            opening=opening,
            shown_from=shown_from,
            thinking=self.chat.opens,
        )

    def note_sizes(self, group: Group) -> None:
        """Read the sizes of the rollouts' texts off their tokens, if `token_bytes` is given."""
        if self.token_bytes is not None:
            for rollout in group.rollouts:
                text, start = self.chats.shown(rollout)
                ids = rollout.completion_ids[start:]
                self.sizes[text] = sampled_size(self.token_bytes, ids, text)

    def _size(self, text: str) -> TextSize:
        if text not in self.sizes:
            self.sizes[text] = encoded_size(self.chat.tokenizer, text)
        return self.sizes[text]

    @property
    def _params(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            stop_token_ids=self.stop_token_ids,
        )

    def _grammar(self, text: str, visible: str, *, correct: bool) -> str | None:
        """The grammar of the reflection; None when there is nothing that it could name.

        text: the rollout as prompts show it. visible: the same, cut to fit this prompt.
        """
        config = self.config
        limits: dict[str, Any] = {
            "max_tokens": config.max_new_tokens,
            "think": self.think,
            "spaced": self.spaced,
        }
        if correct:
            return explanation_grammar(**limits)
        if config.mode == "verbatim":
            return verbatim_grammar(text, min_words=config.min_quote_words, **limits)
        return sentence_grammar([int(match[1]) for match in NUMBERED.finditer(visible)], **limits)

    def _prompt(
        self, problem: Problem, template: str, texts: Mapping[str, str], note: str, opening: str
    ) -> tuple[int, tuple[int, ...], bool]:
        """(characters kept, the prompt, whether anything was cut).

        The middle of each text is cut, or with `cut_right` the end of the user turn, only as far as
        needed.

        note: what replaces {answer_note}.
        """
        config = self.config

        def user_turn(keep: int) -> str:
            values = {name: cut_middle(text, keep) for name, text in texts.items()}
            values |= {"problem": problem.prompt, "answer_note": note}
            return fill_template(template, values)

        longest = max(map(len, texts.values()), default=0)
        whole = user_turn(longest)
        limit = len(whole) if self.cut_right else longest

        def render(keep: int) -> tuple[int, ...]:
            user = whole[:keep] if self.cut_right else user_turn(keep)
            return self.chat.render_problem(problem, user, opening=opening)

        def size(keep: int) -> int:
            if self.cut_right:
                return self._size(whole).head(keep)
            return sum(self._size(text).middle_cut(keep) for text in texts.values())

        budget = config.max_prompt_tokens
        fitted = fit_prompt(render, longest=limit, max_tokens=budget, size=size)
        if fitted is None:
            raise UserError(
                f"the reflection prompt has {len(render(0))} tokens without any rollout, over the "
                f"budget of {config.max_prompt_tokens}",
                where=f"problem {problem.id}",
                fix="Raise reflect.max_prompt_tokens, or leave the problem out",
            )
        keep, prompt_ids = fitted
        return keep, prompt_ids, keep < limit


def reflection_format(chat: ChatFormat, config: ReflectConfig) -> tuple[ChatFormat, Think | None]:
    """(the format of the reflector's prompts, the thoughts that its grammars allow).

    `reflect.think` decides whether the reflector thinks, except in mode free, where the chat
    template does. So thinking that the template opens is closed, and the other way round.
    """
    if config.mode == "free":
        return chat, None
    if not config.think:
        return chat.without_thinking(), None
    chat = chat.with_thinking()
    if chat.mode == "closed" or chat.opens not in (None, THINK):
        return chat.without_thinking(), None
    added = chat.tokenizer.get_added_vocab()
    tokens = [tag for tag in (THINK.opening, THINK.closing) if tag in added]
    return chat, Think(tokens=tokens, opened=chat.opens is not None)


def template_of(config: ReflectConfig, *, correct: bool) -> str:
    """The user turn for a rollout."""
    return getattr(config, template_name(config, correct=correct))


def template_name(config: ReflectConfig, *, correct: bool) -> str:
    """The option that holds the user turn for a rollout."""
    if correct:
        return "correct_template"
    return "sentence_template" if config.mode == "sentence" else "wrong_template"


def split_sentences(text: str) -> tuple[str, ...]:
    """The sentences of a rollout; sentence n is the one that `locate.locate_sentence(n)` finds."""
    data = text.encode(errors="replace")
    return tuple(data[first:last].decode() for first, last in sentences(data))


def number_sentences(parts: Sequence[str]) -> str:
    """One sentence per line, as in "[1] Add the ones."; line breaks within one become spaces."""
    lines = (" ".join(part.split()) for part in parts)
    return "\n".join(f"[{number}] {line}" for number, line in enumerate(lines, start=1))
