"""A model whose weights are sharded over the ranks: FSDP2, one block at a time.

Rank 0 loads the model and the others get its skeleton; each rank then receives its shards. Shards
are stored, and gradients are reduced, in fp32; blocks compute in the run's dtype.

FSDP2 is `torch.distributed.fsdp.fully_shard`, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rosd_fast.model.blocks import blocks
from rosd_fast.model.head import Head, head
from rosd_fast.model.layouts import decode, packed_forward
from rosd_fast.model.policy import PolicyModel
from rosd_fast.model.vocab_parallel import average_head_gradients, shard_head
from rosd_fast.types import PackedSequences
from rosd_fast.utils.distributed import World, full


class ShardedDecoder(nn.Module):
    """The root of the sharding: FSDP gathers the weights around its forward.

    The root is not the transformers model, whose own forward would compute all logits.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.device = device

    def forward(self, packed: PackedSequences) -> Tensor:
        """The [1, T, H] states after the final norm."""
        return decode(self.model, packed, self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedModel(PolicyModel):
    """A model whose parameters are DTensors, one shard per rank.

    decoder: computes the hidden states with gathered weights.
    head_dtype: dtype of this rank's rows of a vocab-parallel head; None: FSDP gathers the head.
    """

    decoder: ShardedDecoder
    head_dtype: torch.dtype | None

    @property
    def head(self) -> Head:
        full_head = head(self.module)
        if self.head_dtype is None:
            return full_head
        weight, bias = (
            x.to_local().to(self.device, self.head_dtype) if isinstance(x, DTensor) else x
            for x in (full_head.weight, full_head.bias)
        )
        assert weight is not None
        return replace(full_head, weight=weight, bias=bias)

    def hidden_states(self, packed: PackedSequences) -> Tensor:
        with packed_forward(self.module):
            return self.decoder(packed)[0]

    def release(self) -> None:
        assert isinstance(self.decoder, FSDPModule)
        self.decoder.reshard()

    @torch.no_grad()
    def gather_weights(self, into: PreTrainedModel | None) -> None:
        targets = {} if into is None else dict(into.named_parameters())
        for name, parameter in self.module.named_parameters():
            weight = full(parameter)
            if into is not None:
                targets[name].copy_(weight)

    @torch.no_grad()
    def load_shards(self, source: PreTrainedModel | None, there: Collection[str] = ()) -> None:
        """Give each rank its shards of the weights of `source`, rank 0's full model. A
        collective.

        there: the names of the parameters whose shards are there already.
        """
        weights = None if source is None else dict(source.named_parameters())
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor)
            if name in there:
                continue
            device = parameter.device_mesh.device_type
            weight = (
                torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if weights is None
                else weights[name].detach().to(device, parameter.dtype)
            )
            shards = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(shards.to_local())


def skeleton(model: PreTrainedModel, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """A copy of the model whose parameters have no memory; buffers are copied.

    dtype: of the parameters; None: each keeps its own.
    """
    memo = {
        id(p): nn.Parameter(
            torch.empty_like(p, device="meta", dtype=dtype), requires_grad=p.requires_grad
        )
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def shard(
    model: PreTrainedModel,
    world: World,
    *,
    dtype: torch.dtype,
    offload: bool = False,
    vocab_parallel: bool = False,
) -> ShardedModel:
    """Shard a skeleton over the ranks, in place; `load_shards` fills it. A collective.

    dtype: that blocks compute in. offload: keep shards in host memory between uses.
    vocab_parallel: never gather the output head (`rosd_fast.model.vocab_parallel`).
    """
    assert world.mesh is not None
    mesh, device = world.mesh, torch.device(world.mesh.device_type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    storage = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=storage)
    decoder = ShardedDecoder(model, device)
    # All but the blocks stays gathered after the forward pass: the divergence reads the head.
    fully_shard(
        decoder,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=storage,
        reshard_after_forward=False,
        ignored_params=shard_head(model, world) if vocab_parallel else None,
    )
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    decoder.to_empty(device="cpu" if offload else device)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    if vocab_parallel:
        average_head_gradients(model, world)
    # The warning is about in-place changes to the output; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return ShardedModel(
        module=model,
        device=device,
        offload=offload,
        decoder=decoder,
        head_dtype=dtype if vocab_parallel else None,
    )
