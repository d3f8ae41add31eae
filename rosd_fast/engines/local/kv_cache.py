"""A preallocated KV cache whose rows come and go.

All rows end at the same column, so a prompt of L tokens that joins at column `end` occupies the
columns [end - L, end), and one slice per layer writes a whole decoding step:

    column   0        first            end        capacity
    row 0    .  .  .  |  p  p  p  t  t  |  .  .  .
    row 1    .  .  .  .  .  p  p  t  t  |  .  .  .          p prompt, t sampled, . masked out
    row 2    .  .  .  .  .  .  p  p  p  |  .  .  .          joined two tokens later

Attention reads only [first, end), where `first` is the column at which the longest row begins.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

BLOCK = 64  # minimum number of columns by which the cache grows


class RowCache(Cache):
    """Keys and values of `num_rows` sequences that end at column `end`.

    Each layer has two buffers [capacity rows, heads, capacity columns, head size] in the model's
    dtype and on its device, allocated when the layer first writes. They start as zeros, since a
    masked NaN would still spread. transformers calls `update`; the caller of the model advances
    `end`.
    """

    def __init__(self, *, rows: int, columns: int) -> None:
        super().__init__(layers=[])
        self.capacity_rows = rows
        self.capacity = columns
        self.num_rows = rows
        self.first = 0
        self.end = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.keys)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write [num_rows, heads, Q, head size] at `end`; return views of the whole window."""
        if layer_idx >= len(self.keys):
            assert layer_idx == len(self.keys), (
                f"layer {layer_idx} writes before layer {len(self.keys)}"
            )
            self.keys.append(self._allocate(key_states))
            self.values.append(self._allocate(value_states))
        stop = self.end + key_states.shape[2]
        keys = self.keys[layer_idx][: self.num_rows, :, self.first : stop]
        values = self.values[layer_idx][: self.num_rows, :, self.first : stop]
        keys[:, :, self.end - self.first :] = key_states
        values[:, :, self.end - self.first :] = value_states
        return keys, values

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
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
                new[: self.num_rows, :, :width] = old[: self.num_rows, :, shift : self.end]
                buffers[layer] = new
        self.first, self.end = 0, width
        return shift

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows `source` to the rows `target` ([K] int64 each, disjoint)."""
        if source.numel():
            window = slice(self.first, self.end)
            for buffer in (*self.keys, *self.values):
                buffer[target, :, window] = buffer[source, :, window]

    def copy_rows(self, source: Tensor) -> None:
        """Add copies of the rows `source` ([K] int64) behind the last row."""
        first_row, window = self.num_rows, slice(self.first, self.end)
        self.num_rows += source.numel()
        assert self.num_rows <= self.capacity_rows
        for buffer in (*self.keys, *self.values):
            buffer[first_row : self.num_rows, :, window] = buffer[source, :, window]

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
        for mine, theirs in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for layer, prompt in enumerate(theirs):
                if layer == len(mine):
                    mine.append(self._allocate(prompt))
                target = mine[layer][first_row : self.num_rows, :, columns]
                target.copy_(prompt[row_of, :, :width])

    def _allocate(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.capacity_rows, states.shape[1], self.capacity, states.shape[3])
