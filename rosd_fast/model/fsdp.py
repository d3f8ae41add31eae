"""A model whose weights are spread over the ranks: FSDP2 (`fully_shard`), one layer at a time.

Rank 0 loads the model; the others get its skeleton, and each rank its share of the weights. Weights
and gradients are summed and kept in fp32; layers compute in the run's dtype.
"""

from __future__ import annotations

import copy
import warnings
from types import MethodType
from typing import TypeGuard

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rosd_fast.model.attention import SHARDED_FORWARD, decode
from rosd_fast.model.blocks import blocks
from rosd_fast.model.head import HEAD_ROWS, PLACE
from rosd_fast.model.vocab_parallel import average_rows, shard_rows
from rosd_fast.utils.distributed import World, full


def skeleton(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A copy with parameters of `dtype` that have no memory; buffers and settings are copied."""
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
    head_rows: bool = False,
) -> PreTrainedModel:
    """Spread a skeleton over the ranks, in place. A collective; `fill` gives it its weights.

    dtype: that layers compute in. offload: shares lie in host memory between uses. head_rows: the
    output head is never whole (`head_rows.py`).
    """
    assert world.mesh is not None
    mesh, device = world.mesh, torch.device(world.mesh.device_type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    on_host = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=on_host)
    # The rest stays whole from its forward on: the divergence reads the head.
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=on_host,
        reshard_after_forward=False,
        ignored_params=shard_rows(model, world) if head_rows else None,
    )
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if offload else device)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer
    if head_rows:
        average_rows(model, world)
        setattr(model, HEAD_ROWS, dtype)
    setattr(model, PLACE, device)
    setattr(model, SHARDED_FORWARD, MethodType(decode, model))
    register_fsdp_forward_method(model, SHARDED_FORWARD)
    # It speaks of in-place changes to the output; nobody makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, source: PreTrainedModel | None) -> None:
    """Give each rank its share of the weights of `source`, which rank 0 has. A collective."""
    weights = None if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        device = parameter.device_mesh.device_type
        whole = (
            torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if weights is None
            else weights[name].detach().to(device, parameter.dtype)
        )
        share = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(share.to_local())


@torch.no_grad()
def collect(model: PreTrainedModel, into: PreTrainedModel | None) -> None:
    """Write whole weights into another model, on the rank that gives one. A collective."""
    others = {} if into is None else dict(into.named_parameters())
    for name, parameter in model.named_parameters():
        whole = full(parameter)
        if into is not None:
            others[name].copy_(whole)


def is_spread(model: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether the weights are spread over ranks, which see to their place themselves."""
    return isinstance(model, FSDPModule)
