"""Compile every Triton kernel for all GPU generations, without a GPU, and gate the result.

    python -m rosd_kernels.testing.aot [--check] [--quick] [--csv FILE] [--markdown]

`signatures.py` records what the launchers would compile on such a device. This module compiles it
and reads registers, spills, shared memory, tensor-core and TMA instructions and occupancy from the
machine code. The columns of the table:

    spills   instructions that load or store local memory, where registers do not suffice
    shared   KiB per block
    mma      tensor-core instructions: HGMMA (90), UTC*MMA (100), HMMA (all others)
    tma      UTMALDG instructions, each of which loads a block
    wide     IMAD.WIDE instructions: 32 x 32 -> 64-bit products, for 64-bit addresses
    blocks   blocks that fit a multiprocessor at once

Exit status: 0 on success, 1 where `--check` finds a broken rule, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_kernels.gpu.configs import ARCHITECTURES, FAMILIES, SHARED_BYTES, Precision

if TYPE_CHECKING:
    from rosd_kernels.testing.signatures import Job

WORKERS = 2
SAME_AS_86 = 89  # the same blocks and limits, so one variant shows that it compiles
NARROW: tuple[Precision, ...] = ("narrow",)
TENSOR_CORES = {90: "HGMMA", 100: "UTC*MMA"}  # HMMA elsewhere
# Per multiprocessor (CUDA's programming guide, "Technical Specifications per Compute Capability").
REGISTERS = 64 * 1024
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
TENSOR_MEMORY_COLUMNS = 512
BLOCK_RESERVE_BYTES = 1024  # of shared memory, which every block costs on top of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One compiled kernel."""

    kernel: str
    arch: int
    precision: str
    variant: str
    config: str  # blocks, warps, stages
    is_gemm: bool
    use_tma: bool
    registers: int  # per thread
    spills: int
    stack_bytes: int
    shared_bytes: int
    hmma: int
    hgmma: int
    utcmma: int
    tma: int
    wide: int
    short_strides: int  # strides that are multiplied in 32 bits
    blocks: int
    compile_s: float

    @property
    def mma(self) -> int:
        """Tensor-core instructions of the architecture's own kind."""
        return {90: self.hgmma, 100: self.utcmma}.get(self.arch, self.hmma)

    @property
    def any_mma(self) -> int:
        return self.hmma + self.hgmma + self.utcmma


def violations(record: Record) -> list[str]:
    """The rules that a kernel breaks, one line each."""
    r = record
    place = f"{r.kernel}, sm_{r.arch}, {r.precision}, {r.variant}, {r.config}"
    found = []
    if r.spills:
        found.append(
            f"{r.spills} loads and stores of spilled registers ({r.stack_bytes} bytes of stack): "
            "take a smaller block or more warps"
        )
    if r.shared_bytes > SHARED_BYTES[r.arch]:
        found.append(
            f"{r.shared_bytes} bytes of shared memory, over the limit of {SHARED_BYTES[r.arch]}: "
            "take a smaller block or fewer stages"
        )
    if r.is_gemm and r.precision == "narrow" and not r.mma:
        instruction = TENSOR_CORES.get(r.arch, "HMMA")
        found.append(f"no {instruction}: 16-bit operands miss the tensor cores")
    if r.is_gemm and r.precision in ("tf32", "tf32x3") and not r.any_mma:
        found.append("no tensor-core instruction of any kind")
    if r.use_tma and not r.tma:
        found.append("no UTMALDG, although operands come as tensor descriptors")
    if r.short_strides:
        found.append(f"{r.short_strides} row strides multiplied in 32 bits, which overflow")
    return [f"{place}: {what}" for what in found]


def blocks_per_processor(
    arch: int, *, registers: int, num_warps: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Number of blocks of num_warps warps that fit a multiprocessor; registers are per thread."""
    # Registers are allocated to warps in units of 256, from four equal parts of the file.
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    warps = min(WARPS[arch], REGISTERS // 4 // warp_registers * 4)
    limits = [
        BLOCKS[arch],
        warps // num_warps,
        SHARED_KIB[arch] * 1024 // (shared_bytes + BLOCK_RESERVE_BYTES),
    ]
    if tensor_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(limits)


def compile_job(job: Job) -> Record:
    """Compile a job and read its machine code; runs in a worker process."""
    import triton
    from triton.compiler import ASTSource

    start = time.perf_counter()
    kernel = getattr(importlib.import_module(job.module), job.function)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    compiled = triton.compile(source, target=job.target, options=job.options)
    usage, code = read_cubin(compiled.asm["cubin"])
    meta: Any = compiled.metadata
    # On sm_90 and later cuobjdump counts each block's reserve as static shared memory.
    static = max(usage["SHARED"] - (BLOCK_RESERVE_BYTES if job.arch >= 90 else 0), 0)
    shared_bytes = meta.shared + static
    constants = job.named
    return Record(
        kernel=job.kernel,
        arch=job.arch,
        precision=job.precision if job.gemm else "-",
        variant=job.variant,
        config=job.blocks,
        is_gemm=job.gemm is not None,
        use_tma=bool(constants.get("USE_TMA")),
        registers=usage["REG"],
        spills=count(code, "LDL") + count(code, "STL"),
        stack_bytes=usage["STACK"],
        shared_bytes=shared_bytes,
        hmma=count(code, "HMMA"),
        hgmma=count(code, "HGMMA"),
        utcmma=count(code, r"UTC\w*MMA"),
        tma=count(code, "UTMALDG"),
        wide=count(code, r"IMAD\.WIDE"),
        short_strides=short_strides(compiled.asm["ttir"]),
        blocks=blocks_per_processor(
            job.arch,
            registers=usage["REG"],
            num_warps=meta.num_warps,
            shared_bytes=shared_bytes,
            tensor_columns=getattr(meta, "tmem_size", None) or 0,
        ),
        compile_s=round(time.perf_counter() - start, 2),
    )


def read_cubin(cubin: bytes) -> tuple[dict[str, int], str]:
    """(resource usage such as REG, STACK and SHARED; SASS)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "--dump-sass")
        )
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}, code


def count(code: str, instruction: str) -> int:
    """Count a SASS instruction, given as a regular expression for its beginning."""
    return len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{instruction}\b", code, re.M))


def short_strides(ttir: str) -> int:
    """Count the uses of a kernel's 32-bit row strides other than widening them to 64 bits."""
    head, _, body = ttir[ttir.index("tt.func public") :].partition("\n")
    strides = re.findall(r"%(\w*stride): i32", head)
    uses = (
        line for name in strides for line in body.splitlines() if re.search(rf"%{name}\b", line)
    )
    return sum("arith.extsi" not in line for line in uses)


def all_jobs(quick: bool, *, narrow: bool = False) -> list[Job]:
    """All compilations, in float32 once per family of devices.

    quick: each kernel once for 90, in bf16, and the sweep for every architecture. narrow: those in
    bf16, for every architecture.
    """
    from rosd_kernels.testing import signatures

    if not quick:
        families = () if narrow else FAMILIES
        return [
            job
            for arch in ARCHITECTURES
            for job in signatures.jobs(arch, signatures.VARIANTS if arch in families else NARROW)
            if arch != SAME_AS_86 or job.variant == "plain"
        ]
    found: dict[tuple[str, int], Job] = {}
    for arch in ARCHITECTURES:
        for job in signatures.jobs(arch, ["narrow"]):
            if arch == 90 or job.kernel == "sweep":
                found.setdefault((job.kernel, arch), job)
    return list(found.values())


def table(records: Iterable[Record], *, markdown: bool) -> str:
    """The records as aligned columns or as a Markdown table."""
    head = "kernel,arch,precision,variant,config,registers,spills,shared,mma,tma,wide,blocks"
    lines = [[str(word) for word in head.split(",")]]
    for r in records:
        mma = str(r.mma or r.any_mma) + ("" if r.mma or not r.any_mma else " HMMA")
        numbers = (r.registers, r.spills, f"{r.shared_bytes / 1024:.1f}", mma, r.tma, r.wide)
        words = (r.kernel, r.arch, r.precision, r.variant, r.config, *numbers, r.blocks)
        lines.append([str(word) for word in words])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [
            word.ljust(width) if i < 5 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * w if i < 5 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_csv(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rosd_kernels.testing.aot",
        description="Compile the Triton kernels for all GPU generations, without a GPU.",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a rule is broken")
    parser.add_argument("--quick", action="store_true", help="one config per kernel, bf16")
    parser.add_argument("--narrow", action="store_true", help="bf16 only")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args = parser.parse_args(argv)
    try:
        from rosd_kernels.gpu.modes import INTERPRETED
    except ImportError as error:
        print(f"rosd_kernels.testing.aot: needs Triton: {error}; install triton", file=sys.stderr)
        return 2
    if INTERPRETED:
        print(
            "rosd_kernels.testing.aot: TRITON_INTERPRET is set, and the interpreter "
            "compiles nothing; unset it",
            file=sys.stderr,
        )
        return 2

    start = time.perf_counter()
    jobs = all_jobs(args.quick, narrow=args.narrow)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), mp_context=spawn) as pool:
        records = list(pool.map(compile_job, jobs))
    print(table(records, markdown=args.markdown))
    if args.csv is not None:
        write_csv(args.csv, records)
    broken = [line for record in records for line in violations(record)] if args.check else []
    for line in broken:
        print(line, file=sys.stderr)
    verdict = f", {len(broken)} rules broken" if args.check else ""
    seconds = time.perf_counter() - start
    import triton

    by = f"by Triton {triton.__version__} in {seconds:.0f} s"
    print(f"\n{len(records)} kernels compiled {by}{verdict}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
