"""A separate teacher: another model with the student's vocabulary (option `teacher.model`).

Width, depth and family may differ from the student's. So may the number of vocabulary rows, which
model makers pad beyond the tokenizer's ids: both sides are then compared on the rows that both
have. The rest are padding of almost no probability; they are left out of the softmax, and of the
gradient of the loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.head import Head, head, output_layer
from rosd_fast.model.load import LoadedModel, find, load_model, load_tokenizer, quiet_transformers
from rosd_fast.model.skeleton import load_skeleton
from rosd_fast.text.vocabulary import SharedVocabulary, shared_vocabulary
from rosd_fast.utils.distributed import World


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateTeacher:
    """The model of `teacher.model`, loaded and compared with the student.

    model: the teacher.
    vocabulary: how its tokenizer compares with the student's.
    num_rows: vocabulary rows that both heads have.
    """

    model: LoadedModel
    vocabulary: SharedVocabulary
    num_rows: int

    def describe(self) -> str:
        """One line for the start of a run."""
        module = self.model.model
        weights = sum(parameter.numel() for parameter in module.parameters())
        parts = [
            f"{self.model.name}, {type(module).__name__}, {weights:,} weights",
            f"{self.num_rows:,} vocabulary entries compared",
            self.vocabulary.describe(),
        ]
        return ", ".join(part for part in parts if part)


def compare_tokenizers(config: Config) -> SharedVocabulary | None:
    """Compare the tokenizers of student and teacher, before any weights are loaded.

    None without a separate teacher. Raises UserError unless ids stand for the same bytes.
    """
    if config.teacher.model is None:
        return None
    with quiet_transformers():
        student, teacher = (
            load_tokenizer(
                find(source, weights=False),
                trust_remote_code=config.trust_remote_code,
                needs_template=False,
            )
            for source in (config.model, config.teacher.model)
        )
    return shared_vocabulary(student, teacher, where=f"teacher.model: {config.teacher.model}")


def load_separate_teacher(
    config: Config,
    student: LoadedModel,
    vocabulary: SharedVocabulary,
    device: torch.device | None,
) -> SeparateTeacher:
    """Load the teacher. Raises UserError if it cannot teach this student.

    vocabulary: from `compare_tokenizers`. device: where it is loaded; None: only its shapes are.
    """
    assert config.teacher.model is not None
    load = load_skeleton if device is None else partial(load_model, device=device)
    teacher = load(
        config.teacher.model,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        needs_template=False,
    )
    where = f"teacher.model: {config.teacher.model}"
    rows = common_rows(head(student.model), head(teacher.model))
    if rows < vocabulary.size:
        raise UserError(
            f"student and teacher have {rows} vocabulary rows in common, and the tokenizers "
            f"have ids up to {vocabulary.size - 1}",
            where=where,
            fix="Give a teacher whose output head has a row for each of them",
        )
    longest = min(
        student.context_length, config.sample.max_prompt_tokens + config.sample.max_new_tokens
    )
    if teacher.context_length < longest:
        raise UserError(
            f"its context has {teacher.context_length} tokens, and a prompt and its rollout may "
            f"have {longest}",
            where=where,
            fix="Lower sample.max_new_tokens or sample.max_prompt_tokens",
        )
    return SeparateTeacher(model=teacher, vocabulary=vocabulary, num_rows=rows)


def common_rows(student: Head, teacher: Head) -> int:
    """Number of vocabulary rows that both heads have. Raises UserError for unequal soft caps."""
    if student.softcap != teacher.softcap:
        raise UserError(
            f"its logits have the soft cap {teacher.softcap} and the student's {student.softcap}",
            where="teacher.model",
            fix="Give a teacher with the student's soft cap",
        )
    return min(len(student.weight), len(teacher.weight))


def local_rows(num_rows: int, student_rows: int, world: World) -> int:
    """How many of the first `num_rows` rows a vocab-parallel head of this rank holds.

    Raises UserError, on all ranks, if a rank would hold nothing but padding.

    student_rows: number of rows of the student's head, which DTensor splits like torch.chunk.
    """
    group = world.shard_group
    size = dist.get_world_size(group)
    per_rank = -(-student_rows // size)
    if num_rows < student_rows and per_rank * (size - 1) >= num_rows:
        raise UserError(
            f"the last of {size} ranks would hold only rows of the vocabulary that the teacher "
            "lacks",
            where="parallel.head: shard",
            fix="Leave it out, or use fewer ranks",
        )
    return min(per_rank, num_rows - per_rank * dist.get_rank(group))


def with_rows(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model with a head of its own of `rows` rows, cut or filled up with zeros.

    All other parameters are shared with `model`, which is returned if its head is like that
    already. So the ranks' rows of a vocab-parallel teacher are those of the student, and a head
    that was tied to the input embeddings is not any more.
    """
    layer = output_layer(model)
    tied = layer.weight is model.get_input_embeddings().weight
    if len(layer.weight) == rows and not tied:
        return model
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    layer = output_layer(shared)
    for name, parameter in list(layer.named_parameters()):
        own = parameter.detach().new_zeros((rows, *parameter.shape[1:]))
        kept = min(rows, len(parameter))
        own[:kept] = parameter.detach()[:kept]
        setattr(layer, name, nn.Parameter(own, requires_grad=False))
    return shared


def placed_head(model: PreTrainedModel, world: World, *, dtype: torch.dtype, sharded: bool) -> Head:
    """The model's output head alone on every rank, whole or this rank's rows. A collective.

    model: rank 0's full model, a skeleton elsewhere.
    """
    assert world.mesh is not None
    mesh, own = world.mesh, head(model)
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0) if sharded else Replicate()]

    def place(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        full = (
            tensor.detach().to(mesh.device_type, dtype)
            if world.is_rank0
            else torch.empty(tensor.shape, dtype=dtype, device=mesh.device_type)
        )
        return distribute_tensor(full, mesh, placements).to_local()

    weight = place(own.weight)
    assert weight is not None
    return replace(own, weight=weight, bias=place(own.bias))
