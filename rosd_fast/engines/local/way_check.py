"""Compare a way to decode a model with its plain forward pass of each sequence alone.

Three rows meet what a run meets: prompts of unequal length, a row that is copied when its samples
part, one that takes the place of a row that has retired, and more tokens than a short attention
window holds:

    row 0   a a a a a a   a a          retires, and row 2 takes its place
    row 1       b b b b   b b b
    row 2       b b b b   b c c        a copy of row 1, which goes on with other tokens
            prompts       decoded
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.engines.local.kv_cache import RowCache
from rosd_fast.engines.local.plain import evaluating, plain_options

if TYPE_CHECKING:
    from rosd_fast.engines.local.forward import NextToken

PROMPT = 6  # tokens of the longer prompt, besides those that fill a window
SHORTER = 2  # tokens that the other prompt lacks
STEPS = 3  # decoded tokens
MAX_WINDOW = 32  # a longer window is not filled, as the comparison would take long


@dataclass(frozen=True, slots=True)
class Trial:
    """The rows of the comparison, and what a right way gives.

    long, short: number of prompt tokens of row 0 and of the others.
    ids: [3, long + STEPS] int64, the rows from their first token on.
    expected: per row [tokens, V], the logits of its plain forward pass.
    """

    long: int
    short: int
    ids: Tensor
    expected: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, context_length: int | None) -> Self:
        """The trial of `model` and the logits of its plain forward passes, one per row."""
        config = model.config.get_text_config()
        long = PROMPT + _window(config)
        if context_length is not None:
            long = max(SHORTER + 1, min(long, context_length - STEPS))
        short = long - SHORTER
        ids = torch.arange(3 * (long + STEPS), device=model.device).reshape(3, -1) * 37 + 11
        ids %= config.vocab_size
        ids[2, : short + 1] = ids[1, : short + 1]
        lengths = (long + STEPS - 1, short + STEPS, short + STEPS)
        with evaluating(model):
            expected = tuple(
                model(input_ids=row[None, :length], **plain_options(model)).logits[0].float()
                for row, length in zip(ids, lengths, strict=True)
            )
        return cls(long=long, short=short, ids=ids, expected=expected)

    @property
    def is_finite(self) -> bool:
        return all(bool(logits.isfinite().all()) for logits in self.expected)

    def mismatch(self, model: NextToken) -> float:
        """The relative difference between the logits that `model` gives and the expected ones.

        The largest one; but the largest median of a row in a narrow dtype, where a router of
        experts that flips on a rounding error changes one token of a row, and for the last way to
        try, where a tie among experts or keys that breaks otherwise must not refuse the model.
        """
        differences: tuple[list[Tensor], ...] = ([], [], [])
        with model.running():
            for rows, lengths, logits in self._decode(model):
                for row, length, ours in zip(rows, lengths, logits.float(), strict=True):
                    expected = self.expected[row][length - 1]
                    differences[row].append((ours - expected).norm() / expected.norm())
        narrow = model.model.dtype not in (torch.float32, torch.float64)
        pick = torch.median if narrow or model.way == "recompute" else torch.amax
        return float(torch.stack([pick(torch.stack(own)) for own in differences]).amax())

    def _decode(self, model: NextToken) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Yield rows, their numbers of tokens and the logits [B, V] that follow them."""
        device = self.ids.device
        cache = model.new_cache(rows=3, columns=self.long + 1)  # it has to grow
        cache.keep_rows(0)
        lengths = torch.tensor([self.long, self.short], device=device)
        for rows in [[0], [1]] if model.way == "exact" else [[0, 1]]:
            own = lengths[rows]
            width = int(own.max())
            prompts = model.new_cache(rows=len(rows), columns=width)
            columns = torch.arange(width, device=device) - (width - own[:, None])
            ids = self.ids[rows].gather(1, columns.clamp(min=0))
            yield rows, own.tolist(), model.prefill(prompts, ids, width - own)
            cache.append_rows(prompts, torch.arange(len(rows), device=device))
        yield self._step(model, cache, [0, 1], lengths)
        cache.copy_rows(torch.tensor([1], device=device))
        lengths = torch.cat([lengths, lengths[1:]]) + 1
        yield self._step(model, cache, [0, 1, 2], lengths)
        cache.move_rows(torch.tensor([2], device=device), torch.tensor([0], device=device))
        cache.keep_rows(2)
        yield self._step(model, cache, [2, 1], lengths[1:] + 1)

    def _step(
        self, model: NextToken, cache: RowCache, rows: list[int], lengths: Tensor
    ) -> tuple[list[int], list[int], Tensor]:
        """Feed each row its next token."""
        cache.reserve_columns(1)
        starts = cache.end - lengths
        cache.first = int(starts.min())
        ids = self.ids[rows].gather(1, lengths[:, None])[:, 0]
        logits = model.decode(cache, ids, lengths, model.decode_mask(cache, starts))
        return rows, (lengths + 1).tolist(), logits


def _window(config: Any) -> int:
    """The tokens that fill the shortest attention window or chunk of a model, at most MAX_WINDOW.

    0: it has none, or a longer one.
    """
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size <= MAX_WINDOW), default=0)
