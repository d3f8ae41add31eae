"""The control arms of ROSD, and what its teacher is shown, on groups small enough to do by hand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.errors import UserError
from rosd_fast.methods import METHODS
from rosd_fast.methods.rosd import Rosd
from rosd_fast.report import read_rollouts, rollouts_path
from rosd_fast.report.metrics import read_metrics
from rosd_fast.report.progress import Hidden
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.train import train
from rosd_fast.types import Reflection, Verdict

WRONG = "{problem}\nWrong: {quote}\n{explanation}\nSolve."
CORRECT = "{problem}\nHint: {explanation}\nSolve."
TEXTS = ["First 2 + 2 is 5. Then stop.", "It is 4.", "So 2 + 2 is 3. Then stop."]
ANSWERS = ["5", "4", None]


@dataclass(frozen=True)
class Model:
    tokenizer: Any


def make_method(tokenizer: Any, options: Config) -> Rosd:
    model: Any = Model(tokenizer)
    return Rosd(options, model, TokenBytes(tokenizer), make_chats(options.chat, tokenizer))


@dataclass(frozen=True)
class Step:
    """Three problems with the same three rollouts: wrong, correct, wrong."""

    groups: list[Any]
    verdicts: dict[str, Verdict]
    reflections: dict[str, Reflection]


@pytest.fixture(scope="module")
def step(make_group) -> Step:
    groups, verdicts, reflections = [], {}, {}
    for name in "abc":
        group, _ = make_group(TEXTS, [0.0, 1.0, 0.0], id=name, prompt=f"Problem {name}?")
        groups.append(group)
        for rollout, answer in zip(group.rollouts, ANSWERS, strict=True):
            correct = answer == "4"
            verdicts[rollout.id] = Verdict(
                rollout_id=rollout.id, score=float(correct), success=correct, answer=answer
            )
            quote = {"0": "2 is 5", "2": "2 is 3"}.get(rollout.id[-1])
            reflections[rollout.id] = reflection(rollout.id, quote, correct=correct)
    return Step(groups, verdicts, reflections)


def reflection(rollout_id: str, quote: str | None, *, correct: bool) -> Reflection:
    return Reflection(
        rollout_id=rollout_id,
        demonstration_id=None if correct else f"{rollout_id[0]}/1",
        correct=correct,
        text="",
        quote=quote,
        explanation=f"Idea of {rollout_id}.",
        well_formed=True,
        num_tokens=1,
    )


def config(**changes: Any) -> Config:
    given = {"teacher.wrong_template": WRONG, "teacher.correct_template": CORRECT}
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    return apply_args(Config(), given | named)


def build(tokenizer, step, *, groups=None, **changes):
    method = make_method(tokenizer, config(**changes))
    built = method.build(groups or step.groups, step.verdicts, step.reflections, Hidden())
    return {sample.rollout_id: sample for sample in built.samples}, built


def prompt(tokenizer, sample) -> str:
    text = tokenizer.decode(sample.teacher_prompt_ids)
    return text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


def parts(samples) -> dict[str, tuple[int, int]]:
    return {name: (sample.start, sample.end) for name, sample in samples.items()}


def test_without_an_arm(tokenizer, step):
    samples, built = build(tokenizer, step)
    assert prompt(tokenizer, samples["a/0"]) == ("Problem a?\nWrong: 2 is 5\nIdea of a/0.\nSolve.")
    assert prompt(tokenizer, samples["a/1"]) == "Problem a?\nHint: Idea of a/1.\nSolve."
    assert len(samples) == 9 and not [name for name in built.metrics if "control" in name]
    for sample in (samples["a/0"], samples["a/2"]):
        assert 0 < sample.start < sample.end == len(sample.completion_ids)


def test_none_trains_everything_under_the_rest_of_the_template(tokenizer, step):
    samples, built = build(tokenizer, step, reflect__control="none")
    wrong, correct = "Problem b?\nWrong: \n\nSolve.", "Problem b?\nHint: \nSolve."
    assert [prompt(tokenizer, samples[f"b/{i}"]) for i in range(3)] == [wrong, correct, wrong]
    assert parts(samples) == {
        r.id: (0, len(r.completion_ids)) for group in step.groups for r in group.rollouts
    }
    assert built.metrics["control/num_reflections"] == 9
    skipped, _ = build(tokenizer, step, reflect__control="none", reflect__on_correct="skip")
    assert sorted(skipped) == ["a/0", "a/2", "b/0", "b/2", "c/0", "c/2"]
    plain = {"teacher__wrong_template": "{problem}{quote}{explanation}"}
    samples, _ = build(tokenizer, step, reflect__control="none", **plain)
    assert samples["c/0"].teacher_prompt_ids == samples["c/0"].student_prompt_ids


def test_none_generates_nothing(tokenizer, step):
    method = make_method(tokenizer, config(reflect__control="none"))
    engines: Any = None  # none of its parts is touched
    assert asyncio.run(method.annotate(1, step.groups, step.verdicts, engines, Hidden())) == {}
    assert not method.needs_teacher_engine


def test_shuffled_reads_the_reflection_on_another_problem(tokenizer, step):
    own, _ = build(tokenizer, step)
    samples, built = build(tokenizer, step, reflect__control="shuffled")
    assert parts(samples) == parts(own)
    assert built.metrics["control/num_reflections"] == 9
    assert built.metrics["control/num_unpaired"] == 0
    donors = {
        name: prompt(tokenizer, sample).split("Idea of ")[1][:3] for name, sample in samples.items()
    }
    for kind in ("0", "1", "2"):
        given = {name[0]: donors[f"{name}/{kind}"] for name in "abc"}
        assert all(donor[0] != name and donor[2] == kind for name, donor in given.items())
        assert {donor[0] for donor in given.values()} == {"a", "b", "c"}
    for name in ("a/0", "c/2"):
        quote = {"0": "2 is 5", "2": "2 is 3"}[donors[name][2]]
        assert prompt(tokenizer, samples[name]) == (
            f"Problem {name[0]}?\nWrong: {quote}\nIdea of {donors[name]}.\nSolve."
        )
    assert build(tokenizer, step, reflect__control="shuffled")[0] == samples
    orders = {
        tuple(
            prompt(tokenizer, s)
            for s in build(tokenizer, step, reflect__control="shuffled", seed=seed)[0].values()
        )
        for seed in range(8)
    }
    assert len(orders) == 4  # two cycles of three problems, for each of two kinds


def test_shuffled_leaves_out_what_has_no_partner(tokenizer, step):
    samples, built = build(tokenizer, step, groups=step.groups[:1], reflect__control="shuffled")
    assert samples == {} and built.metrics["control/num_unpaired"] == 3
    assert built.metrics["control/num_reflections"] == 0
    # Correct rollouts have partners; of the wrong ones only those of one problem have reflections.
    few = {k: v for k, v in step.reflections.items() if v.correct or k == "b/0"}
    samples, built = build(
        tokenizer, Step(step.groups, step.verdicts, few), reflect__control="shuffled"
    )
    assert sorted(samples) == ["a/1", "b/1", "c/1"]
    assert built.metrics["control/num_unpaired"] == 1


def test_whole(tokenizer, step):
    own, plain = build(tokenizer, step)
    samples, built = build(tokenizer, step, span__control="whole")
    assert parts(samples) == {name: (0, len(s.completion_ids)) for name, s in own.items()}
    assert [s.teacher_prompt_ids for s in samples.values()] == [
        s.teacher_prompt_ids for s in own.values()
    ]
    assert built.metrics["control/num_spans"] == 6
    assert built.metrics["reflect/found_frac"] == plain.metrics["reflect/found_frac"] == 1
    missed = step.reflections | {"a/0": reflection("a/0", "nowhere", correct=False)}
    samples, _ = build(tokenizer, Step(step.groups, step.verdicts, missed), span__control="whole")
    assert len(samples) == 8 and "a/0" not in samples  # the rollouts that are trained without it


def test_random_spans_are_as_long_and_anywhere(tokenizer, step):
    options = {"span__control": "random", "span__granularity": "span"}
    own, _ = build(tokenizer, step, span__granularity="span")
    starts: dict[str, set[int]] = {name: set() for name in own}
    for seed in range(60):
        samples, built = build(tokenizer, step, seed=seed, **options)
        assert built.metrics["control/num_spans"] == 6
        for name, sample in samples.items():
            assert sample.num_tokens == own[name].num_tokens
            assert sample.teacher_prompt_ids == own[name].teacher_prompt_ids
            starts[name].add(sample.start)
    last = len(own["a/0"].completion_ids) - own["a/0"].num_tokens
    assert starts["a/0"] == set(range(last + 1))
    assert starts["a/1"] == {0}
    first, again = (build(tokenizer, step, **options)[0] for _ in range(2))
    assert first == again
    suffix, _ = build(tokenizer, step)
    moved, built = build(tokenizer, step, span__control="random")
    assert {n: s.num_tokens for n, s in moved.items()} == {
        n: s.num_tokens for n, s in suffix.items()
    }
    assert built.spans["a/0"].source == "random" and built.spans["a/1"].source == "full"


def test_no_arm_moves_a_span_into_thinking(tokenizer, make_group):
    text = "<think>2 is 5, is it?</think> So 2 is 5. Then stop."
    group, verdicts = make_group([text], [0.0], id="a")
    (rollout,) = group.rollouts
    made = Step([group], verdicts, {"a/0": reflection("a/0", "2 is 5", correct=False)})
    answer = make_method(tokenizer, config()).chats.num_thinking(rollout)
    assert answer > 5
    end, starts = len(rollout.completion_ids), set()
    for arm in ({"reflect__control": "none"}, {"span__control": "whole"}):
        assert parts(build(tokenizer, made, **arm)[0]) == {"a/0": (answer, end)}
        assert parts(build(tokenizer, made, span__thinking=True, **arm)[0]) == {"a/0": (0, end)}
    options = {"span__control": "random", "span__granularity": "span"}
    for seed in range(40):
        samples, _ = build(tokenizer, made, seed=seed, **options)
        starts.add(samples["a/0"].start)
        size = samples["a/0"].num_tokens
    assert starts == set(range(answer, end - size + 1))


def test_negative_has_no_teacher_on_wrong_rollouts(tokenizer, step):
    own, _ = build(tokenizer, step)
    samples, built = build(tokenizer, step, span__control="negative", span__negative_weight=0.5)
    assert parts(samples) == parts(own)
    for name, sample in samples.items():
        if step.verdicts[name].success:
            assert sample == own[name]
        else:
            assert (sample.advantage, sample.weight) == (-1.0, 0.5)
            assert sample.teacher_prompt_ids is None
    assert built.metrics["control/num_spans"] == 6
    halved, _ = build(tokenizer, step, span__control="negative", loss__distill_weight=0.5)
    assert [halved[f"a/{i}"].weight for i in range(3)] == [1.0, 0.5, 1.0]


def test_the_teacher_may_see_a_sibling_and_the_verifiers_words(tokenizer, step):
    templates = {
        "teacher__wrong_template": "{problem}\n{demonstration}\n{feedback}\n{explanation}",
        "teacher__correct_template": "{problem}\n{demonstration}\n{explanation}",
        "teacher__show_feedback": True,
        "teacher__demonstration_note": "Solved: {demonstration}",
    }
    samples, built = build(tokenizer, step, **templates)
    assert prompt(tokenizer, samples["a/0"]) == (
        "Problem a?\nSolved: It is 4.\nThe answer 5 is wrong.\nIdea of a/0."
    )
    assert prompt(tokenizer, samples["a/2"]) == (
        "Problem a?\nSolved: It is 4.\nNo answer was found.\nIdea of a/2."
    )
    # The only correct rollout has nothing to show, and its note is left out as a whole.
    assert prompt(tokenizer, samples["a/1"]) == "Problem a?\n\nIdea of a/1."
    assert built.metrics["select/num_no_demonstration"] == 3
    samples, built = build(tokenizer, step, select__on_lone_success="own", **templates)
    assert prompt(tokenizer, samples["a/1"]) == "Problem a?\nSolved: It is 4.\nIdea of a/1."
    assert built.metrics["select/num_no_demonstration"] == 0
    silent, _ = build(tokenizer, step, **(templates | {"teacher__show_feedback": False}))
    assert prompt(tokenizer, silent["a/0"]) == "Problem a?\nSolved: It is 4.\n\nIdea of a/0."
    # Without a reflection the sibling stays.
    bare, _ = build(tokenizer, step, reflect__control="none", **templates)
    assert (
        prompt(tokenizer, bare["a/0"]) == "Problem a?\nSolved: It is 4.\nThe answer 5 is wrong.\n"
    )


def test_teacher_and_reflector_see_the_same_sibling(tokenizer, make_group):
    group, verdicts = make_group(["It is 5.", "4", "It is 4."], [0.0, 1.0, 1.0], id="a")
    seen = reflection("a/0", "is 5", correct=False)
    for shown, text in (("a/1", "4"), ("a/2", "It is 4.")):
        reflections = {"a/0": Reflection(**{**fields(seen), "demonstration_id": shown})}
        step = Step([group], verdicts, reflections)
        template = "{problem}\n{demonstration}\n{explanation}"
        samples, _ = build(tokenizer, step, teacher__wrong_template=template)
        assert prompt(tokenizer, samples["a/0"]) == f"2 + 2 = ?\n{text}\nIdea of a/0."


def fields(record: Reflection) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Reflection.__slots__}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"rosd"}))
def test_other_methods_have_no_arms(method: str) -> None:
    for name, value in (("reflect.control", "shuffled"), ("span.control", "whole")):
        options = apply_args(Config(), {"method": method, name: value})
        with pytest.raises(UserError, match=rf"{name} {value}: the method {method} has no"):
            METHODS[method].check_options(options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reflect.control": "none", "span.control": "whole"}, "span.control is whole: with"),
        ({"span.control": "negative", "loss.policy_weight": 1.0}, "loss.policy_weight gives"),
    ],
)
def test_arms_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_args(Config(), given)


@pytest.mark.parametrize(
    "arm",
    [
        {"reflect.control": "none"},
        {"reflect.control": "shuffled", "span.control": "random"},
        {"span.control": "negative"},
    ],
)
def test_a_run_in_an_arm_says_so(
    arm: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "steps": 1,
        "out": str(tmp_path),
        "name": "run",
        "sample.problems_per_step": 3,
        "sample.group_size": 4,
        "data.dev": None,
        "data.dev_ood": None,
    }
    run = train(apply_args(load_preset("quickstart"), options | arm))
    named = ", ".join(f"{name} {value}" for name, value in arm.items())
    assert capsys.readouterr().out.count(f"control arm: {named}") == 2  # first and last
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["rollout/trained_frac"] > 0 and row["loss/grad_norm"] > 0
    assert row.get("control/num_spans", 0) + row.get("control/num_reflections", 0) > 0
    rollouts = read_rollouts(rollouts_path(run, 1))
    wrong = [r for r in rollouts if r["span"] and not r["success"]]
    assert wrong
    if "none" in arm.values():
        assert row["reflect/num_reflections"] == 0
        assert {r["span"]["source"] for r in wrong} == {"full"}
        assert not any(r["reflection"] for r in rollouts)
    if "negative" in arm.values():
        assert {r["divergence"] for r in wrong} == {None}
        assert "policy/loss" in row
