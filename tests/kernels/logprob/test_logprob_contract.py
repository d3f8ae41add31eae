"""A violation of `span_logprob`'s contract raises a ValueError: argument, what it got and wants."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rosd_kernels import SpanLogprobOutput, VocabularyOrder, entry, mass, span_logprob

N, V, H = 4, 7, 3


def good(**changes: Any) -> dict[str, Any]:
    arguments = {
        "hidden": torch.randn(N, H),
        "head": torch.randn(V, H),
        "token_ids": torch.tensor([0, 6, 3, 3]),
    }
    return arguments | changes


SHAPES = [
    ("hidden", torch.randn(2, N, H), "[2, 4, 3]", "[N, H]"),
    ("head", torch.randn(V), "[7]", "[V, H]"),
    ("head", torch.randn(V, H + 1), "[7, 4]", "[V, H] = [V, 3]"),
    ("head", torch.randn(0, H), "[0, 3]", "V >= 1"),
    ("bias", torch.randn(V + 1), "[8]", "[V] = [7]"),
    ("token_ids", torch.zeros(N + 1, dtype=torch.int64), "[5]", "[N] = [4]"),
]


@pytest.mark.parametrize(("name", "value", "got", "want"), SHAPES)
@pytest.mark.parametrize("strategy", ["auto", "tiled", "reference"])
def test_wrong_shape(name, value, got, want, strategy):
    message = f"^{name}: got shape {re.escape(got)}, want .*{re.escape(want)}"
    with pytest.raises(ValueError, match=message):
        span_logprob(**good(**{name: value}), strategy=strategy)


VALUES = [
    ("temperature", 0, "> 0"),
    ("temperature", float("nan"), "finite"),
    ("softcap", 0.0, "> 0"),
    ("workspace_mib", "256", "> 0"),
    ("sparsity", None, r"'exact', entry\(eps\) or mass\(tol\)"),
    ("sparsity", entry(0.0), r"eps in the open interval \(0, 1\)"),
    ("sparsity", mass(1.0), r"tol in the open interval \(0, 1\)"),
    ("sparsity", entry(0.1, VocabularyOrder(V + 1)), "V = 7"),
    ("strategy", "fast", "one of 'auto', 'chunked', 'tiled', 'reference'"),
    ("vocab_group", object(), "process group that this rank belongs to"),
    ("token_loss", 3, "a callable or None"),
    ("token_ids", [0, 1, 2, 3], "a tensor"),
    ("token_ids", torch.zeros(N), "int64 or int32"),
    ("token_ids", torch.tensor([0, V, 1, 2]), "0 <= id < V = 7"),
    ("token_ids", torch.tensor([0, -1, 1, 2]), "0 <= id < V = 7"),
    ("hidden", torch.zeros(N, H, dtype=torch.int64), "one of float64"),
]


@pytest.mark.parametrize(("name", "value", "want"), VALUES)
def test_wrong_value(name, value, want):
    with pytest.raises(ValueError, match=f"^{name}: got .*{want}"):
        span_logprob(**good(**{name: value}))


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"^bias: is on meta, want cpu, where hidden is"):
        span_logprob(**good(bias=torch.ones(V, device="meta")))


@pytest.mark.parametrize("strategy", ["chunked", "tiled", "reference"])
@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda logprob: logprob.sum(), r"torch.float32 of shape \[\]"),
        (lambda logprob: logprob[:, None], r"torch.float32 of shape \[4, 1\]"),
        (lambda logprob: logprob > 0, r"torch.bool of shape \[4\]"),
        (lambda logprob: None, "NoneType"),
    ],
    ids=["sum", "column", "bool", "none"],
)
def test_a_token_loss_returns_a_loss_per_token(strategy, returned, got):
    def token_loss(logprob, entropy, rows):
        return returned(logprob)

    with pytest.raises(ValueError, match=rf"^token_loss: returned {got}, want .*\[n\] = \[4\]"):
        span_logprob(**good(), token_loss=token_loss, strategy=strategy)


def test_an_error_in_a_token_loss_comes_through():
    def token_loss(logprob, entropy, rows):
        raise KeyError("advantages")

    with pytest.raises(KeyError, match="advantages"):
        span_logprob(**good(), token_loss=token_loss)


def test_what_comes_back():
    out = span_logprob(**good(token_ids=torch.zeros(N, dtype=torch.int32)))
    assert isinstance(out, SpanLogprobOutput)
    assert out.logprob.shape == out.entropy.shape == (N,)
    assert torch.equal(out.loss, -out.logprob.sum())
    assert out.stats.strategy == "chunked" and 0 < out.stats.workspace_bytes <= 256 << 20
