"""The compile gate: a quick run passes the shipped kernels, and every rule can be broken."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from rosd_kernels.gpu import configs
from rosd_kernels.gpu.configs import (
    ARCHITECTURES,
    CONFIGS,
    OLDER,
    SHARED_BYTES,
    family,
    select,
)
from rosd_kernels.testing import aot

GOOD = aot.Record(
    kernel="sweep",
    arch=90,
    precision="narrow",
    variant="plain",
    config="128x256x64 w8 s3",
    is_gemm=True,
    use_tma=True,
    registers=200,
    spills=0,
    stack_bytes=0,
    shared_bytes=150_000,
    hmma=0,
    hgmma=16,
    utcmma=0,
    tma=4,
    wide=12,
    short_strides=0,
    blocks=1,
    compile_s=1.0,
)


def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rosd_kernels.testing.aot", *args]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_the_quick_gate_passes(tmp_path):
    """Each kernel for sm_90 and the sweep for every architecture."""
    done = run("--quick", "--check", "--csv", str(tmp_path / "aot.csv"))
    assert done.returncode == 0, done.stderr
    assert "0 rules broken" in done.stdout
    with (tmp_path / "aot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["arch"]) for row in rows if row["kernel"] == "sweep"} == set(ARCHITECTURES)
    names = {row["kernel"] for row in rows}
    assert {"sweep", "pair loss", "pair grad", "grad_hidden", "grad_head", "rows"} <= names
    assert {"logprob_tile", "logprob_stats", "logprob_grad"} <= names
    assert all(int(row["spills"]) == 0 for row in rows)
    assert f"{len(rows)} kernels compiled" in done.stdout
    for arch, column in ((80, "hmma"), (90, "hgmma"), (100, "utcmma"), (120, "hmma")):
        sweep = next(r for r in rows if r["kernel"] == "sweep" and r["arch"] == str(arch))
        assert int(sweep[column]) > 0
        assert (int(sweep["tma"]) > 0) == configs.has_tma(arch)


def test_in_the_interpreter_it_says_so_in_one_line():
    done = run("--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_a_good_kernel_breaks_no_rule():
    assert aot.violations(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spills": 3, "stack_bytes": 16}, "3 loads and stores of spilled registers"),
        ({"shared_bytes": SHARED_BYTES[90] + 1}, "over the limit"),
        ({"hgmma": 0, "hmma": 16}, "no HGMMA"),
        ({"hgmma": 0, "arch": 80, "use_tma": False}, "no HMMA"),
        ({"hgmma": 0, "hmma": 8, "arch": 89, "use_tma": False}, "over the limit of 101376"),
        ({"hgmma": 0, "precision": "tf32"}, "no tensor-core instruction"),
        ({"tma": 0}, "no UTMALDG"),
        ({"short_strides": 1}, "overflow"),
    ],
    ids=str,
)
def test_each_rule_can_be_broken(changes: dict[str, Any], text: str):
    (line,) = aot.violations(replace(GOOD, **changes))
    assert text in line
    assert line.startswith("sweep, sm_")


def test_float32_in_full_needs_no_tensor_cores():
    assert aot.violations(replace(GOOD, precision="ieee", hgmma=0)) == []


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 STL [R1+0x4], R5 ;
        /*0020*/                   LDL.LU R5, [R1+0x4] ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/            @!UPT UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10] ;
        /*0060*/                   IMAD.WIDE.U32 R2, R3, R4, R6 ;
        /*0070*/                   IMAD R2, R3, R4, R6 ;
"""


def test_instructions_are_counted():
    counts = {
        "LDL": 1,
        "STL": 1,
        "HGMMA": 1,
        "HMMA": 0,
        "UTMALDG": 1,
        r"UTC\w*MMA": 1,
        r"IMAD\.WIDE": 1,
    }
    assert {name: aot.count(SASS, name) for name in counts} == counts


def test_strides_that_are_multiplied_in_32_bits_are_found():
    head = "tt.func public @k(%a: !tt.ptr<f32>, %a_stride: i32) {\n"
    assert aot.short_strides(head + "%1 = arith.extsi %a_stride : i32 to i64\n") == 0
    assert aot.short_strides(head + "%1 = arith.muli %0, %a_stride : i32\n") == 1


@pytest.mark.parametrize(
    ("usage", "blocks"),
    [
        ({"registers": 255, "num_warps": 8, "shared_bytes": 0}, 1),
        ({"registers": 128, "num_warps": 8, "shared_bytes": 0}, 2),
        ({"registers": 32, "num_warps": 4, "shared_bytes": 0}, 16),
        ({"registers": 32, "num_warps": 4, "shared_bytes": 100 * 1024}, 2),
        ({"registers": 32, "num_warps": 1, "shared_bytes": 0}, 32),
        ({"registers": 32, "num_warps": 4, "shared_bytes": 0, "tensor_columns": 256}, 2),
    ],
    ids=str,
)
def test_occupancy(usage, blocks):
    assert aot.blocks_per_processor(90, **usage) == blocks


def test_tables():
    plain = aot.table([GOOD, replace(GOOD, arch=80, spills=2)], markdown=False).splitlines()
    assert plain[0].split() == aot.table([], markdown=False).split()
    assert plain[1].split()[:3] == ["sweep", "90", "narrow"]
    lines = aot.table([GOOD], markdown=True).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert re.fullmatch(r"[|: -]+", lines[1])


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *((75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100)),
        *((110, 100), (120, 80), (121, 80), (130, 80)),
    ],
)
def test_the_configs_of_a_device(capability, arch):
    assert family(capability) == arch
    table = CONFIGS | (OLDER if configs.is_old_triton() else {})
    for kernel, of_arch, precision in CONFIGS:
        if of_arch == arch:
            lean = select(kernel, capability, precision, lean=True)
            assert lean is table[kernel, arch, precision][0]


@pytest.mark.parametrize(
    ("version", "is_old"),
    [("3.6.0", True), ("3.7.1+git12", True), ("3.8.0", False), ("3.10.0", False)],
)
def test_an_older_triton_has_its_own_table(monkeypatch, version, is_old):
    """Smaller blocks where it would spill, and no TMA on consumer GPUs."""
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    configs.is_old_triton.cache_clear()
    try:
        for (kernel, arch, precision), older in OLDER.items():
            for lean, want in ((True, older[0]), (False, older[1])):
                newer = CONFIGS[kernel, arch, precision][0 if lean else 1]
                assert select(kernel, arch, precision, lean=lean) is (want if is_old else newer)
        assert configs.has_tma(120) == (not is_old)
        assert configs.has_tma(90)
        assert not configs.has_tma(89)
        assert configs.rows_config() == ((1024, 8, 64) if is_old else (2048, 8, None))
    finally:
        configs.is_old_triton.cache_clear()
