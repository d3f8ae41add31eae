"""What is said of bfloat16 on a CPU, and that it is said."""

from __future__ import annotations

import time

import pytest
import torch

from rosd_fast import narrow
from rosd_fast.commands import doctor


@pytest.mark.parametrize(
    ("amx", "avx512", "found"),
    [(True, True, "AMX"), (False, True, "AVX512-BF16"), (False, False, None)],
)
def test_the_instructions_are_torchs(amx, avx512, found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert narrow.units() == found


def test_a_torch_that_does_not_tell_has_none(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert narrow.units() is None


@pytest.mark.parametrize(
    ("clock", "gain"),
    # start of all; then begin and end of a float32 and of a bfloat16 product; then the budget
    [((0, 0, 3, 3, 4, 9), 3.0), ((0, 0, 1, 1, 3, 9), 0.5)],
)
def test_the_gain_is_float32s_time_over_bfloat16s(clock, gain, monkeypatch):
    ticks = iter(clock)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert narrow.gain.__wrapped__() == gain


@pytest.mark.parametrize(
    ("found", "gain", "text"),
    [
        ("AMX", 4.04, "with AMX, products of layers are 4.0 times as fast"),
        (None, 0.25, "without instructions for it, products of layers are 4.0 times as slow"),
    ],
)
def test_one_line_says_it(found, gain, text, monkeypatch):
    monkeypatch.setattr(narrow, "units", lambda: found)
    monkeypatch.setattr(narrow, "gain", lambda: gain)
    line = narrow.about_bfloat16()
    assert text in line
    assert line.endswith("the losses compute in float32")
    assert "\n" not in line


@pytest.mark.parametrize("device", ["cpu, 2 threads", "cuda 13.0: a card"])
def test_doctor_says_it_where_the_cpu_computes(device, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_device", lambda: doctor.Finding("device", device, None))
    monkeypatch.setattr(doctor, "about_bfloat16", lambda: "what it says")
    findings = doctor.examine(doctor.Options(out=str(tmp_path)))
    said = [finding.text for finding in findings if finding.name == "bfloat16"]
    assert said == (["what it says"] if device.startswith("cpu") else [])
