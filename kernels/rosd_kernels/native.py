"""The C++ operators `torch.ops.rosd.*` of csrc/: loading, fake implementations, Python wrappers.

They are an optional part of the installation. Where they are missing, plain PyTorch does the same
work, and a one-line warning says so.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosd_kernels.divergences import is_never_negative
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import DIVERGENCES, SpanOptions

if TYPE_CHECKING:
    from rosd_kernels.active import ActiveEntries

# From the newest vector instructions to none; a library is named after those it was built for.
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")
DTYPES = (torch.float32, torch.float64)
OPERATORS = (
    *("stats", "terms_", "logprob_grad_"),
    *("mark_active_", "dropped_mass", "scanned_terms", "compact_", "mass_threshold"),
)


@cache
def is_available() -> bool:
    """Load the operators once; warn, once, when none fit this processor."""
    library = find_library(Path(__file__).parent, torch.backends.cpu.get_cpu_capability())
    reason = "it was installed without its C++ extension"
    if library is not None:
        try:
            torch.ops.load_library(library)
        except OSError as error:  # built for another torch
            reason = f"{library.name} cannot be loaded ({str(error).splitlines()[0]})"
        else:
            if all(hasattr(torch.ops.rosd, name) for name in OPERATORS):
                register_fakes()
                return True
            reason = f"{library.name} was built from older sources"
    warnings.warn(
        f"rosd_kernels computes in plain PyTorch, which is slower: {reason}; with a C++ compiler, "
        "`pip install --no-build-isolation` builds it",
        stacklevel=2,
    )
    return False


def find_library(folder: Path, capability: str) -> Path | None:
    """The best library in `folder` that a processor of `capability` can load."""
    usable = CAPABILITIES[CAPABILITIES.index(capability) if capability in CAPABILITIES else -1 :]
    for name in usable:
        for suffix in (".so", ".pyd", ".dylib"):
            for library in sorted(folder.glob(f"_C_{name}.*{suffix}")):
                return library
    return None


def register_fakes() -> None:
    """Register shapes and dtypes of the results, for torch.compile and export."""

    @torch.library.register_fake("rosd::stats")
    def _(logits, bias, columns, softcap, temperature, tile):
        num_rows, num_columns = logits.shape
        found = logits.new_empty(4, num_rows, (num_columns + tile - 1) // tile)
        return found, logits.new_empty(0 if columns is None else num_rows)

    @torch.library.register_fake("rosd::terms_")
    def _(student, teacher, *rest):
        return student.new_empty(2, student.shape[0])

    for name in ("logprob_grad_", "mark_active_", "compact_"):
        torch.library.register_fake(f"rosd::{name}")(lambda *arguments: None)

    @torch.library.register_fake("rosd::dropped_mass")
    def _(logits, *rest):
        return logits.new_empty(4, logits.shape[0])

    @torch.library.register_fake("rosd::scanned_terms")
    def _(student, *rest):
        return student.new_empty(3, student.shape[0])

    @torch.library.register_fake("rosd::mass_threshold")
    def _(logits, *rest):
        return logits.new_empty(logits.shape[0])


def stats(
    logits: Tensor, transform: LogitTransform, columns: Tensor | None, tile: int
) -> tuple[Tensor, Tensor | None]:
    """See elementwise.stats."""
    found, sampled = torch.ops.rosd.stats(
        logits, transform.bias, columns, transform.softcap, transform.temperature, tile
    )
    return found, None if columns is None else sampled


def terms_(
    student: Tensor,
    teacher: Tensor,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,
    teacher_lse: Tensor,
    options: SpanOptions,
) -> Tensor:
    """See elementwise.terms_."""
    result = torch.ops.rosd.terms_(
        student,
        teacher,
        student_transform.bias,
        teacher_transform.bias,
        student_lse,
        teacher_lse,
        DIVERGENCES.index(options.divergence),
        options.beta,
        options.entry_clip,
        options.softcap,
        options.temperature,
    )
    if is_never_negative(options):  # a divergence is never negative; its rounded sum may be
        result[0].clamp_(min=0)
    return result


def logprob_grad_(
    logits: Tensor, transform: LogitTransform, columns: Tensor, lse: Tensor, factors: Tensor
) -> None:
    """See logprob/elementwise.py: `gradient`, in place; factors [3, R] are its `row_factors`."""
    torch.ops.rosd.logprob_grad_(
        logits, transform.bias, columns, lse, factors, transform.softcap, transform.temperature
    )


def mark_active_(
    active: Tensor,
    logits: Tensor,
    transform: LogitTransform,
    threshold: Tensor,
    scanned: Tensor,
    tile: int,
) -> None:
    """See active.py: `mark_active_`."""
    torch.ops.rosd.mark_active_(
        active,
        logits,
        transform.bias,
        threshold,
        scanned,
        transform.softcap,
        transform.temperature,
        tile,
    )


def dropped_mass(
    logits: Tensor, transform: LogitTransform, lse: Tensor, entries: ActiveEntries
) -> Tensor:
    """See active.py: `dropped_mass`."""
    return torch.ops.rosd.dropped_mass(
        logits,
        transform.bias,
        lse,
        entries.scanned,
        entries.is_dropped,
        entries.index,
        transform.softcap,
        transform.temperature,
        entries.tile,
    )


def scanned_terms(
    student: Tensor,
    teacher: Tensor,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,
    teacher_lse: Tensor,
    entries: ActiveEntries,
    options: SpanOptions,
) -> Tensor:
    """See active.py: `scanned_terms`."""
    return torch.ops.rosd.scanned_terms(
        student,
        teacher,
        student_transform.bias,
        teacher_transform.bias,
        student_lse,
        teacher_lse,
        entries.scanned,
        entries.is_dropped,
        DIVERGENCES.index(options.divergence),
        options.beta,
        options.entry_clip,
        options.softcap,
        options.temperature,
        entries.tile,
    )


def compact_(logits: Tensor, index: Tensor) -> Tensor:
    """See active.py: `compact_`."""
    torch.ops.rosd.compact_(logits, index)
    return logits[:, : len(index)]


def mass_threshold(
    logits: Tensor, transform: LogitTransform, lse: Tensor, tolerance: float
) -> Tensor:
    """See active.py: `mass_threshold`."""
    return torch.ops.rosd.mass_threshold(
        logits, transform.bias, lse, tolerance, transform.softcap, transform.temperature
    )
