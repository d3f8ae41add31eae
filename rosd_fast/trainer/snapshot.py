"""A host-memory copy of a checkpoint's content, so that it can be written while training
continues."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.adapter_files import adapter_config, adapter_weights, write_adapter
from rosd_fast.model.adapters import without_adapters
from rosd_fast.model.export import write_model
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.other_parts import OtherParts, other_parts
from rosd_fast.trainer.learner import Learner

ADAPTER_FOLDER = "adapter"  # not the model's own folder, which transformers would load it from


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A model to save in the Hugging Face layout, with adapters merged into its weights.

    model: has the config and the names, but no memory for weights.
    weights: copies in host memory, in the layout of files.
    tokenizer: saved beside the model.
    other_parts: what the files have besides the language model.
    adapter: copies of the adapters' weights, by peft's names; empty without adapters.
    adapter_config: the peft config of the adapters; None without adapters.
    """

    model: PreTrainedModel
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    other_parts: OtherParts
    adapter: dict[str, Tensor]
    adapter_config: Any

    @classmethod
    def of(cls, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> Export:
        """Copy rank 0's full model, as of the learner's last `gather_weights`; one that is about to
        be released is taken over instead.

        Raises UserError if a model of that config has no parameter for one of the weights.
        """
        assert learner.full_model is not None
        model = without_adapters(learner.full_model)
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        weights = {name: w for name, w in learner.weights.items() if name in names}
        kept = {weight.data_ptr() for weight in weights.values()}
        for name, weight in learner.weights.items():  # tied weights share their memory
            if name not in names and weight.data_ptr() not in kept:
                raise UserError(
                    f"an export would lose {name}: the model's config has no place for it",
                    where=type(model).__name__,
                    fix="Correct the model's config.json, such as its tie_word_embeddings",
                )
        adapter = adapter_weights(learner.full_model)
        return cls(
            model=model,
            weights=_copies(
                file_weights(learner.full_model, weights), copy=learner.keeps_full_model
            ),
            tokenizer=tokenizer,
            other_parts=other_parts(learner.full_model),
            adapter=_copies(adapter, copy=learner.keeps_full_model),
            adapter_config=adapter_config(learner.full_model) if adapter else None,
        )

    def save(self, folder: Path) -> None:
        """Save model and tokenizer, and the adapters in a folder of their own.

        Raises RunFailed if the files do not hold the weights.
        """
        write_model(self.model, self.weights, self.other_parts, self.tokenizer, folder)
        self._check_files(folder)
        if self.adapter:
            write_adapter(self.adapter_config, self.adapter, folder / ADAPTER_FOLDER)

    def _check_files(self, folder: Path) -> None:
        """Raise RunFailed unless the files hold all values of the weights.

        The total number of values is compared, and of each tensor its shape and its first row.
        """
        ignored = self.model._keys_to_ignore_on_save or ()
        weights = self.weights | self.other_parts.weights
        missing = sum(w.numel() for name, w in weights.items() if name not in ignored)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is not a mapping)
                    part = tensors.get_slice(name)
                    missing -= math.prod(part.get_shape())
                    weight = weights.get(name)
                    if weight is not None and not _agrees(part, weight):
                        raise RunFailed(f"the export does not hold the model's {name}: {file}")
        if missing:
            raise RunFailed(f"the export does not hold {missing} values of the model: {folder}")


def _copies(weights: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """The weights in host memory. copy: also of those that are there already."""
    return {name: weight.detach().to("cpu", copy=copy) for name, weight in weights.items()}


def _agrees(part: Any, weight: Tensor) -> bool:
    """Whether a tensor in a file has the shape of `weight`, and the values of its first row."""
    if part.get_shape() != [*weight.shape]:
        return False
    if weight.ndim > 1:
        part, weight = part[:1], weight[:1]
    return torch.equal(_bytes(part[...]), _bytes(weight))


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for comparisons in which NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one rank writes to a checkpoint.

    step: the optimizer step after which it was taken.
    config_hash: of the run's options.
    dev_accuracy: mean accuracy on the dev split after that step; None: not measured.
    threads: torch's number of threads, on which the rounding of matrix products can depend.
    fingerprint: of the initial weights, on rank 0.
    teacher_fingerprint: of a separate teacher's weights, on rank 0; else empty.
    state: this rank's part of `Learner.state_dict`.
    export: the model to save, on rank 0; None elsewhere.
    """

    step: int
    config_hash: str
    dev_accuracy: float | None
    threads: int
    fingerprint: str
    teacher_fingerprint: str
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
        """Copy the learner's state. A collective.

        tokenizer: for the export on rank 0; None elsewhere.
        """
        learner.gather_weights()
        export = None if tokenizer is None else Export.of(learner, tokenizer)
        learner.release_weights()
        return cls(
            step=step,
            config_hash=config_hash,
            dev_accuracy=dev_accuracy,
            threads=torch.get_num_threads(),
            fingerprint=learner.fingerprint,
            teacher_fingerprint=learner.teacher_fingerprint,
            state=BlockingAsyncStager(cache_staged_state_dict=False).stage(learner.state_dict()),
            export=export,
        )
