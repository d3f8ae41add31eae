"""Control arms: does the reflection, or where it points, do the work?

    reflect.control none       no reflection; all tokens of every rollout
    reflect.control shuffled   the reflection on a rollout of another problem; its own span
    span.control whole         its own reflection; all tokens of a wrong rollout
    span.control random        its own reflection; as many tokens elsewhere in a wrong rollout

An arm changes one thing, on the rollouts that would be trained without it. (`span.control negative`
changes the loss; it is in `methods/rosd.py`.)
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rosd_fast.config.templates import without_reflection
from rosd_fast.text.prompts import placeholders
from rosd_fast.types import ErrorSpan, Reflection

if TYPE_CHECKING:
    from rosd_fast.config import Config, TeacherConfig
    from rosd_fast.types import Group, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What a step trains in a control arm; without one, what it would train anyway.

    reflections: by the id of the rollout whose teacher reads them.
    spans: by rollout id.
    templates: the teacher's options.
    metrics: `control/num_reflections`, how many reflections are withheld or replaced;
        `control/num_unpaired`, how many rollouts are left out since no other problem of the step
        has a reflection of their kind; `control/num_spans`, how many spans are treated differently.
        Each only where the arm is on.
    """

    reflections: Mapping[str, Reflection]
    spans: dict[str, ErrorSpan]
    templates: TeacherConfig
    metrics: dict[str, float]

    def template_of(self, reflection: Reflection) -> str:
        """The user turn of the teacher that reads `reflection`."""
        templates = self.templates
        return templates.correct_template if reflection.correct else templates.wrong_template


def apply_control(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    reflections: Mapping[str, Reflection],
    spans: dict[str, ErrorSpan],
    config: Config,
    *,
    thinking: Mapping[str, int],
) -> Arm:
    """Put the step into the control arms of `config`.

    reflections, spans: each rollout's own, as generated and located.
    thinking: by rollout id, the number of first tokens where spans may not fall.
    """
    templates, metrics = config.teacher, {}
    if config.reflect.control == "none":
        spans = _whole_spans(groups, thinking)
        reflections = blank_reflections(groups, verdicts, on_correct=config.reflect.on_correct)
        spans = {name: span for name, span in spans.items() if name in reflections}
        templates = _without_reflections(templates)
        metrics["control/num_reflections"] = float(len(spans))
    if config.reflect.control == "shuffled":
        shuffled = shuffle_reflections(groups, reflections, templates, seed=config.seed)
        reflections = shuffled.reflections
        metrics["control/num_reflections"] = float(len(reflections))
        metrics["control/num_unpaired"] = float(shuffled.num_unpaired)
    if config.span.control != "off":
        wrong = sum(not verdicts[name].success for name in spans)
        metrics["control/num_spans"] = float(wrong)
        spans = control_spans(
            groups, verdicts, spans, config.span.control, seed=config.seed, thinking=thinking
        )
    return Arm(reflections=reflections, spans=spans, templates=templates, metrics=metrics)


def _whole_spans(groups: Sequence[Group], thinking: Mapping[str, int]) -> dict[str, ErrorSpan]:
    """The span of each rollout after its thinking; rollouts that have nothing else have none."""
    spans = {}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        start, end = thinking.get(rollout.id, 0), len(rollout.completion_ids)
        if start < end:
            spans[rollout.id] = ErrorSpan(
                rollout_id=rollout.id, start=start, end=end, source="full"
            )
    return spans


def _without_reflections(config: TeacherConfig) -> TeacherConfig:
    names = ("wrong_template", "correct_template")
    return config.model_copy(
        update={name: without_reflection(getattr(config, name)) for name in names}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled:
    """Reflections by the id of the rollout whose teacher reads them.

    num_unpaired: reflections that have no partner, since no other problem of the step has a
        reflection of their kind; their rollouts are left out.
    """

    reflections: dict[str, Reflection]
    num_unpaired: int


def shuffle_reflections(
    groups: Sequence[Group],
    reflections: Mapping[str, Reflection],
    config: TeacherConfig,
    *,
    seed: int,
) -> Shuffled:
    """Give each rollout the reflection on a rollout of another problem: wrong ones among wrong
    ones, and correct ones among correct ones.

    The problems of a kind are put into a random order, and each takes the reflections of the next;
    the last takes those of the first. The i-th rollout of a problem takes the i-th reflection,
    modulo their number. Only reflections that the teacher's template can show take part. `seed` and
    the version of the weights that sampled fix the order.
    """
    given: dict[str, Reflection] = {}
    num_unpaired = 0
    for correct in (False, True):
        template = config.correct_template if correct else config.wrong_template
        shown = _by_problem(groups, reflections, template, correct=correct)
        order = sorted(shown)
        random.Random(f"{seed}/{_version(groups)}/shuffled/{correct}").shuffle(order)
        if len(order) < 2:
            num_unpaired += sum(map(len, shown.values()))
            continue
        for problem, other in zip(order, order[1:] + order[:1], strict=True):
            for place, own in enumerate(shown[problem]):
                donor = shown[other][place % len(shown[other])]
                given[own.rollout_id] = replace(donor, rollout_id=own.rollout_id)
    return Shuffled(reflections=given, num_unpaired=num_unpaired)


def _by_problem(
    groups: Sequence[Group],
    reflections: Mapping[str, Reflection],
    template: str,
    *,
    correct: bool,
) -> dict[str, list[Reflection]]:
    """The reflections of a kind that have every text of the template, by problem id."""
    needed = placeholders(template) & {"quote", "explanation"}
    found: defaultdict[str, list[Reflection]] = defaultdict(list)
    for group in groups:
        for rollout in group.rollouts:
            reflection = reflections.get(rollout.id)
            if reflection is None or reflection.correct != correct:
                continue
            if all(getattr(reflection, name) for name in needed):
                found[group.problem.id].append(reflection)
    return dict(found)


def _version(groups: Sequence[Group]) -> int:
    """The version of the weights that sampled the step."""
    return min((r.policy_version for group in groups for r in group.rollouts), default=0)


def blank_reflections(
    groups: Sequence[Group], verdicts: Mapping[str, Verdict], *, on_correct: str
) -> dict[str, Reflection]:
    """A reflection without any text for each rollout that would be reflected on.

    on_correct: `reflect.on_correct`; with skip correct rollouts have none.
    """
    return {
        rollout.id: Reflection(
            rollout_id=rollout.id,
            demonstration_id=None,
            correct=verdicts[rollout.id].success,
            text="",
            quote=None,
            explanation=None,
            well_formed=True,
            num_tokens=0,
        )
        for group in groups
        for rollout in group.rollouts
        if rollout.completion_ids and (on_correct == "reflect" or not verdicts[rollout.id].success)
    }


def control_spans(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    spans: Mapping[str, ErrorSpan],
    control: str,
    *,
    seed: int,
    thinking: Mapping[str, int],
) -> dict[str, ErrorSpan]:
    """The spans with those of wrong rollouts replaced, as `span.control` whole or random says.

    A random span is as long as the located one and may overlap it; every place is equally likely,
    drawn by `seed`, the version of the weights that sampled and the rollout id.
    """
    replaced, whole = dict(spans), _whole_spans(groups, thinking)
    for group in groups:
        for rollout in group.rollouts:
            span = spans.get(rollout.id)
            if span is None or verdicts[rollout.id].success:
                continue
            if control == "whole":
                replaced[rollout.id] = whole[rollout.id]
            if control == "random":
                draw = random.Random(f"{seed}/{rollout.policy_version}/{rollout.id}/span")
                size, room = span.end - span.start, whole[rollout.id]
                start = draw.randrange(room.start, room.end - size + 1)
                replaced[rollout.id] = ErrorSpan(
                    rollout_id=rollout.id, start=start, end=start + size, source="random"
                )
    return replaced
