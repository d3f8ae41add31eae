"""Rows of an output head that stand for no token.

Heads are padded to a round number of rows. In a trained model these rows have next to no
probability, and the loss and the engines see them like all others. Where they have some, as after
rows were added to a model, the local engine does not sample them, and loss and gradient are those
of the other rows. A server samples from all rows, and so all are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rosd_fast.model.head import head

ATTRIBUTE = "rosd_token_rows"  # of a model; copies of the model, skeletons among them, have it too
MAX_MASS = 1e-5  # probability of all rows without a token that is left to them
TEXT = "First, we add 3 and 4, which gives 7. The answer is 7."


def token_rows(model: PreTrainedModel) -> int:
    """The number of first rows of the head that the local engine samples."""
    return getattr(model, ATTRIBUTE, len(head(model).weight))


def limit_rows(model: PreTrainedModel, tokenizer: Any) -> None:
    """Leave out the rows behind the tokenizer's ids if they have more than `MAX_MASS`."""
    count = 1 + max(tokenizer.get_vocab().values())
    if count < len(head(model).weight) and padding_mass(model, tokenizer, count) > MAX_MASS:
        setattr(model, ATTRIBUTE, count)


@torch.no_grad()
def padding_mass(model: PreTrainedModel, tokenizer: Any, count: int) -> float:
    """The largest probability that rows from `count` on have together, over a short text."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return float(logits.softmax(-1)[:, count:].sum(-1).max())
