"""The unit of sparsity: one row block and one tile of the vocabulary, computed or skipped."""

from __future__ import annotations

TILE = 128  # vocabulary entries of a tile
ROW_BLOCK = 128  # tokens of a row block
# Entries of a tile whose logits are in memory and are read again where its maximum calls for it.
# Smaller ones are read less often, but their statistics cost more.
SCAN_TILE = 256


def num_tiles(vocab_size: int, tile: int = TILE) -> int:
    """T, the number of tiles that cover the vocabulary; the last may be short."""
    return -(-vocab_size // tile)


def num_row_blocks(num_tokens: int) -> int:
    """B, the number of row blocks that cover the tokens; the last may be short."""
    return -(-num_tokens // ROW_BLOCK)
