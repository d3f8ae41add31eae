"""A violation of the contract raises a ValueError: the argument, what it got, what it wants."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import rosd_kernels
from rosd_kernels import SpanDivergenceOutput, VocabularyOrder, entry, mass, span_divergence

N, V, H, HT = 4, 7, 3, 5


def good(**changes: Any) -> dict[str, Any]:
    arguments = {
        "student_hidden": torch.randn(N, H),
        "teacher_hidden": torch.randn(N, HT),
        "student_head": torch.randn(V, H),
        "teacher_head": torch.randn(V, HT),
    }
    return arguments | changes


SHAPES = [
    ("student_hidden", torch.randn(2, N, H), "[2, 4, 3]", "[N, H]"),
    ("teacher_hidden", torch.randn(N), "[4]", "[N, Ht]"),
    ("teacher_hidden", torch.randn(N + 1, HT), "[5, 5]", "[N, Ht] = [4, Ht]"),
    ("student_head", torch.randn(V), "[7]", "[V, H]"),
    ("student_head", torch.randn(V, H + 1), "[7, 4]", "[V, H] = [V, 3]"),
    ("student_head", torch.randn(0, H), "[0, 3]", "V >= 1"),
    ("teacher_head", torch.randn(V), "[7]", "[V, Ht]"),
    ("teacher_head", torch.randn(V + 1, HT), "[8, 5]", "[V, Ht] = [7, 5]"),
    ("teacher_head", torch.randn(V, H), "[7, 3]", "[V, Ht] = [7, 5]"),
    ("student_bias", torch.randn(V + 1), "[8]", "[V] = [7]"),
    ("teacher_bias", torch.randn(1, V), "[1, 7]", "[V] = [7]"),
    ("weights", torch.ones(N, 1), "[4, 1]", "[N] = [4]"),
    ("weights", torch.ones(()), "[]", "[N] = [4]"),
    ("token_ids", torch.zeros(N + 1, dtype=torch.int64), "[5]", "[N] = [4]"),
    ("rollout_logprobs", torch.zeros(N - 1), "[3]", "[N] = [4]"),
]


@pytest.mark.parametrize(("name", "value", "got", "want"), SHAPES)
@pytest.mark.parametrize("strategy", ["auto", "tiled", "reference"])
def test_wrong_shape(name, value, got, want, strategy):
    message = f"^{name}: got shape {re.escape(got)}, want .*{re.escape(want)}"
    with pytest.raises(ValueError, match=message):
        span_divergence(**good(**{name: value}), strategy=strategy)


def test_narrower_teacher_without_its_own_head():
    message = r"^teacher_hidden: got shape \[4, 5\], want \[N, H\] = \[4, 3\], as teacher_head is"
    with pytest.raises(ValueError, match=message):
        span_divergence(**good(teacher_head=None))


VALUES = [
    ("divergence", "kl", "'forward_kl'"),
    ("beta", 0.0, r"\(0, 1\)"),
    ("beta", 1, r"\(0, 1\)"),
    ("beta", float("nan"), r"\(0, 1\)"),
    ("beta", "0.5", r"\(0, 1\)"),
    ("temperature", 0, "> 0"),
    ("temperature", None, "> 0"),
    ("temperature", float("inf"), "finite"),
    ("softcap", 0.0, "> 0"),
    ("softcap", True, "> 0"),
    ("importance_clip", -1.0, "> 0"),
    ("entry_clip", 0.0, "> 0"),
    ("workspace_mib", 0, "> 0"),
    ("workspace_mib", "256", "> 0"),
    ("top_k", 0, "1 to V"),
    ("top_k", 2.0, "int"),
    ("top_k", True, "int"),
    ("top_k", V + 1, "at most V = 7"),
    ("tail", 1, "True or False"),
    ("sparsity", "entry(1e-3)", r"'exact', entry\(eps\) or mass\(tol\)"),
    ("sparsity", None, r"'exact', entry\(eps\) or mass\(tol\)"),
    ("sparsity", entry(0.0), r"eps in the open interval \(0, 1\)"),
    ("sparsity", mass(1.0), r"tol in the open interval \(0, 1\)"),
    ("sparsity", mass(float("nan")), r"tol in the open interval"),
    ("sparsity", entry(0.1, order=[1, 2]), "VocabularyOrder or None"),  # type: ignore[arg-type]
    ("sparsity", entry(0.1, VocabularyOrder(V + 1)), "V = 7"),
    ("strategy", "fast", "one of 'auto', 'chunked', 'tiled', 'reference'"),
    ("vocab_group", object(), "process group that this rank belongs to"),
]


@pytest.mark.parametrize(("name", "value", "want"), VALUES)
def test_wrong_value(name, value, want):
    with pytest.raises(ValueError, match=f"^{name}: got .*{want}"):
        span_divergence(**good(**{name: value}))


def test_tiled_has_no_top_k():
    with pytest.raises(ValueError, match=r"^top_k: got 3 with strategy 'tiled'.* want 'chunked'"):
        span_divergence(**good(), top_k=3, strategy="tiled")


@pytest.mark.parametrize("size", [0, -1])
def test_order_of_nothing(size):
    with pytest.raises(ValueError, match=r"^VocabularyOrder: got vocab_size"):
        VocabularyOrder(size)


@pytest.mark.parametrize("name", ["teacher_hidden", "weights", "rollout_logprobs"])
def test_gradient_where_none_can_flow(name):
    value = torch.randn(N, HT) if name == "teacher_hidden" else torch.ones(N)
    with pytest.raises(ValueError, match=f"^{name}: requires a gradient"):
        span_divergence(**good(**{name: value.requires_grad_()}))


def test_teacher_head_that_requires_a_gradient_is_detached():
    tensors = good(teacher_head=torch.randn(V, HT, requires_grad=True))
    tensors["student_head"].requires_grad_()
    span_divergence(**tensors).loss.backward()
    assert tensors["teacher_head"].grad is None and tensors["student_head"].grad is not None


@pytest.mark.parametrize("missing", ["token_ids", "rollout_logprobs"])
def test_importance_clip_needs_sampled_tokens(missing):
    sampled = {"token_ids": torch.zeros(N, dtype=torch.int64), "rollout_logprobs": torch.zeros(N)}
    del sampled[missing]
    with pytest.raises(
        ValueError, match=rf"^{missing}: got None, want shape \[N\] = \[4\] with importance_clip"
    ):
        span_divergence(**good(**sampled), importance_clip=2.0)


@pytest.mark.parametrize("bad", [-1, V])
def test_token_id_outside_the_vocabulary(bad):
    ids = torch.tensor([0, bad, 1, 2])
    with pytest.raises(ValueError, match=f"^token_ids: got id {bad}, want 0 <= id < V = 7"):
        span_divergence(**good(token_ids=ids))


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("student_hidden", torch.zeros(N, H, dtype=torch.int64), "dtype torch.int64"),
        ("student_head", torch.zeros(V, H, dtype=torch.complex64), "dtype torch.complex64"),
        ("weights", torch.ones(N, dtype=torch.bool), "dtype torch.bool"),
        ("token_ids", torch.zeros(N), "dtype torch.float32"),
        ("token_ids", [0, 1, 2, 3], "list"),
        ("weights", [1.0] * N, "list"),
        ("teacher_hidden", None, "NoneType"),
    ],
)
def test_wrong_type(name, value, got):
    with pytest.raises(ValueError, match=f"^{name}: got {got}, want"):
        span_divergence(**good(**{name: value}))


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"^weights: is on meta, want cpu"):
        span_divergence(**good(weights=torch.ones(N, device="meta")))


def test_options_without_effect_are_accepted():
    """Callers may pass the same options with any divergence."""
    want = span_divergence(**(arguments := good()), divergence="forward_kl")
    got = span_divergence(
        **arguments,
        divergence="forward_kl",
        beta=1.0,
        tail=False,
        token_ids=torch.zeros(N, dtype=torch.int32),
        rollout_logprobs=torch.zeros(N),
    )
    assert torch.equal(want.loss, got.loss)
    assert want.student_logprob is None and got.student_logprob is not None


def test_public_names():
    assert isinstance(span_divergence(**good()), SpanDivergenceOutput)
    assert set(rosd_kernels.__all__) >= {"span_divergence", "SpanDivergenceOutput"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", rosd_kernels.__version__)
