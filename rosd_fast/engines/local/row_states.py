"""The states of recurrent and convolution layers, one per row of the cache.

A state has a fixed size whatever the length of its row, so it has no columns and knows no padding:

    prompts [R, ...]  --append-->  buffer [capacity rows, ...]  --copy, move-->  buffer
                                      |
                                      views [num rows, ...], which the layers update in place

transformers' own cache layers hold the states of a prefill. Those of the decoded batch hold views
of buffers that are allocated once, since a state of 2 MB per layer and row is not copied lightly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

KINDS = ("conv_states", "recurrent_states")


class RowStates:
    """States of the recurrent layers among `layers`, for at most `rows` rows.

    layers: the cache layers of the model, by layer index; empty for a model without states.
    """

    def __init__(self, layers: Sequence[Any], *, rows: int) -> None:
        self.layers = [layer for layer in layers if is_recurrent(layer)]
        self.rows = rows
        self.buffers: dict[tuple[int, str, int], Tensor] = {}

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the states of the rows `source` to the rows `target` ([K] int64, disjoint)."""
        for buffer in self.buffers.values():
            buffer[target] = buffer[source]

    def copy(self, source: Tensor, first: int) -> None:
        """Copy the states of the rows `source` ([K] int64) to the rows from `first` on."""
        for buffer in self.buffers.values():
            buffer[first : first + source.numel()] = buffer[source]

    def append(self, prompts: RowStates, row_of: Tensor, first: int) -> None:
        """Write the states of the rows `row_of` of a prefill to the rows from `first` on."""
        if not self.buffers:
            for mine, theirs in zip(self.layers, prompts.layers, strict=True):
                _adopt(mine, theirs)
        for key, states in prompts._items():
            if key not in self.buffers:
                self.buffers[key] = states.new_zeros(self.rows, *states.shape[1:])
            self.buffers[key][first : first + row_of.numel()] = states[row_of]

    def show(self, num_rows: int) -> None:
        """Let the layers compute with the first `num_rows` rows."""
        for (layer, kind, index), buffer in self.buffers.items():
            getattr(self.layers[layer], kind)[index] = buffer[:num_rows]

    def _items(self) -> Iterator[tuple[tuple[int, str, int], Tensor]]:
        """The states that the layers hold, each with its place."""
        for place, layer in enumerate(self.layers):
            for kind in KINDS:
                for index, states in getattr(layer, kind).items():
                    if states is not None:
                        yield (place, kind, index), states


def is_recurrent(layer: object) -> bool:
    """Whether a cache layer of transformers holds a state of fixed size."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def _adopt(mine: Any, theirs: Any) -> None:
    """Take over what a prefilled layer knows of its states: their sizes, and that they are set."""
    for name, value in vars(theirs).items():
        setattr(mine, name, dict(value) if isinstance(value, dict) else value)
