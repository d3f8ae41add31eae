"""The records that pass between `span_logprob` and a strategy.

A strategy is a function `(LogprobInputs, LogprobOptions, Vocabulary, TokenLoss | None) ->
SpanLogprobOutput`. The records check themselves; every violation is a ValueError that names the
argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels.autograd import Leaves
from rosd_kernels.checks import (
    check_devices,
    check_matrix,
    check_scales,
    check_sparsity,
    check_token_ids,
    check_vector,
    shape_text,
)
from rosd_kernels.logits import LogitTransform, compute_dtype
from rosd_kernels.records import HeadSum, SpanStats
from rosd_kernels.rows import RowStats
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary

# (logprob [n], entropy [n], rows: the tokens that they belong to) -> [n] losses
TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobOptions:
    """Validated scalar options; `span_logprob` says what each means."""

    temperature: float = 1.0
    softcap: float | None = None
    sparsity: Sparsity = field(default_factory=Sparsity)
    workspace_mib: float = 256

    def __post_init__(self) -> None:
        check_scales(temperature=self.temperature, workspace_mib=self.workspace_mib)
        check_scales(softcap=self.softcap, optional=True)
        check_sparsity(self.sparsity)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobInputs:
    """Validated tensors. Use `of` to build one from arguments."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [N] int64
    head_sum: HeadSum | None = None

    @classmethod
    def of(
        cls, *, hidden: Tensor, head: Tensor, bias: Tensor | None, token_ids: Tensor
    ) -> LogprobInputs:
        """Check every tensor against the shape legend. Raises ValueError."""
        check_matrix("hidden", hidden, "[N, H]")
        check_matrix("head", head, "[V, H]")
        num_tokens, width = hidden.shape
        if head.shape[0] == 0:
            raise ValueError(shape_text("head", head, "[V, H] with V >= 1"))
        if head.shape[1] != width:
            raise ValueError(shape_text("head", head, f"[V, H] = [V, {width}]"))
        if bias is not None:
            check_vector("bias", bias, "V", head.shape[0])
        token_ids = check_token_ids(token_ids, num_tokens)
        check_devices(hidden=hidden, head=head, bias=bias, token_ids=token_ids)
        return cls(hidden=hidden, head=head, bias=bias, token_ids=token_ids)

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head; with a vocabulary group, of this rank's."""
        return self.head.shape[0]

    @property
    def leaves(self) -> Leaves:
        """The tensors that may have a gradient: hidden states, head, bias."""
        return self.hidden, self.head, self.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of logits, sums and results."""
        return compute_dtype(self.hidden, self.head)

    def with_head_sum(self, buffer: Tensor | None, factor: float) -> LogprobInputs:
        """The inputs of a call that adds the head's gradient to `buffer`. Raises ValueError."""
        if buffer is None:
            return self
        found = HeadSum.of(buffer, factor, dtype=self.compute_dtype, head=self.head)
        return replace(self, head_sum=found)

    def scale(self, options: LogprobOptions) -> float:
        """The factor of every row's G."""
        factor = 1.0 if self.head_sum is None else self.head_sum.factor
        return factor / options.temperature

    def transform(self, options: LogprobOptions) -> LogitTransform:
        """The transform of the logits."""
        bias = self.bias
        if bias is not None:
            bias = bias.detach().to(self.compute_dtype).contiguous()
        return LogitTransform(bias, options.softcap, options.temperature)


class TokenValues(NamedTuple):
    """What is known of each token after a pass over the vocabulary, [N] each, detached."""

    lse: Tensor  # log sum exp of the scaled logits
    entropy: Tensor  # nats
    logprob: Tensor  # of the sampled token

    @classmethod
    def empty(cls, inputs: LogprobInputs) -> TokenValues:
        size, dtype = inputs.num_tokens, inputs.compute_dtype
        return cls(*(inputs.hidden.new_empty(size, dtype=dtype) for _ in cls._fields))

    @classmethod
    def of(cls, rows: RowStats) -> TokenValues:
        """The values of rows whose sampled tokens were given."""
        assert rows.logprob is not None
        return cls(rows.lse, rows.entropy, rows.logprob)

    def at(self, rows: slice) -> TokenValues:
        """The values of some tokens, as views."""
        return TokenValues(*(values[rows] for values in self))


class Slopes(NamedTuple):
    """Derivatives of each token's loss, [N] each."""

    logprob: Tensor  # dloss/dlogprob
    entropy: Tensor  # dloss/dentropy

    def at(self, rows: slice) -> Slopes:
        """The slopes of some tokens, as views."""
        return Slopes(self.logprob[rows], self.entropy[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLogprobOutput:
    """What `span_logprob` returns; dtypes are float32, or float64 where the inputs are.

    With `token_loss`, `loss` is differentiable and the rest is detached. Without, all three are
    differentiable.
    """

    loss: Tensor  # scalar: sum over the tokens of what `token_loss` returns, or of -logprob
    logprob: Tensor  # [N] of token_ids at the given temperature
    entropy: Tensor  # [N] over the whole vocabulary, in nats
    stats: SpanStats


Strategy = Callable[
    [LogprobInputs, LogprobOptions, Vocabulary, TokenLoss | None], SpanLogprobOutput
]
