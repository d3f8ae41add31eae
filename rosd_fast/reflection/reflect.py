"""Reflection: the model says where a wrong rollout goes wrong, and what makes a right one right.

    kept groups -> one request per rollout -> generations -> Reflection (quote, explanation)

The mode is how a reflection names the error. `verbatim`: a quote that is constrained to words of
the rollout. `sentence`: the number of one of its sentences, which the prompt numbers. `free`: a
quote without any constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.background import in_background
from rosd_fast.reflection.filters import apply_filters
from rosd_fast.reflection.parse import parse_reflection
from rosd_fast.reflection.requests import ReflectionTask, build_reflection_requests
from rosd_fast.text.decode import decode
from rosd_fast.types import Reflection

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.text.chat import Chats
    from rosd_fast.text.token_bytes import TokenBytes
    from rosd_fast.types import Generation, Group, Verdict


async def reflect(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    engine: RolloutEngine,
    config: ReflectConfig,
    chats: Chats,
    stop_token_ids: Sequence[int],
    seed: int,
    step: int,
    on_no_success: str = "skip",
    on_tokens: Callable[[int], None] | None = None,
    cut_right: bool = False,
    token_bytes: TokenBytes | None = None,
) -> dict[str, Reflection]:
    """Reflections on the rollouts of `groups` (the groups that were kept), by rollout id.

    on_no_success, cut_right, token_bytes: as for `build_reflection_requests`, which runs in a
    thread. `on_tokens(k)` is called after k more tokens were sampled.

    Raises UserError as `build_reflection_requests` and the engine do, and ValueError when the
    engine's completions are not those that were requested.
    """
    tasks = await in_background(
        build_reflection_requests,
        groups,
        verdicts,
        config=config,
        chats=chats,
        stop_token_ids=stop_token_ids,
        seed=seed,
        step=step,
        on_no_success=on_no_success,
        cut_right=cut_right,
        token_bytes=token_bytes,
    )
    if not tasks:
        return {}
    generations = await engine.generate([task.request for task in tasks], on_tokens=on_tokens)
    if [generation.request_id for generation in generations] != [task.request.id for task in tasks]:
        raise ValueError(
            f"the engine's completions are not, in order, those of {len(tasks)} requests"
        )
    reflections = {
        task.rollout_id: _read(task, generation, config.mode, chats)
        for task, generation in zip(tasks, generations, strict=True)
    }
    return apply_filters(reflections, groups, config)


def _read(task: ReflectionTask, generation: Generation, mode: str, chats: Chats) -> Reflection:
    """The reflection that the reflector wrote for `task`, read after any thinking."""
    ids = generation.completion_ids
    start = chats.thinking.num_tokens(ids, opened=task.thinking)
    parsed = parse_reflection(
        task.opening + decode(chats.tokenizer, ids[start:]),
        correct=task.correct,
        sentences=task.sentences if mode == "sentence" else None,
    )
    return Reflection(
        rollout_id=task.rollout_id,
        demonstration_id=task.demonstration_id,
        correct=task.correct,
        text=task.opening + decode(chats.tokenizer, ids),
        quote=parsed.quote,
        explanation=parsed.explanation,
        well_formed=parsed.well_formed,
        num_tokens=len(generation.completion_ids),
        sentence=parsed.sentence,
        mode=mode,
        prompt_cut=task.prompt_cut,
        shown_from=task.shown_from,
        tolerated=parsed.tolerated,
    )


def reflection_metrics(reflections: Mapping[str, Reflection]) -> dict[str, float]:
    """`reflect/num_reflections`, their mean length in tokens, and these shares of them:

    well_formed_frac   with every tag
    tolerated_frac     read although a tag is missing or in another case
    truncated_frac     whose prompt lacks the middle of a rollout
    leak_frac          whose explanation states the final answer
    empty_frac         whose explanation is too short to use
    copied_frac        whose explanation is copied from the solution
    refused_frac       whose explanation is not used, for any of these three reasons
    """
    count = len(reflections)
    metrics = {"reflect/num_reflections": float(count)}
    if not count:
        return metrics
    items = reflections.values()
    for name, number in (
        ("well_formed", sum(item.well_formed for item in items)),
        ("tolerated", sum(bool(item.tolerated) for item in items)),
        ("truncated", sum(item.prompt_cut for item in items)),
        ("leak", sum(item.leaks for item in items)),
        ("empty", sum(item.refused == "empty" for item in items)),
        ("copied", sum(item.refused == "copy" for item in items)),
        ("refused", sum(item.refused is not None for item in items)),
    ):
        metrics[f"reflect/{name}_frac"] = number / count
    metrics["reflect/tokens_mean"] = sum(item.num_tokens for item in items) / count
    return metrics
