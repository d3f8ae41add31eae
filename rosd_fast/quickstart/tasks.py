"""Step-by-step problems of five kinds, drawn from seeded generators.

A problem is a `Plan`: the values it states and the `Step`s that solve it. Three kinds are in domain
(ledger, ages, shop), two are held out (clock, pick). A step is *hard* when it needs a carry, a
borrow, a large product, a turn of the clock or a comparison of all numbers; each hard step has one
typical slip.

Splits never overlap: the kind and numbers of a plan, without its wording, are hashed to a bucket,
and each bucket belongs to one split. The model's training corpus uses the train buckets only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from rosd_fast.types import Problem

Split = Literal["train", "dev", "test", "dev_ood", "test_ood"]

IN_DOMAIN = ("ledger", "ages", "shop")
OUT_OF_DOMAIN = ("clock", "pick")
SPLIT_SIZES: dict[Split, int] = {
    "train": 3000,
    "dev": 150,
    "test": 300,
    "dev_ood": 100,
    "test_ood": 200,
}
NAMES = "Ana Ben Cal Dan Eva Finn Gus Hana Ivo Jana Kim Leo Mia Noa Otto Pia".split()
THINGS = "coins stamps cards shells pens apples books beads".split()


@dataclass(frozen=True, slots=True)
class Step:
    """A step `left = right`. The callables are functions of the running value."""

    left: str  # {} is the running value
    right: Callable[[int], int]
    slip: Callable[[int], int | None]  # what a slip writes instead of `right`; None: an easy step
    idea: Callable[[int], str]  # how to do the step right, in words
    unit: str = ""

    def equation(self, value: int, result: int) -> str:
        return f"{self.left.format(value)} = {result}{self.unit}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A problem: its statement and the steps that solve it."""

    kind: str
    numbers: tuple[int, ...]  # what the problem states; with `kind` its identity
    text: str
    first: int  # the running value before the first step
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        value = self.first
        for step in self.steps:
            value = step.right(value)
        return value

    @property
    def solution(self) -> str:
        """All steps, each done right, and the answer in its tag."""
        value, lines = self.first, []
        for step in self.steps:
            result = step.right(value)
            lines.append(f"{step.equation(value, result)}.")
            value = result
        return f"{' '.join(lines)} <answer>{value}</answer>"

    @property
    def bucket(self) -> int:
        key = f"{self.kind}:{','.join(map(str, self.numbers))}"
        return hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % 10


def bucket_split(bucket: int) -> Literal["train", "dev", "test"]:
    """The split of a bucket: eight of ten are train, one dev, one test."""
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


def plus(amount: int) -> Step:
    """An addition; the slip forgets the carry."""

    def slip(value: int) -> int | None:
        return value + amount - 10 if value % 10 + amount % 10 >= 10 else None

    def idea(value: int) -> str:
        ones = value % 10, amount % 10
        return f"{ones[0]} + {ones[1]} = {sum(ones)}, so carry the one"

    return Step("{} + " + str(amount), lambda value: value + amount, slip, idea)


def minus(amount: int) -> Step:
    """A subtraction; the slip subtracts the smaller digit from the larger instead of borrowing."""

    def slip(value: int) -> int | None:
        ones = value % 10 - amount % 10
        return value - value % 10 - amount // 10 * 10 - ones if ones < 0 else None

    def idea(value: int) -> str:
        return f"{value % 10} is less than {amount % 10}, so borrow a ten"

    return Step("{} - " + str(amount), lambda value: value - amount, slip, idea)


def times(count: int, price: int) -> Step:
    """A product of two small numbers; the slip is the neighbour in the times table."""
    hard = count >= 5 and price >= 5
    return Step(
        f"{count} x {price}",
        lambda _: count * price,
        lambda _: (count - 1) * price if hard else None,
        lambda _: f"That is {price} more than {(count - 1) * price}",
    )


def turn(hours: int) -> Step:
    """A move on a twelve-hour clock; the slip starts over after ten."""

    def slip(value: int) -> int | None:
        return value + hours - 10 if value + hours > 12 else None

    return Step(
        "{} o'clock + " + f"{hours} h",
        lambda value: (value + hours - 1) % 12 + 1,
        slip,
        lambda value: f"{value} + {hours} = {value + hours}, and the clock starts over after 12",
        " o'clock",
    )


def choose(numbers: tuple[int, ...], largest: bool) -> Step:
    """The largest or smallest of some numbers; the slip takes the second."""
    ordered = sorted(numbers, reverse=largest)
    name = "largest" if largest else "smallest"
    return Step(
        f"The {name}",
        lambda _: ordered[0],
        lambda _: ordered[1],
        lambda _: f"{ordered[0]} is {name.replace('st', 'r')} than {ordered[1]}",
    )


def _moves(rng: random.Random, start: int, count: int) -> list[int]:
    """Signed amounts that keep the running value between 11 and 99."""
    value, moves = start, []
    while len(moves) < count:
        move = rng.choice((1, -1)) * rng.choice((rng.randint(2, 9), rng.randint(2, 9), 10, 20))
        if 11 <= value + move <= 99:
            moves.append(move)
            value += move
    return moves


def _arithmetic(moves: list[int]) -> tuple[Step, ...]:
    return tuple(plus(move) if move > 0 else minus(-move) for move in moves)


def ledger(rng: random.Random) -> Plan:
    """A person owns things, gets some and loses some."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = rng.randint(21, 89)
    moves = _moves(rng, start, 3)
    gain = ("{n} gets {b} more.", "{n} finds {b}.", "Then {b} more arrive.")
    loss = ("{n} gives away {b}.", "{n} loses {b}.", "Then {b} are sold.")
    events = [rng.choice(gain if move > 0 else loss).format(n=name, b=abs(move)) for move in moves]
    text = f"{name} has {start} {thing}. {' '.join(events)} How many {thing} are left?"
    return Plan("ledger", (start, *moves), text, start, _arithmetic(moves))


def ages(rng: random.Random) -> Plan:
    """A chain of people, each older or younger than the one before."""
    names = rng.sample(NAMES, 4)
    start = rng.randint(21, 69)
    moves = _moves(rng, start, 3)
    lines = [f"{names[0]} is {start} years old."]
    for before, name, move in zip(names, names[1:], moves, strict=False):
        lines.append(
            f"{name} is {abs(move)} years {'older' if move > 0 else 'younger'} than {before}."
        )
    text = f"{' '.join(lines)} How old is {names[-1]}?"
    return Plan("ages", (start, *moves), text, start, _arithmetic(moves))


def shop(rng: random.Random) -> Plan:
    """Several things at the same price, then a fee and a discount."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS[1:])
    count, price = rng.randint(3, 9), rng.randint(4, 9)
    total = count * price
    moves = _moves(rng, total, 2)
    gain = ("Delivery costs {b} coins.", "A bag costs {b} coins.")
    loss = ("A coupon takes off {b} coins.", "{n} gets {b} coins back.")
    events = [rng.choice(gain if move > 0 else loss).format(n=name, b=abs(move)) for move in moves]
    text = (
        f"{name} buys {count} {thing} at {price} coins each. {' '.join(events)} "
        "How many coins is that in all?"
    )
    return Plan("shop", (count, price, *moves), text, 0, (times(count, price), *_arithmetic(moves)))


def clock(rng: random.Random) -> Plan:
    """Hours pass on a twelve-hour clock."""
    start = rng.randint(1, 12)
    hours = [rng.randint(2, 9) for _ in range(3)]
    acts = rng.sample(("A train ride", "A walk", "A nap", "A film", "A meal", "A class"), 3)
    events = [f"{act} takes {hour} hours." for act, hour in zip(acts, hours, strict=True)]
    text = f"It is {start} o'clock. {' '.join(events)} What hour does the clock show then?"
    return Plan("clock", (start, *hours), text, start, tuple(turn(hour) for hour in hours))


def pick(rng: random.Random) -> Plan:
    """One of some numbers is chosen by size, then changed."""
    numbers = tuple(rng.sample(range(21, 90), 3))
    largest = rng.random() < 0.5
    chosen = choose(numbers, largest)
    moves = _moves(rng, chosen.right(0), 2)
    events = [f"{'add' if move > 0 else 'take away'} {abs(move)}" for move in moves]
    text = (
        f"The numbers are {numbers[0]}, {numbers[1]} and {numbers[2]}. "
        f"Take the {'largest' if largest else 'smallest'}, {events[0]}, then {events[1]}. "
        "What is the result?"
    )
    return Plan("pick", (*numbers, int(largest), *moves), text, 0, (chosen, *_arithmetic(moves)))


KINDS: dict[str, Callable[[random.Random], Plan]] = {
    "ledger": ledger,
    "ages": ages,
    "shop": shop,
    "clock": clock,
    "pick": pick,
}


def draw(kind: str, rng: random.Random, split: str) -> Plan:
    """A plan of this kind whose bucket belongs to the split (train, dev or test)."""
    while True:
        plan = KINDS[kind](rng)
        if bucket_split(plan.bucket) == split:
            return plan


@cache
def split_plans(split: Split) -> list[Plan]:
    """The distinct plans of a split, the same in every call; the kinds alternate."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLIT_SIZES)}")
    kinds = OUT_OF_DOMAIN if split.endswith("_ood") else IN_DOMAIN
    rng = random.Random(f"quickstart:{split}")
    plans: dict[tuple[str, tuple[int, ...]], Plan] = {}
    while len(plans) < SPLIT_SIZES[split]:
        plan = draw(kinds[len(plans) % len(kinds)], rng, split.removesuffix("_ood"))
        plans.setdefault((plan.kind, plan.numbers), plan)
    return list(plans.values())


def load_split(split: Split) -> list[Problem]:
    """The problems of a split."""
    return [
        Problem(
            id=f"{plan.kind}:{number}",
            domain=plan.kind,
            prompt=plan.text,
            answer=str(plan.answer),
            verifier="number",
            reference=plan.solution,
        )
        for number, plan in enumerate(split_plans(split))
    ]
