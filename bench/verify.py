"""Verifiers: answers per second through the worker processes, and how long one takes.

    python bench/verify.py                     # all verifiers, two minutes
    python bench/verify.py --verifiers math    # one

Each answer is judged once, in a completion of about 900 characters: half of the answers are right,
many of those in another form. No two are equal, so that nothing is remembered.

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

from harness import RESULTS, environment, record, version

from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool
from rosd_fast.verify.sandbox import unavailable

CSV = RESULTS / "verify.csv"
STEPS = "We take what the problem gives and go on step by step. " * 16
USER_FILE = "def score(completion, answer):\n    return completion.endswith(answer), answer\n"
LIMITS = {"math": "math-verify", "reasoning_gym": "reasoning-gym", "code": "bubblewrap"}
"""Verifiers whose speed is that of another program."""

Case = tuple[Problem, str]
Maker = Callable[[random.Random, int], tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verifiers", nargs="+", default=[*MAKERS], choices=[*MAKERS])
    parser.add_argument("--answers", type=int, default=4000, help="per repetition; code: 1/200")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in record(args.csv, measured(args, Path(folder))):
            names = ("verifier", "workers", "answers_per_s", "in_process_per_s", "latency_ms")
            print("  ".join(f"{name} {row[name]}" for name in names), flush=True)


def measured(args: argparse.Namespace, folder: Path):  # noqa: ANN201
    """The rows of the table, one per verifier and number of workers."""
    for verifier in args.verifiers:
        if verifier == "code" and (why := unavailable()) is not None:
            print(f"code: {why}")
            continue
        count = args.answers // 200 if verifier == "code" else args.answers
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
                "verifier": verifier,
                "library": f"{name} {version(name)}" if (name := LIMITS.get(verifier)) else "",
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
    for problem, text in cases[:8]:
        VERIFIERS[verifier](text, problem.answer)
    start = time.perf_counter()
    for problem, text in cases[8:]:
        VERIFIERS[verifier](text, problem.answer)
    return (len(cases) - 8) / (time.perf_counter() - start)


def make_cases(verifier: str, count: int, *, seed: int, folder: Path) -> list[Case]:
    """Problems with a completion each."""
    draw = random.Random(seed)
    name = verifier
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


def math(draw: random.Random, index: int) -> tuple[str, str]:
    """Answers as in MATH and AIME: half are whole numbers, the others fractions, roots, terms."""
    n, off = index + 2, draw.randrange(2)
    k = 2 + index % 7
    forms = [
        (f"{n}", f"{n + off}"),
        (f"{n}", f"{n + off}.0"),
        (f"{n}", f"{n + off:,}"),
        (f"{n}", f"{n + off}^\\circ"),
        (f"\\frac{{{n}}}{{{k}}}", f"\\dfrac{{{2 * (n + off)}}}{{{2 * k}}}"),
        (f"{n}\\sqrt{{{k}}}", f"\\sqrt{{{k}}} \\cdot {n + off}"),
        (f"({n},{k})", f"({n + off}, {k})"),
        (f"x^2 + {n}x", f"x(x + {n + off})"),
    ]
    answer, found = forms[index % len(forms)]
    return answer, f"\\boxed{{{found}}}"


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


DATASETS: dict[str, object] = {}
MAKERS: dict[str, Maker] = {
    "number": number,
    "choice": choice,
    "exact": words,
    "contains": words,
    "math": math,
    "tools": tools,
    "reasoning_gym": exercise,
    "file": words,
    "code": code,
}

if __name__ == "__main__":
    main()
