"""How far student and teacher agree at a few tokens of a step, without a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from rosd_fast.config import Config
from rosd_fast.model.head import Head, logits
from rosd_fast.model.vocab_parallel import GatheredTokens
from rosd_fast.trainer.loss import token_divergences
from rosd_fast.types import DiagnosedTokens, PackedBatch, PackedSequences
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import default_workspace_mib

BUFFERS = 4  # of the size of a row's logits that are held at once: two, and temporary ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The agreement at the diagnosed tokens of a micro-batch; see `DiagnosedTokens`.

    With the k most likely tokens of each side:

    overlap: [n] share of the student's k that are among the teacher's.
    student_mass: [n] probability that the student gives to its own k.
    teacher_mass: [n] probability that the teacher gives to the student's k.
    before: [M] divergence at tokens before located errors, in nats.
    """

    overlap: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    before: Tensor


def with_rows_before(
    teacher: PackedSequences, diagnosed: DiagnosedTokens | None
) -> PackedSequences:
    """The teacher's sequences, whose states are gathered also before located errors."""
    if diagnosed is None or not len(diagnosed.teacher_before):
        return teacher
    return replace(teacher, gather=torch.cat([teacher.gather, diagnosed.teacher_before]))


@torch.no_grad()
def agreement_of(
    states: Tensor,  # [T, H] of the student
    teacher_states: Tensor,  # [N + M, Ht], those of `with_rows_before`
    batch: PackedBatch,
    diagnosed: DiagnosedTokens,
    *,
    heads: tuple[Head, Head],
    config: Config,
    vocab_group: ProcessGroup | None = None,
) -> Agreement:
    """The agreement at a micro-batch's diagnosed tokens.

    heads: of student and teacher.
    vocab_group: ranks of a vocab-parallel head, on which this is a collective: each rank sees the
        states of all ranks, and keeps the results of its own.
    """
    device = states.device
    rows = diagnosed.rows.to(device)
    num_distilled, num_before = batch.num_distilled, len(diagnosed.teacher_before)
    distilled = _Pairs.of(
        states[batch.student.gather.to(device)[rows]],
        teacher_states[:num_distilled][rows],
        vocab_group,
    )
    before = _Pairs.of(
        states[diagnosed.student_before.to(device)],
        teacher_states[num_distilled : num_distilled + num_before],
        vocab_group,
    )
    loss, sampled_at = config.loss, config.sample.temperature
    found = topk_agreement(
        distilled.student,
        distilled.teacher,
        heads=heads,
        k=config.diagnose.top_k,
        temperature=sampled_at if loss.temperature is None else loss.temperature,
        workspace_mib=loss.workspace_mib or default_workspace_mib(states.device),
        vocab_group=vocab_group,
    )
    overlap, student_mass, teacher_mass = (values[distilled.own] for values in found)
    divergences = token_divergences(
        before.student,
        before.teacher,
        student_head=heads[0],
        teacher_head=heads[1],
        config=loss,
        temperature=sampled_at,
        vocab_group=vocab_group,
    )
    return Agreement(
        overlap=overlap,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        before=divergences[before.own],
    )


@dataclass(frozen=True, slots=True)
class _Pairs:
    """States of both sides at the same tokens: this rank's, or vocab-parallel those of all ranks.

    own: this rank's among them.
    """

    student: Tensor
    teacher: Tensor
    own: slice

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, vocab_group: ProcessGroup | None) -> _Pairs:
        if vocab_group is None:
            return cls(student, teacher, slice(None))
        tokens = GatheredTokens.of(len(student), vocab_group, student.device)
        return cls(tokens.gather(student), tokens.gather(teacher), tokens.local_rows)


@dataclass(frozen=True, slots=True)
class TopK:
    """The most likely tokens of one side, for R rows.

    logits: [R, V of this rank], divided by the temperature.
    lse: [R] their log-sum-exp over the whole vocabulary.
    values, ids: [R, k] the largest logits, and the tokens of the whole vocabulary they belong to.
    """

    logits: Tensor
    lse: Tensor
    values: Tensor
    ids: Tensor

    @classmethod
    def of(
        cls, states: Tensor, head: Head, *, k: int, temperature: float, vocabulary: Vocabulary
    ) -> TopK:
        """The top k of the rows `states`, [R, H]. A collective where the head is sharded."""
        values = logits(states.to(head.weight), head, dtype=torch.float32) / temperature
        lse = vocabulary.logsumexp(values.logsumexp(-1))
        top, ids = values.topk(min(k, values.shape[1]), dim=-1)
        if not vocabulary.is_sharded:
            return cls(values, lse, top, ids)
        missing = (0, k - top.shape[1])  # a shard may have fewer rows than k
        tops = vocabulary.gather(F.pad(top, missing, value=-torch.inf))
        found = vocabulary.gather(F.pad(ids + vocabulary.offset, missing))
        best, places = tops.topk(k, dim=-1)
        return cls(values, lse, best, found.gather(-1, places))

    def mass(self, ids: Tensor, vocabulary: Vocabulary) -> Tensor:
        """[R] the probability of the tokens `ids`, [R, k] of the whole vocabulary."""
        columns = vocabulary.columns(ids)
        assert columns is not None
        chosen = self.logits.gather(-1, columns.clamp(min=0)) - self.lse[:, None]
        return vocabulary.sum_(chosen.exp().where(columns >= 0, 0.0).sum(-1))


@torch.no_grad()
def topk_agreement(
    student: Tensor,  # [n, H]
    teacher: Tensor,  # [n, Ht]
    *,
    heads: tuple[Head, Head],
    k: int,
    temperature: float,
    workspace_mib: float,
    vocab_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`overlap`, `student_mass` and `teacher_mass` of an `Agreement`.

    heads: of student and teacher.
    temperature: divides both logits, as in the loss.
    workspace_mib: bounds the logits that are held at once; one row is held in any case.
    vocab_group: ranks of a vocab-parallel head, which all call this with the same states.
    """
    vocabulary = Vocabulary(heads[0].weight.shape[0], vocab_group, student.device)
    k = min(k, vocabulary.size)
    size = max(1, int(workspace_mib * 2**20 / (4 * BUFFERS * vocabulary.largest)))
    parts = []
    for own, other in zip(student.split(size), teacher.split(size), strict=True):
        mine, theirs = (
            TopK.of(states, head, k=k, temperature=temperature, vocabulary=vocabulary)
            for states, head in zip((own, other), heads, strict=True)
        )
        shared = (mine.ids[:, :, None] == theirs.ids[:, None, :]).any(-1).float().mean(-1)
        own_mass = (mine.values - mine.lse[:, None]).exp().sum(-1)
        parts.append(torch.stack([shared, own_mass, theirs.mass(mine.ids, vocabulary)]))
    overlap, student_mass, teacher_mass = torch.cat(parts, dim=1)
    return overlap, student_mass, teacher_mass
