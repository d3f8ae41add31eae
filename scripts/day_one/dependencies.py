"""Which wheels of a folder a machine needs, and what neither of them has.

The machine's own packages are used wherever they meet the requirements of pyproject.toml; only what
is missing, or too old, comes from the folder. torch and Triton always come from the machine.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

PREINSTALLED = ("torch", "triton")  # never in the folder: gigabytes, and built for the machine
OPTIONAL = {  # what a first day can do without, and what then has no figures
    "matplotlib": "the quickstart's plots",
    "liger-kernel": "Liger's rows of the tables",
    "hf-xet": "",  # downloads only
    "triton": "the kernels in the interpreter",  # on a CPU; a GPU's machine must have it
}
EXTRA = ("liger-kernel",)  # beyond the requirements: a peer, of pure Python


def packaging(module: str) -> Any:
    """A module of `packaging`, or of the copy inside pip where a bare machine has no other."""
    import importlib

    try:
        return importlib.import_module(f"packaging.{module}")
    except ImportError:
        return importlib.import_module(f"pip._vendor.packaging.{module}")


@dataclass(slots=True, kw_only=True)
class Needs:
    """What a machine needs.

    wheels: to install, by the package's name. present: versions of what the machine has and keeps.
    missing: requirement -> who wants it; neither the machine nor the folder has it.
    """

    wheels: dict[str, Path] = field(default_factory=dict)
    present: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def fatal(self) -> dict[str, str]:
        """The part of `missing` without which nothing runs."""
        return {
            text: by for text, by in self.missing.items() if requirement_name(text) not in OPTIONAL
        }


def project_requirements(tree: Path) -> list[str]:
    """The requirements of the project in `tree`, Triton and the peers."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    triton = [text for text in project["optional-dependencies"]["gpu"] if "triton" in text]
    return [*project["dependencies"], *triton, *EXTRA]


def resolve(
    requirements: Iterable[str],
    folder: Path,
    *,
    installed: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    tags: Iterable[Any] | None = None,
) -> Needs:
    """Return what a machine needs of the wheels in `folder`.

    installed: name -> version of the machine's packages; None: this process's. environment, tags:
    those of another Python that the folder is checked for; None: this one's.
    """
    if installed is None:
        installed = installed_versions()
    supported = list(tags or packaging("tags").sys_tags())
    wheels, needs = read_folder(folder, supported), Needs()
    waiting = [(text, "rosd-fast") for text in requirements]
    seen: set[str] = set()
    while waiting:
        text, by = waiting.pop(0)
        requirement = packaging("requirements").Requirement(text)
        name = normal(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(
            {**(environment or {}), "extra": ""}
        ):
            continue
        plain = f"{name}{requirement.specifier}"
        if name in needs.wheels:
            if not requirement.specifier.contains(version_of(needs.wheels[name]), prereleases=True):
                needs.missing[plain] = by
            continue
        if name in installed and requirement.specifier.contains(installed[name], prereleases=True):
            needs.present[name] = installed[name]
            continue
        if plain in seen:
            continue
        seen.add(plain)
        fitting = [
            path
            for path in wheels.get(name, ())
            if requirement.specifier.contains(version_of(path), prereleases=True)
        ]
        if not fitting or name in PREINSTALLED:
            needs.missing[plain] = by
            continue
        needs.present.pop(name, None)
        needs.wheels[name] = fitting[0]
        waiting += [(text, name) for text in wheel_requirements(fitting[0])]
    return needs


def installed_versions() -> dict[str, str]:
    """The packages that this Python finds, by normalized name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normal(name), distribution.version)
    return found


def normal(name: str) -> str:
    return packaging("utils").canonicalize_name(name)


def requirement_name(text: str) -> str:
    """The normalized name of the package that a requirement is about."""
    return normal(packaging("requirements").Requirement(text).name)


def read_folder(folder: Path, tags: list[Any]) -> dict[str, list[Path]]:
    """The wheels that suit a Python, by package, the newest and most special first."""
    rank = {tag: index for index, tag in enumerate(tags)}
    found: dict[str, list[tuple[Any, int, Path]]] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, wheel_tags = packaging("utils").parse_wheel_filename(path.name)
        fits = [rank[tag] for tag in wheel_tags if tag in rank]
        if fits:
            found.setdefault(name, []).append((version, -min(fits), path))
    return {
        name: [path for _, _, path in sorted(paths, reverse=True)] for name, paths in found.items()
    }


def version_of(wheel: Path) -> Any:
    return packaging("utils").parse_wheel_filename(wheel.name)[1]


def wheel_requirements(wheel: Path) -> list[str]:
    """What a wheel requires, extras included; peers' own requirements are the project's."""
    if normal(wheel.name.split("-")[0]) in EXTRA:
        return []
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode(errors="replace")
    return HeaderParser().parsestr(text).get_all("Requires-Dist") or []


def install(needs: Needs, site: Path) -> None:
    """Install the wheels into the folder `site`; no index is asked and nothing else changes.

    What an earlier run has installed stays.
    """
    wheels = [
        str(path)
        for path in needs.wheels.values()
        if not (site / "{}-{}.dist-info".format(*path.name.split("-")[:2])).is_dir()
    ]
    if not wheels:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade"]
    command += ["--root-user-action", "ignore", "--target", str(site)]
    subprocess.run([*command, *wheels], check=True)
