"""Lists of active tiles, built on the device without a synchronization.

Kernels loop over a list of indices whose length they read from memory, so that skipped tiles cost
nothing and loads can be pipelined across tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Active(NamedTuple):
    """Indices with the active ones first, and the number of active ones."""

    indices: Tensor  # [R, C] int64
    counts: Tensor  # [R] int32


def active_per_row(flags: Tensor) -> Active:
    """The active columns of each row of flags [R, C], rising."""
    # Sorting keeps the strides of its input.
    indices = torch.argsort(flags.contiguous(), dim=1, descending=True, stable=True)
    return Active(indices, flags.sum(1, dtype=torch.int32))


def active_pairs(active: Tensor, group: int) -> Active:
    """Codes `b * T + t` of the active pairs of [B, T] flags, as one row sorted like `grouped`."""
    row_blocks, tiles = active.shape
    groups = -(-row_blocks // group)
    padded = pad(active, (0, 0, 0, groups * group - row_blocks))
    grouped = padded.view(groups, group, tiles).transpose(1, 2).reshape(1, -1)
    places, counts = active_per_row(grouped)
    row = places // (group * tiles) * group + places % group
    tile = places // group % tiles
    return Active(row * tiles + tile, counts)
