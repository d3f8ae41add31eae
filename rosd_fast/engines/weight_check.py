"""The weight check: does a server compute what the trainer computes?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rosd_fast.errors import RunFailed
from rosd_fast.model.attention import hidden_states
from rosd_fast.model.head import head
from rosd_fast.types import PackedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosd_fast.engines.sglang.teacher import SglangTeacher

MIN_PROB = 1e-3  # the least probability of a token that servers and trainer are compared at
MAX_LOGPROB_GAP = {"float32": 0.01, "bfloat16": 0.3}


async def check_teacher(
    teacher_server: SglangTeacher, teacher: PreTrainedModel, ids: Sequence[int], *, bound: float
) -> None:
    """Raise RunFailed unless the server's teacher gives the log-probabilities of `teacher`.

    ids: a text, whose second half is compared, at all tokens of a probability of at least 0.001.
    """
    first = len(ids) // 2
    theirs = (await teacher_server.score(ids, first=first)).to(head(teacher).weight)
    packed = PackedSequences(
        input_ids=torch.tensor(list(ids)),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=(0, len(ids)),
        gather=torch.arange(first, len(ids)),
    )
    with torch.no_grad():
        own = hidden_states(teacher, packed)[first:]
        expected, found = (head(teacher).logprobs(states) for states in (own, theirs))
    gap = (expected - found).abs().where(expected.exp() >= MIN_PROB, 0.0)
    worst = int(gap.argmax())
    if not float(gap.flatten()[worst]) <= bound:  # nor NaN
        raise RunFailed(
            f"the teacher's server gives a token the log-probability "
            f"{float(found.flatten()[worst]):.4f}, and the teacher in the trainer's process "
            f"{float(expected.flatten()[worst]):.4f}, more than teacher.max_logprob_gap = "
            f"{bound:g} apart: does the server run the model that the run starts from?"
        )


def allowed_gap(given: float | None, dtype: str) -> float:
    """Largest difference of log-probabilities that is no error, in nats."""
    return MAX_LOGPROB_GAP[dtype] if given is None else given


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids[1:]` at temperature 1, each given those before it."""
    inputs = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0].tolist()
