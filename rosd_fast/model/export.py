"""A model folder in the layout of the hub, without adapters: what checkpoints and servers read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.model.adapters import base_weights, without_adapters
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.load import quiet_transformers
from rosd_fast.model.other_parts import OtherParts, other_parts
from rosd_fast.model.tensor_file import TensorFile
from rosd_fast.model.weight_files import INDEX
from rosd_fast.model.weight_stream import TensorSpec, WeightStream, WholeWeights, read_ahead

MAX_FILE_BYTES = 50 * 10**9  # the default of transformers


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model with its adapters off."""
    plain = without_adapters(model)
    names = {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}
    weights = {name: w for name, w in base_weights(model).items() if name in names}
    stream = WholeWeights(file_weights(model, weights))
    write_model(plain, stream, other_parts(model), tokenizer, folder)


def write_model(
    model: PreTrainedModel,
    weights: WeightStream,
    parts: OtherParts,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save model and tokenizer, also with a generation config that transformers would refuse.

    The files are those that transformers' `save_pretrained` writes, without having all weights in
    memory. model: has the config; its weights are not read. parts: what is saved besides the
    language model.
    """
    generation = model.generation_config
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            # It has sampling parameters without do_sample: keep only the token ids.
            model.generation_config = GenerationConfig(
                bos_token_id=generation.bos_token_id,
                eos_token_id=generation.eos_token_id,
                pad_token_id=generation.pad_token_id,
            )
    with quiet_transformers():
        model.save_pretrained(folder, state_dict={}, save_original_format=False)
        for empty in folder.glob("*.safetensors"):
            empty.unlink()
        tokenizer.save_pretrained(folder)
    write_weights(model, weights, parts, folder)
    for name, content in parts.files.items():
        (folder / name).write_bytes(content)
    add_interval(folder)


def write_weights(
    model: PreTrainedModel, weights: WeightStream, parts: OtherParts, folder: Path
) -> None:
    """Write the weights to one file, or to several with an index, bucket by bucket."""
    ignored = model._keys_to_ignore_on_save or ()
    beside = {name: TensorSpec.of(tensor) for name, tensor in parts.weights.items()}
    specs = {k: spec for k, spec in {**weights.specs, **beside}.items() if k not in ignored}
    split = split_torch_state_dict_into_shards(
        {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in specs.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_FILE_BYTES,
    )
    with ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for file, names in split.filename_to_tensors.items():
            of_file = TensorFile(folder / file, {name: specs[name] for name in names})
            files |= dict.fromkeys(names, stack.enter_context(of_file))

        def write(tensors: dict[str, Tensor]) -> None:
            for name in tensors.keys() & files.keys():
                files[name].write(name, tensors[name])

        write(parts.weights)
        with read_ahead(weights.buckets()) as buckets:
            for bucket in buckets:
                write(bucket)
    if split.is_sharded:
        about = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def add_interval(folder: Path) -> None:
    """Add the `full_attention_interval` of hybrid Qwen models to config.json.

    The hub's files have it, transformers writes `layer_types` in its place, and SGLang reads it.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config") or {}):
        types = part.get("layer_types") or []
        if str(part.get("model_type")).startswith("qwen3") and "linear_attention" in types:
            interval = 1 + types.index("full_attention") if "full_attention" in types else 0
            regular = interval and all(
                (kind == "full_attention") == ((index + 1) % interval == 0)
                for index, kind in enumerate(types)
            )
            if regular:
                part.setdefault("full_attention_interval", interval)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
