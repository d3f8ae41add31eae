"""The weight check: does a server compute the same log-probabilities as the trainer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rosd_fast.errors import RunFailed
from rosd_fast.model.head import head
from rosd_fast.model.layouts import hidden_states
from rosd_fast.types import PackedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosd_fast.engines.sglang.teacher import SglangTeacher

MIN_PROB = 1e-3  # tokens of a lower probability are not compared
MAX_LOGPROB_GAP = {"float32": 0.01, "bfloat16": 0.3}  # nats, by compute type


async def check_teacher_server(
    server: SglangTeacher, model: PreTrainedModel, ids: Sequence[int], *, max_gap: float
) -> None:
    """Raise RunFailed unless the server's log-probabilities are those of `model`.

    The second half of the text `ids` is compared, at each position all tokens of a probability of
    at least `MIN_PROB`. max_gap: largest accepted difference in nats; 0: no check.
    """
    if not max_gap:
        return
    first = len(ids) // 2
    server_states = (await server.score(ids, first=first)).to(head(model).weight)
    packed = PackedSequences(
        input_ids=torch.tensor(list(ids)),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=(0, len(ids)),
        gather=torch.arange(first, len(ids)),
    )
    with torch.no_grad():
        expected = head(model).logprobs(hidden_states(model, packed)[first:])
        received = head(model).logprobs(server_states)
    gap = (expected - received).abs().where(expected.exp() >= MIN_PROB, 0.0)
    worst = int(gap.argmax())
    if not float(gap.flatten()[worst]) <= max_gap:  # also true for NaN
        raise RunFailed(
            f"the teacher server gives a token the log-probability "
            f"{float(received.flatten()[worst]):.4f} and the teacher in the trainer's process "
            f"{float(expected.flatten()[worst]):.4f}, which differ by more than "
            f"teacher.max_logprob_gap = {max_gap:g}: does the server run the model that "
            "teacher.model names or, without it, model?"
        )


def allowed_gap(max_logprob_gap: float | None, dtype: str) -> float:
    """The largest accepted difference of log-probabilities, in nats; None: the dtype's default."""
    return MAX_LOGPROB_GAP[dtype] if max_logprob_gap is None else max_logprob_gap


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """The log-probabilities of `ids[1:]` at temperature 1, each given the tokens before it."""
    inputs = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0].tolist()
