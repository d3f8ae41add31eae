"""The weights of a model as its files have them: other names, and experts one by one.

transformers fuses some weights when it loads a model: the experts of a layer are one parameter
`experts.gate_up_proj` [E, 2I, H], where the files have `experts.0.gate_proj.weight` [I, H] and so
on. Servers, and programs that read a checkpoint, know the names of the files. transformers keeps
what it did on loading, and undoes it here as it does when it saves a model.

The conversions are in transformers' `core_model_loading.py` and `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rosd_fast.errors import UserError

LAYER = re.compile(r".*?\.\d+\.")  # what the names of a layer's weights begin with


def file_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` by the names and in the shapes of the files that `model` came from.

    A model that came from no file has the layout in which transformers would save it. Of tied
    weights only the one that files hold is returned. Tensors share memory with `weights` or, where
    transformers copies parts of one, are in host memory: a device never holds the parts of more
    than one layer.

    weights: by the state-dict names of `model` without adapters.

    Raises UserError if transformers cannot undo a conversion.
    """
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        if not (name in ties and same_memory(tensor, weights.get(ties[name]))):
            layers[layer_of(name)][name] = tensor
    storages = {storage(tensor) for tensor in weights.values()}
    try:
        return {
            name: tensor if storage(tensor) in storages else tensor.to("cpu")
            for layer in layers.values()
            for name, tensor in revert_weight_conversion(model, layer).items()
        }
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"its weights cannot be written in the layout of its files ({error})",
            where=type(model).__name__,
            fix="Save the model with transformers' save_pretrained, and train that copy",
        ) from None


def layer_of(name: str) -> str:
    """What the names of all weights of a layer begin with; empty outside of the layers."""
    found = LAYER.match(name)
    return found[0] if found else ""


def check_tied(model: PreTrainedModel, *, where: str) -> None:
    """Raise UserError when the config ties two parameters that the files give different values.

    transformers leaves such a pair untied. SGLang, and programs that load an export of the model,
    tie it as the config says, so they would run another model than the one that was trained.
    """
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(source):
            raise UserError(
                f"config.json ties {name} to {source}, but the files give them different values",
                where=where,
                fix="Set tie_word_embeddings to false in config.json to use both, or remove "
                f"{name} from the files",
            )


def same_memory(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors of one shape begin at the same address."""
    return (
        other is not None
        and tensor.shape == other.shape
        and (tensor is other or tensor.data_ptr() == other.data_ptr())
    )


def storage(tensor: Tensor) -> tuple[str, int]:
    """What tensors that share memory have in common."""
    return str(tensor.device), tensor.untyped_storage().data_ptr()
