"""The output head of a model, which turns hidden states into logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rosd_fast.errors import UserError

# Names in configs: of the soft cap of logits, of what multiplies them, and of what divides them.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last step of a language model: logits = cap(scale * (h @ weight.T + bias)).

    cap(x) = softcap * tanh(x / softcap), or x if softcap is None. Gradients flow to weight and bias
    where these are parameters.

    weight: [V, H].
    bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None = None
    scale: float = 1.0

    def first(self, rows: int) -> Head:
        """The head of the first `rows` vocabulary entries; itself if it has no more."""
        if rows >= len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:rows]
        return replace(self, weight=self.weight[:rows], bias=bias)

    def logprobs(self, states: Tensor) -> Tensor:
        """[N, V] float32 log-probabilities at temperature 1 for a few states [N, H]."""
        return logits(states, self, dtype=torch.float32).log_softmax(-1)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that computes the logits. Raises UserError if there is none."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            "has no linear output head, so it is not a causal language model",
            where=type(model).__name__,
        )
    return layer


def head(model: PreTrainedModel) -> Head:
    """The model's output head. Raises UserError if it has none.

    Its tensors are the live parameters; on several ranks use `PolicyModel.head`.
    """
    layer = output_layer(model)
    config = model.config.get_text_config()
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        softcap=next((cap for key in SOFTCAPS if (cap := getattr(config, key, None))), None),
        scale=_scale(config),
    )


def _scale(config: PreTrainedConfig) -> float:
    """What multiplies the logits, by the config."""
    factors = {name: getattr(config, name, None) or 1.0 for name in (*FACTORS, *DIVISORS)}
    if config.model_type.startswith("hyperclovax"):  # it multiplies where others divide
        factors["logits_scaling"] **= -1
    if config.model_type == "mpt":  # it does not read it, and it may be a word
        factors["logit_scale"] = 1.0
    return math.prod(factors[name] for name in FACTORS) / math.prod(
        factors[name] for name in DIVISORS
    )


def logits(hidden: Tensor, head: Head, *, dtype: torch.dtype | None = None) -> Tensor:
    """[N, V] logits of [N, H] hidden states: for checks and tests, never for training.

    dtype: of everything after the matrix product; None: that of the states.
    """
    values = F.linear(hidden, head.weight, head.bias).to(dtype or hidden.dtype) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)
