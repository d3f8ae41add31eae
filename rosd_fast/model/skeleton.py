"""A model without its weights, from config.json and tokenizer alone.

Its parameters are on the meta device: they have names, shapes and a dtype, and take no memory.
Plans and checks that need no more than that take seconds, and need no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from rosd_fast.model.head import head
from rosd_fast.model.load import (
    LoadedModel,
    check_vocabulary,
    context_length,
    explain,
    find,
    load_tokenizer,
    quiet_transformers,
    set_generation_config,
    short_name,
    stop_token_ids,
)
from rosd_fast.model.other_parts import auto_class_of, take_out
from rosd_fast.model.quantized import plain_config


def load_skeleton(
    model_name: str, *, dtype: str, trust_remote_code: bool = False, needs_template: bool = True
) -> LoadedModel:
    """`load_model` without weights. Raises UserError for anything but the weights that is wrong."""
    source = find(model_name, weights=False)
    with quiet_transformers():
        tokenizer = load_tokenizer(
            source, trust_remote_code=trust_remote_code, needs_template=needs_template
        )
    model = build_skeleton(model_name, dtype=dtype, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, where=model_name)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name(model_name),
        context_length=context_length(model, tokenizer, where=model_name),
        stop_token_ids=stop_token_ids(model, tokenizer, where=model_name),
    )


def build_skeleton(
    model_name: str, *, dtype: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of the option `model`, in eval mode, on the meta device. Raises UserError."""
    source = find(model_name, weights=False)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            plain_config(config)
            with torch.device("meta"):
                model: Any = auto_class_of(config).from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
                )
        except Exception as error:
            raise explain(error, source, "model") from error
        set_generation_config(model, source)
        head(model)
        take_out(model)
    return model.eval()
