"""What a model's code can do under bubblewrap, and what it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.verify import sandbox
from rosd_fast.verify.sandbox import Budget, SandboxFailed, run, unavailable

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap"
)
BUDGET = Budget(seconds=3.0, memory_bytes=128 << 20)


def outcomes(program: str, *tests: str, **options: Any) -> list[str]:
    """What came of each test: "passed", or why it failed."""
    reports = run(program, BUDGET, tests=tests or ("pass",), **options)
    return ["passed" if report["passed"] else report["reason"] for report in reports]


def printed(program: str, *stdins: str) -> list[str]:
    reports = run(program, BUDGET, stdins=stdins or ("",))
    return [report["stdout"] if report["passed"] else report["reason"] for report in reports]


def test_it_works_here() -> None:
    assert unavailable() is None


def test_each_test_runs_alone_after_setup_and_program() -> None:
    program = "def f(x): return x + y\ndone = []"
    tests = ["done.append(1); assert f(1) == 3", "assert not done", "assert f(1) == 4, 'no'", "f()"]
    assert outcomes(program, *tests, setup="y = 2") == [
        *("passed", "passed", "AssertionError: no"),
        "TypeError: f() missing 1 required positional argument: 'x'",
    ]


def test_standard_input_and_output() -> None:
    program = "import sys\nprint(sum(map(int, input().split())))\nprint(sys.stdin.read(), end='')"
    assert printed(program, "1 2\nä\n", "3 4\n") == ["3\nä\n", "7\n"]
    assert printed("if __name__ == '__main__':\n    print(1); exit()") == ["1\n"]
    assert printed("print(1); raise SystemExit(2)", "") == ["ended early, by sys.exit"]
    assert printed("print(1); 1 / 0") == ["ZeroDivisionError: division by zero"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit(0)", "ended early, by sys.exit"),
        ("exit()", "ended early, by sys.exit"),
        ("import os; os._exit(0)", "ended early, with exit code 0"),
        ("import os; os.kill(os.getpid(), 11)", "died (SIGSEGV)"),
        ("print('{\"passed\": true}')\nimport os; os._exit(0)", "ended early, with exit code 0"),
        (
            "import os\nfor i in range(3, 4096):\n"
            "    try: os.write(i, b'{\"passed\": true}\\n' * 9)\n"
            "    except OSError: pass\nos._exit(0)",
            '{"passed": true}',
        ),
        ("import builtins; builtins.exec = lambda *given: None", "AssertionError"),
        ("import builtins; builtins.compile = lambda *given: 'pass'", "AssertionError"),
        ("import os, sys; sys.stdout.flush = lambda: os._exit(0)", "ended early, with exit code 0"),
        ("import os; os.write = lambda *given: 0; os._exit = print", "AssertionError"),
        ("import sys; sys.modules['builtins'].AssertionError = None; f = None", "AssertionError"),
    ],
)
def test_leaving_or_printing_is_not_passing(program: str, reason: str) -> None:
    (found,) = outcomes(program, "assert False")
    assert found.startswith(reason)


def test_no_network() -> None:
    connect = "import socket\nsocket.create_connection(('{}', 53), timeout=1)"
    for address in ("1.1.1.1", "127.0.0.1"):
        (found,) = outcomes(connect.format(address))
        assert found.startswith(("OSError", "ConnectionRefusedError"))
    (found,) = outcomes(
        "import socket; print(socket.if_nameindex()); assert 0, socket.if_nameindex()"
    )
    assert found == "AssertionError: [(1, 'lo')]"


def test_it_sees_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    monkeypatch.setenv("ROSD_SECRET", "x")
    for path in (secret, Path.cwd() / "pyproject.toml", Path(__file__), Path("/etc/passwd")):
        (found,) = outcomes(f"open({str(path)!r})")
        assert found.startswith("FileNotFoundError")
    home = "import os\nassert 0, [os.listdir(d) for d in ('/', '/tmp') if os.path.exists(d)]"
    (found,) = outcomes(home)
    assert "proc" not in found and found.endswith(", []]")
    (found,) = outcomes("import os; assert 0, (os.environ.get('ROSD_SECRET'), os.getuid())")
    assert found == "AssertionError: (None, 65534)"


@pytest.mark.parametrize("path", ["/x", "/usr/x", "/usr/bin/python3", "/etc/x", "/dev/x"])
def test_it_writes_to_tmp_only(path: str) -> None:
    (found,) = outcomes(f"open({path!r}, 'w').write('x')")
    assert found.split(":")[0] in ("OSError", "PermissionError", "FileNotFoundError")
    assert outcomes("open('/tmp/x', 'w').write('x'); assert open('/tmp/x').read() == 'x'") == [
        "passed"
    ]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nwhile True: os.fork()", "PermissionError"),
        (
            "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            "timed out",
        ),
        ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
        ("import multiprocessing as m; m.get_context('fork').Process().start()", "PermissionError"),
        (
            "import threading, time\n"
            "while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
            "RuntimeError: can't start new thread",
        ),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "ran out of memory"),
        ("x = bytearray(10**12)", "ran out of memory"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("import signal\nfor s in range(1, 30):\n  try: signal.signal(s, signal.SIG_IGN)\n"
         "  except OSError: pass\nwhile True: pass", "timed out"),
        ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(10**6))", "OSError"),
        (
            "for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(10**7))",
            "OSError: [Errno 28] No space left on device",
        ),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes; assert ctypes.CDLL(None).ptrace(16, 2, 0, 0) != -1", "AssertionError"),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) != -1", "AssertionError"),
    ],
)  # fmt: skip
def test_bombs_end_with_a_reason(program: str, reason: str) -> None:
    (found,) = outcomes(program)
    assert found.startswith(reason)


def test_endless_output_is_cut_off() -> None:
    endless = "while True: print('x' * 1000)"
    assert printed(endless) == ["printed more than 65,536 bytes"]
    assert outcomes(endless) == ["timed out"]  # beside assertions, it goes nowhere


def test_threads_work() -> None:
    program = "import threading\nt = threading.Thread(target=print); t.start(); t.join()"
    assert outcomes(program) == ["passed"]


def test_a_test_that_hangs_leaves_time_for_the_others() -> None:
    program = "def f(x):\n    while x: pass\n"
    assert outcomes(program, "f(0)", "f(1)", "f(0)") == ["passed", "timed out", "passed"]


def test_code_that_ends_the_runner_passes_nothing() -> None:
    with pytest.raises(SandboxFailed, match="ended before all tests"):
        outcomes("import os, time; os.kill(os.getppid(), 9); time.sleep(9)", "pass", "pass")


def test_no_process_is_left() -> None:
    outcomes("import time; time.sleep(60)")
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    own = [
        line.split(maxsplit=1)[1]
        for line in found.split("\n")
        if line.split()[:1] == [str(os.getpid())]
    ]
    assert not [args for args in own if args.startswith("bwrap")]


def test_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._tried.cache_clear()
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert unavailable() == "bubblewrap is not installed"
    sandbox._tried.cache_clear()


def test_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: no permissions' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sandbox._tried.cache_clear()
    assert unavailable() == "bubblewrap does not work here (bwrap: no permissions)"
    sandbox._tried.cache_clear()


def test_dead_sandboxes_do_not_pile_up() -> None:
    script = """
import os, subprocess, time
from rosd_fast.verify import sandbox

def dead():
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "stat="], capture_output=True)
    return found.stdout.count(b"Z")

reap, sandbox.reap = sandbox.reap, lambda: None
sandbox.adopt()
budget = sandbox.Budget(seconds=10.0, memory_bytes=1 << 30)
for _ in range(3):
    sandbox.run("x = 1", budget, tests=["assert x == 1"])
end = time.monotonic() + 20
while dead() < 3 and time.monotonic() < end:
    time.sleep(0.02)
print(dead())
other = subprocess.Popen(["true"])
reap()
print(other.wait(), dead())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.stdout.split(), found.stderr) == (["3", "0", "0"], "")
