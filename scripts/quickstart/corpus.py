"""The training texts of the quickstart model: solutions, reflections, and solutions after one.

The corpus is of mixed quality, like text from the web. In a plain solution a hard step is a slip
with probability `SLIP`, so a model that has learned the corpus well is right about half the time. A
solution that follows a reflection never repeats the error that the reflection explains, and slips
at other hard steps with the smaller probability `TEACHER_SLIP`. Self-distillation moves this
knowledge into the plain prompt.

Prompts use the templates of the `quickstart` preset, so the model knows the prompts of the loop.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rosd_fast.config import Config
from rosd_fast.quickstart.tasks import Plan, Step, draw
from rosd_fast.text.prompts import fill_template

SLIP = {"ledger": 0.55, "ages": 0.55, "shop": 0.5, "clock": 0.4, "pick": 0.35}
SHARE = {"ledger": 2, "ages": 2, "shop": 3, "clock": 2, "pick": 3}  # harder kinds get more
TEACHER_SLIP = 0.08
BLUNDER = 0.01  # probability of an error in any step that is not its typical slip
LEADS = (
    ("", "", "", ""),
    ("First, ", "Then ", "Then ", "Last, "),
    ("Step 1: ", "Step 2: ", "Step 3: ", "Step 4: "),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One written step, from the value `before` to the value `after`, right or not."""

    step: Step
    before: int
    after: int

    @property
    def right(self) -> int:
        return self.step.right(self.before)

    @property
    def hard(self) -> bool:
        return self.step.slip(self.before) is not None

    @property
    def written(self) -> str:
        return self.step.equation(self.before, self.after)

    @property
    def corrected(self) -> str:
        return self.step.equation(self.before, self.right)


@dataclass(frozen=True, slots=True)
class Solution:
    lines: tuple[Line, ...]
    text: str
    correct: bool

    @property
    def first_error(self) -> Line | None:
        return next((line for line in self.lines if line.after != line.right), None)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user turn and its answer."""

    user: str
    assistant: str


def solve(
    plan: Plan,
    rng: random.Random,
    slip: float,
    *,
    hinted: Line | None = None,
    careful: bool = False,
) -> Solution:
    """Write a solution. The step `hinted` is always right; with `careful` every step is."""
    value, lines = plan.first, []
    for step in plan.steps:
        wrong = step.slip(value)
        after = step.right(value)
        known = careful or (hinted is not None and hinted.step is step and hinted.before == value)
        if not known and wrong is not None and rng.random() < slip:
            after = wrong
        elif not known and rng.random() < BLUNDER:
            after = max(1, after + rng.choice((-10, -1, 1, 10)))
        lines.append(Line(step, value, after))
        value = after
    leads = rng.choice(LEADS)
    steps = " ".join(f"{lead}{line.written}." for lead, line in zip(leads, lines, strict=False))
    return Solution(tuple(lines), f"{steps} <answer>{value}</answer>", value == plan.answer)


def explain_wrong(error: Line) -> str:
    if error.hard:
        return f"{error.step.idea(error.before)}: {error.corrected}."
    return f"Count again: {error.corrected}."


def explain_correct(solution: Solution) -> str:
    hard = [line.written for line in solution.lines if line.hard]
    return f"Take care here: {', '.join(hard)}." if hard else "No step is hard here."


class Corpus:
    """An endless stream of conversations, fixed by the seed, from the train buckets only."""

    def __init__(self, config: Config, seed: int) -> None:
        self.reflect, self.teacher = config.reflect, config.teacher
        self.rng = random.Random(f"corpus:{seed}")

    def draw(self) -> list[Conversation]:
        """The conversations about one new problem."""
        rng = self.rng
        plan = draw(rng.choices(list(SHARE), list(SHARE.values()))[0], rng, "train")
        slip = SLIP[plan.kind]
        plain = solve(plan, rng, slip)
        out = [Conversation(plan.text, plain.text)]
        if plain.correct and plain.first_error is None:
            out.append(self.reflect_on_correct(plan, plain))
            if rng.random() < 0.5:
                out.append(self.after_correct(plan, plain))
        elif plain.first_error is not None:
            for _ in range(2):
                out.append(self.reflect_on_wrong(plan, plain, solve(plan, rng, slip, careful=True)))
            out.append(self.after_wrong(plan, plain.first_error))
        return out

    def reflect_on_wrong(self, plan: Plan, wrong: Solution, correct: Solution) -> Conversation:
        error = wrong.first_error
        assert error is not None
        texts = {"problem": plan.text, "demonstration": correct.text, "rollout": wrong.text}
        user = fill_template(self.reflect.wrong_template, texts | {"answer_note": ""})
        return Conversation(
            user,
            f"<error_quote>{error.written}</error_quote>\n<explanation>{explain_wrong(error)}</explanation>",
        )

    def reflect_on_correct(self, plan: Plan, correct: Solution) -> Conversation:
        texts = {"problem": plan.text, "rollout": correct.text, "answer_note": ""}
        user = fill_template(self.reflect.correct_template, texts)
        return Conversation(user, f"<explanation>{explain_correct(correct)}</explanation>")

    def after_wrong(self, plan: Plan, error: Line) -> Conversation:
        texts = {"problem": plan.text, "quote": error.written, "explanation": explain_wrong(error)}
        user = fill_template(self.teacher.wrong_template, texts)
        return Conversation(user, solve(plan, self.rng, TEACHER_SLIP, hinted=error).text)

    def after_correct(self, plan: Plan, correct: Solution) -> Conversation:
        texts = {"problem": plan.text, "explanation": explain_correct(correct)}
        user = fill_template(self.teacher.correct_template, texts)
        return Conversation(user, solve(plan, self.rng, TEACHER_SLIP, careful=True).text)
