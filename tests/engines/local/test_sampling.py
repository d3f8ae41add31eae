"""Draws: evenly spaced uniforms must select each token as often as its probability says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.engines.local.sampling import Policy, draw, uniforms
from rosd_fast.types import SamplingParams

CPU = torch.device("cpu")


def expected_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [V] by the definitions of temperature, top-k and top-p."""
    scaled = logits.double() / params.temperature
    order = sorted(range(len(logits)), key=lambda token: (-float(scaled[token]), token))
    order = order[: params.top_k] if params.top_k else order
    probs = torch.zeros_like(scaled)
    probs[order] = scaled[order].softmax(0)
    if params.top_p < 1:
        mass = 0.0
        for rank, token in enumerate(order):
            if mass >= params.top_p:
                probs[order[rank:]] = 0.0
                break
            mass += float(probs[token])
    return probs / probs.sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    scale=st.sampled_from([0.1, 3.0]),
)
def test_frequencies_are_the_probabilities(
    seed: int, vocab: int, temperature: float, top_p: float, top_k: int, scale: float
) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale
    num = 4096
    uniform = (torch.arange(num) + 0.5) / num
    policy = Policy.of([params] * num, vocab=vocab, device=CPU)
    ids, logprobs = draw(logits.expand(num, -1), uniform, policy)

    expected = expected_probs(logits, params)
    counts = torch.bincount(ids, minlength=vocab).double()
    # Evenly spaced numbers hit an interval of length p within one of p * num times.
    assert (counts - expected * num).abs().max() <= 1.01
    assert torch.allclose(logprobs.double(), expected[ids].log(), atol=1e-5)


def test_the_edges_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, -200.0]]).expand(3, -1)
    params = SamplingParams(max_new_tokens=1)
    uniform = torch.tensor([0.0, 1 - 2.0**-24, 1.0])
    ids, logprobs = draw(logits, uniform, Policy.of([params] * 3, vocab=5, device=CPU))
    assert ids.tolist() == [1, 2, 2]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())


def test_rows_draw_by_their_own_parameters() -> None:
    rows = [
        SamplingParams(max_new_tokens=1, temperature=0.0, top_p=0.1),
        SamplingParams(max_new_tokens=1, temperature=0.5, top_k=2),
        SamplingParams(max_new_tokens=1, top_p=0.6),
        SamplingParams(max_new_tokens=1),
    ]
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((4,), 0.7)
    together = draw(logits, uniform, Policy.of(rows, vocab=30, device=CPU))
    for row, params in enumerate(rows):
        alone = Policy.of([params], vocab=30, device=CPU)
        token, logprob = draw(logits[row : row + 1], uniform[:1], alone)
        assert token == together[0][row]
        assert torch.allclose(logprob, together[1][row], atol=1e-6)
    assert together[0][0] == logits[0].argmax()
    # A greedy token's log-probability is the one at temperature 1.
    assert torch.allclose(together[1][0], logits[0].log_softmax(0).max(), atol=1e-6)


def test_a_huge_vocabulary_keeps_its_rare_tokens() -> None:
    logits = torch.zeros(1, 200_000)
    params = SamplingParams(max_new_tokens=1, top_p=0.5)
    ids, logprobs = draw(
        logits, torch.tensor([0.9999]), Policy.of([params], vocab=200_000, device=CPU)
    )
    assert abs(int(ids) - 100_000) < 200
    assert float(logprobs) == pytest.approx(-np.log(100_000), abs=1e-2)


def test_logits_that_are_not_finite_give_nan() -> None:
    for bad in (torch.nan, torch.inf):
        logits = torch.tensor([[0.0, bad, 1.0]])
        policy = Policy.of([SamplingParams(max_new_tokens=1)], vocab=3, device=CPU)
        ids, logprobs = draw(logits, torch.tensor([0.3]), policy)
        assert 0 <= int(ids) < 3
        assert torch.isnan(logprobs).all()


def test_uniforms_are_fixed_by_their_key() -> None:
    def stream(
        seed: int = 0, request_id: str = "a", index: int = 0, count: int = 50
    ) -> list[float]:
        return uniforms(seed=seed, request_id=request_id, index=index, count=count).tolist()

    assert stream() == stream()
    assert stream(count=9) == stream()[:9]
    others = [stream(seed=1), stream(request_id="b"), stream(index=1), stream(request_id="0/a")]
    assert all(not set(other) & set(stream()) for other in others)
    # The same on all platforms and versions, so that runs can be repeated elsewhere.
    assert stream(count=3) == pytest.approx([0.03510720, 0.56399935, 0.82172573], abs=1e-7)


def test_uniforms_are_uniform() -> None:
    numbers = np.concatenate(
        [uniforms(seed=0, request_id="r", index=index, count=100) for index in range(1000)]
    )
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 55 < chi_square < 155  # 99 degrees of freedom: 0.02 % to 99.98 %
