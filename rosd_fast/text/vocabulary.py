"""Do two tokenizers share their vocabulary? Compared byte by byte, since equal sizes say nothing.

A divergence between two models is a sum over token ids, so an id has to stand for the same bytes on
both sides. Merges, templates and the split into words may differ: the teacher reads the student's
ids and never tokenizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.text.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedVocabulary:
    """Two tokenizers whose common ids stand for the same bytes.

    size: one more than the largest id of either tokenizer.
    num_student_only: ids that only the student's tokenizer defines.
    num_teacher_only: ids that only the teacher's tokenizer defines.
    """

    size: int
    num_student_only: int
    num_teacher_only: int

    def describe(self) -> str:
        """Ids that only one side defines, in words; empty if there are none."""
        counts = (("student", self.num_student_only), ("teacher", self.num_teacher_only))
        parts = [f"{count} in the {side}'s tokenizer only" for side, count in counts if count]
        return f"token ids: {', '.join(parts)}" if parts else ""


def shared_vocabulary(student: Any, teacher: Any, *, where: str) -> SharedVocabulary:
    """Compare two tokenizers. Raises UserError for the first id that stands for different bytes.

    student, teacher: fast tokenizers of transformers. where: begins the error.
    """
    own, other = vocabulary_bytes(student), vocabulary_bytes(teacher)
    common = own.keys() & other.keys()
    differing = [token for token in common if own[token] != other[token]]
    if differing:
        first = min(differing)
        raise UserError(
            f"its tokenizer is another one: token {first} is {_shown(other[first])} and the "
            f"student's is {_shown(own[first])} ({len(differing)} ids differ)",
            where=where,
            fix="Give a teacher of the student's model family",
        )
    return SharedVocabulary(
        size=max([*own, *other]) + 1,
        num_student_only=len(own) - len(common),
        num_teacher_only=len(other) - len(common),
    )


def vocabulary_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each id stands for inside a text; those of an added token are its content."""
    pieces = TokenBytes(tokenizer).vocabulary()
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    contents = {token: item.content.encode() for token, item in added.items()}
    return pieces | contents


def _shown(text: bytes) -> str:
    """The bytes as a quoted text, or as bytes if they are no UTF-8."""
    try:
        return repr(text.decode())
    except UnicodeDecodeError:
        return repr(text)
