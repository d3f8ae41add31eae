"""Measured block sizes: their file, their use, and the candidates that are tried for them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from rosd_kernels.gpu import tuned
from rosd_kernels.gpu.configs import ARCHITECTURES, SHARED_BYTES, Config, select, shared_limit
from rosd_kernels.gpu.launch import Gemm
from rosd_kernels.testing import tuning
from rosd_kernels.testing.checking import Shape

CPU = torch.device("cpu")
CONFIG = Config(64, 128, 32, 4, 2)
SHAPE = Shape(130, 256, 64)


def entry(**changes):
    made = tuning.table_entry("sweep", CONFIG, arch_capability=90, lean=True, ms=1.0)
    return {**made, **changes}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a file of entries and has it read in place of the committed one."""

    def write(*entries) -> None:
        path = tmp_path / f"{len(entries)}.json"
        path.write_text(json.dumps({"entries": entries}))
        monkeypatch.setattr(tuned, "FILE", path)

    return write


def of(kernel="sweep", capability=90, *, lean=True):
    return tuned.tuned(kernel, capability, "narrow", lean=lean)


def test_an_entry_holds_for_its_device_and_version_alone(table):
    table(entry(), entry(capability=80, triton="1.0"))
    assert of() == CONFIG
    assert of(lean=False) is None
    assert of("pair") is None
    assert of(capability=100) is None
    assert of(capability=80) is None  # of another Triton
    assert tuned.tuned("sweep", 90, "tf32", lean=True) is None


def test_without_a_file_nothing_is_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FILE", tmp_path / "absent.json")
    assert of() is None


def test_an_entry_that_lacks_something_is_refused():
    bad = entry()
    del bad["num_warps"]
    with pytest.raises(ValueError, match="entry 0 has no 'num_warps'"):
        tuned.read_table({"entries": [bad]})


def test_the_committed_table_fits_the_devices_that_it_names():
    if not tuned.FILE.is_file():
        pytest.skip("nothing was measured yet")
    for key, config in tuned.read_table(json.loads(tuned.FILE.read_text())).items():
        kernel, capability, _, precision, _ = key
        assert precision == "narrow"
        assert capability >= 80
        limit = shared_limit(capability)
        assert tuning.shared_bytes(kernel, config) <= limit  # type: ignore[arg-type]


def test_launches_use_the_measured_config(table):
    table(entry())
    operands = torch.zeros(8, 64).bfloat16(), torch.zeros(16, 64).bfloat16()
    assert Gemm.of("sweep", *operands, order=None).config == CONFIG
    assert Gemm.of("pair", *operands, order=None).config == select("pair", 90, "narrow", lean=True)


def test_a_config_is_forced_for_a_moment(table):
    table()
    with tuned.using("sweep", CONFIG), tuned.using("pair", replace(CONFIG, group=4)):
        assert of() == CONFIG and of("pair") == replace(CONFIG, group=4)
    assert of() is None and of("pair") is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_begin_with_the_config_in_use_and_fit(kernel, arch):
    base = select(kernel, arch, "narrow", lean=True)
    found = tuning.candidates(kernel, base, arch)
    assert found[0] == base and len(found) == len(set(found)) > 5
    for config in found[1:]:
        assert tuning.shared_bytes(kernel, config) < SHARED_BYTES[arch]


@pytest.fixture(scope="module")
def problem():
    return tuning.Problem(SHAPE, CPU, lean=True)


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_right_candidates_pass(kernel, problem):
    base = tuning.current(kernel, CPU, lean=True)
    other = tuning.candidates(kernel, base, 90)[1]
    check = tuning.check(kernel, other, problem, base)
    assert check.ok, check.text
    tuning.timed_call(kernel, other, problem)()


def test_candidates_with_extras_pass():
    problem = tuning.Problem(SHAPE, CPU, lean=False)
    base = tuning.current("pair", CPU, lean=False)
    check = tuning.check("pair", replace(base, block_k=32), problem, base)
    assert check.ok, check.text


class Broken:
    """A problem whose results with any but the base's config are wrong, or do not repeat."""

    def __init__(self, change) -> None:
        self.change, self.calls = change, 0

    def run(self, kernel):
        self.calls += 1
        result = torch.ones(4)
        if tuned._forced[kernel] == CONFIG:
            return [result]
        return [self.change(result, self.calls)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, calls: x * 1.1, "wrong"),
        (lambda x, calls: x * float("nan"), "other bits"),
        (lambda x, calls: x + calls * 1e-6, "other bits"),
    ],
    ids=["wrong", "nan", "not repeatable"],
)
def test_wrong_candidates_fail(change, text):
    check = tuning.check("sweep", replace(CONFIG, group=4), Broken(change), CONFIG)  # type: ignore[arg-type]
    assert not check.ok and text in check.text


def test_a_candidate_that_the_device_refuses_is_no_crash():
    class OutOfResources(Exception):
        pass

    def refuse(x, calls):
        raise OutOfResources("out of resource: shared memory")

    check = tuning.check("sweep", replace(CONFIG, group=4), Broken(refuse), CONFIG)  # type: ignore[arg-type]
    assert not check.ok and "does not fit" in check.text

    def crash(x, calls):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tuning.check("sweep", replace(CONFIG, group=4), Broken(crash), CONFIG)  # type: ignore[arg-type]


def test_a_candidate_that_spills_fails_but_not_the_config_in_use(monkeypatch):
    class Binary:
        n_regs, n_spills = 255, 40

    loaded: set = set()
    monkeypatch.setattr(tuning, "_compiled", lambda kernel: set(loaded))

    def load(x, calls):
        loaded.add(Binary())
        return x

    check = tuning.check("sweep", replace(CONFIG, group=4), Broken(load), CONFIG)  # type: ignore[arg-type]
    assert not check.ok and "spills 40" in check.text
