"""The parts of a checkpoint that text does not pass: vision and audio towers and their projectors.

Image-text models are trained on text: their language model alone. The other parts are taken out of
the model when it is loaded, so they use no device memory, are not sharded, and have no gradients. A
checkpoint gets them back as the files have them, bit for bit (dequantized, if they are quantized),
with the files of the processor:

    model.language_model.*   trained, saved by the names of the files
    model.vision_tower.*     kept as in the files
    preprocessor_config.json, processor_config.json, ...   copied
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils.hub import cached_file

from rosd_fast.model.attention import backbone
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.head import output_layer
from rosd_fast.model.weight_files import open_weights

PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "audio_processor_config.json"),
)
ATTRIBUTE = "_rosd_other_parts"  # of a model whose other parts were taken out


def concerns_language(record: logging.LogRecord) -> bool:
    """False for transformers' warning, at each change of the attention, that a config has a section
    for a part that the model lacks."""
    return "without finding the associated sub-model" not in record.getMessage()


logging.getLogger("transformers.modeling_utils").addFilter(concerns_language)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherParts:
    """What an export adds to the weights of the language model.

    A copy of the model shares it. A pickled one is empty: only rank 0 writes exports.

    weights: by the names and with the dtypes of the files, in host memory.
    files: the content of each processor file by its name.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherParts:
        return self

    def __reduce__(self) -> tuple[type[OtherParts], tuple[()]]:
        return OtherParts, ()


def other_parts(model: PreTrainedModel) -> OtherParts:
    """What was taken out of `model` when it was loaded; empty for a text model."""
    return getattr(model, ATTRIBUTE, None) or OtherParts()


def auto_class_of(config: Any) -> Any:
    """The transformers class that loads a model of this config in the layout of its files.

    It is AutoModelForCausalLM, except for a checkpoint of an image-text or audio-text model, from
    which that class would take only the language model, or nothing.
    """
    several = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if not several or config.is_encoder_decoder or config.get_text_config() is config:
        return AutoModelForCausalLM
    named: list[str] = config.architectures or []
    if any(name.endswith("ForCausalLM") for name in named):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def set_aside(
    model: PreTrainedModel, source: Path | str, plain: Mapping[str, Tensor] | None = None
) -> None:
    """Take the other parts out of a model that `source` was loaded into, and keep its files'
    tensors of them.

    plain: all weights by their names in the files, where those are quantized. The config of the
        export says nothing of a quantization, so the parts are kept dequantized.
    """
    names = file_names(model)
    if not take_out(model):
        return
    kept = names - file_names(model)
    if plain is not None:
        weights = {name: plain[name] for name in kept.intersection(plain)}
    else:
        with open_weights(source) as found:
            weights = {name: found[name].get_tensor(name) for name in kept.intersection(found)}
    files = {
        name: Path(path).read_bytes()
        for name in PROCESSOR_FILES
        if (path := optional_file(source, name)) is not None
    }
    setattr(model, ATTRIBUTE, OtherParts(weights=weights, files=files))


def processor_template(source: Path | str) -> str | None:
    """The chat template that older image-text models have beside their processor, not tokenizer."""
    path = optional_file(source, "chat_template.json")
    return None if path is None else json.loads(Path(path).read_text()).get("chat_template")


def take_out(model: PreTrainedModel) -> bool:
    """Remove all modules but the language model and the head; return whether there were any."""
    if model.config.get_text_config() is model.config:
        return False
    kept = {backbone(model), output_layer(model)}
    removed = list(_beside(model, kept))
    for owner, name in removed:
        setattr(owner, name, None)
    return bool(removed)


def _beside(module: nn.Module, kept: set[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """(owner, attribute) of the largest modules with parameters that are no part of `kept`."""
    for name, child in list(module.named_children()):
        if child in kept:
            continue
        if kept.intersection(child.modules()):
            yield from _beside(child, kept)
        elif next(child.parameters(), None) is not None:
            yield module, name


def file_names(model: PreTrainedModel) -> set[str]:
    """The names that the model's weights have in files."""
    shapes = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict().items()}
    return set(file_weights(model, shapes))


def optional_file(source: Path | str, name: str) -> str | None:
    """The path of a file of a model folder or hub model, or None if it has no such file."""
    return cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
