"""From hidden states to the loss: a thin layer over `rosd_kernels`.

The loss of an optimizer step, over its N distilled tokens in all micro-batches:

    1/N sum_i weight_i * min(exp(student_lp_i - rollout_lp_i), importance_clip) * divergence_i

The importance weight is detached; it is 1 if `importance_clip` is None. To this the tokens without
a teacher add, with ratio_j = exp(student_lp_j - rollout_lp_j):

    sum_j weight_j * -min(ratio_j A_j, clip(ratio_j, 1 - clip_low, 1 + clip_high) A_j)
    sum_k weight_k * -student_lp_k                                                    (likelihood)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rosd_fast.config import LossConfig, PolicyConfig
from rosd_fast.model.head import Head
from rosd_fast.types import PackedBatch, PolicyTokens
from rosd_fast.utils.transfer import on_device
from rosd_kernels import (
    SpanDivergenceOutput,
    SpanLogprobOutput,
    VocabularyOrder,
    entry,
    mass,
    span_divergence,
    span_logprob,
)


def span_loss(
    student_hidden: Tensor,  # [N, H], rows gathered at the distilled tokens
    teacher_hidden: Tensor,  # [N, H], the same tokens under the teacher's prompt
    batch: PackedBatch,
    *,
    student_head: Head,
    teacher_head: Head,
    config: LossConfig,
    temperature: float,
    order: VocabularyOrder | None = None,
    vocab_group: ProcessGroup | None = None,
    head_grad: Tensor | None = None,  # [V, H] float32
    head_grad_factor: float = 1.0,
) -> SpanDivergenceOutput:
    """The micro-batch's summed loss, with per-token divergence, log-probs and entropies.

    Differentiable with respect to the student's states and head. `loss` is a sum: divide it by the
    step's N.

    temperature: of the rollouts; `config.temperature` overrides it.
    order: from `vocabulary_order`; it is learned in the first calls.
    vocab_group: ranks of a vocab-parallel head. The heads are this rank's rows; all other arguments
        are equal on all ranks of the group.
    head_grad: memory that the head's gradient, times `head_grad_factor`, is added to at once;
        autograd then gets none. None: autograd gets it.
    """
    device = student_hidden.device
    return span_divergence(
        scaled(student_hidden, student_head),
        scaled(teacher_hidden, teacher_head),
        student_head.weight,
        teacher_head.weight,
        weights=on_device(batch.weights, device),
        token_ids=on_device(batch.token_ids, device),
        rollout_logprobs=None
        if config.importance_clip is None
        else on_device(batch.rollout_logprobs, device),
        importance_clip=config.importance_clip,
        vocab_group=vocab_group,
        head_grad=head_grad,
        head_grad_factor=head_grad_factor,
        **formula(student_head, teacher_head, config, temperature),
        **sparsity(config, order),
    )


@torch.no_grad()
def token_divergences(
    student_hidden: Tensor,  # [M, H]
    teacher_hidden: Tensor,  # [M, Ht]
    *,
    student_head: Head,
    teacher_head: Head,
    config: LossConfig,
    temperature: float,
    vocab_group: ProcessGroup | None = None,
) -> Tensor:
    """[M] divergences in nats at tokens that are not trained; the arguments are `span_loss`'s."""
    return span_divergence(
        scaled(student_hidden, student_head),
        scaled(teacher_hidden, teacher_head),
        student_head.weight,
        teacher_head.weight,
        vocab_group=vocab_group,
        **formula(student_head, teacher_head, config, temperature),
    ).per_token


def formula(
    student_head: Head, teacher_head: Head, config: LossConfig, temperature: float
) -> dict[str, Any]:
    """The keyword arguments that say which divergence is computed, and how."""
    return {
        "divergence": config.divergence,
        "beta": config.beta,
        "temperature": temperature if config.temperature is None else config.temperature,
        "softcap": student_head.softcap,
        "student_bias": scaled_bias(student_head),
        "teacher_bias": scaled_bias(teacher_head),
        "top_k": config.top_k,
        "tail": config.tail,
        "entry_clip": config.entry_clip,
        "strategy": strategy(config, student_head.weight.device),
        "workspace_mib": config.workspace_mib,
    }


def policy_loss(
    student_hidden: Tensor,  # [M, H], rows gathered at the tokens
    tokens: PolicyTokens,
    *,
    student_head: Head,
    config: LossConfig,
    policy: PolicyConfig,
    temperature: float,
    order: VocabularyOrder | None = None,
    vocab_group: ProcessGroup | None = None,
    head_grad: Tensor | None = None,  # [V, H] float32
) -> SpanLogprobOutput:
    """The micro-batch's weighted sum of policy gradient and likelihood losses.

    The arguments are those of `span_loss`; the loss is not divided by anything before backward.
    Differentiable with respect to the student's states and head; log-probs and entropies are
    detached.
    """
    device = student_hidden.device
    return span_logprob(
        scaled(student_hidden, student_head),
        student_head.weight,
        on_device(tokens.token_ids, device),
        token_loss=PolicyTokenLoss(tokens, policy, device),
        temperature=temperature if config.temperature is None else config.temperature,
        softcap=student_head.softcap,
        bias=scaled_bias(student_head),
        strategy=strategy(config, device),
        workspace_mib=config.workspace_mib,
        vocab_group=vocab_group,
        head_grad=head_grad,
        **sparsity(config, order),
    )


class PolicyTokenLoss:
    """The losses of tokens as a function of their log-probs and entropies; see the module."""

    def __init__(self, tokens: PolicyTokens, config: PolicyConfig, device: torch.device) -> None:
        self.config = config
        self.weights = on_device(tokens.weights, device)
        self.advantages = on_device(tokens.advantages, device)
        self.is_likelihood = on_device(tokens.is_likelihood, device)
        self.rollout_logprobs = on_device(tokens.rollout_logprobs, device)

    def __call__(self, logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """[n] losses of the tokens in `rows`, given their [n] log-probs and entropies."""
        config, advantages = self.config, self.advantages[rows].to(logprob)
        ratio = (logprob - self.rollout_logprobs[rows].to(logprob)).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        if config.dual_clip is not None:
            floor = config.dual_clip * advantages
            gain = torch.where(advantages < 0, torch.maximum(gain, floor), gain)
        likelihood = self.is_likelihood[rows]
        losses = torch.where(likelihood, -logprob, -gain)
        if config.entropy_weight:
            losses = losses - config.entropy_weight * entropy
        return self.weights[rows].to(logprob) * losses


def strategy(config: LossConfig, device: torch.device) -> Literal["chunked", "tiled", "reference"]:
    """The kernels' strategy, a function of the options and the kind of device alone.

    The kernels' own "auto" depends on measurements of earlier calls, which a resumed run lacks.
    """
    if config.strategy != "auto":
        return config.strategy
    # On a GPU, "chunked" with a sparsity gathers rows of the head, and was not timed.
    drops_tiles = config.sparsity != "exact" and device.type == "cuda"
    return "tiled" if drops_tiles else "chunked"


def sparsity(config: LossConfig, order: VocabularyOrder | None) -> dict[str, Any]:
    """The keyword argument for the kernels' sparsity rule; empty for "exact"."""
    if config.sparsity == "exact":
        return {}
    rule = entry if config.sparsity == "entry" else mass
    return {"sparsity": rule(config.sparsity_bound, order)}


def vocabulary_order(
    config: LossConfig, vocab_size: int, device: torch.device
) -> VocabularyOrder | None:
    """A new vocabulary order; None if the options make no use of one."""
    drops_tiles = config.sparsity != "exact" and strategy(config, device) == "tiled"
    if not drops_tiles or not config.vocabulary_order:
        return None
    return VocabularyOrder(vocab_size)


def importance_weights(
    student_logprob: Tensor, rollout_logprobs: Tensor, importance_clip: float | None
) -> Tensor:
    """[N] min(exp(student - rollout log-prob), importance_clip); ones if that is None."""
    if importance_clip is None:
        return torch.ones_like(student_logprob)
    return (student_logprob - rollout_logprobs).exp().clamp(max=importance_clip)


def scaled(values: Tensor, head: Head) -> Tensor:
    """Hidden states, or a bias, multiplied by the head's logit scale."""
    return values if head.scale == 1.0 else values * head.scale


def scaled_bias(head: Head) -> Tensor | None:
    """The head's bias multiplied by its logit scale; None if it has no bias."""
    return None if head.bias is None else scaled(head.bias, head)
