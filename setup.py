"""Builds the C++ extension of rosd_kernels; everything else is declared in pyproject.toml.

Without torch at build time (pip's isolated builds), without a compiler, or with ROSD_NO_CPP=1, the
package is installed without it: it works, in plain PyTorch. The code is built for the vector
instructions of this machine, and its file is named after them, so that an older processor does not
load it; ROSD_CPU_CAPABILITY=AVX2 or DEFAULT builds for older ones.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import setup

HEADERS = ("active", "arguments", "checks", "logits", "logprob", "stats", "terms")
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "DEFAULT": [],
}


def extension() -> dict[str, Any]:
    """Arguments of `setup` that build the extension; none where it cannot be built."""
    if os.environ.get("ROSD_NO_CPP") == "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return skip("torch cannot be imported here; use pip install --no-build-isolation")
    capability = os.environ.get("ROSD_CPU_CAPABILITY") or torch.backends.cpu.get_cpu_capability()
    if capability not in FLAGS:
        capability = "DEFAULT"

    class OptionalBuild(BuildExtension):
        """A build that fails leaves the package without its extension, and says so."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # a compiler that is missing, too old, or fails
                lines = str(error).strip().splitlines() or [type(error).__name__]
                skip(f"{lines[0][:200]} (the compiler's own words, if any, are above)")
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    module = CppExtension(
        f"rosd_kernels._C_{capability}",
        ["csrc/ops.cpp", "csrc/active_ops.cpp"],
        depends=[f"csrc/{name}.h" for name in HEADERS],
        extra_compile_args=[
            *("-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
            "-Wno-maybe-uninitialized",  # in the vector headers of GCC 12
            *(*FLAGS[capability], *defines),
        ],
        extra_link_args=["-fopenmp"],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)},
    }


def skip(reason: str) -> dict[str, Any]:
    print(f"rosd-fast: built without its C++ extension: {reason}", file=sys.stderr)
    return {}


setup(**extension())
