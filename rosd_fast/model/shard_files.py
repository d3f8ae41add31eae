"""Shards of a model that each rank reads from the model's files, instead of receiving them.

Rank 0 says which parameters the files hold as they are: by the name that they have without
adapters, in the same shape, and with the values that it has loaded, which it compares at its own
rows. All others are sent by rank 0
as before: adapters, weights that transformers makes of several ones, quantized ones. So are all of
them if some rank does not see the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from rosd_fast.model.adapters import plain_name
from rosd_fast.model.weight_files import open_weights, weight_files
from rosd_fast.utils.distributed import World

BLOCK, BLOCKS = 4096, 16  # bytes, and how many of them are compared per file


@torch.no_grad()
def read_shards(module: PreTrainedModel, full: PreTrainedModel | None, world: World) -> set[str]:
    """Fill this rank's shards from the files where that can be; returns the names of these.

    A collective, with the same result on all ranks.

    module: the sharded model. full: rank 0's full model, None elsewhere.
    """
    parameters = {n: p for n, p in module.named_parameters() if isinstance(p, DTensor)}
    folder, digest = None if full is None else folder_of(full), ""
    dtypes: dict[str, torch.dtype] = {}
    with ExitStack() as stack:
        if full is not None and folder is not None:
            with suppress(OSError):  # it has no such files any more
                dtypes = unchanged(stack.enter_context(open_weights(folder)), parameters, full)
                digest = digest_of(weight_files(folder))
        folder, expected, dtypes = world.broadcast((folder, digest, dtypes))
        if not dtypes:
            return set()
        files: Mapping[str, Any] = {}
        try:
            files = stack.enter_context(open_weights(folder))
            digest = digest_of(weight_files(folder))
        except OSError:  # this rank does not see the folder
            digest = ""
        if world.sum(float(digest != expected)):
            return set()
        for name, dtype in dtypes.items():
            parameter = parameters[name]
            stored = plain_name(name)
            rows = files[stored].get_slice(stored)[own_rows(parameter)]
            parameter.to_local().copy_(rows.to(dtype))
    return set(dtypes)


def folder_of(model: PreTrainedModel) -> str | None:
    """The folder that a model was loaded from, in the cache for a hub model; None: from none."""
    name = model.name_or_path or ""
    if name and Path(name).is_dir():
        return str(Path(name).absolute())
    with suppress(ValueError):  # not a hub id
        cached = try_to_load_from_cache(name, "config.json")
        return str(Path(cached).parent) if isinstance(cached, str) else None
    return None


def unchanged(
    files: Mapping[str, Any], parameters: Mapping[str, DTensor], full: PreTrainedModel
) -> dict[str, torch.dtype]:
    """The dtype in the full model of each parameter that the files have with the same values.

    Its own rows are compared.
    """
    found = {}
    weights = dict(full.named_parameters())
    for name, parameter in parameters.items():
        stored = plain_name(name)
        if "lora_" in name or stored not in files or parameter.placements[-1] != Shard(0):
            continue
        weight, rows = weights[name].detach(), own_rows(parameter)
        part = files[stored].get_slice(stored)
        if part.get_shape() == list(weight.shape):
            read = part[rows].to(weight.dtype)
            if same_bytes(read, weight[rows].to("cpu")):
                found[name] = weight.dtype
    return found


def own_rows(parameter: DTensor) -> slice:
    """This rank's rows of a parameter that is sharded by rows."""
    mesh = parameter.device_mesh
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    count = -(-parameter.shape[0] // size)
    start = min(rank * count, parameter.shape[0])
    return slice(start, min(start + count, parameter.shape[0]))


def same_bytes(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other))
    return torch.equal(a, b)


def digest_of(files: Sequence[Path]) -> str:
    """A hash of the files' names, sizes and some blocks of each, which tells other files apart."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for index in range(BLOCKS):
                file.seek(index * max(0, size - BLOCK) // max(1, BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
