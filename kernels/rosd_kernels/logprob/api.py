"""The public function: it checks its arguments, chooses a strategy and runs it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rosd_kernels.auto import choose, remember, start_of
from rosd_kernels.backends import on_device
from rosd_kernels.checks import check_group, check_ids, check_order, check_strategy
from rosd_kernels.logprob.chunked import run_chunked
from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    SpanLogprobOutput,
    Strategy,
    TokenLoss,
)
from rosd_kernels.logprob.reference import run_reference
from rosd_kernels.logprob.tiled import run_tiled
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import default_workspace_mib

STRATEGIES: dict[str, Strategy] = {
    "chunked": run_chunked,
    "tiled": run_tiled,
    "reference": run_reference,
}


def span_logprob(
    hidden: Tensor,  # [N, H]
    head: Tensor,  # [V, H]
    token_ids: Tensor,  # [N]
    *,
    token_loss: TokenLoss | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,  # [V]
    sparsity: Literal["exact"] | Sparsity = "exact",
    strategy: Literal["auto", "tiled", "chunked", "reference"] = "auto",
    workspace_mib: float | None = None,
    vocab_group: ProcessGroup | None = None,
    head_grad: Tensor | None = None,  # [V, H]
    head_grad_factor: float = 1.0,
) -> SpanLogprobOutput:
    """Log-probabilities of sampled tokens and entropies, from hidden states, without [N, V] logits.

    With logits `s = softcap(h W^T + b) / temperature`, `p = softmax(s)` and the sampled token y,

        logprob = log p_y        dlogprob/ds_v = [v = y] - p_v
        entropy = -sum_v p_v log p_v        dentropy/ds_v = -p_v (log p_v + entropy)

    A loss that is a sum over tokens of some function of these two, such as a clipped policy
    gradient with an entropy bonus, goes into `token_loss`: loss and gradients then come from one
    pass over the vocabulary. Cross entropy is `token_loss=lambda logprob, entropy, rows: -logprob`;
    it is also the default, in two passes.

    Args:
        hidden: [N, H], after the final norm, of the tokens of the loss only. N may be 0: the loss
            is zero and backpropagates zeros.
        head: [V, H]. Without a gradient (LoRA), its gradient is not computed.
        token_ids: [N] sampled ids, int64 or int32.
        token_loss: called as `token_loss(logprob, entropy, rows)` on a few tokens at a time while
            their logits are in memory: [n] log-probs and entropies of the tokens `rows`, a slice
            of 0..N. Returns their [n] losses. Autograd differentiates it w.r.t. its two arguments,
            and w.r.t. nothing else that it reads. None: `loss` is the cross entropy, and `logprob`
            and `entropy` are differentiable as well, at the price of computing the logits again in
            backward.
        temperature: divides the logits, after the soft cap.
        softcap: `softcap(x) = cap tanh(x / cap)`. None: the identity.
        bias: [V], finite, added before the soft cap. None: no bias.
        sparsity: "exact", all entries are computed; `entry(eps)` or `mass(tol)`, entries of the
            vocabulary that hold almost no probability have no gradient, and `stats` reports how
            much they held: "tiled" skips tiles (see sparsity.py), "chunked" single entries (see
            active.py). Log-probs and entropies are exact in any case. "reference" computes
            everything.
        strategy: "chunked", dense GEMMs through a bounded workspace, and with `sparsity` gradients
            of the entries that matter; "tiled", one tile of the vocabulary at a time, and with
            `sparsity` only those that matter; "reference", plain PyTorch on whole [N, V] logits,
            for tests; "auto", see auto.py. They agree up to rounding and what `sparsity` skips.
        workspace_mib: bound on all logit-sized buffers together, statistics of tiles included. One
            row ("chunked"), or one tile and the statistics of 128 rows ("tiled"), are held in any
            case. None: by the device, see `default_workspace_mib`.
        vocab_group: a torch.distributed process group over which the vocabulary is sharded: head
            and bias are this rank's rows, in rank order, of any number; hidden states and ids (of
            the whole vocabulary) are the same on all ranks, and `token_loss` computes the same. So
            are the results, and each rank's gradient of `hidden` is the whole one. A collective,
            and without `token_loss` so is its backward. Not for "reference".
        head_grad, head_grad_factor: as in `span_divergence`; with `token_loss` only, as the
            gradient is known in backward without.

    Returns:
        `SpanLogprobOutput`. With `token_loss`, its `loss` is differentiable w.r.t. `hidden`, `head`
        and `bias`, once, and the rest is detached. Without, `loss`, `logprob` and `entropy` are
        differentiable. All but "reference" refuse `create_graph=True` with a
        RuntimeError. Dtypes, rounding and repeatability are those of `span_divergence`. Under
        torch.compile the graph breaks here.

        Cost in sweeps of the head's GEMM: "chunked" 3 with `token_loss`, 4 without; one less where
        the head has no gradient; 1 without any gradient. With a sparsity, "chunked" 1 + 2f with
        `token_loss` and 2 + 2f without, "tiled" 1 + 3f; f is the active fraction of the vocabulary,
        of which single entries are a smaller one than tiles.

    Raises:
        ValueError: an argument breaks the contract above. Names the argument, what it got and what
            it wants.
    """
    check_strategy(strategy, tuple(STRATEGIES))
    if token_loss is not None and not callable(token_loss):
        raise ValueError(f"token_loss: got {type(token_loss).__name__}, want a callable or None")
    device = getattr(hidden, "device", torch.device("cpu"))
    options = LogprobOptions(
        temperature=temperature,
        softcap=softcap,
        sparsity=Sparsity() if sparsity == "exact" else sparsity,
        workspace_mib=default_workspace_mib(device) if workspace_mib is None else workspace_mib,
    )
    inputs = LogprobInputs.of(
        hidden=hidden, head=head, bias=bias, token_ids=token_ids
    ).with_head_sum(head_grad, head_grad_factor)
    if head_grad is not None and (strategy == "reference" or token_loss is None):
        where = "without token_loss" if token_loss is None else "with strategy 'reference'"
        raise ValueError(f"head_grad: got a tensor, want None {where}")
    # A tracer would unroll the loops over chunks; it cannot trace collectives or auto's memory.
    run: Any = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(strategy, inputs, options, vocab_group, token_loss)


def _run(
    strategy: str,
    inputs: LogprobInputs,
    options: LogprobOptions,
    vocab_group: ProcessGroup | None,
    token_loss: TokenLoss | None,
) -> SpanLogprobOutput:
    """The last checks, which need the whole vocabulary's size, then the strategy."""
    check_group(vocab_group, strategy)
    check_order(options.sparsity, inputs.vocab_size)
    vocabulary = Vocabulary(
        inputs.vocab_size, vocab_group, inputs.head.device, inputs.head.data_ptr()
    )
    check_ids(inputs.token_ids, vocabulary)
    name, kind = strategy, None
    if strategy == "auto":
        name, kind = choose(
            "span_logprob",
            options.sparsity,
            inputs.hidden,
            (inputs.head,),
            inputs.compute_dtype,
            vocabulary,
            options.workspace_mib,
        )
    start = start_of(kind)
    # Autocast would run in bfloat16 the GEMMs that are in float32 on purpose.
    place = inputs.hidden.device
    with on_device(place), torch.autocast(device_type=place.type, enabled=False):
        output = STRATEGIES[name](inputs, options, vocabulary, token_loss)
    remember(kind, output.stats, inputs.num_tokens, start)
    return output
