"""Tokenizers of kinds that llguidance does not read by itself, trained on a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import CHAT_TEMPLATE, CORPUS, SPECIAL

TAGS = [
    f"<{slash}{name}>"
    for name in ("error_quote", "error_sentence", "explanation")
    for slash in ("", "/")
]
LINES = [line for line in CORPUS if line.isascii()] + [" ".join([*TAGS, "<answer>", "</answer>"])]


def wrapped(backend: Tokenizer, *, tags: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers, with a chat template.

    tags: make the tags of a reflection tokens, which are not special.
    """
    backend.add_special_tokens(SPECIAL)
    if tags:
        backend.add_tokens(TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def metaspace() -> PreTrainedTokenizerFast:
    """BPE with Metaspace, whose decoder drops the first token's spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerFast:
    """Unigram with Metaspace, as T5's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=220, show_progress=False, unk_token="<unk>")
    )
    return wrapped(backend)


def never_prepended() -> PreTrainedTokenizerFast:
    """BPE with Metaspace that adds no space before a text: no token is another one there."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    return wrapped(backend)


def replaced() -> PreTrainedTokenizerFast:
    """BPE with ▁ and without byte fallback, whose decoder drops a leading space."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    return wrapped(backend)


def word_ends() -> PreTrainedTokenizerFast:
    """BPE whose tokens mark the end of a word, as the first GPT's."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False, end_of_word_suffix="</w>")
    backend.train_from_iterator(LINES, trainer)
    return wrapped(backend)


def words() -> PreTrainedTokenizerFast:
    """One token per word, without a decoder."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([*LINES, " ".join(map(str, range(30)))], trainer)
    return wrapped(backend)


def characters() -> PreTrainedTokenizerFast:
    """One token per character, joined as they are."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(["".join(sorted({*"".join(LINES)}))], trainer)
    return wrapped(backend)


def word_pieces() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's, with the tags of a reflection as tokens."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=220, special_tokens=["<unk>"], show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return wrapped(backend, tags=True)


KINDS: dict[str, Callable[[], Any]] = {
    "metaspace": metaspace,
    "unigram": unigram,
    "metaspace, never prepended": never_prepended,
    "replaced": replaced,
    "word ends": word_ends,
    "words": words,
    "characters": characters,
}
