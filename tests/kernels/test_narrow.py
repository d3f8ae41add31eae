"""bfloat16 GEMMs with float32 sums, which only GPUs have, emulated on the CPU."""

from __future__ import annotations

import pytest
import torch

from rosd_kernels import entry, workspace
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan

BF16 = torch.bfloat16
# G and the scaled hidden states are rounded to bfloat16 (2^-9 of each), products sum those up.
TOLERANCE = 2.0**-8


@pytest.fixture
def narrow_gemms(monkeypatch):
    """Register the emulation for one test; return the calls that it receives."""
    calls = []

    def mm(a, b, out_dtype, *, out):
        assert a.dtype == b.dtype == BF16
        assert out_dtype == out.dtype == torch.float32
        calls.append("mm")
        return out.copy_(a.double() @ b.double())

    def addmm(bias, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert a.dtype == b.dtype == BF16
        assert out_dtype == out.dtype == bias.dtype == torch.float32
        assert beta == alpha == 1
        calls.append("addmm")
        return out.copy_(bias + a.double() @ b.double())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(workspace, "NARROW_DEVICES", ("cpu",))
    yield calls
    library._destroy()


def gemms_of(options) -> set[str]:
    """The first chunk writes the head's gradient, and the others add to it."""
    return {"mm", "addmm"} if "workspace_mib" in options else {"mm"}


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl", "softcap": 5.0},
        {"divergence": "jsd", "workspace_mib": 0.01},
        {"divergence": "jsd", "top_k": 5},
        {"divergence": "jsd", "top_k": 5, "tail": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("teacher_width", [None, 24])
def test_agrees_with_float64(narrow_gemms, make_case, agrees, options, teacher_width):
    case = make_case(
        40, 300, 16, teacher_width=teacher_width, bias=True, weights=True, sampled=True, dtype=BF16
    )
    truth = case.run(
        dtype=torch.float64, **{**options, "strategy": "reference", "workspace_mib": 256}
    )
    actual = case.run(**options, strategy="chunked")
    assert set(narrow_gemms) == gemms_of(options)
    for name in ("loss", "per_token", "student_logprob", "teacher_entropy"):
        got, want = getattr(actual.output, name), getattr(truth.output, name)
        assert torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-5), name
    for name, want in truth.gradients.items():
        got = actual.gradients[name].double()
        allowed = TOLERANCE * (want.abs().max() + want.abs())
        assert bool(((got - want).abs() <= allowed).all()), name


@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "workspace_mib": 0.01}], ids=str)
def test_log_probs_agree_with_float64(narrow_gemms, make_logprob, loss, options):
    case = make_logprob(40, 300, 16, bias=True, dtype=BF16)
    wide = options | {"strategy": "reference", "workspace_mib": 256}
    truth = case.run(loss, dtype=torch.float64, **wide)
    actual = case.run(loss, **options, strategy="chunked")
    assert set(narrow_gemms) == gemms_of(options)
    for name in ("logprob", "entropy"):
        got, want = getattr(actual.output, name), getattr(truth.output, name)
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5), name
    for name, want in truth.gradients.items():
        got = actual.gradients[name].double()
        allowed = TOLERANCE * (want.abs().max() + want.abs())
        assert bool(((got - want).abs() <= allowed).all()), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("is_policy", [False, True], ids=["divergence", "logprob"])
def test_with_a_sparsity(narrow_gemms, make_case, make_logprob, monkeypatch, backend, is_policy):
    """Triton's kernels write G in bfloat16; the others gather for operands in float32."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", backend)
    case = (make_logprob if is_policy else make_case)(40, 300, 16, bias=True, dtype=BF16)
    truth = case.run(dtype=torch.float64, strategy="reference")
    actual = case.run(strategy="chunked", sparsity=entry(1e-9))
    assert set(narrow_gemms) == ({"mm"} if backend == "triton" else set())
    for name, want in truth.gradients.items():
        got = actual.gradients[name].double()
        allowed = TOLERANCE * (want.abs().max() + want.abs())
        assert bool(((got - want).abs() <= allowed).all()), name


def test_g_of_a_sparsity_needs_no_buffer_of_its_own(narrow_gemms):
    hidden, head = torch.zeros(40, 16, dtype=BF16), torch.zeros(300, 16, dtype=BF16)
    call = {"workspace_mib": 1.0, "scratch_rows": 0, "is_fused": True}
    dense, sparse = (
        WorkspacePlan.of([(hidden, head)], Vocabulary(300), is_sparse=of, is_gathered=of, **call)
        for of in (False, True)
    )
    assert dense.gemm_dtype == sparse.gemm_dtype == BF16
    assert (dense.has_narrow, sparse.has_narrow) == (True, False)
    assert Workspace(sparse, hidden.device).narrow is None


def test_what_is_not_all_bfloat16_is_multiplied_in_float32(narrow_gemms, make_case, agrees):
    case = make_case(5, 70, 8, dtype=BF16)
    case.tensors["student_head"] = case.tensors["student_head"].float()
    truth = case.run(dtype=torch.float64, strategy="reference")
    agrees(case.run(strategy="chunked"), truth)
    assert narrow_gemms == []


def test_a_head_of_odd_strides_is_copied_narrow(narrow_gemms, make_case):
    case = make_case(20, 300, 16, dtype=BF16)
    want = case.run(strategy="chunked")
    spread = torch.zeros(300, 32, dtype=BF16)
    spread[:, ::2] = case.tensors["student_head"]
    case.tensors["student_head"] = spread[:, ::2]
    got = case.run(strategy="chunked")
    for name, gradient in want.gradients.items():
        assert torch.allclose(got.gradients[name], gradient, rtol=1e-2, atol=1e-5), name


def test_the_narrow_copy_lies_in_the_workspace():
    plan = WorkspacePlan(
        dtype=torch.float32,
        gemm_dtype=BF16,
        vocab_size=7,
        sides=2,
        rows=3,
        block=3,
        cast_rows=0,
        cast_width=0,
        has_narrow=False,
        num_bytes=0,
    )
    space = Workspace(plan, torch.device("cpu"))
    space.logits.copy_(torch.arange(42.0).view(6, 7))
    narrow = space.grad_operand(2)
    assert torch.equal(narrow.float(), torch.arange(14.0).view(2, 7))
    assert narrow.untyped_storage().data_ptr() == space.logits.untyped_storage().data_ptr()
    assert torch.equal(space.logits[:2], torch.arange(14.0).view(2, 7))
    assert torch.equal(space.logits[4:], torch.arange(28.0, 42.0).view(2, 7))
