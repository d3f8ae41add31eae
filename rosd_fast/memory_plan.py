"""How much memory a run needs, by arithmetic on parameter counts and options (docs/scaling.md).

What belongs to parameters (weights, masters, moments, gradients, the teacher's copy) is exact.
Activations and the KV cache depend on the data; they are estimates for the longest sequences that
the options allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.model.adapters import has_adapters
from rosd_fast.model.blocks import blocks
from rosd_fast.model.head import output_layer
from rosd_fast.model.nf4 import BYTES_PER_WEIGHT, linear_layers
from rosd_fast.utils.distributed import pick_device
from rosd_kernels.workspace import LARGEST_MIB, default_workspace_mib

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
FULL = 4  # bytes of a value in full precision

Place = Literal["device", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide how much memory it takes."""

    parameters: int
    trained: int  # parameters that are trained; with adapters, those of the adapters
    outside: int  # parameters outside the blocks: embeddings, final norm, untied head
    block: int  # parameters of the largest block
    head: int  # parameters of the output head
    linear: int  # parameters of linear layers but the output head, which lora.quantize packs
    adapted: bool  # whether the trained parameters are adapters
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """The sizes of `model`, whose parameters may be on the meta device."""
        config = model.config.get_text_config()
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
        total = sum(p.numel() for p in model.parameters())
        heads = config.num_attention_heads
        return cls(
            parameters=total,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            outside=total - sum(sizes),
            block=max(sizes, default=0),
            head=output_layer(model).weight.numel(),
            linear=sum(layer.weight.numel() for _, layer in linear_layers(model)),
            adapted=has_adapters(model),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One use of memory, in bytes per rank."""

    what: str
    size: int
    place: Place = "device"
    exact: bool = True  # False: an estimate
    when: Literal["always", "learning", "sampling"] = "always"
    rank0_only: bool = False  # whether the other ranks do not have it


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory of rank 0, which needs the most, and what it consists of."""

    rows: tuple[Row, ...]
    num_ranks: int

    def total(self, place: Place = "device", *, exact: bool = False) -> int:
        """Bytes at the peak: what is always there, and the larger of learning and sampling.

        exact: leave out the estimates, for a lower bound.
        """
        rows = [row for row in self.rows if row.place == place and (row.exact or not exact)]
        sums = {
            when: sum(row.size for row in rows if row.when == when)
            for when in ("always", "learning", "sampling")
        }
        return sums["always"] + max(sums["learning"], sums["sampling"])


def memory_plan(
    shape: ModelShape,
    config: Config,
    *,
    num_ranks: int = 1,
    teacher: bool = True,
    separate: ModelShape | None = None,
    on_gpu: bool = True,
) -> MemoryPlan:
    """Return what rank 0 holds in memory.

    teacher: whether the method has a teacher. separate: the model of `teacher.model`; None: the
    teacher has the student's shape. on_gpu: whether the learner runs on GPUs.
    """
    rows = [
        *parameter_rows(shape, config, num_ranks),
        *(teacher_rows(shape, separate, config, num_ranks) if teacher else ()),
        *(gathered_rows(shape, separate, config, teacher=teacher) if num_ranks > 1 else ()),
        *working_rows(shape, config, teacher=teacher),
        *sampling_rows(shape, config, num_ranks=num_ranks, on_gpu=on_gpu),
    ]
    return MemoryPlan(rows=tuple(row for row in rows if row.size), num_ranks=num_ranks)


def parameter_rows(shape: ModelShape, config: Config, num_ranks: int) -> list[Row]:
    """Weights, masters, moments and gradients. Several ranks keep fp32 shards of all of them.

    With `optim.offload` masters, summed gradients and moments are in host memory.
    """
    several, offload = num_ranks > 1, config.optim.offload
    shards, trained = shard_size(config, num_ranks), shape.trained
    size = FULL if several else BYTES[config.dtype]
    place: Place = "host" if offload else "device"
    has_masters = offload or size < FULL
    packed = int((size - BYTES_PER_WEIGHT) * shape.linear) if config.lora.quantize == "nf4" else 0
    return [
        Row(
            what="weights (fp32 shard)" if several else "weights",
            size=size * shape.parameters // shards - packed,
        ),
        Row(
            what="fp32 masters",
            size=FULL * trained // shards if has_masters else 0,
            place=place,
        ),
        Row(what="AdamW moments", size=moment_bytes(config) * trained // shards, place=place),
        Row(what="gradients", size=FULL * trained // shards, place=place, when="learning"),
        Row(
            what="gradients of a backward pass",
            size=size * trained // shards if has_masters else 0,
            when="learning",
        ),
    ]


def moment_bytes(config: Config) -> int:
    """Bytes of both moments per trained parameter, as if no parameter were too small for 8 bits."""
    return 2 if config.optim.kind == "adamw8bit" else 2 * FULL


def teacher_rows(
    shape: ModelShape, separate: ModelShape | None, config: Config, num_ranks: int
) -> list[Row]:
    """The teacher's own weights, and the fp32 average of kind ema."""
    options, size = config.teacher, BYTES[config.dtype]
    place: Place = "host" if options.offload else "device"
    shards = shard_size(config, num_ranks)
    if options.kind == "live":
        return []
    if separate is not None:
        whole, on_server = size * separate.parameters, options.backend == "sglang"
        return [
            Row(what="teacher: output head", size=size * separate.head if on_server else 0),
            Row(what="teacher: weights", size=0 if on_server else whole // shards, place=place),
            Row(
                what="rank 0: whole teacher",  # until the ranks have it, or the server is compared
                size=whole if num_ranks > 1 or on_server else 0,
                place="host",
                rank0_only=True,
            ),
        ]
    if shape.adapted:  # the teacher is the student without its adapters, or with averaged ones
        stored = FULL if num_ranks > 1 else size
        average = stored * shape.trained // shards if options.kind == "ema" else 0
        return [Row(what="teacher: average of the adapters", size=average)]
    if options.backend == "sglang":
        return [Row(what="teacher: output head", size=size * shape.head)]
    if options.kind == "ema" and num_ranks > 1:
        return [
            Row(what="teacher (fp32 shard)", size=FULL * shape.parameters // shards, place=place)
        ]
    average = FULL * shape.parameters if options.kind == "ema" and size < FULL else 0
    return [
        Row(what="teacher: weights", size=size * shape.parameters // shards, place=place),
        Row(what="teacher: fp32 average", size=average, place=place),
    ]


def gathered_rows(
    shape: ModelShape, separate: ModelShape | None, config: Config, *, teacher: bool
) -> list[Row]:
    """What FSDP gathers from the other ranks: two blocks, and all that is outside the blocks."""
    size, options = BYTES[config.dtype], config.teacher

    def gathered(of: ModelShape) -> int:
        head = of.head if config.parallel.head == "shard" else 0
        return size * (of.outside - head + 2 * of.block)

    has_copy = options.kind != "live" and (separate is not None or not shape.adapted)
    second = gathered(separate or shape) if teacher and has_copy else 0
    if options.backend == "sglang":
        second = 0
    outside = shape.outside - (shape.head if config.parallel.head == "shard" else 0)
    return [
        Row(what="gathered weights", size=gathered(shape) + second, when="learning", exact=False),
        Row(
            what="gradient of gathered weights",
            size=0 if shape.adapted else size * outside,
            when="learning",
            exact=False,
        ),
    ]


def working_rows(shape: ModelShape, config: Config, *, teacher: bool) -> list[Row]:
    """Activations of the largest micro-batch, and the workspace of the loss."""
    size = BYTES[config.dtype]
    tokens = student_tokens(config, teacher=teacher)
    per_block = tokens * activation_bytes(shape, size)
    if config.learner.activation_checkpointing:
        activations = tokens * size * shape.hidden * shape.layers + per_block
    else:
        activations = per_block * shape.layers
    states = tokens * size * shape.hidden * (3 if teacher else 2)  # of both sides, and a gradient
    workspace = workspace_mib(config) * 2**20
    what = f"activations of {tokens:,} tokens"
    return [
        Row(what=what, size=activations, when="learning", exact=False),
        Row(
            what="loss: states and workspace", size=states + workspace, when="learning", exact=False
        ),
    ]


def sampling_rows(shape: ModelShape, config: Config, *, num_ranks: int, on_gpu: bool) -> list[Row]:
    """Rank 0's whole model, and the KV cache of the local engine at its longest rollouts."""
    engine, sample, size = config.engine, config.sample, BYTES[config.dtype]
    local = engine.kind == "local"
    on_device = local or not on_gpu
    rows = []
    if num_ranks > 1:
        place: Place = "device" if on_device else "host"
        rows.append(
            Row(
                what="rank 0: whole model",
                size=size * shape.parameters,
                place=place,
                rank0_only=True,
            )
        )
    if local:
        num_rows = min(engine.max_rows, sample.problems_per_step * sample.group_size)
        length = sample.max_prompt_tokens + sample.max_new_tokens
        cache = num_rows * length * kv_bytes(shape, size)
        what = f"KV cache of {num_rows} rollouts of {length:,} tokens"
        rows.append(Row(what=what, size=cache, when="sampling", exact=False))
    return rows


def server_rows(shape: ModelShape, config: Config) -> list[Row]:
    """What one SGLang server holds, over all GPUs that it uses.

    The KV cache is that of one group: its prompt once, and its rollouts at their longest.
    """
    sample, size = config.sample, BYTES[config.dtype]
    tokens = sample.max_prompt_tokens + sample.group_size * sample.max_new_tokens
    what = f"KV cache per problem in flight ({tokens:,} tokens)"
    return [
        Row(what="weights", size=size * shape.parameters),
        Row(what=what, size=tokens * kv_bytes(shape, size), exact=False),
    ]


def shard_size(config: Config, num_ranks: int) -> int:
    """The number of ranks that share one copy of the weights."""
    return min(config.parallel.shard_size or num_ranks, num_ranks)


def student_tokens(config: Config, *, teacher: bool) -> int:
    """The most student tokens in a micro-batch: those that keep activations for the backward pass.

    With a teacher about half of `pack.max_tokens` are the student's. A longer rollout has a
    micro-batch of its own.
    """
    share = config.pack.max_tokens // (2 if teacher else 1)
    return max(share, config.sample.max_prompt_tokens + config.sample.max_new_tokens)


def activation_bytes(shape: ModelShape, size: int) -> int:
    """Bytes that one token keeps in one block for the backward pass, with fused attention.

    Two norms (each keeps its input, an fp32 copy of it and the normalized states), the inputs of
    the projections, queries, keys and values before and after the rotation, the attention's output,
    and four states of the gated MLP.
    """
    attention = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    norms = 2 * (size * 2 + FULL) * shape.hidden
    qkv = size * 2 * (attention + 2 * keys)
    return norms + qkv + size * (2 * attention + shape.hidden) + size * 4 * shape.intermediate


def kv_bytes(shape: ModelShape, size: int) -> int:
    """Bytes of the KV cache per token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * size


def workspace_mib(config: Config) -> int:
    """The loss's memory for logits, on this machine's device or, without one, on a large GPU."""
    if config.loss.workspace_mib is not None:
        return config.loss.workspace_mib
    if config.device == "cuda" and not torch.cuda.is_available():
        return LARGEST_MIB
    return default_workspace_mib(pick_device(config.device))
