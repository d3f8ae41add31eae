"""Which library computes a model's matrix products on a CPU: torch's own BLAS, or oneDNN.

torch multiplies float32 matrices with the BLAS that it was built with, mostly MKL, which is slow on
some CPUs: on an AMD EPYC one thread does 108 GFLOP/s, and 237 with oneDNN, which torch contains,
too. Errors against float64 are of the same size. A run measures both when it begins, and a
checkpoint holds the choice: a resumed run has the bits of a run that was never stopped.

ROSD_PRODUCTS (torch or onednn) fixes the choice; nothing is measured then. Several ranks, and a run
on a GPU, keep torch's own. `rosd_fast.model.cpu_linear` computes with what is chosen here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from rosd_fast.errors import UserError

Library = Literal["torch", "onednn"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
VARIABLE = "ROSD_PRODUCTS"

GAIN = 1.25  # oneDNN must be this many times as fast
ROUNDS = 6  # of a measurement, of which the fastest counts
BUDGET_S = 0.1  # after which a measurement begins no further round
SHAPE = (512, 192, 576)  # rows, inputs and outputs of the product that is measured
MAX_ERROR = 1e-5  # of oneDNN's product against torch's, relative; a narrower format has 1e-3

_chosen: Library = "torch"


def chosen() -> Library:
    """The library that this process computes with; torch until a run chooses."""
    return _chosen


def use(library: Library) -> None:
    """Compute with `library` from now on, in all threads. It must be `available`."""
    global _chosen
    _chosen = library


def onednn_product() -> Any:
    """`product(x, w, bias, "none", [], "")` = x w^T + bias by oneDNN; None: torch has none."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def given(environ: Mapping[str, str] = os.environ) -> Library | None:
    """The user's choice; None: there is none. Raises UserError for one that cannot be had."""
    value = environ.get(VARIABLE)
    if not value:
        return None
    library: Library | None = next((name for name in LIBRARIES if name == value), None)
    if library is None:
        raise UserError(
            f"must be {' or '.join(LIBRARIES)}", where=f"{VARIABLE}={value}", fix="Leave it out"
        )
    if library == "onednn" and onednn_product() is None:
        raise UserError(
            "this torch has no products by oneDNN", where=f"{VARIABLE}={value}", fix="Leave it out"
        )
    return library


def measure() -> dict[Library, float]:
    """Seconds of one product by each library, with torch's number of threads; up to 0.1 s.

    The fastest round of each counts, which other processes hardly change. Without oneDNN, or where
    its product is not that of float32, there is only torch's.
    """
    import torch

    rows, inputs, outputs = SHAPE
    product = onednn_product()
    with torch.inference_mode():
        x = torch.linspace(-1, 1, rows * inputs).view(rows, inputs)
        w = torch.linspace(-1, 1, inputs * outputs).cos().view(outputs, inputs)
        ways: dict[Library, Callable[[], torch.Tensor]] = {
            "torch": lambda: torch.nn.functional.linear(x, w)
        }
        expected = ways["torch"]()
        if product is not None:
            error = (product(x, w, None, "none", [], "") - expected).norm() / expected.norm()
            if error <= MAX_ERROR:
                ways["onednn"] = lambda: product(x, w, None, "none", [], "")
        seconds = dict.fromkeys(ways, float("inf"))
        begun = time.perf_counter()
        for _ in range(ROUNDS):
            for library, compute in ways.items():
                start = time.perf_counter()
                compute()
                seconds[library] = min(seconds[library], time.perf_counter() - start)
            if time.perf_counter() - begun > BUDGET_S:
                break
    return seconds


def choose(
    *,
    on_cpu: bool,
    num_ranks: int = 1,
    recorded: Library | None = None,
    environ: Mapping[str, str] = os.environ,
    measure: Callable[[], Mapping[Library, float]] = measure,
) -> str:
    """Choose the library of this process; return a line for the user, empty for torch's own.

    recorded: that of the checkpoint that the run resumes from; torch is used if oneDNN is missing.
    Raises UserError as `given` does.
    """
    wanted = given(environ)
    if not on_cpu or num_ranks > 1:
        use("torch")
        return ""
    if wanted is not None or recorded is not None:
        library = wanted or recorded or "torch"
        use(library if onednn_product() is not None else "torch")
        why = f"by {VARIABLE}" if wanted else "as before"
        return f"matrix products: oneDNN, {why}" if chosen() == "onednn" else ""
    seconds = measure()
    gain = seconds["torch"] / seconds.get("onednn", float("inf"))
    use("onednn" if gain >= GAIN else "torch")
    if chosen() == "torch":
        return ""
    return f"matrix products: oneDNN, {gain:.1f} times as fast as torch's own here"
