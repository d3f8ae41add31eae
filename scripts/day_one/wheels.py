"""Make the folder that a first day on a GPU needs, on a machine with a network.

    scripts/gpu_wheels.sh [FOLDER] [--python 3.11 3.12] [--max-mb 60]

FOLDER then has the source of the last commit (rosd-fast.tar.gz) and wheels of what it imports: one
of each package for every Python, pure or for x86-64 Linux. torch and Triton are the machine's own.
numpy, then matplotlib and what it needs, are added where the folder stays under its size: images
with torch have them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from day_one.dependencies import (
    EXTRA,
    PREINSTALLED,
    packaging,
    project_requirements,
    requirement_name,
    resolve,
)

TREE = Path(__file__).parents[2]
MB = 1e6
GLIBC = (
    "2_12",
    "2_17",
    "2_24",
    "2_27",
    "2_28",
    "2_31",
    "2_34",
    "2_35",
)  # the wheels', oldest first
BULKY = (("numpy",), ("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pillow"))
UNUSED = ("hf-xet",)  # downloads; there is no network
SOURCE = "rosd-fast.tar.gz"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_wheels.sh", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("wheels"))
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12"], metavar="VERSION")
    parser.add_argument("--max-mb", type=float, default=60.0, help="size of the folder")
    args = parser.parse_args(argv)
    folder: Path = args.folder
    if folder.exists() and any(
        path.suffix != ".whl" and path.name != SOURCE for path in folder.iterdir()
    ):
        print(f"gpu_wheels: {folder} has other files in it; name a new folder", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    commit = archive_source(folder / SOURCE)
    with tempfile.TemporaryDirectory() as name:
        downloads = Path(name)
        for python in args.python:
            try:
                download(python, downloads)
            except subprocess.CalledProcessError:  # pip has said why
                print(f"gpu_wheels: pip found no wheels for Python {python}", file=sys.stderr)
                return 1
        left_out = fill(folder, downloads, max_bytes=args.max_mb * MB)
    size = folder_size(folder)
    print(
        f"{folder}: commit {commit}, {len(list(folder.glob('*.whl')))} wheels, {size / MB:.1f} MB"
    )
    if left_out:
        print(f"left out, to stay under {args.max_mb:g} MB: {', '.join(left_out)}")
    for python in args.python:
        lacking = ", ".join(lacks(folder, python))
        lacking = lacking.replace("matplotlib", "matplotlib (only for plots)")
        print(f"a machine with Python {python} must have {lacking}")
    if size > args.max_mb * MB:
        print(
            f"gpu_wheels: {folder} is over {args.max_mb:g} MB; name one --python", file=sys.stderr
        )
        return 1
    return 0


def archive_source(path: Path) -> str:
    """Write the last commit's files, and its name in COMMIT; returns the name."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(TREE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        print("gpu_wheels: changes that are not committed are left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "COMMIT"
        mark.write_text(f"{commit}\n")
        prefix = ["--prefix=rosd-fast/", f"--add-file={mark}"]
        git("archive", "--format=tar.gz", *prefix, "-o", str(path.resolve()), "HEAD")
    return commit


def download(python: str, into: Path) -> None:
    """Fetch the wheels for one version of Python into `into`/VERSION."""
    wanted = [
        text
        for text in project_requirements(TREE)
        if requirement_name(text) not in (*PREINSTALLED, *EXTRA)
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    for glibc in GLIBC:
        command += ["--platform", f"manylinux_{glibc}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--dest", str(into / python)]
    subprocess.run([*command, *wanted], check=True)
    subprocess.run([*command, "--no-deps", *EXTRA], check=True)


def fill(folder: Path, downloads: Path, *, max_bytes: float) -> list[str]:
    """Copy the wheels into `folder`, the bulky ones while they fit; returns what does not."""
    wheels = {path.name: path for path in sorted(downloads.glob("*/*.whl"))}
    bulky = {name for names in BULKY for name in names}
    for path in wheels.values():
        if (name := wheel_name(path)) not in bulky and name not in UNUSED:
            (folder / path.name).write_bytes(path.read_bytes())
    left_out = []
    for names in BULKY:
        group = [path for path in wheels.values() if wheel_name(path) in names]
        if folder_size(folder) + sum(path.stat().st_size for path in group) > max_bytes:
            left_out.append(names[0])
            continue
        for path in group:
            (folder / path.name).write_bytes(path.read_bytes())
    return left_out


def wheel_name(path: Path) -> str:
    return packaging("utils").parse_wheel_filename(path.name)[0]


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def lacks(folder: Path, python: str) -> list[str]:
    """The packages that neither the folder nor a machine with a bare Python has."""
    major, minor = map(int, python.split("."))
    tags = packaging("tags")
    platforms = [f"manylinux_2_{glibc}_x86_64" for glibc in range(40, 4, -1)]
    platforms += ["manylinux2014_x86_64", "linux_x86_64"]
    version = (major, minor)
    supported: Iterable[object] = [
        *tags.cpython_tags(version, platforms=platforms),
        *tags.compatible_tags(version, f"cp{major}{minor}", platforms),
    ]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    needs = resolve(
        project_requirements(TREE), folder, installed={}, environment=environment, tags=supported
    )
    names = dict.fromkeys(map(requirement_name, needs.missing))
    return [name for name in names if name not in UNUSED]


if __name__ == "__main__":
    sys.exit(main())
