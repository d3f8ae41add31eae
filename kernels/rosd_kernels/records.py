"""The records that pass between the public function and a strategy.

A strategy is a function `(SpanInputs, SpanOptions, Vocabulary) -> SpanDivergenceOutput`. The
records check themselves, so a strategy may rely on everything documented here; every violation is
a `ValueError` that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rosd_kernels.checks import (
    check_devices,
    check_matrix,
    check_scales,
    check_sparsity,
    check_token_ids,
    check_vector,
    forbid_gradient,
    is_positive,
    shape_text,
)
from rosd_kernels.logits import LogitTransform, compute_dtype
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanOptions:
    """Validated scalar options; `span_divergence` says what each means."""

    divergence: Divergence = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    importance_clip: float | None = None
    top_k: int | None = None
    tail: bool = True
    entry_clip: float | None = None
    sparsity: Sparsity = field(default_factory=Sparsity)
    workspace_mib: float = 256

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: got {self.divergence!r}, want one of {DIVERGENCES}")
        if self.divergence == "jsd" and not (is_positive(self.beta) and self.beta < 1):
            raise ValueError(
                f"beta: got {self.beta!r}, want a number in the open interval (0, 1); "
                "its ends are the divergences 'forward_kl' and 'reverse_kl'"
            )
        check_scales(temperature=self.temperature, workspace_mib=self.workspace_mib)
        clips = {"importance_clip": self.importance_clip, "entry_clip": self.entry_clip}
        check_scales(softcap=self.softcap, **clips, optional=True)
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise ValueError(f"top_k: got {self.top_k!r}, want None or an int from 1 to V")
        if not isinstance(self.tail, bool):
            raise ValueError(f"tail: got {self.tail!r}, want True or False")
        check_sparsity(self.sparsity)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSum:
    """Memory of the caller that the head's gradient is added to, in forward.

    All gradients are formed times `factor`, and backward divides the others by it again.
    """

    buffer: Tensor  # [V, H] in the dtype of the results, contiguous
    factor: float  # what the caller multiplies the loss by before backward


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanInputs:
    """Validated tensors; all but those of the student are detached.

    Use `of` to build one: it fills in the teacher's head and detaches what has no gradient.
    """

    student_hidden: Tensor  # [N, H]
    teacher_hidden: Tensor  # [N, Ht]
    student_head: Tensor  # [V, H]
    teacher_head: Tensor  # [V, Ht]
    student_bias: Tensor | None  # [V]
    teacher_bias: Tensor | None  # [V]
    weights: Tensor | None  # [N]
    token_ids: Tensor | None  # [N] int64
    rollout_logprobs: Tensor | None  # [N]
    head_is_shared: bool  # student_head and teacher_head are the same memory
    head_sum: HeadSum | None = None

    @classmethod
    def of(
        cls,
        *,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        student_head: Tensor,
        teacher_head: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        weights: Tensor | None,
        token_ids: Tensor | None,
        rollout_logprobs: Tensor | None,
    ) -> SpanInputs:
        """Check every tensor against the shape legend. Raises ValueError."""
        check_matrix("student_hidden", student_hidden, "[N, H]")
        check_matrix("teacher_hidden", teacher_hidden, "[N, Ht]")
        check_matrix("student_head", student_head, "[V, H]")
        num_tokens, width = student_hidden.shape
        vocab = student_head.shape[0]
        if vocab == 0:
            raise ValueError(shape_text("student_head", student_head, "[V, H] with V >= 1"))
        if student_head.shape[1] != width:
            raise ValueError(shape_text("student_head", student_head, f"[V, H] = [V, {width}]"))
        if teacher_hidden.shape[0] != num_tokens:
            raise ValueError(
                shape_text("teacher_hidden", teacher_hidden, f"[N, Ht] = [{num_tokens}, Ht]")
            )
        forbid_gradient(teacher_hidden=teacher_hidden, weights=weights)
        forbid_gradient(rollout_logprobs=rollout_logprobs)
        teacher_width = teacher_hidden.shape[1]
        if teacher_head is None:
            if teacher_width != width:
                wish = f"[N, H] = [{num_tokens}, {width}], as teacher_head is None"
                raise ValueError(shape_text("teacher_hidden", teacher_hidden, wish))
            teacher_head = student_head
            teacher_bias = student_bias if teacher_bias is None else teacher_bias
        check_matrix("teacher_head", teacher_head, "[V, Ht]")
        if tuple(teacher_head.shape) != (vocab, teacher_width):
            wish = f"[V, Ht] = [{vocab}, {teacher_width}]"
            raise ValueError(shape_text("teacher_head", teacher_head, wish))
        for name, tensor, want in (
            ("student_bias", student_bias, ("V", vocab)),
            ("teacher_bias", teacher_bias, ("V", vocab)),
            ("weights", weights, ("N", num_tokens)),
            ("rollout_logprobs", rollout_logprobs, ("N", num_tokens)),
        ):
            if tensor is not None:
                check_vector(name, tensor, *want)
        if token_ids is not None:
            token_ids = check_token_ids(token_ids, num_tokens)
        check_devices(
            student_hidden=student_hidden,
            teacher_hidden=teacher_hidden,
            student_head=student_head,
            teacher_head=teacher_head,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weights=weights,
            token_ids=token_ids,
            rollout_logprobs=rollout_logprobs,
        )
        return cls(
            student_hidden=student_hidden,
            teacher_hidden=teacher_hidden.detach(),
            student_head=student_head,
            teacher_head=teacher_head.detach(),
            student_bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            weights=weights,
            token_ids=token_ids,
            rollout_logprobs=rollout_logprobs,
            head_is_shared=same_memory(student_head, teacher_head),
        )

    @property
    def num_tokens(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the heads; with a vocabulary group, of this rank's."""
        return self.student_head.shape[0]

    @property
    def students(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may have a gradient: hidden states, head, bias."""
        return self.student_hidden, self.student_head, self.student_bias

    @property
    def is_stacked(self) -> bool:
        """Whether student and teacher share head and bias, so that one GEMM serves both."""
        same_bias = self.student_bias is self.teacher_bias or (
            self.student_bias is not None
            and self.teacher_bias is not None
            and same_memory(self.student_bias, self.teacher_bias)
        )
        return self.head_is_shared and same_bias

    def transforms(self, options: SpanOptions) -> tuple[LogitTransform, LogitTransform]:
        """The transforms of the student's and of the teacher's logits."""
        biases = (
            None if bias is None else bias.detach().to(self.compute_dtype).contiguous()
            for bias in (self.student_bias, self.teacher_bias)
        )
        student, teacher = (
            LogitTransform(bias, options.softcap, options.temperature) for bias in biases
        )
        return student, teacher

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of logits, sums and results."""
        heads = self.student_head, self.teacher_head
        return compute_dtype(self.student_hidden, self.teacher_hidden, *heads)

    def row_scale(self, weights: Tensor, options: SpanOptions) -> Tensor:
        """The factor of each row's G: [N] of the results of `token_weights`."""
        factor = 1.0 if self.head_sum is None else self.head_sum.factor
        return weights * (factor / options.temperature)

    def with_head_sum(self, buffer: Tensor | None, factor: float) -> SpanInputs:
        """The inputs of a call that adds the head's gradient to `buffer`. Raises ValueError."""
        if buffer is None:
            return self
        head, dtype = self.student_head, self.compute_dtype
        check_matrix("head_grad", buffer, f"[V, H] = {list(head.shape)}")
        if buffer.shape != head.shape or buffer.dtype != dtype or not buffer.is_contiguous():
            raise ValueError(
                f"head_grad: got {buffer.dtype} of shape {list(buffer.shape)}, want contiguous "
                f"{dtype} of shape [V, H] = {list(head.shape)}"
            )
        check_devices(student_head=head, head_grad=buffer)
        check_scales(head_grad_factor=factor)
        return replace(self, head_sum=HeadSum(buffer=buffer, factor=float(factor)))

    def rows(self, start: int, stop: int) -> SpanInputs:
        """The inputs of tokens start..stop only, as views."""
        per_token = ("student_hidden", "teacher_hidden", "weights", "token_ids", "rollout_logprobs")
        tensors = {name: getattr(self, name) for name in per_token}
        cut = {name: x[start:stop] for name, x in tensors.items() if x is not None}
        return replace(self, **cut)

    def token_weights(self, student_logprob: Tensor | None, options: SpanOptions) -> Tensor:
        """Return the [N] weights in the compute dtype.

        With `importance_clip` they are multiplied by `min(exp(lp - rollout_lp), importance_clip)`,
        where lp is `student_logprob` [N], detached; without, it may be None.
        """
        dtype = self.compute_dtype
        if self.weights is None:
            weights = self.student_hidden.new_ones(self.num_tokens, dtype=dtype)
        else:
            weights = self.weights.to(dtype)
        if options.importance_clip is None:
            return weights
        assert student_logprob is not None and self.rollout_logprobs is not None
        ratio = torch.exp(student_logprob - self.rollout_logprobs.to(dtype))
        return weights * ratio.clamp(max=options.importance_clip)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStats:
    """How a result was computed. Reading a measured value waits for the device."""

    strategy: str  # the strategy that ran; never "auto"
    workspace_bytes: int  # logit-sized buffers held at once; 0: unbounded (reference)
    measured: Tensor | None = None  # [3] the properties below; None: everything was computed

    @property
    def active_frac(self) -> float:
        """Fraction of the (token, vocabulary entry) pairs whose gradient was computed."""
        return 1.0 if self.measured is None else float(self.measured[0])

    @property
    def dropped_mass_max(self) -> float:
        """Largest probability mass that sparsity dropped for any token.

        Of `span_divergence`, the larger one of the student's and the teacher's.
        """
        return 0.0 if self.measured is None else float(self.measured[1])

    @property
    def grad_error_bound(self) -> float:
        """Upper bound, over all tokens, on the gradient error that sparsity caused.

        The error of a token is `sum_v |G_v - exact G_v|`, rounding aside, where G is a gradient
        w.r.t. `softcap(h W^T + b)`, the logits before the temperature: that of the token's
        divergence, or of its `token_loss`. Without one, `span_logprob` bounds the gradients of
        the token's log-prob and of its entropy.
        """
        return 0.0 if self.measured is None else float(self.measured[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanDivergenceOutput:
    """What `span_divergence` returns. Everything but `loss` is detached.

    Dtypes are float32, or float64 where the inputs are.
    """

    loss: Tensor  # scalar: sum over tokens of weight * divergence
    per_token: Tensor  # [N] divergence, without the weights, in nats
    # [N] of token_ids at the given temperature; None without token_ids
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None  # [N] likewise
    student_entropy: Tensor | None  # [N] over the whole vocabulary, in nats
    teacher_entropy: Tensor | None  # [N] likewise
    stats: SpanStats


Strategy = Callable[[SpanInputs, SpanOptions, Vocabulary], SpanDivergenceOutput]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same layout."""
    same_layout = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return same_layout and a.data_ptr() == b.data_ptr()
