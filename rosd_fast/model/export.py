"""A model folder in the layout of the hub, without adapters: what checkpoints and servers read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.model.adapters import base_weights, without_adapters
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.load import quiet_transformers
from rosd_fast.model.other_parts import OtherParts, other_parts


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model with its adapters off."""
    plain = without_adapters(model)
    names = {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}
    weights = {name: w for name, w in base_weights(model).items() if name in names}
    write_model(plain, file_weights(model, weights), other_parts(model), tokenizer, folder)


def write_model(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    parts: OtherParts,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save model and tokenizer, also with a generation config that transformers would refuse.

    model: has the config; its weights are not read. weights: in the layout of files. parts: what is
    saved besides the language model.
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
        # save_pretrained empties the mapping, so it gets another one.
        state = {**weights, **parts.weights}
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
        tokenizer.save_pretrained(folder)
    for name, content in parts.files.items():
        (folder / name).write_bytes(content)
