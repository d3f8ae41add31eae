"""Rotary embeddings (RoPE) whose frequencies depend on the length of a sequence.

With longrope (Phi-3) and dynamic NTK, transformers computes the frequencies of all rows of a batch
from its longest sequence, so a sequence's log-probabilities would depend on what else is in its
batch, and on how far its decoding has come. `fix_rope` fixes the frequencies once, for the longest
sequence that a run can have:

    longrope   the short factors if that is within original_max_position_embeddings, else the long
               ones, for every sequence
    dynamic    the base that transformers computes for a sequence of that length; SGLang has the one
               for factor * max_position_embeddings tokens, whatever the length

The config of the model, which checkpoints and exports get, is not changed. Frequencies are buffers,
so copies of the model, skeletons and shards have them too.

longrope: https://arxiv.org/abs/2402.13753, dynamic NTK: https://arxiv.org/abs/2306.15595
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rosd_fast.errors import UserError

FIXED = "fixed"
"""The rope_type of a module whose frequencies transformers leaves as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The RoPE of one kind of layers, whose frequencies depend on the length of a sequence.

    module: computes cosines and sines.
    kind: its rope_type, which contains "dynamic" or is "longrope".
    layer_type: the layers that it is for, where each type has a RoPE of its own; None: all.
    """

    module: Any
    kind: str
    layer_type: str | None

    @property
    def parameters(self) -> dict[str, Any]:
        """Its part of the config's rope_parameters."""
        all_types = self.module.config.rope_parameters
        return all_types if self.layer_type is None else all_types[self.layer_type]

    @property
    def is_longrope(self) -> bool:
        return self.kind == "longrope"

    @property
    def border(self) -> int:
        """The number of tokens up to which the frequencies do not depend on the length."""
        if self.is_longrope:
            return int(self.parameters["original_max_position_embeddings"])
        return int(self.module.config.max_position_embeddings)

    def served_length(self, longest: int) -> int:
        """The length whose frequencies SGLang has for a model that may see `longest` tokens."""
        if self.is_longrope:
            return longest
        return int(self.parameters.get("factor", 1.0) * self.border)

    def fix(self, length: int) -> None:
        """Give the module the frequencies of sequences of `length` tokens, for good."""
        module, prefix = self.module, "" if self.layer_type is None else f"{self.layer_type}_"
        if self.is_longrope and length > self.border:
            module.config = self._long_only()
        frequencies = getattr(module, f"{prefix}inv_freq")
        fixed, scaling = ROPE_INIT_FUNCTIONS[self.kind](
            module.config,
            frequencies.device,
            seq_len=max(length, self.border),
            **({} if self.layer_type is None else {"layer_type": self.layer_type}),
        )
        setattr(module, f"{prefix}inv_freq", fixed.to(frequencies.dtype))
        setattr(module, f"{prefix}original_inv_freq", fixed.to(frequencies.dtype, copy=True))
        setattr(module, f"{prefix}attention_scaling", scaling)
        if self.layer_type is None:
            module.rope_type = FIXED
        else:
            module.rope_type = {**module.rope_type, self.layer_type: FIXED}

    def _long_only(self) -> Any:
        """A copy of the config, for this module alone, that has long factors only."""
        own = {**self.parameters, "short_factor": self.parameters["long_factor"]}
        if "long_mscale" in own:
            own["short_mscale"] = own["long_mscale"]
        config = copy.copy(self.module.config)
        all_types = own
        if self.layer_type is not None:
            all_types = {**config.rope_parameters, self.layer_type: own}
        config.rope_parameters = all_types
        return config


def find_rotary(model: nn.Module) -> Iterator[Rotary]:
    """Each RoPE of the model whose frequencies depend on the length and are not fixed yet."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if not isinstance(kinds, str | dict):
            continue
        for layer_type, kind in ({None: kinds} if isinstance(kinds, str) else kinds).items():
            if "dynamic" in kind or kind == "longrope":
                yield Rotary(module=module, kind=kind, layer_type=layer_type)


def fix_rope(model: PreTrainedModel, longest: int, *, served: bool = False) -> str | None:
    """Fix the frequencies of a model for sequences of up to `longest` tokens, in place.

    Every sequence of the run is then computed with the same frequencies, short ones too. Nothing
    happens where frequencies do not depend on the length, or are fixed already. Returns a line for
    the user where they are not those of a short sequence, else None.

    served: whether an SGLang server computes with the model, too; the frequencies are then its.
    """
    lines = []
    for rotary in list(find_rotary(model)):
        length = rotary.served_length(longest) if served else longest
        if length > rotary.border:
            of = "the long factors" if rotary.is_longrope else f"frequencies of {length:,} tokens"
            why = f"{longest:,} tokens are possible" if length == longest else "as SGLang has them"
            lines.append(
                f"RoPE {rotary.kind}: {of} for every sequence ({why}, and the model was "
                f"trained on {rotary.border:,})"
            )
        rotary.fix(length)
    return "; ".join(dict.fromkeys(lines)) or None


def server_rope_args(model: PreTrainedModel, *, where: str, managed: bool) -> tuple[str, ...]:
    """The arguments of an SGLang server that make its frequencies those of `fix_rope`.

    By itself a server of a longrope model chooses the factors by the sequences that it happens to
    compute together. With these arguments it has the long factors only.

    where: the option that names the servers. managed: whether we start them.

    Raises UserError for servers that run already, and for a language model within another one: the
    arguments would not reach these.
    """
    parameters = long_parameters(model)
    if parameters is None:
        return ()
    if not managed or model.config.get_text_config() is not model.config:
        raise UserError(
            "a sequence may have more tokens than original_max_position_embeddings = "
            f"{parameters['original_max_position_embeddings']}, and a server then chooses the "
            "RoPE factors by the sequences that it happens to compute together",
            where=where,
            fix="Let the run start the servers (engine.launch = local), or lower max_new_tokens "
            "and max_prompt_tokens",
        )
    longest = model.config.max_position_embeddings
    scaling = {f"{name}_mscale": parameters["attention_scaling"] for name in ("short", "long")}
    rope = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": parameters["rope_theta"],
        "short_factor": parameters["long_factor"],
        "long_factor": parameters["long_factor"],
        "original_max_position_embeddings": longest,
        **{name: parameters.get(name, value) for name, value in scaling.items()},
    }
    if "partial_rotary_factor" in parameters:
        rope["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    changed = {"rope_parameters": rope, "original_max_position_embeddings": longest}
    return ("--json-model-override-args", json.dumps(changed))


def long_parameters(model: PreTrainedModel) -> dict[str, Any] | None:
    """The RoPE parameters of a longrope model that `fix_rope` gave the long factors; else None.

    With "attention_scaling", the scale of cosines and sines.
    """
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if getattr(module, "rope_type", None) != FIXED or own is model.config.get_text_config():
            continue
        return {**own.rope_parameters, "attention_scaling": module.attention_scaling}
    return None
