"""The public function: it checks its arguments, chooses a strategy and runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rosd_kernels.auto import choose, remember, start_of
from rosd_kernels.backends import on_device
from rosd_kernels.checks import check_group, check_ids, check_order, check_strategy
from rosd_kernels.chunked import run_chunked
from rosd_kernels.records import (
    Divergence,
    SpanDivergenceOutput,
    SpanInputs,
    SpanOptions,
    Strategy,
)
from rosd_kernels.reference import run_reference
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.tiled import run_tiled
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import default_workspace_mib

STRATEGIES: dict[str, Strategy] = {
    "chunked": run_chunked,
    "tiled": run_tiled,
    "reference": run_reference,
}


def span_divergence(
    student_hidden: Tensor,  # [N, H]
    teacher_hidden: Tensor,  # [N, Ht]
    student_head: Tensor,  # [V, H]
    teacher_head: Tensor | None = None,  # [V, Ht]
    *,
    divergence: Divergence = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    weights: Tensor | None = None,  # [N]
    token_ids: Tensor | None = None,  # [N]
    rollout_logprobs: Tensor | None = None,  # [N]
    importance_clip: float | None = None,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
    sparsity: Literal["exact"] | Sparsity = "exact",
    strategy: Literal["auto", "tiled", "chunked", "reference"] = "auto",
    workspace_mib: float | None = None,
    vocab_group: ProcessGroup | None = None,
    head_grad: Tensor | None = None,  # [V, H]
    head_grad_factor: float = 1.0,
) -> SpanDivergenceOutput:
    """Token-level divergence of student and teacher, from hidden states: `sum_n w_n D_n`.

    With logits `s = softcap(h W^T + b) / temperature` of the student, `z` of the teacher likewise,
    `p = softmax(s)` and `q = softmax(z)`, the divergence D of a token is the sum over the
    vocabulary of these contributions (`m = beta q + (1-beta) p`):

        forward_kl   q_v log(q_v/p_v)                                     KL(q, p)
        reverse_kl   p_v log(p_v/q_v)                                     KL(p, q)
        jsd          beta q_v log(q_v/m_v) + (1-beta) p_v log(p_v/m_v)    JSD_beta

    Args:
        student_hidden: [N, H], after the final norm, of the distilled tokens only. N may be 0: the
            loss is zero and backpropagates zeros.
        teacher_hidden: [N, Ht]. No gradient flows into it.
        student_head: [V, H].
        teacher_head: [V, Ht]; used without a gradient. None: the student's head, and with it the
            student's bias unless `teacher_bias` is given.
        divergence: a name from the table.
        beta: weight of the teacher in `m`, in (0, 1). Read by `jsd` only.
        temperature: divides both logits, after the soft cap.
        softcap: `softcap(x) = cap tanh(x / cap)`, on both logits. None: the identity.
        student_bias, teacher_bias: [V], added before the soft cap. None: no bias (but see
            `teacher_head`). -inf on both sides, without a soft cap, takes an entry out.
        weights: [N], without a gradient. None: ones. The loss is a sum, not a mean: a normalization
            over the whole optimizer step goes into the weights.
        token_ids: [N] sampled ids, int64 or int32; gives `student_logprob` and `teacher_logprob`.
            Ids out of range raise a ValueError on a CPU, and stop the device on a GPU.
        rollout_logprobs: [N] log-probs of `token_ids` under the policy that sampled them. Read only
            where `importance_clip` is set.
        importance_clip: multiplies weight n by `min(exp(student_logprob_n -
            rollout_logprobs_n), importance_clip)`, without a gradient. Needs `token_ids` and
            `rollout_logprobs`. None: off.
        top_k: compare on the student's k most likely ids only, 1 <= k <= V; the teacher is read at
            the same ids. Entropies and log-probs still see the whole vocabulary. None: all ids.
        tail: with `top_k`, True adds a bucket that holds the remaining mass of either side; False
            renormalizes both over the k ids.
        entry_clip: bounds what an entry contributes from above, `min(contribution_v, entry_clip)`;
            an entry above the bound has no gradient. The tail's bucket is an entry as well. In
            `reverse_kl` an entry counts as `p_v log(p_v/q_v) - p_v + q_v`, which is the same in sum
            and never negative; in `forward_kl` as published, so that its bounded value may be
            negative. None: no bound. A bounded gradient need not lower the unbounded divergence:
            `docs/kernels.md` has measured directions.
        sparsity: "exact", all entries are computed; `entry(eps)` or `mass(tol)`, entries of the
            vocabulary that hold almost no probability have no gradient, and `stats` reports how
            much they held: "tiled" skips tiles (see sparsity.py), "chunked" single entries (see
            active.py). "reference", and "chunked" with `top_k`, compute everything.
        strategy: "chunked", dense GEMMs through a bounded workspace, and with `sparsity` gradients
            of the entries that matter; "tiled", one tile of the vocabulary at a time, and with
            `sparsity` only those that matter, without `top_k`;
            "reference", plain PyTorch on whole [N, V] logits, for tests; "auto", see auto.py. They
            agree up to rounding and what `sparsity` skips.
        workspace_mib: bound on all logit-sized buffers together, statistics of tiles included. One
            row ("chunked"), or one tile and the statistics of 128 rows ("tiled"), are held in any
            case. None: by the device, see `default_workspace_mib`.
        vocab_group: a torch.distributed process group over which the vocabulary is sharded: heads
            and biases are this rank's rows, in rank order, of any number; hidden states, weights,
            ids (of the whole vocabulary) and log-probs are the same on all ranks. So are the
            results, and each rank's gradient of `student_hidden` is the whole one. A collective:
            all ranks of the group call it with the same options. Not for "reference".
        head_grad: [V, H] float32 (float64 where the inputs are), contiguous. Where `student_head`
            requires a gradient, forward adds `head_grad_factor * dloss/dhead` to it, and backward
            returns none for the head: micro-batches then share one buffer. None: autograd gets
            the head's gradient. Not for "reference".
        head_grad_factor: what the loss is multiplied by before backward, a loss scale included;
            with `head_grad` only. The other gradients come out of backward as always. On a CPU a
            backward with another factor raises RuntimeError.

    Returns:
        `SpanDivergenceOutput`. Its `loss` is differentiable w.r.t. `student_hidden`, `student_head`
        and `student_bias`, once: all but "reference" refuse a second backward and
        `create_graph=True` with a RuntimeError. Floating tensors are float64, float32, bfloat16 or
        float16. Logits, sums and gradients are formed in float32 (in float64 where a hidden state
        or head is float64), and a gradient is rounded once, to the dtype of its input (on a GPU,
        "tiled" rounds the head's when it is made, and again when a backward scales it). Equal calls
        give equal bits on one machine and thread count.
        Under torch.compile the graph breaks here.

    Raises:
        ValueError: an argument breaks the contract above. Names the argument, what it got and what
            it wants.
    """
    check_strategy(strategy, tuple(STRATEGIES))
    device = getattr(student_hidden, "device", torch.device("cpu"))
    options = SpanOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        importance_clip=importance_clip,
        top_k=top_k,
        tail=tail,
        entry_clip=entry_clip,
        sparsity=Sparsity() if sparsity == "exact" else sparsity,
        workspace_mib=default_workspace_mib(device) if workspace_mib is None else workspace_mib,
    )
    inputs = SpanInputs.of(
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        student_head=student_head,
        teacher_head=teacher_head,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        weights=weights,
        token_ids=token_ids,
        rollout_logprobs=rollout_logprobs,
    ).with_head_sum(head_grad, head_grad_factor)
    if head_grad is not None and strategy == "reference":
        raise ValueError("head_grad: got a tensor, want None with strategy 'reference'")
    # A tracer would unroll the loops over chunks; it cannot trace collectives or auto's memory.
    run: Any = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(strategy, inputs, options, vocab_group)


def _run(
    strategy: str, inputs: SpanInputs, options: SpanOptions, vocab_group: ProcessGroup | None
) -> SpanDivergenceOutput:
    """The last checks, which need the whole vocabulary's size, then the strategy."""
    check_group(vocab_group, strategy)
    check_order(options.sparsity, inputs.vocab_size)
    head = inputs.student_head
    vocabulary = Vocabulary(inputs.vocab_size, vocab_group, head.device, head.data_ptr())
    _check_sizes(inputs, options, vocabulary)
    if options.top_k == vocabulary.size:  # nothing is left for a tail
        options = replace(options, top_k=None)
    if options.top_k is not None and strategy == "tiled":
        raise ValueError(
            f"top_k: got {options.top_k} with strategy 'tiled', which has no top-k; "
            "want 'chunked' or 'auto'"
        )
    name, kind = strategy, None
    if strategy == "auto":
        name, kind = choose(
            "span_divergence",
            options.sparsity if options.top_k is None else Sparsity(),
            inputs.student_hidden,
            (inputs.student_head, inputs.teacher_head),
            inputs.compute_dtype,
            vocabulary,
            options.workspace_mib,
        )
    start = start_of(kind)
    # Autocast would run in bfloat16 the GEMMs that are in float32 on purpose.
    place = inputs.student_hidden.device
    with on_device(place), torch.autocast(device_type=place.type, enabled=False):
        output = STRATEGIES[name](inputs, options, vocabulary)
    remember(kind, output.stats, inputs.num_tokens, start)
    return output


def _check_sizes(inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary) -> None:
    """The checks that depend on the whole vocabulary's size, or on several arguments."""
    if options.importance_clip is not None:
        for name in ("token_ids", "rollout_logprobs"):
            if getattr(inputs, name) is None:
                raise ValueError(
                    f"{name}: got None, want shape [N] = [{inputs.num_tokens}] with importance_clip"
                )
    if options.top_k is not None and options.top_k > vocabulary.size:
        raise ValueError(f"top_k: got {options.top_k}, want at most V = {vocabulary.size}")
    check_ids(inputs.token_ids, vocabulary)
