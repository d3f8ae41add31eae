"""Verifiers: answers per second through the worker processes, and how long one takes.

    python bench/verify.py                     # all verifiers, two minutes
    python bench/verify.py --verifiers tools   # one

Each answer is judged once, in a completion of about 900 characters; about half of the answers are
right, many of those in another form. No two are equal, so that nothing is remembered, except in
math_mixed, which is as in training: eight rollouts give a few answers to one problem.

    answers_per_s   through `VerifierPool`, with all completions asked for at once
    in_process_per_s  the verifier alone, called in one process: the limit of its library
    latency_ms      one completion, asked for when the workers are idle
    start_s         the first answer of a new pool: the workers start and import what they need

Medians of --repeats; spread_frac is (most - least) / median of answers_per_s. Rows go to
bench/results/verify.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, record, version

from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool
from rosd_fast.verify.sandbox import unavailable

CSV = RESULTS / "verify.csv"
STEPS = "We take what the problem gives and go on step by step. " * 16
USER_FILE = "def score(completion, answer):\n    return completion.endswith(answer), answer\n"
LIBRARIES = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}

SLOWER = {"code": 200, "math_algebra": 8}
"""Fewer answers of these are judged, by a factor."""

Case = tuple[Problem, str]
Maker = Callable[[random.Random, int], tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verifiers", nargs="+", default=[*MAKERS], choices=[*MAKERS])
    parser.add_argument(
        "--answers", type=int, default=4000, help="per repetition; of slow ones fewer"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in record(args.csv, measured(args, Path(folder))):
            names = ("answers_of", "workers", "answers_per_s", "in_process_per_s", "latency_ms")
            print("  ".join(f"{name} {row[name]}" for name in names), flush=True)


def measured(args: argparse.Namespace, folder: Path):
    """The rows of the table, one per verifier and number of workers."""
    for verifier in args.verifiers:
        own = "math" if verifier.startswith("math") else verifier
        if verifier == "code" and (why := unavailable()) is not None:
            print(f"code: {why}")
            continue
        count = args.answers // SLOWER.get(verifier, 1)
        alone = None if verifier in ("code", "file") else in_process(verifier, count)
        for workers in args.workers:
            rates, latencies, starts = [], [], []
            for repeat in range(args.repeats):
                cases = make_cases(verifier, count, seed=repeat, folder=folder)
                with VerifierPool(Limits(workers=workers, run_code=True)) as pool:
                    starts.append(seconds(pool, cases[:1]))
                    seconds(pool, cases[1 : 1 + 8 * workers])  # all workers have started
                    rest = cases[1 + 8 * workers :] or cases
                    rates.append(len(rest) / seconds(pool, rest))
                    latencies += [seconds(pool, [case]) for case in cases[:50]]
            yield {
                "verifier": own,
                "answers_of": verifier,
                "library": f"{name} {version(name)}" if (name := LIBRARIES.get(own)) else "",
                "workers": workers,
                "answers": count,
                "repeats": args.repeats,
                "answers_per_s": f"{statistics.median(rates):.0f}",
                "spread_frac": f"{(max(rates) - min(rates)) / statistics.median(rates):.2f}",
                "in_process_per_s": "" if alone is None else f"{alone:.0f}",
                "latency_ms": f"{1e3 * statistics.median(latencies):.2f}",
                "start_s": f"{statistics.median(starts):.2f}",
            }


def seconds(pool: VerifierPool, cases: Sequence[Case]) -> float:
    """The time that the pool takes; no case may fail."""
    start = time.perf_counter()
    pool.judge_sync(cases)
    elapsed = time.perf_counter() - start
    failures = {name: count for name, count in pool.take_metrics().items() if count}
    if failures:
        raise SystemExit(f"{cases[0][0].verifier}: {failures}")
    return elapsed


def in_process(verifier: str, count: int) -> float:
    """Answers per second of the verifier alone."""
    cases = make_cases(verifier, count, seed=99, folder=Path())
    judge = VERIFIERS[cases[0][0].verifier]
    for problem, text in cases[:8]:
        judge(text, problem.answer)
    start = time.perf_counter()
    for problem, text in cases[8:]:
        judge(text, problem.answer)
    return (len(cases) - 8) / (time.perf_counter() - start)


def make_cases(verifier: str, count: int, *, seed: int, folder: Path) -> list[Case]:
    """Problems with a completion each."""
    draw = random.Random(seed)
    name = "math" if verifier.startswith("math") else verifier
    if verifier == "file":
        (folder / "score.py").write_text(USER_FILE)
        name = f"{folder}/score.py:score"
    cases = []
    for index in range(count):
        answer, text = MAKERS[verifier](draw, seed * count + index)
        problem = Problem(id=f"p{index}", domain="d", prompt="?", answer=answer, verifier=name)
        cases.append((problem, STEPS + text))
    return cases


def number(draw: random.Random, index: int) -> tuple[str, str]:
    value = 1000 + index
    return str(value), f"<answer>${value + draw.randrange(2):,}.00</answer>"


def choice(draw: random.Random, index: int) -> tuple[str, str]:
    return draw.choice("ABCD"), f"<answer>({draw.choice('AB')}) option {index}</answer>"


def words(draw: random.Random, index: int) -> tuple[str, str]:
    return f"word {index}", f"<answer>Word  {index + draw.randrange(2)}</answer>"


def math_numbers(draw: random.Random, index: int) -> tuple[str, str]:
    """Answers as in AIME and GSM8K: whole numbers, no two problems with the same."""
    value, off = index + 2, draw.randrange(2)
    written = (f"{value + off}", f"{value + off:,}", f"{value + off}.0", f"{value + off}^\\circ")
    return str(value), f"\\boxed{{{draw.choice(written)}}}"


def math_mixed(draw: random.Random, index: int) -> tuple[str, str]:
    """As in MATH: 60% whole numbers, 14% fractions, 10% points, 16% terms that need algebra; eight
    completions per problem, which give one of four answers."""
    place = index // 8 * 37 % 100
    if place < 60:
        return math_numbers(draw, index // 8)
    n, found, k = index // 8 + 2, index // 8 + 2 + max(0, draw.randrange(-3, 4)), 2 + index // 8 % 7
    if place < 74:
        answer, text = f"\\frac{{{n}}}{{{k}}}", f"\\dfrac{{{2 * found}}}{{{2 * k}}}"
    elif place < 84:
        answer, text = f"({n},{k})", f"({found}, {k})"
    else:
        answer, text = algebra(n, found, k)
    return answer, f"\\boxed{{{text}}}"


def math_algebra(draw: random.Random, index: int) -> tuple[str, str]:
    """Terms alone, no two alike: each is parsed and compared by math-verify."""
    answer, text = algebra(index + 2, index + 2 + draw.randrange(2), 2 + index % 7)
    return answer, f"\\boxed{{{text}}}"


def algebra(wanted: int, found: int, k: int) -> tuple[str, str]:
    """A radical or a polynomial in one form, and in another with `found` for `wanted`."""
    if wanted % 2:
        return f"{wanted}\\sqrt{{{k}}}", f"\\sqrt{{{k}}} \\cdot {found}"
    return f"x^2 + {wanted}x", f"x(x + {found})"


def tools(draw: random.Random, index: int) -> tuple[str, str]:
    right = {"Action": "search", "Action_Input": json.dumps({"query": f"q{index}", "limit": 5})}
    said = json.dumps({"limit": 5.0, "query": f"q{index + draw.randrange(2)}"})
    return json.dumps([right]), f"Action: search\nAction Input: {said}"


def code(draw: random.Random, index: int) -> tuple[str, str]:
    tests = [f"assert f({n}) == {n + index}" for n in range(3)]
    text = f"\n```python\ndef f(x):\n    return x + {index + draw.randrange(2)}\n```"
    return json.dumps({"tests": tests}), text


def exercise(draw: random.Random, index: int) -> tuple[str, str]:
    """Four tasks: a count, a term, a list of numbers and a grid."""
    import reasoning_gym

    names = ("leg_counting", "polynomial_equations", "number_sorting", "mini_sudoku")
    if not DATASETS:
        DATASETS.update({n: reasoning_gym.create_dataset(n, size=10**6, seed=0) for n in names})
    made = DATASETS[names[index % len(names)]][index]
    entry = json.dumps({name: made[name] for name in ("question", "answer", "metadata")})
    found = made["answer"] if draw.randrange(2) else "0"
    return entry, f"<answer>{found}</answer>"


DATASETS: dict[str, Any] = {}
MAKERS: dict[str, Maker] = {
    "number": number,
    "choice": choice,
    "exact": words,
    "contains": words,
    "math_numbers": math_numbers,
    "math_mixed": math_mixed,
    "math_algebra": math_algebra,
    "tools": tools,
    "reasoning_gym": exercise,
    "file": words,
    "code": code,
}

if __name__ == "__main__":
    main()
