"""What is stored of how an evaluation was made, and the part that decides what it measures.

`identity` is that part: model, problems, prompts and sampling. An evaluation goes on only with the
same identity. The rest says where and with what it ran: versions, engine, files.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast import __version__
from rosd_fast.data.sources import split_settings, split_sources
from rosd_fast.evaluation.records import Sampling
from rosd_fast.files import STATE_JSON
from rosd_fast.verify import VERIFIERS
from rosd_fast.verify.user_file import is_user_file

if TYPE_CHECKING:
    from rosd_fast.evaluation.evaluation import Evaluation
    from rosd_fast.evaluation.model import EvaluatedModel
    from rosd_fast.types import Problem

FORMAT = 1  # of settings.json
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "math-verify", "sglang")
HASHED_BYTES = 2**20  # of each end of a file of the model
MODEL_FILES = (".json", ".jinja", ".model", ".safetensors", ".txt")


def identity_of(
    model: EvaluatedModel,
    problems: Mapping[str, Sequence[Problem]],
    *,
    sampling: Sampling,
    chat: Mapping[str, Any],
    dtype: str,
    engine: str,
) -> dict[str, Any]:
    """What decides the figures. chat: the options of chat templates, with texts of templates."""
    own = verifiers_hash(problem.verifier for each in problems.values() for problem in each)
    return {
        "model": model.identity,
        "data": {name: problems_hash(own) for name, own in problems.items()},
        "sampling": asdict(sampling),
        "chat": chat,
        "dtype": dtype,
        "engine": engine,
    } | ({"verifiers": own} if own else {})


def settings_of(evaluation: Evaluation, options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of settings.json. options: of the command, from which it can go on."""
    model, text = evaluation.model, evaluation.source
    places = [split_settings(part)[0] for part in split_sources(text)]
    return {
        "format": FORMAT,
        "model": {"name": model.name, "source": model.source, "note": model.note},
        "data": {"source": text, "files_sha256": files_hash(map(Path, places))},
        "identity": evaluation.identity,
        "options": dict(options),
        "versions": versions(),
    }


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Eight hex digits that tell evaluations with different settings apart."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first setting that differs, with both values; None: there is none."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (found := changed(old, new, f"{prefix}{name}.")) is not None:
                return found
        elif old != new:
            return f"{prefix}{name} was {_short(old)}, is {_short(new)}"
    return None


def problems_hash(problems: Iterable[Problem]) -> dict[str, Any]:
    """The number of problems, and a hash of what is asked and how it is judged."""
    digest, count = hashlib.sha256(), 0
    for problem in problems:
        turns = [[message.role, message.content] for message in problem.messages]
        asked = [problem.id, problem.domain, turns, problem.answer, problem.verifier]
        digest.update(json.dumps(asked).encode() + b"\n")
        count += 1
    return {"problems": count, "sha256": digest.hexdigest()}


def verifiers_hash(names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of the file of each verifier that is one of the user's files, by its name."""
    found = {}
    for name in sorted({*names}):
        origin = VERIFIERS[name].origin if name in VERIFIERS else None
        if origin is not None and is_user_file(name):
            (found[name],) = files_hash([Path(origin.file)]).values()
    return found


def files_hash(paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its absolute path."""
    found = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.absolute())] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def model_hash(folder: Path) -> str:
    """A hash of a model folder: name, size, first and last MiB of each file of the model.

    Training changes nearly all weights, so that is enough, also where the files have many GB.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in MODEL_FILES or path.name == STATE_JSON:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of what the figures may depend on."""
    found = {"rosd_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
