"""How many tokens a text has when it is cut, read off the tokens of the whole text.

Cutting and encoding again costs as much as the whole prompt at every try. The character at which
each token of the whole text ends gives the size of each cut at once, up to the token or two in
which the cut falls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosd_fast.text.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class TextSize:
    """The tokens of a text.

    ends: for each token, the number of characters of the text up to its end; ascending.
    """

    ends: Sequence[int]

    def head(self, chars: int) -> int:
        """The number of tokens that the first characters have."""
        return min(bisect_left(self.ends, chars) + 1, len(self.ends)) if chars > 0 else 0

    def middle_cut(self, keep: int) -> int:
        """The number of tokens that `cut_middle` keeps of the text, less those of its ellipsis."""
        if not self.ends or keep >= self.ends[-1]:
            return len(self.ends)
        tail = keep // 2
        left_out = bisect_right(self.ends, self.ends[-1] - tail)
        kept = self.head(keep - tail) + len(self.ends) - left_out
        return min(kept, len(self.ends))  # a token with both cuts counts in both parts


def encoded_size(tokenizer: Any, text: str) -> TextSize:
    """The size of a text of unknown tokens, which is encoded for it."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return TextSize([end for _, end in encoding.offsets])


def sampled_size(token_bytes: TokenBytes, ids: Sequence[int], text: str) -> TextSize:
    """The size of a text that a model sampled as `ids`, without encoding it.

    text: what `ids` decode to, possibly without its first characters. A model may sample other
    tokens than the text would be encoded to, though it rarely does.
    """
    ends = list(accumulate(token_bytes.num_chars(ids)))
    if missing := (ends[-1] if ends else 0) - len(text):
        ends = [max(0, end - missing) for end in ends]
    return TextSize(ends)
