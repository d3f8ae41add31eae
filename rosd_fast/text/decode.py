"""From sampled ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of sampled ids without special tokens, its spaces as they were sampled.

    Verifiers and quotes depend on the exact characters, so the spaces before punctuation, which
    some tokenizers "clean up", stay. `TokenBytes` gives the same text token by token.
    """
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
