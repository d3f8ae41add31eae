"""A copy in host memory of what a checkpoint holds: it is written while the run goes on."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.load import quiet_transformers
from rosd_fast.trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A model to save in the Hugging Face layout; adapters are merged into its weights."""

    model: PreTrainedModel  # without memory for weights
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> Export:
        """A copy of rank 0's model, as of the learner's last `gather_weights`.

        Raises UserError when a model of that config has no place for one of the weights.
        """
        assert learner.full_model is not None
        model = without_adapters(learner.full_model)
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        weights = {name: w for name, w in learner.weights.items() if name in names}
        kept = {weight.data_ptr() for weight in weights.values()}
        for name, weight in learner.weights.items():  # a tied one has another's memory
            if name not in names and weight.data_ptr() not in kept:
                raise UserError(
                    f"an export would lose {name}: the model's config has no place for it",
                    where=type(model).__name__,
                    fix="Correct the model's config.json, such as its tie_word_embeddings",
                )
        copies = {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
        return cls(model=model, weights=copies, tokenizer=tokenizer)

    def save(self, folder: Path) -> None:
        """`save_pretrained`, also for generation configs that transformers refuses to save.

        Raises RunFailed when the files do not hold the weights.
        """
        own = self.model.generation_config
        if own is not None:
            try:
                own.validate(strict=True)
            except ValueError:
                # Sampling parameters without do_sample: keep the token ids, which are needed.
                self.model.generation_config = GenerationConfig(
                    bos_token_id=own.bos_token_id,
                    eos_token_id=own.eos_token_id,
                    pad_token_id=own.pad_token_id,
                )
        with quiet_transformers():
            # A copy of the mapping: save_pretrained empties it.
            self.model.save_pretrained(folder, state_dict=dict(self.weights))
            self.tokenizer.save_pretrained(folder)
        self._check_files(folder)

    def _check_files(self, folder: Path) -> None:
        """Compare the weights with the files' headers, and some of the values.

        transformers writes the fused weights of some models in parts with other names, so the
        numbers of values are compared, and by name only what both have.
        """
        ignored = self.model._keys_to_ignore_on_save or ()
        missing = sum(w.numel() for name, w in self.weights.items() if name not in ignored)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is not a mapping)
                    part = tensors.get_slice(name)
                    missing -= math.prod(part.get_shape())
                    own = self.weights.get(name)
                    if own is not None and not _agrees(part, own):
                        raise RunFailed(f"the export does not hold the model's {name}: {file}")
        if missing:
            raise RunFailed(f"the export does not hold {missing} values of the model: {folder}")


def _agrees(part: Any, weight: Tensor) -> bool:
    """Whether a tensor in a file has the shape of `weight`, and its first row or all of it."""
    if part.get_shape() != [*weight.shape]:
        return False
    if weight.ndim > 1:
        part, weight = part[:1], weight[:1]
    return torch.equal(_bytes(part[...]), _bytes(weight))


def _bytes(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Of one rank after a step.

    state: this rank's part of `Learner.state_dict`. export: rank 0's, None elsewhere.
    """

    step: int
    config_hash: str
    dev_accuracy: float | None
    fingerprint: str
    state: dict[str, Any]
    export: Export | None

    @classmethod
    def of(
        cls,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        step: int,
        config_hash: str,
        dev_accuracy: float | None = None,
    ) -> Snapshot:
        """A collective: rank 0's model is brought up to date. tokenizer: rank 0's."""
        learner.gather_weights()
        return cls(
            step=step,
            config_hash=config_hash,
            dev_accuracy=dev_accuracy,
            fingerprint=learner.fingerprint,
            state=BlockingAsyncStager(cache_staged_state_dict=False).stage(learner.state_dict()),
            export=None if tokenizer is None else Export.of(learner, tokenizer),
        )


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of that kind without memory for its weights."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    return plain
