"""The C++ operators against plain PyTorch and float64, under torch.compile, and without them."""

from __future__ import annotations

import itertools
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch import Tensor

import rosd_kernels
from rosd_kernels import native, plain, span_divergence
from rosd_kernels.logits import SCALED, LogitTransform
from rosd_kernels.records import SpanOptions

ROOT = Path(__file__).parents[2]
PACKAGE = Path(rosd_kernels.__file__).parent
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
DTYPES = (torch.float32, torch.float64)
SHAPES = tuple(itertools.product((0, 1, 5), (1, 7, 130, 1000)))  # R, C
TILES = (1, 3, 32, 128, 1000, 5000)

built = pytest.mark.skipif(not native.is_available(), reason="built without the C++ extension")


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def logits(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """[R, C] float64 whose values float32 can represent."""
    found = normal(rows, columns, seed=seed, std=3.0)
    if kind == "huge":
        found = 80 * found.sign()
    elif kind == "one_hot" and found.numel():
        found = torch.full_like(found, -300.0)
        found[torch.arange(rows), (torch.arange(rows) * 37 + seed) % columns] = 300.0
    elif kind == "masked":
        found[:, 1::3] = -torch.inf
    return found.float().double()


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Absolute and relative error within `tolerance`; equal where infinite."""
    assert got.shape == want.shape, name
    if want.numel() == 0:
        return
    error = torch.where(got == want, 0.0, (got.double() - want).abs())
    bound = tolerance * (1 + want.abs().nan_to_num(posinf=0.0))
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: element {worst} is {got.flatten()[worst]}, want {want.flatten()[worst]}"
    )


def transform_of(
    bias: Tensor | None, softcap: float | None, temperature: float, dtype: Any
) -> LogitTransform:
    return LogitTransform(None if bias is None else bias.to(dtype), softcap, temperature)


def stats_by_definition(scaled: Tensor, tile: int) -> Tensor:
    """[4, R, T] in float64."""
    found = []
    for part in scaled.split(tile, dim=1):
        log_share = torch.log_softmax(part, -1)
        terms = torch.where(log_share == -torch.inf, 0.0, log_share.exp() * log_share)
        lse = torch.logsumexp(part, -1)
        found.append(torch.stack([lse, part.amax(-1), part.amin(-1), -terms.sum(-1)]))
    return torch.stack(found, dim=-1)


TRANSFORMS = ((False, None, 1.0), (True, None, 0.7), (True, 4.0, 1.0), (False, 4.0, 1.3))


@built
@pytest.mark.parametrize("kind", ["normal", "huge", "one_hot", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_bias", "softcap", "temperature"), TRANSFORMS)
def test_stats(kind, dtype, has_bias, softcap, temperature):
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    for (rows, columns), tile in itertools.product(SHAPES, TILES):
        raw = logits(kind, rows, columns, seed=1)
        bias = normal(columns, seed=2).float().double() if has_bias else None
        picks = torch.arange(rows) * 7 % (columns + 1) - 1  # -1: the token is another shard's
        scaled = raw if bias is None else raw + bias
        scaled = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
        scaled = scaled / temperature
        want = stats_by_definition(scaled, tile)
        sampled = scaled.gather(1, picks.clamp(min=0)[:, None])[:, 0].masked_fill(picks < 0, 0)
        transform = transform_of(bias, softcap, temperature, dtype)
        bound = tolerance * magnitude(scaled)
        has_mass = want[0] > -torch.inf  # a tile whose entries are all masked has no entropy
        want[3] = torch.where(has_mass, want[3], 0.0)
        for module in (native, plain):
            found, picked = module.stats(raw.to(dtype), transform, picks, tile)
            found[3] = torch.where(has_mass, found[3], 0.0)
            label = f"{module.__name__} {rows}x{columns} by {tile}"
            for name, got, wish in zip(("lse", "max", "min", "entropy"), found, want, strict=True):
                assert_close(f"{name} {label}", got, wish, bound)
            assert picked is not None and found.dtype == picked.dtype == dtype
            assert_close(f"sampled {label}", picked, sampled, tolerance)
            assert module.stats(raw.to(dtype), transform, None, tile)[1] is None


def magnitude(scaled: Tensor) -> float:
    """Factor by which logits, and so log-probabilities, are rounded more coarsely than near 1."""
    sizes = scaled.abs().masked_fill(scaled == -torch.inf, 0.0)
    return max(1.0, sizes.max().item() / 30) if scaled.numel() else 1.0


def terms_of(module: Any, *arguments: Any) -> Tensor:
    return module.terms_(*arguments)


def lse_of(raw: Tensor, transform: LogitTransform) -> Tensor:
    """[R], in the dtype of the logits."""
    found, _ = plain.stats(
        raw.double(), transform._replace(bias=_double(transform.bias)), None, 10**6
    )
    return found[0, :, 0].to(raw.dtype)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


@built
@pytest.mark.parametrize("kind", ["normal", "huge", "one_hot", "same"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("entry_clip", [None, 0.01])
@pytest.mark.parametrize(("has_bias", "softcap", "temperature"), TRANSFORMS)
def test_terms(kind, divergence, entry_clip, has_bias, softcap, temperature):
    options = SpanOptions(
        divergence=divergence,
        beta=0.3,
        entry_clip=entry_clip,
        softcap=softcap,
        temperature=temperature,
    )
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        student = logits(kind, rows, columns, seed=1).to(dtype)
        teacher = student.clone() if kind == "same" else logits(kind, rows, columns, 2).to(dtype)
        bias = normal(columns, seed=3).float().double() if has_bias else None
        transforms = [transform_of(b, softcap, temperature, dtype) for b in (bias, bias)]
        lses = [lse_of(raw, f) for raw, f in zip((student, teacher), transforms, strict=True)]
        truth = student.clone().double(), teacher.clone().double()
        doubles = [f._replace(bias=_double(f.bias)) for f in transforms]
        want = terms_of(plain, *truth, *doubles, *map(_double, lses), options)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        tolerance *= magnitude(student.double() / temperature)
        for module in (native, plain):
            mine = student.clone(), teacher.clone()
            got = terms_of(module, *mine, *transforms, *lses, options)
            label = f"{module.__name__} {dtype} {rows}x{columns}"
            assert got.dtype == dtype
            assert_close(f"value and K {label}", got, want, tolerance)
            assert_close(f"p w {label}", mine[0], truth[0], tolerance)
            assert_close(f"e w {label}", mine[1], truth[1], tolerance)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_matrix(dtype):
    """Only the elements of a row are adjacent; elements beyond the columns are not written."""
    wide = normal(2, 5, 40, seed=4).to(dtype)
    parts = wide[:, :, 3:20]
    want_found, _ = native.stats(parts[0].contiguous(), SCALED, None, 8)
    assert torch.equal(native.stats(parts[0], SCALED, None, 8)[0], want_found)
    options, lse = SpanOptions(), torch.full((5,), 4.0, dtype=dtype)
    alone, before = [part.contiguous() for part in parts], wide.clone()
    want = terms_of(native, *alone, SCALED, SCALED, lse, lse, options)
    got = native.terms_(parts[0], parts[1], SCALED, SCALED, lse, lse, options)
    assert torch.equal(got, want)
    assert torch.equal(parts, torch.stack(alone))
    wide[:, :, 3:20] = before[:, :, 3:20]
    assert torch.equal(wide, before)


@built
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3, 4).T}, "logits: got shape .*columns side by side"),
        ({"logits": torch.zeros(3)}, "logits: got shape"),
        ({"bias": torch.zeros(5)}, r"bias: got .*of shape \[4\]"),
        ({"bias": torch.zeros(4).double()}, "bias: got .*ouble"),
        ({"columns": torch.zeros(3)}, "columns: got .*ong"),
        ({"tile": 0}, "tile: got 0, want >= 1"),
    ],
)
def test_operators_check_what_they_get(arguments, message):
    good = {"logits": torch.zeros(3, 4), "bias": None, "columns": None, "softcap": None}
    with pytest.raises(ValueError, match=message):
        torch.ops.rosd.stats(**(good | {"temperature": 1.0, "tile": 4} | arguments))


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(dtype):
    """Repeated calls too give equal bits: one thread sums each row, in a fixed sequence."""
    student, teacher = normal(2, 64, 3001, seed=5, std=3.0).to(dtype)
    lse = lse_of(student, SCALED)
    options, columns = SpanOptions(softcap=8.0), torch.arange(64)
    transform = LogitTransform(None, 8.0, 1.0)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        both = student.clone(), teacher.clone()
        found, picked = native.stats(both[0], transform, columns, 128)
        assert picked is not None
        sums = terms_of(native, *both, transform, transform, lse, lse, options)
        results.append((found, picked, sums, *both))
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@built
@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (3, 130, 9), (9, 1000, 17)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_public_function(make_case, agrees, monkeypatch, strategy, shape, dtype):
    """With and without C++, on the same rounded inputs, with student and teacher far apart."""
    case = make_case(*shape, bias=True, weights=True, sampled=True, scale=3.0, dtype=dtype)
    for divergence in DIVERGENCES:
        options = {"strategy": strategy, "divergence": divergence, "importance_clip": 2.0}
        truth = case.run(dtype=torch.float64, **options | {"strategy": "reference"})
        with_native = case.run(**options)
        with monkeypatch.context() as context:
            context.setattr(native, "is_available", lambda: False)
            without = case.run(**options)
        for result in (with_native, without):
            agrees(result, truth, scale=3.0)


# --------------------------------------------------------------------------- torch.library


def operator_arguments(name: str) -> list[tuple[Any, ...]]:
    bias, columns = normal(130, seed=2).float(), torch.tensor([0, -1, 129, 5, 64])
    student, teacher = (logits("normal", 5, 130, seed).float() for seed in (0, 1))
    lse = lse_of(student, SCALED)
    if name == "stats":
        return [
            (student, None, None, None, 1.0, 130),
            (student, bias, columns, 2.0, 0.5, 32),
            (student[:0], None, columns[:0], None, 1.0, 32),
        ]
    return [
        (student, teacher, None, None, lse, lse, 2, 0.5, None, None, 1.0),
        (student, teacher, bias, None, lse, lse, 0, 0.5, 0.01, 3.0, 0.7),
        (student[:0], teacher[:0], None, None, lse[:0], lse[:0], 1, 0.5, None, None, 1.0),
    ]


@built
@pytest.mark.parametrize("name", ["stats", "terms_"])
def test_opcheck(name):
    for arguments in operator_arguments(name):
        torch.library.opcheck(getattr(torch.ops.rosd, name).default, arguments)


def both_passes(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = 2 * x, y + 1
    (of_x, _), (of_y, _) = (torch.ops.rosd.stats(z, None, None, None, 1.0, 64) for z in (x, y))
    lses = (of_x[0].logsumexp(-1), of_y[0].logsumexp(-1))
    sums = torch.ops.rosd.terms_(x, y, None, None, *lses, 2, 0.5, None, None, 1.0)
    return sums, y - sums[1][:, None] * x


def loss_of(hidden: Tensor, teacher: Tensor, head: Tensor, strategy: Any) -> Tensor:
    return 2 * span_divergence(torch.tanh(hidden), teacher, head, strategy=strategy).loss


def compiler_for(backend: str) -> Any:
    if backend == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    return backend


@built
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_operators(backend):
    """One graph serves any shape."""
    compiled = torch.compile(
        both_passes, backend=compiler_for(backend), fullgraph=True, dynamic=True
    )
    for rows, columns in ((5, 130), (3, 200)):
        x, y = normal(2, rows, columns, seed=6).float()
        for got, want in zip(compiled(x, y), both_passes(x, y), strict=True):
            assert_close(backend, got, want.double(), 1e-6)


@pytest.mark.parametrize("strategy", ["chunked", "tiled", "auto", "reference"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_public_function(make_case, strategy, backend):
    tensors = make_case(6, 300, 8).tensors
    hidden = tensors["student_hidden"].requires_grad_()
    head = tensors["student_head"].requires_grad_()
    compiled = torch.compile(loss_of, backend=compiler_for(backend))
    results = []
    for function in (loss_of, compiled):
        loss = function(hidden, tensors["teacher_hidden"], head, strategy)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for got, want in zip(*results, strict=True):
        assert_close(f"{strategy} {backend}", got, want.double(), 1e-5)


# --------------------------------------------------------------------------- with or without


@pytest.mark.parametrize(
    ("there", "capability", "want"),
    [
        (["AVX512", "AVX2", "DEFAULT"], "AVX512", "AVX512"),
        (["AVX512", "AVX2", "DEFAULT"], "AVX2", "AVX2"),
        (["AVX2", "DEFAULT"], "AVX512", "AVX2"),
        (["AVX512"], "AVX2", None),
        (["AVX512", "AVX2"], "DEFAULT", None),
        (["AVX512", "AVX2", "DEFAULT"], "SVE256", "DEFAULT"),
        (["AVX512"], "NO AVX", None),
        ([], "AVX512", None),
    ],
)
@pytest.mark.parametrize("suffix", ["so", "pyd", "dylib"])
def test_library_of_the_processor(tmp_path, there, capability, want, suffix):
    for name in there:
        (tmp_path / f"_C_{name}.cpython-311-any.{suffix}").touch()
    (tmp_path / "_C_AVX2.py").touch()
    found = native.find_library(tmp_path, capability)
    assert (found and found.name) == (want and f"_C_{want}.cpython-311-any.{suffix}")


TWO_CALLS = """
import torch, rosd_kernels
print(rosd_kernels.__file__)
hidden, head = torch.arange(6.0).view(2, 3).requires_grad_(), torch.eye(3)
for strategy in ("chunked", "tiled", "chunked"):
    out = rosd_kernels.span_divergence(hidden, torch.ones(2, 3), head, strategy=strategy)
    out.loss.backward()
    print(out.loss.item())
"""


def run_python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "it was installed without its C++ extension"), ("broken", "cannot be loaded (")],
)
def test_without_the_extension_it_works_and_says_so_once(tmp_path, library, reason):
    copy = tmp_path / "rosd_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C_*", "__pycache__", "gpu"))
    if library is not None:
        (copy / "_C_DEFAULT.any.so").write_text("not a library")
    ran = run_python(
        "-c", TWO_CALLS, folder=tmp_path, PYTHONPATH=str(tmp_path), PYTHONWARNINGS="default"
    )
    assert ran.returncode == 0, ran.stderr
    where, *losses = ran.stdout.split()
    assert Path(where).parent == copy
    out = span_divergence(torch.arange(6.0).view(2, 3), torch.ones(2, 3), torch.eye(3))
    assert [float(loss) for loss in losses] == pytest.approx([out.loss.item()] * 3, rel=1e-5)
    (line,) = [line for line in ran.stderr.splitlines() if "plain PyTorch" in line]
    assert "rosd_kernels computes in plain PyTorch, which is slower" in line and reason in line
    assert "pip install" in line


def setup_arguments(monkeypatch, **environment: str) -> dict[str, Any]:
    """The arguments that setup.py passes to `setup`."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.append(arguments))
    for name in ("ROSD_NO_CPP", "ROSD_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "setup.py"))
    return found[0]


@pytest.mark.parametrize(
    ("capability", "want"), [("AVX512", "AVX512"), ("AVX2", "AVX2"), ("none such", "DEFAULT")]
)
def test_setup_builds_for_a_capability(monkeypatch, capability, want):
    arguments = setup_arguments(monkeypatch, ROSD_CPU_CAPABILITY=capability)
    (module,) = arguments["ext_modules"]
    assert module.name == f"rosd_kernels._C_{want}"
    assert f"-DCPU_CAPABILITY={want}" in module.extra_compile_args
    assert ("-mavx2" in module.extra_compile_args) == (want != "DEFAULT")
    headers = {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.h")}
    assert set(module.depends) == headers  # a changed header is a new build


def test_setup_without_cpp_or_torch(monkeypatch, capsys):
    assert setup_arguments(monkeypatch, ROSD_NO_CPP="1") == {}
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert setup_arguments(monkeypatch) == {}
    assert capsys.readouterr().err == (
        "rosd-fast: built without its C++ extension: torch cannot be imported here; use pip "
        "install --no-build-isolation\n"
    )


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_compiler_that_fails_leaves_no_extension(tmp_path, compiler):
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = ("setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp")
    ran = run_python(*command, folder=tmp_path, CXX=compiler, CC=compiler)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("rosd-fast:")]
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("rosd-fast: built without its C++ extension: ")
    assert not list(tmp_path.rglob("_C_*"))
