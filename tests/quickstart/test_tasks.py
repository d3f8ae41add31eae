"""The quickstart problems: solvable as written, seeded, and disjoint over the splits."""

from __future__ import annotations

import random
import re

import pytest

from rosd_fast.quickstart.tasks import (
    IN_DOMAIN,
    KINDS,
    OUT_OF_DOMAIN,
    SPLIT_SIZES,
    bucket_split,
    draw,
    load_split,
    split_plans,
)
from rosd_fast.verify import VERIFIERS
from scripts.quickstart.corpus import SLIP, solve

EQUATION = re.compile(r"(\d+) ([+x-]) (\d+) = (\d+)")


def test_splits_have_their_sizes_and_kinds() -> None:
    for split, size in SPLIT_SIZES.items():
        problems = load_split(split)
        assert len(problems) == size
        kinds = OUT_OF_DOMAIN if split.endswith("_ood") else IN_DOMAIN
        assert {problem.domain for problem in problems} == set(kinds)
        assert len({problem.id for problem in problems}) == size


def test_splits_never_overlap() -> None:
    """Kind and numbers identify a problem; names and wording do not."""
    owner: dict[tuple[str, tuple[int, ...]], str] = {}
    for split in SPLIT_SIZES:
        for plan in split_plans(split):
            assert owner.setdefault((plan.kind, plan.numbers), split) == split
            assert bucket_split(plan.bucket) == split.removesuffix("_ood")
    assert len(owner) == sum(SPLIT_SIZES.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_drawn_plans_stay_in_their_split(kind: str, split: str) -> None:
    rng = random.Random(3)
    plans = [draw(kind, rng, split) for _ in range(50)]
    assert {bucket_split(plan.bucket) for plan in plans} == {split}


@pytest.mark.parametrize("kind", KINDS)
def test_a_careful_solution_is_right_and_adds_up(kind: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        plan = draw(kind, rng, "train")
        solution = solve(plan, rng, SLIP[kind], careful=True)
        judged = VERIFIERS["number"](solution.text, str(plan.answer))
        score, found = judged.score, judged.answer
        assert (score, found) == (1.0, str(plan.answer))
        assert solution.first_error is None
        for left, sign, right, result in EQUATION.findall(solution.text):
            value = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}[sign](
                int(left), int(right)
            )
            assert value == int(result)


@pytest.mark.parametrize("kind", KINDS)
def test_slips_make_wrong_solutions_and_name_their_first_error(kind: str) -> None:
    rng = random.Random(2)
    wrong = [
        solution
        for solution in (solve(draw(kind, rng, "train"), rng, SLIP[kind]) for _ in range(300))
        if not solution.correct
    ]
    assert 60 < len(wrong) < 240
    for solution in wrong:
        error = solution.first_error
        assert error is not None and error.written in solution.text
        assert error.written != error.corrected


def test_the_same_seed_gives_the_same_problems() -> None:
    first = load_split("dev")
    split_plans.cache_clear()
    assert first == load_split("dev")
