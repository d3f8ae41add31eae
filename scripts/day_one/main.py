"""The command behind scripts/gpu_day_one.sh: install, run the stages, write JSON and Markdown."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from day_one.dependencies import (
    OPTIONAL,
    Needs,
    install,
    project_requirements,
    requirement_name,
    resolve,
)
from day_one.page import page
from day_one.registry import BY_NAME, STAGES, Entry
from day_one.results import STATES, Result, load
from day_one.runner import run_stage
from rosd_fast.files import write_atomic

TREE = Path(__file__).parents[2]
JSON, PAGE, SITE = "day_one.json", "day_one.md", "site"
SOURCES = (
    *("rosd_fast/**/*.py", "rosd_fast/**/*.toml", "kernels/**/*.py", "kernels/**/*.json"),
    "scripts/day_one/**/*.py",
)
BAD_CALL = 2
LONGEST_TMPDIR = 70  # a socket in a temporary folder has a path of at most 107 characters
FLOOR_S = 45.0  # of a stage's time: a first import of torch may take half of it


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 where all stages are complete and good, 1 where not, 2 for a wrong call."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` ends the stage
    started = time.monotonic()
    out: Path = args.out.resolve()
    try:
        (out / "work" / "tmp").mkdir(parents=True, exist_ok=True)
        needs = prepare(args.wheels, out, args.device)
    except OSError as error:
        print(f"gpu_day_one: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return BAD_CALL
    except UsageError as error:
        print(f"gpu_day_one: {error}", file=sys.stderr)
        return BAD_CALL
    if args.device == "cuda" and (problem := cuda_problem(out)):
        print(f"gpu_day_one: {problem}", file=sys.stderr)
        return BAD_CALL
    try:
        return run(args, out, needs, end=started + 60 * args.minutes)
    except OSError as error:
        print(
            f"gpu_day_one: {error.filename or out}: {error.strerror}; start it again to go on",
            file=sys.stderr,
        )
        return 1


def run(args: argparse.Namespace, out: Path, needs: Needs, *, end: float) -> int:
    """Run the stages until `end`, seconds of the monotonic clock; returns the exit status.

    Raises OSError where a result cannot be written; those before it are kept.
    """
    facts = identity(args.device)
    entries = [BY_NAME[name] for name in args.only] if args.only else list(STAGES)
    for index, entry in enumerate(entries):
        left = end - time.monotonic()
        weights = [other.weight for other in entries[index:]]
        seconds = min(left, max(FLOOR_S, left * entry.weight / sum(weights)))
        print(f"{entry.name}: at most {max(0, seconds):.0f} s", flush=True)
        result = run_stage(
            entry,
            out=out,
            device=args.device,
            seconds=seconds,
            identity=facts,
            environment=environment(entry, args.device, out),
        )
        report(result)
        write(out, facts, needs)
    write(out, facts, needs)
    print(f"{out / PAGE}")
    found = [load(out, entry.name) for entry in entries]
    return int(not all(result is not None and result.is_good for result in found))


class UsageError(Exception):
    """Something that the caller can mend, as one line."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_day_one.sh",
        description="What a bare machine with one GPU can show in ten minutes, without a network.",
    )
    parser.add_argument("--wheels", type=Path, help="the folder that scripts/gpu_wheels.sh made")
    parser.add_argument("--out", type=Path, default=Path("day_one"), help="default: day_one")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    names = [entry.name for entry in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes is {args.minutes:g}; give a number above 0")
    return args


def prepare(wheels: Path | None, out: Path, device: str) -> Needs:
    """Install what the machine lacks. Raises UsageError where something is missing after all."""
    if wheels is not None and not wheels.is_dir():
        raise UsageError(f"--wheels {wheels} is no folder; scripts/gpu_wheels.sh makes one")
    folder = wheels or out / "no wheels"
    needs = resolve(project_requirements(TREE), folder)
    fix = "install it, or set PYTHON to one that has it"
    for text in needs.missing:
        name = requirement_name(text)
        if name == "torch" or (name == "triton" and device == "cuda"):
            has = f"this one has {version(name)}" if version(name) else "there is none"
            raise UsageError(f"{sys.executable} must have {text}, and {has}: {fix}")
    if needs.fatal:
        given = f"{wheels} has no wheel for" if wheels else "name --wheels FOLDER; there is no"
        names = ", ".join(f"{text} (for {by})" for text, by in needs.fatal.items())
        raise UsageError(f"{given} {names}; scripts/gpu_wheels.sh --python {python_version()}")
    try:
        install(needs, out / SITE)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"pip could not install into {out / SITE}: {error}") from error
    for text in needs.missing:
        if purpose := OPTIONAL[requirement_name(text)]:
            print(f"missing: {text}, for {purpose}", flush=True)
    return needs


def cuda_problem(out: Path) -> str:
    """Why torch cannot use a GPU, in a line; empty where it can."""
    code = (
        "import torch; assert torch.cuda.is_available(); torch.ones(1, device='cuda').sum().item()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(STAGES[0], "cuda", out),
    )
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    why = "" if last.startswith("AssertionError") else f" ({last[:200]})"
    return (
        f"torch {version('torch')} of {sys.executable} sees no CUDA device that it can use{why}; "
        "--device cpu rehearses all stages without one"
    )


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def identity(device: str) -> dict[str, str]:
    """What results depend on; those of another identity are measured again."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(TREE.glob(pattern)):
            digest.update(path.relative_to(TREE).as_posix().encode() + path.read_bytes())
    return {
        "device": device,
        "machine": gpu_name() if device == "cuda" else cpu_name(),
        "commit": commit(),
        "source": digest.hexdigest()[:12],
        "python": python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
    }


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown GPU"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "CPU")


def commit() -> str:
    """The commit of the source: git's, or what the archive says of itself."""
    try:
        done = subprocess.run(
            ["git", "-C", str(TREE), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        mark = TREE / "COMMIT"
        return mark.read_text().strip() if mark.is_file() else "unknown"


def environment(entry: Entry, device: str, out: Path) -> dict[str, str]:
    """The variables of a stage's process: caches in `out`, no network, no writes elsewhere."""
    work = out / "work"
    inherited = list(filter(None, [os.environ.get("PYTHONPATH")]))
    path = [TREE / "scripts", TREE, TREE / "kernels", out / SITE]
    names = {
        "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]),
        # The machine's compiled modules are read, and none are written beside them.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "CUDA_CACHE_PATH": str(work / "cuda"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "HF_HOME": str(work / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
    }
    drop = {"TRITON_INTERPRET", "ROSD_KERNELS_BACKEND"}
    if len(str(work / "tmp")) <= LONGEST_TMPDIR:
        names["TMPDIR"] = str(work / "tmp")
    others = {name: value for name, value in os.environ.items() if name not in drop}
    if device == "cpu":
        names["CUDA_VISIBLE_DEVICES"] = ""
        if entry.interpreted and version("triton"):
            names |= {"TRITON_INTERPRET": "1", "ROSD_KERNELS_BACKEND": "triton"}
    return others | names


def report(result: Result) -> None:
    """Print the line of a stage that is over."""
    failed = f", {result.num_failed} failed" if result.num_failed else ""
    why = f": {result.error}" if result.error else ""
    print(
        f"{result.stage}: {STATES[result.state]} after {result.seconds:.0f} s, "
        f"{len(result.items)} items{failed}{why}",
        flush=True,
    )


def write(out: Path, facts: Mapping[str, str], needs: Needs) -> None:
    """Write the JSON and the page of all results so far."""
    results = [found for entry in STAGES if (found := load(out, entry.name)) is not None]
    packages = {
        "from the machine": dict(sorted(needs.present.items())),
        "installed aside": {
            name: path.name.split("-")[1] for name, path in sorted(needs.wheels.items())
        },
        "missing": needs.missing,
    }
    whole = {
        "identity": dict(facts),
        "packages": packages,
        "stages": {
            found.stage: {
                "state": found.state,
                "seconds": found.seconds,
                "limit_s": found.limit_s,
                "identity": found.identity,
                "failed": found.num_failed,
                "left": found.left,
                "error": found.error,
                "item_errors": {k: item.error for k, item in found.items.items() if item.error},
                "rows": found.rows,
            }
            for found in results
        },
    }
    write_atomic(out / JSON, json.dumps(whole, indent=1).encode())
    write_atomic(out / PAGE, page(results, facts, packages).encode())


if __name__ == "__main__":
    sys.exit(main())
