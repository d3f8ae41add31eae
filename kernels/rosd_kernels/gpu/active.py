"""Lists of active tiles, made on the device without waiting for it.

Kernels walk a list of indices and read its length from memory, so that skipped tiles cost nothing
and loads can be pipelined across tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Active(NamedTuple):
    """The indices of what is active, in front of the others, and how many."""

    indices: Tensor  # [R, C] int64
    counts: Tensor  # [R] int32


def active_per_row(flags: Tensor) -> Active:
    """Of flags [R, C]: the active columns of each row, in rising order."""
    # Sorting keeps the strides of its input.
    indices = torch.argsort(flags.contiguous(), dim=1, descending=True, stable=True)
    return Active(indices, flags.sum(1, dtype=torch.int32))


def active_pairs(active: Tensor, group: int) -> Active:
    """Of active [B, T]: codes `b * T + t`, as R = 1, in the order of `blocks.grouped`."""
    row_blocks, tiles = active.shape
    groups = -(-row_blocks // group)
    padded = pad(active, (0, 0, 0, groups * group - row_blocks))
    grouped = padded.view(groups, group, tiles).transpose(1, 2).reshape(1, -1)
    places, counts = active_per_row(grouped)
    row = places // (group * tiles) * group + places % group
    tile = places // group % tiles
    return Active(row * tiles + tile, counts)
