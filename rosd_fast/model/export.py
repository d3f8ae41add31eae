"""A model folder in the layout of the hub, without adapters: what checkpoints and servers read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.model.adapters import merged_weights
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.load import quiet_transformers
from rosd_fast.model.other_parts import OtherParts, other_parts


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model as it is, with its adapters merged."""
    weights = file_weights(model, merged_weights(model))
    write_model(without_adapters(model), weights, other_parts(model), tokenizer, folder)


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


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config, without adapters and without memory for its weights."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    return plain
