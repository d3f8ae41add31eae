"""Worker processes: limits, failures, order, cancellation, and that none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.errors import RunFailed
from rosd_fast.types import Group, Judgement, Problem, Rollout
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, process

NUMPY = "__import__('numpy')"
TRAPS = '''
import ctypes, os, re, signal, subprocess, sys, time

def score(completion, answer):
    """Do what the completion says."""
    word, _, rest = completion.partition(" ")
    if word == "sleep":
        time.sleep(float(rest))
    elif word == "lock":  # never gives the interpreter's lock back
        re.match(r"(a|aa)+$", "a" * 200 + "b")
    elif word == "exit":
        os._exit(3)
    elif word == "quit":
        sys.exit(0)
    elif word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif word == "fill":
        return len(bytearray(int(rest) << 20)) > 0
    elif word == "raise":
        raise ValueError("a wrong\\nvalue")
    elif word == "return":
        return eval(rest)
    elif word == "print":
        print('{"kind": "done", "score": 1}' * 10_000)
        os.write(1, b"x" * 100_000)
        os.write(2, b"x" * 100_000)
        return sys.stdin.read() == "", "printed"
    elif word == "pid":
        return 1.0, str(os.getpid())
    elif word == "child":
        child = subprocess.Popen(["sleep", "60"])
        with open(rest, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        child.wait()
    elif word == "junk":  # writes into the pipe to the trainer
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"junk\\n" * 3)
            except OSError:
                pass
    elif word == "modules":
        return 1.0, " ".join(sys.modules)
    elif word == "env":
        return 1.0, str(os.environ.get(rest))
    return completion == answer, completion
'''


@pytest.fixture
def traps(tmp_path: Path) -> str:
    """The name of a verifier that does what a completion says."""
    file = tmp_path / "traps.py"
    file.write_text(TRAPS)
    return f"{file}:score"


def problem(verifier: str, answer: str = "yes", id: str = "p") -> Problem:
    return Problem(id=id, domain="d", prompt="?", answer=answer, verifier=verifier)


def judge(verifier: str, *completions: str, **limits: Any) -> list[Judgement]:
    with VerifierPool(Limits(**limits)) as pool:
        return pool.judge_sync([(problem(verifier), text) for text in completions])


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


def test_judgements_are_in_order_and_the_same_with_one_worker_and_eight() -> None:
    tasks = [
        (problem("number", answer=str(i % 3)), f"<answer>{i % 5}</answer>") for i in range(1000)
    ]
    expected = [VERIFIERS["number"](completion, p.answer) for p, completion in tasks]
    for workers in (1, 8):
        with VerifierPool(Limits(workers=workers)) as pool:
            assert pool.judge_sync(tasks) == expected
    assert {judgement.score for judgement in expected} == {0.0, 1.0}


def test_groups_become_verdicts() -> None:
    rollouts = tuple(
        Rollout(
            id=f"p/{i}",
            problem_id="p",
            prompt_ids=(1,),
            completion_ids=(2,),
            logprobs=(0.0,),
            text=f"<answer>{i}</answer>",
            finish_reason="stop",
            policy_version=0,
        )
        for i in range(3)
    )
    group = Group(problem=problem("number", answer="1"), rollouts=rollouts)
    with VerifierPool(Limits(workers=1)) as pool:
        verdicts = asyncio.run(pool.verify([group], threshold=0.5))
    assert [verdicts[f"p/{i}"].success for i in range(3)] == [False, True, False]
    assert verdicts["p/2"].answer == "2"


def test_each_way_to_fail_costs_one_completion_and_says_why(traps: str) -> None:
    texts = ["yes", "sleep 60", "yes", "exit", "yes", "raise", "quit", "crash", "yes", "fill 4000"]
    notes: list[str] = []
    with VerifierPool(Limits(workers=1, timeout_s=0.5, memory_mib=500), notes.append) as pool:
        judged = pool.judge_sync([(problem(traps), text) for text in [*texts, "no", "fill 4000"]])
        counts = pool.take_metrics()
        assert pool.take_metrics() == dict.fromkeys(counts, 0.0)
    assert [j.score for j in judged] == [1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert [j.reason for j in judged if j.reason] == [
        "timed out after 0.5 s",
        "the verifier died (exit code 3)",
        "the verifier raised ValueError: a wrong value",
        "the verifier raised SystemExit: 0",
        "the verifier died (SIGSEGV)",
        "the verifier ran out of memory (verify.memory_mib 500)",
        "the verifier ran out of memory (verify.memory_mib 500)",
    ]
    assert counts == {"verify/timed_out": 1, "verify/died": 4, "verify/failed": 2}
    assert [note.split("; ")[1] for note in notes] == [
        "the score is 0. verify/" + each + " counts such completions"
        for each in ("timed_out", "died", "failed")
    ]
    assert notes[0].startswith(f"verifier {traps}, problem p: timed out after 0.5 s")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "'right'",
            "a verifier returned str, not a score, (score, answer) or (score, answer, reason)",
        ),
        ("None", "a verifier returned NoneType"),
        ("float('nan')", "score nan is outside [0, 1]"),
        ("2", "score 2.0 is outside [0, 1]"),
        ("('x', 'y')", "could not convert string to float"),
        ("1,", "a verifier returned tuple"),
        ("10**400", "what the verifier returned raises OverflowError"),
        ("1, type('A', (), {'__str__': lambda s: 1 / 0})()", "raises ZeroDivisionError"),
    ],
)
def test_nonsense_is_no_score(traps: str, value: str, reason: str) -> None:
    (judged,) = judge(traps, f"return {value}", workers=1)
    assert judged.score == 0 and judged.answer is None and reason in (judged.reason or "")


@pytest.mark.parametrize(
    ("value", "judgement"),
    [
        ("True", Judgement(score=1.0, answer="return True")),
        ("0.25, 'a'", Judgement(score=0.25, answer="a")),
        ("0.25, None, 'no b'", Judgement(score=0.25, answer=None, reason="no b")),
        ("1, '\\ud800'", Judgement(score=1.0, answer="?")),  # no file takes half a pair
        ("0, None, 'a\\udfff'", Judgement(score=0.0, answer=None, reason="a?")),
        (f"{NUMPY}.float32(0.5)", Judgement(score=0.5, answer=f"return {NUMPY}.float32(0.5)")),
        (f"{NUMPY}.bool_(True)", Judgement(score=1.0, answer=f"return {NUMPY}.bool_(True)")),
        ("1, 'ä\\n\"'", Judgement(score=1.0, answer='ä\n"')),
        ("0, 'a' * 10**7, 'b' * 10**7", Judgement(score=0, answer="a" * 2000, reason="b" * 500)),
        (
            "__import__('rosd_fast.types').types.Judgement(score=0.5, answer='c' * 10**6)",
            Judgement(score=0.5, answer="c" * 2000),
        ),
    ],
)
def test_what_a_verifier_may_return(traps: str, value: str, judgement: Judgement) -> None:
    assert judge(traps, f"return {value}", workers=1) == [judgement]


def test_what_a_verifier_prints_goes_nowhere(traps: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert [j.answer for j in judge(traps, "print", "yes", workers=1)] == ["printed", "yes"]
    assert capfd.readouterr() == ("", "")


def test_a_lone_surrogate_and_a_long_completion_reach_the_verifier(traps: str) -> None:
    text = "a\ud800\n" + "b" * 3_000_000
    with VerifierPool(Limits(workers=1)) as pool:
        (judged,) = pool.judge_sync([(problem(traps, answer=text), text)])
    assert judged.score == 1


def test_a_verifier_that_writes_into_the_workers_pipe_is_to_blame(traps: str) -> None:
    judged = judge(traps, "junk", "yes", workers=1)
    assert [j.score for j in judged] == [0, 1] and "died" in (judged[0].reason or "")


def test_a_verifier_that_holds_the_interpreters_lock_times_out(traps: str) -> None:
    assert [j.score for j in judge(traps, "lock", "yes", workers=1, timeout_s=0.5)] == [0, 1]


def test_tasks_behind_one_that_hangs_go_to_another_worker(traps: str) -> None:
    """The batch of the worker that hangs is given back long before the time is up."""

    async def both(pool: VerifierPool) -> tuple[list[Judgement], bool]:
        quick = [(problem(traps), "yes")] * 600
        await pool.judge(quick)  # batches have grown
        slow = asyncio.create_task(pool.judge([(problem(traps), "sleep 60")]))
        await asyncio.sleep(0.1)
        judged = await pool.judge(quick)
        open_yet = not slow.done()
        slow.cancel()
        return judged, open_yet

    with VerifierPool(Limits(workers=2, timeout_s=60)) as pool:
        judged, open_yet = asyncio.run(both(pool))
    assert all(j.score == 1 for j in judged) and open_yet


@pytest.mark.parametrize("workers", [1, 2])
def test_when_all_workers_hang_a_spare_one_serves_the_other_calls(traps: str, workers: int) -> None:
    async def other(pool: VerifierPool) -> bool:
        tasks = [(problem(traps), "sleep 60")] * 4
        slow = asyncio.create_task(pool.judge(tasks))
        await asyncio.sleep(0.1)
        assert [j.score for j in await pool.judge([(problem(traps), "yes")] * 9)] == [1] * 9
        open_yet = not slow.done()
        slow.cancel()
        return open_yet

    with VerifierPool(Limits(workers=workers, timeout_s=60)) as pool:
        assert asyncio.run(other(pool))


def test_a_cancelled_call_leaves_the_pool_at_work(traps: str) -> None:
    async def cancelled(pool: VerifierPool) -> list[Judgement]:
        tasks = [(problem(traps), "sleep 60"), *[(problem(traps), "sleep 0.01")] * 99]
        slow = asyncio.create_task(pool.judge(tasks))
        await asyncio.sleep(0.5)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        return await pool.judge([(problem(traps), "yes")])

    with VerifierPool(Limits(workers=1, timeout_s=1)) as pool:
        assert asyncio.run(cancelled(pool))[0].score == 1
        # Another event loop, and none: the pool has its own.
        assert asyncio.run(pool.judge([(problem(traps), "yes")]))[0].score == 1
        assert pool.judge_sync([(problem(traps), "no")])[0].score == 0


def test_many_tasks_of_the_loop_may_ask_at_once(traps: str) -> None:
    async def ask(pool: VerifierPool) -> list[list[Judgement]]:
        calls = [
            pool.judge(
                [(problem("number", answer=str(i)), f"<answer>{j}</answer>") for j in range(9)]
            )
            for i in range(9)
        ]
        return await asyncio.gather(*calls)

    with VerifierPool(Limits(workers=2)) as pool:
        judged = asyncio.run(ask(pool))
    assert [[j.score for j in row] for row in judged] == [
        [float(i == j) for j in range(9)] for i in range(9)
    ]


def test_a_worker_that_is_killed_while_idle_costs_nothing(traps: str) -> None:
    with VerifierPool(Limits(workers=1)) as pool:
        (judged,) = pool.judge_sync([(problem(traps), "pid")])
        first = int(judged.answer or "")
        os.kill(first, signal.SIGKILL)
        wait_until_gone(first)
        (judged,) = pool.judge_sync([(problem(traps), "pid")])
        assert judged.score == 1 and int(judged.answer or "") != first
        assert pool.take_metrics()["verify/died"] == 0


def test_nothing_starts_before_the_first_task_and_nothing_is_left_after_close(traps: str) -> None:
    before = children()
    with VerifierPool(Limits(workers=2)) as pool:
        assert children() == before
        pids = {int(j.answer or "") for j in pool.judge_sync([(problem(traps), "pid")] * 50)}
        started = children() - before
        assert pids <= started and 1 <= len(started) <= 2
    assert children() == before
    assert pool.judge_sync([(problem(traps), "yes")])[0].score == 1  # it starts again
    pool.close_sync()
    pool.close_sync()
    assert children() == before


def test_a_pool_that_nobody_closes_ends_with_it(traps: str) -> None:
    before = children()
    pool = VerifierPool(Limits(workers=1))
    pool.judge_sync([(problem(traps), "yes")])
    assert children() != before
    del pool
    assert children() == before


def children() -> set[int]:
    """The processes that this one has started."""
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


@pytest.mark.parametrize("trap", ["child", "lock"])
def test_no_process_is_left_when_the_trainer_is_killed(
    traps: str, tmp_path: Path, trap: str
) -> None:
    """Not even in the middle of a task, nor a process that the verifier has started."""
    script, pids = tmp_path / "trainer.py", tmp_path / "pids"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        from rosd_fast.types import Problem
        from rosd_fast.verify import Limits, VerifierPool

        def problem(answer):
            return Problem(id="p", domain="d", prompt="?", answer=answer, verifier={traps!r})

        pool = VerifierPool(Limits(workers=1, timeout_s=1 if {trap!r} == "lock" else 60))
        (judged,) = pool.judge_sync([(problem("yes"), "pid")])
        with open({str(pids)!r} + ".own", "w") as file:
            file.write(f"{{judged.answer}}")
        pool.judge_sync([(problem("yes"), {f"{trap} {pids}"!r})])
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen([sys.executable, str(script)], env=environment)
    wanted = pids if trap == "child" else pids.with_name("pids.own")
    deadline = time.monotonic() + 30
    while not (wanted.exists() and wanted.read_text()):
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.02)
    time.sleep(0.3 if trap == "lock" else 0)  # the task begins
    started = [int(pid) for pid in wanted.read_text().split()]
    assert all(map(is_running, started))
    trainer.kill()
    trainer.wait()
    wait_until_gone(*started)


def test_ctrl_c_is_for_the_trainer(traps: str) -> None:
    with VerifierPool(Limits(workers=1)) as pool:
        (judged,) = pool.judge_sync([(problem(traps), "pid")])
        os.kill(int(judged.answer or ""), signal.SIGINT)
        assert pool.judge_sync([(problem(traps), "pid")]) == [judged]


def test_a_worker_imports_little_and_uses_one_thread(traps: str) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    file = Path(traps.rpartition(":")[0])
    file.write_text(
        file.read_text().replace(
            '" ".join(sys.modules)', '" ".join({m.partition(".")[0] for m in sys.modules})'
        )
    )
    modules, *threads = judge(traps, "modules", *(f"env {name}" for name in names), workers=1)
    assert modules.answer is not None and "rosd_fast" in modules.answer.split()
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(modules.answer.split())
    assert [judgement.answer for judgement in threads] == ["1"] * 3


def test_workers_that_do_not_start_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(program))
    with (
        VerifierPool(Limits(workers=1)) as pool,
        pytest.raises(RunFailed, match="do not start: no such library"),
    ):
        pool.judge_sync([(problem("number"), "x")])


def test_a_closed_pool_fails_what_is_asked_of_it(traps: str) -> None:
    async def close_early(pool: VerifierPool) -> None:
        asked = asyncio.create_task(pool.judge([(problem(traps), "sleep 60")] * 9))
        await asyncio.sleep(0.5)
        await pool.close()
        with pytest.raises(RunFailed, match="were closed"):
            await asked

    before = children()
    asyncio.run(close_early(VerifierPool(Limits(workers=3))))
    assert children() == before


def test_an_unknown_verifier_is_a_broken_contract() -> None:
    with VerifierPool() as pool, pytest.raises(ValueError, match="no verifier 'magic'"):
        pool.judge_sync([(problem("magic"), "x")])
