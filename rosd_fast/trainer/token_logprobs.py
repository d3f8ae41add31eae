"""The student's log-probabilities of a text: what a server's are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from rosd_fast.model.policy import PolicyModel
from rosd_fast.trainer.loss import scaled, scaled_bias
from rosd_fast.types import PackedSequences
from rosd_kernels import span_logprob


@torch.no_grad()
def token_logprobs(
    policy: PolicyModel, ids: Sequence[int], *, vocab_group: ProcessGroup | None = None
) -> list[float]:
    """The log-probabilities of `ids[1:]` at temperature 1, each given the tokens before it.

    A collective if the model is sharded. vocab_group: ranks of a vocab-parallel head.
    """
    packed = PackedSequences(
        input_ids=torch.tensor(list(ids)),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=(0, len(ids)),
        gather=torch.arange(len(ids) - 1),
    )
    states, head = policy.hidden_states(packed)[:-1], policy.head
    found = span_logprob(
        scaled(states, head),
        head.weight.detach(),
        packed.input_ids[1:].to(states.device),
        softcap=head.softcap,
        bias=scaled_bias(head),
        strategy="chunked",
        vocab_group=vocab_group,
    )
    policy.release()
    return found.logprob.float().tolist()
