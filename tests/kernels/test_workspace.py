"""Memory of "chunked": aligned rows, and what the GEMMs write into it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rosd_kernels import span_divergence, span_logprob
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import ROW_ALIGNMENT, Workspace, WorkspacePlan

CPU = torch.device("cpu")
N, V, H = 40, 301, 8
MIB = {1: 8.0, 3: 0.04}  # by number of chunks


class Calls(TorchDispatchMode):
    """Counts operators by name, where the result is a [V, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == (V, H):
            name = func._schema.name.removeprefix("aten::")
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plan_of(hidden, heads, mib, *, is_sparse=False):
    return WorkspacePlan.of(
        [(hidden, head) for head in heads],
        Vocabulary(heads[0].shape[0]),
        workspace_mib=mib,
        scratch_rows=0,
        is_fused=True,
        is_sparse=is_sparse,
    )


@pytest.mark.parametrize("is_narrow", [False, True], ids=["same", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("size", [1, 127, 128, 301, 302])
def test_rows_begin_at_multiples_of_16_bytes(monkeypatch, is_narrow, dtype, sides, size):
    if is_narrow:
        monkeypatch.setattr("rosd_kernels.workspace.NARROW_DEVICES", ("cpu",))
    hidden, head = torch.zeros(N, H, dtype=dtype), torch.zeros(size, H, dtype=dtype)
    plan = plan_of(hidden, [head] * sides, 0.05)
    space = Workspace(plan, CPU)
    matrices = [space.logits, space.grad_operand(min(2, plan.rows))]
    assert [matrix.shape[1] for matrix in matrices] == [size, size]
    for matrix in matrices:
        assert matrix.stride(1) == 1 or size == 1
        assert matrix.stride(0) * matrix.itemsize % ROW_ALIGNMENT == 0
        assert matrix.data_ptr() % ROW_ALIGNMENT == 0
    buffers = {
        tensor.untyped_storage()
        for tensor in (space.logits, space.narrow, space.cast)
        if tensor is not None
    }
    assert sum(buffer.nbytes() for buffer in buffers) == plan.num_bytes <= 0.05 * 2**20


@pytest.mark.parametrize("num_chunks", MIB)
@pytest.mark.parametrize(
    ("function", "is_given"),
    [(span_divergence, False), (span_divergence, True), (span_logprob, False)],
    ids=["divergence", "head_grad", "logprob"],
)
def test_the_first_chunk_writes_the_gradient_of_the_head(
    fresh_memory_is_nan, num_chunks, function, is_given
):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    teacher = torch.randn(N, H, generator=generator)
    ids = torch.arange(N)

    def run(head, **options):
        if function is span_divergence:
            return function(hidden, teacher, head, **options).loss
        return function(
            hidden, head, ids, token_loss=lambda logprob, entropy, rows: -logprob, **options
        ).loss

    head = torch.randn(V, H, generator=generator)
    exact = head.double().requires_grad_()
    run(exact, strategy="reference").backward()
    start = torch.full((V, H), 2.0)
    given = {"head_grad": start.clone()} if is_given else {}
    leaf = head.clone().requires_grad_()
    mib = MIB[num_chunks] / (1 if function is span_divergence else 2)
    with Calls() as calls:
        loss = run(leaf, strategy="chunked", workspace_mib=mib, **given)
    gemms = {name: calls.counts.get(name, 0) for name in ("mm", "addmm")}
    first = 0 if is_given else 1
    assert gemms == {"mm": first, "addmm": num_chunks - first}
    assert not {"zeros", "new_zeros", "zero_", "fill_"} & calls.counts.keys()
    loss.backward()
    got = given["head_grad"] - start if is_given else leaf.grad
    assert exact.grad is not None and got is not None
    assert torch.allclose(got.double(), exact.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("function", [span_divergence, span_logprob])
def test_no_tokens_have_a_gradient_of_zeros(fresh_memory_is_nan, function):
    head, none = torch.ones(V, H, requires_grad=True), torch.zeros(0, H)
    if function is span_divergence:
        loss = function(none, none, head, strategy="chunked").loss
    else:
        ids = torch.zeros(0, dtype=torch.int64)
        loss = function(
            none, head, ids, token_loss=lambda logprob, entropy, rows: -logprob, strategy="chunked"
        ).loss
    loss.backward()
    assert head.grad is not None and not head.grad.any()
