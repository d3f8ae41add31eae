"""A preallocated cache whose rows come and go.

All rows end at the same column, so a prompt of L tokens that joins at column `end` occupies the
columns [end - L, end), and one slice per layer writes a whole decoding step:

    column   0        first            end        capacity
    row 0    .  .  .  |  p  p  p  t  t  |  .  .  .
    row 1    .  .  .  .  .  p  p  t  t  |  .  .  .          p prompt, t sampled, . masked out
    row 2    .  .  .  .  .  .  p  p  p  |  .  .  .          joined two tokens later

Attention reads only [first, end), where `first` is the column at which the longest row begins.
Recurrent and convolution layers have one state per row instead of columns (`row_states`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from rosd_fast.engines.local.row_states import RowStates

BLOCK = 64  # minimum number of columns by which the cache grows


class RowCache(Cache):
    """What a model remembers of `num_rows` sequences that end at column `end`.

    A layer has buffers [capacity rows, heads, capacity columns, size] for its keys, its values and,
    where it has one, its indexer's keys, in the model's dtype and on its device, allocated when the
    layer first writes. They start as zeros, since a masked NaN would still spread. transformers
    calls the `update` methods; the caller of the model advances `end`.

    layers: transformers' cache layers by layer index, for a model with recurrent layers, which read
        and update their states there; otherwise empty.
    """

    def __init__(self, *, rows: int, columns: int, layers: Sequence[Any] = ()) -> None:
        super().__init__(layers=list(layers))
        self.capacity_rows = rows
        self.capacity = columns
        self.num_rows = rows
        self.first = 0
        self.end = 0
        self.buffers: dict[tuple[str, int], Tensor] = {}  # by name and layer
        self.states = RowStates(layers, rows=rows)

    def __len__(self) -> int:
        return len(self.layers) or sum(name == "keys" for name, _ in self.buffers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write [num_rows, heads, Q, head size] at `end`; return views of the whole window."""
        keys = self.write("keys", layer_idx, key_states)
        return keys, self.write("values", layer_idx, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Write [num_rows, Q, size] at `end`; return a view of the whole window."""
        return self.write("indexer", layer_idx, indexer_key_states[:, None])[:, 0]

    def write(self, name: str, layer_idx: int, states: Tensor) -> Tensor:
        """Write [num_rows, heads, Q, size] at `end`; return a view of the whole window."""
        buffer = self.buffers.get((name, layer_idx))
        if buffer is None:
            buffer = self.buffers[name, layer_idx] = self._allocate(states)
        window = buffer[: self.num_rows, :, self.first : self.end + states.shape[2]]
        window[:, :, self.end - self.first :] = states
        return window

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns in the window, by which transformers sizes its masks."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The (key columns, offset) of a mask for `query_length` more columns."""
        return self.end - self.first + query_length, 0

    def reserve_columns(self, columns: int) -> int:
        """Make room for `columns` more behind `end`; return how far all columns moved left."""
        if self.end + columns <= self.capacity:
            return 0
        shift, width = self.first, self.end - self.first
        # Moving is enough if it frees a quarter; otherwise it would be due again in a few tokens.
        if width + columns > self.capacity * 3 // 4:
            self.capacity = width + columns + max(BLOCK, width // 2)
        for key, old in self.buffers.items():
            new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
            new[: self.num_rows, :, :width] = old[: self.num_rows, :, shift : self.end]
            self.buffers[key] = new
        self.first, self.end = 0, width
        return shift

    def keep_rows(self, num_rows: int) -> None:
        """Drop all rows but the first `num_rows`."""
        self.num_rows = num_rows
        self.states.show(num_rows)

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows `source` to the rows `target` ([K] int64 each, disjoint)."""
        if source.numel():
            window = slice(self.first, self.end)
            for buffer in self.buffers.values():
                buffer[target, :, window] = buffer[source, :, window]
            self.states.move(source, target)

    def copy_rows(self, source: Tensor) -> None:
        """Add copies of the rows `source` ([K] int64) behind the last row."""
        first_row, window = self.num_rows, slice(self.first, self.end)
        self.num_rows += source.numel()
        assert self.num_rows <= self.capacity_rows
        for buffer in self.buffers.values():
            buffer[first_row : self.num_rows, :, window] = buffer[source, :, window]
        self.states.copy(source, first_row)
        self.states.show(self.num_rows)

    def append_rows(self, prompts: RowCache, row_of: Tensor) -> None:
        """Add copies of the rows `row_of` of `prompts`, so that they end at `end`.

        An empty cache starts over, with `end` behind the prompts.
        """
        width, first_row = prompts.end, self.num_rows
        if first_row == 0:
            self.first, self.end = 0, 0
            self.reserve_columns(width)
            self.end = width
        assert width <= self.end, f"a prompt of {width} columns joins at column {self.end}"
        self.num_rows += row_of.numel()
        assert self.num_rows <= self.capacity_rows
        columns = slice(self.end - width, self.end)
        for key, prompt in prompts.buffers.items():
            if key not in self.buffers:
                self.buffers[key] = self._allocate(prompt)
            target = self.buffers[key][first_row : self.num_rows, :, columns]
            target.copy_(prompt[row_of, :, :width])
        self.states.append(prompts.states, row_of, first_row)
        self.states.show(self.num_rows)

    def _allocate(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.capacity_rows, states.shape[1], self.capacity, states.shape[3])


class RowGroup(RowCache):
    """Rows of equal length of `cache`, which a model takes for a cache without padding.

    rows: [K] int64. length: the number of their columns, the last ones before `cache.end`.
    """

    def __init__(self, cache: RowCache, rows: Tensor, length: int) -> None:
        super().__init__(rows=rows.numel(), columns=cache.capacity)
        self.buffers, self.rows = cache.buffers, rows
        self.first, self.end = cache.end - length, cache.end

    def write(self, name: str, layer_idx: int, states: Tensor) -> Tensor:
        """Write [K, heads, Q, size] at `end`; return a copy of the whole window."""
        buffer, stop = self.buffers[name, layer_idx], self.end + states.shape[2]
        buffer[self.rows, :, self.end : stop] = states
        return buffer[self.rows, :, self.first : stop]
