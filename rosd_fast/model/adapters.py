"""Which parameters are trained, and LoRA adapters (arXiv 2106.09685) by peft.

Adapters are added to the model in place, so all other code works on the same module. With its
adapters off it is the model that was loaded, so a frozen teacher costs no memory.

peft: https://github.com/huggingface/peft
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import LoraConfig
from rosd_fast.config.arguments import listed
from rosd_fast.errors import UserError
from rosd_fast.model.adapter_targets import without_adapter
from rosd_fast.model.nf4 import plain_state

BASE = re.compile(r"(\.base_layer)+\.")  # peft's name of the layer that an adapter is added to
SAMPLED = 1024  # values per parameter that the fingerprint reads


def choose_trainable(
    model: PreTrainedModel, *, lora: LoraConfig, trainable: str, seed: int
) -> None:
    """Add adapters, or mark the parameters that `trainable` names as the only ones to train.

    Raises UserError for names that match nothing, and if nothing would be trained.

    trainable: the option `optim.trainable`. seed: of the adapters' initial values.
    """
    if lora.rank:
        add_adapters(model, lora, seed=seed)
    elif patterns := listed(trainable):
        train_only(model, patterns)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "none of the model's weights can be trained",
            where="model",
            fix="Give a model with full, unfrozen weights, or set lora.rank",
        )


def train_only(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Train the parameters whose names match a pattern, and no others.

    Raises UserError for a pattern that matches none.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    chosen: set[int] = set()
    for pattern in patterns:
        chosen |= matching(named, pattern, where="optim.trainable")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def matching(named: Sequence[tuple[str, Tensor]], pattern: str, *, where: str) -> set[int]:
    """The `id` of each parameter with a name that matches the pattern.

    Raises UserError if there is none.

    named: parameters by name; a tied parameter has several names. where: the option that holds
    the pattern.
    """
    found = {id(parameter) for name, parameter in named if fnmatchcase(name, pattern)}
    if not found:
        raise UserError(
            f"{pattern} matches no parameter of the model",
            where=where,
            fix=f"Use names such as {named[0][0]}; * matches anything",
        )
    return found


def add_adapters(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Add adapters, which change nothing yet, to the layers that `lora.targets` names.

    Raises UserError if peft is missing or cannot use the targets, and for a target that cannot have
    an adapter.
    """
    if find_spec("peft") is None:
        raise UserError("needs peft", where="lora.rank", fix='pip install "rosd-fast[lora]"')
    import peft

    every = lora.targets == "all-linear"
    unsuited = without_adapter(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft gives fused experts patterns of their own, some of which match no layer.
        warnings.filterwarnings("ignore", message=".*pattern keys did not match")
        torch.manual_seed(seed)
        try:
            model.add_adapter(
                peft.LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    target_modules="all-linear" if every else listed(lora.targets),
                    exclude_modules=[*unsuited] if every and unsuited else None,
                )
            )
        except ValueError as error:
            raise UserError(
                str(error).split(". ")[0], where="lora.targets", fix="Try all-linear"
            ) from None
    for name, module in model.named_modules():
        if not every and name in unsuited and hasattr(module, "lora_A"):
            raise UserError(
                f"{name} {unsuited[name]}, so it cannot have an adapter",
                where="lora.targets",
                fix="Leave it out, or use all-linear",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether LoRA adapters have been added to the model."""
    return any("lora_" in name for name, _ in model.named_parameters())


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model computes without its adapters, as it was loaded."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of an equivalent model without adapters.

    Tensors share the model's memory if no adapter adds to them and they are not packed. Adapters
    without memory (`rosd_fast.model.release`) add nothing.
    """
    state = plain_state(model)
    if not has_adapters(model):
        return state
    weights = _without_adapters(state)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not next(module.lora_A.parameters()).is_meta:  # type: ignore[union-attr]
            # The adapters of a layer's experts adapt parameters that are not called weight.
            changed = plain_name(f"{name}.{getattr(module, 'parameter_name', 'weight')}")
            delta: Tensor = module.get_delta_weight("default")  # type: ignore[operator]
            weight = weights[changed]
            weights[changed] = (weight.float() + delta.float()).to(weight.dtype)
    return weights


@torch.no_grad()
def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the model with its adapters off; it shares memory like `merged_weights`."""
    return _without_adapters(plain_state(model))


def _without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): t for name, t in state.items() if "lora_" not in name}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config, without adapters and without memory for its weights."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    return plain


def plain_name(name: str) -> str:
    """The name that a parameter has in a model without adapters."""
    return BASE.sub(".", name)


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the loaded weights, without adapters: of names, shapes and sampled values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            flat = parameter.detach().flatten()
            values = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().contiguous()
            digest.update(f"{plain_name(name)} {[*parameter.shape]}".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()
