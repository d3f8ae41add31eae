"""Tiny random models of several families, and samples to teach them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rosd_fast.types import TrainSample
from tests.tiny import VOCAB, tiny_model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A function that makes models: make_model("Llama", dtype, seed=0, **config)."""
    return tiny_model


@pytest.fixture
def distill_samples() -> list[TrainSample]:
    """Four samples: two groups of two."""
    g = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=g).tolist())

    prompts = [(ids(6), ids(9)), (ids(4), ids(11))]
    return [
        TrainSample(
            rollout_id=f"{index // 2}/{index % 2}",
            problem_id=str(index // 2),
            student_prompt_ids=prompts[index // 2][0],
            teacher_prompt_ids=prompts[index // 2][1] + ids(3),
            completion_ids=ids(7 + index),
            logprobs=(-2.0,) * (7 + index),
            start=2,
            end=7 + index,
            weight=1.0 + index / 4,
        )
        for index in range(4)
    ]
