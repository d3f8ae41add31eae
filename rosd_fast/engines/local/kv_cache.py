"""A preallocated key-value cache whose rows come and go.

All rows end at the same column, so a prompt of L tokens that joins at column `end` occupies the
columns [end - L, end), and one slice per layer writes a whole decoding step:

    column   0        first            end        capacity
    row 0    .  .  .  |  p  p  p  t  t  |  .  .  .
    row 1    .  .  .  .  .  p  p  t  t  |  .  .  .          p prompt, t sampled, . masked out
    row 2    .  .  .  .  .  .  p  p  p  |  .  .  .          joined two tokens later

Attention reads [first, end) only, `first` being where the longest row begins.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

BLOCK = 64  # columns the cache grows by, at least


class RowCache(Cache):
    """Keys and values of `num_rows` sequences that end at column `end`.

    Per layer two buffers [capacity rows, heads, capacity columns, head size], in the model's dtype
    and on its device, made when the layer first writes. They start as zeros, since a masked NaN
    would still spread. `update` is what transformers calls; whoever calls the model moves `end` on.
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
        """Write [num_rows, heads, Q, head size] at `end`; returns views of the whole window."""
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
        """Columns in the window; transformers sizes its masks by it."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key columns, offset) of a mask for `query_length` further columns."""
        return self.end - self.first + query_length, 0

    def release_memory(self, columns: int) -> int:
        """Let `columns` more fit behind `end`. Returns how far everything moved to the left."""
        if self.end + columns <= self.capacity:
            return 0
        shift, width = self.first, self.end - self.first
        # Moving is enough when it frees a quarter; otherwise it would come back every few tokens.
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
        """Copy the rows `source` over the rows `target` ([K] int64 each, disjoint)."""
        if source.numel():
            window = slice(self.first, self.end)
            for buffer in (*self.keys, *self.values):
                buffer[target, :, window] = buffer[source, :, window]

    def append_rows(self, prompts: RowCache, row_of: Tensor) -> None:
        """Add `row_of.numel()` rows that end at `end`, copies of the rows `row_of` of `prompts`.

        An empty cache starts anew, with `end` behind the prompts.
        """
        width, first_row = prompts.end, self.num_rows
        if first_row == 0:
            self.first, self.end = 0, 0
            self.release_memory(width)
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
