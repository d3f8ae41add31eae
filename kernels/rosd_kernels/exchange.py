"""Small numbers that the ranks of a group tell each other, without a wait for the device.

NCCL sends from the device's memory, and to read there what arrived waits for all work before it.
The numbers are the sizes of shards and of chunks, which stay the same as long as the head does. So
each call gathers them on the device, and only the first one with a head reads the result. Later
calls let the device compare: a rank whose peers have changed stops there, with a message. The
collective itself is never left out, as the ranks must agree on their sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

HOST_DEVICES = ("cpu",)  # whose memory is read without a wait: there nothing is remembered
CHANGED = (
    "vocab_group: another rank's head has changed its size or layout while this rank's is in the "
    "same memory as before; make another process group for it"
)
MOST_KNOWN = 64  # exchanges that are remembered per group


class _Known(NamedTuple):
    """An exchange that was read."""

    own: Tensor  # [K] this rank's numbers
    found: Tensor  # [S, K] of all S ranks
    numbers: list[tuple[int, ...]]  # `found` in host memory


_KNOWN: WeakKeyDictionary[Any, dict[Any, _Known]] = WeakKeyDictionary()


def exchanged(
    own: tuple[int, ...], group: Any, device: torch.device, address: int
) -> list[tuple[int, ...]]:
    """Return every rank's numbers, in rank order: a collective of `group` on `device`.

    All ranks give equally many. address: of the head that they belong to, in this rank's memory.
    """
    known = None
    if device.type not in HOST_DEVICES:
        known = _KNOWN.setdefault(group, {}).get((own, device, address))
    sent = torch.tensor(own, device=device) if known is None else known.own
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group=group)
    found = torch.stack(parts)
    if known is not None:
        torch.ops.aten._assert_async.msg((found == known.found).all(), CHANGED)
        return known.numbers
    numbers = [tuple(int(number) for number in rank) for rank in found.cpu()]
    if device.type not in HOST_DEVICES:
        of_group = _KNOWN[group]
        if len(of_group) >= MOST_KNOWN:
            of_group.pop(next(iter(of_group)))
        of_group[own, device, address] = _Known(sent, found, numbers)
    return numbers
