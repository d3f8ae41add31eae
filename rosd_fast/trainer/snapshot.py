"""A host-memory copy of a checkpoint's content, so that it can be written while training
continues.

On several ranks each copies its own shards, and rank 0 gathers the exported model from the copies
while it writes it, bucket by bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from rosd_fast.model.adapters import plain_name, without_adapters
from rosd_fast.model.export import write_model
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.other_parts import OtherParts, other_parts
from rosd_fast.model.weight_stream import TensorSpec, WeightStream, WholeWeights
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.shards import ShardedWeights, Shards
from rosd_fast.utils.distributed import World

ADAPTER_FOLDER = "adapter"  # not the model's own folder, which transformers would load it from


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A model to save in the Hugging Face layout, with adapters merged into its weights.

    model: has the config and the names, but no memory for weights.
    weights: they stay as they are while it is written.
    tokenizer: saved beside the model.
    other_parts: what the files have besides the language model.
    adapter: copies of the adapters' weights, by peft's names; empty without adapters.
    adapter_config: the peft config of the adapters; None without adapters.
    """

    model: PreTrainedModel
    weights: WeightStream
    tokenizer: PreTrainedTokenizerBase
    other_parts: OtherParts
    adapter: dict[str, Tensor]
    adapter_config: Any

    @classmethod
    def of(
        cls,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        weights: WeightStream | None = None,
        adapter: Mapping[str, Tensor] | None = None,
    ) -> Export:
        """The student of rank 0's learner.

        Raises UserError if a model of that config has no parameter for one of the weights.

        weights, adapter: on several ranks; None: copies of the model's, as of now.
        """
        full_model = learner.full_model
        assert full_model is not None
        model = without_adapters(full_model)
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        check_names(full_model, names)
        if weights is None:
            own = {name: w for name, w in learner.weights.items() if name in names}
            weights = WholeWeights(file_weights(full_model, own)).held()
        if adapter is None:
            adapter = {k: w.detach().clone() for k, w in adapter_weights(full_model).items()}
        return cls(
            model=model,
            weights=weights,
            tokenizer=tokenizer,
            other_parts=other_parts(full_model),
            adapter={name: weight.to("cpu") for name, weight in adapter.items()},
            adapter_config=adapter_config(full_model) if adapter else None,
        )

    def save(self, folder: Path) -> None:
        """Save model and tokenizer, and the adapters in a folder of their own.

        Raises RunFailed if the files do not hold the weights.
        """
        watched = Watched(self.weights)
        write_model(self.model, watched, self.other_parts, self.tokenizer, folder)
        self._check_files(folder, watched.first_rows)
        if self.adapter:
            write_adapter(self.adapter_config, self.adapter, folder / ADAPTER_FOLDER)

    def _check_files(self, folder: Path, first_rows: Mapping[str, Tensor]) -> None:
        """Raise RunFailed unless the files hold all values of the weights.

        The total number of values is compared, and of each tensor its shape and its first row.
        """
        ignored = self.model._keys_to_ignore_on_save or ()
        beside = self.other_parts.weights
        specs = {
            **self.weights.specs,
            **{name: TensorSpec.of(weight) for name, weight in beside.items()},
        }
        rows = {**first_rows, **{name: first_row(weight) for name, weight in beside.items()}}
        missing = sum(math.prod(s.shape) for name, s in specs.items() if name not in ignored)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is not a mapping)
                    part = tensors.get_slice(name)
                    missing -= math.prod(part.get_shape())
                    if name in specs and not _agrees(part, specs[name], rows[name]):
                        raise RunFailed(f"the export does not hold the model's {name}: {file}")
        if missing:
            raise RunFailed(f"the export does not hold {missing} values of the model: {folder}")


class Watched(WeightStream):
    """A stream that remembers the first row of each tensor that passed.

    first_rows: copies, by the tensors' names.
    """

    def __init__(self, stream: WeightStream) -> None:
        self.specs, self.on_gpu = stream.specs, stream.on_gpu
        self.first_rows: dict[str, Tensor] = {}
        self._stream = stream

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        for bucket in self._stream.buckets():
            self.first_rows |= {name: first_row(tensor) for name, tensor in bucket.items()}
            yield bucket
            del bucket  # before the next one is gathered

    def held(self) -> WeightStream:
        return self._stream.held()


def check_names(model: PreTrainedModel, names: set[str]) -> None:
    """Raise UserError if an export would lose a weight of the model.

    names: of the weights of a model of its config.
    """
    weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    plain = [(plain_name(name), weight) for name, weight in weights if "lora_" not in name]
    stored = {plain_name(name) for name in model.state_dict()}
    kept = {id(weight) for name, weight in plain if name in names}
    for name, weight in plain:  # tied weights are one
        if name in stored and name not in names and id(weight) not in kept:
            raise UserError(
                f"an export would lose {name}: the model's config has no place for it",
                where=type(model).__name__,
                fix="Correct the model's config.json, such as its tie_word_embeddings",
            )


def first_row(tensor: Tensor) -> Tensor:
    """A copy of the first row of a tensor in host memory; all of a vector."""
    return (tensor[:1] if tensor.ndim > 1 else tensor).detach().to("cpu", copy=True)


def _agrees(part: Any, spec: TensorSpec, row: Tensor) -> bool:
    """Whether a tensor in a file has the shape of the weight, and the values of its first row."""
    if part.get_shape() != [*spec.shape]:
        return False
    found = part[:1] if len(spec.shape) > 1 else part[...]
    return torch.equal(_bytes(found), _bytes(row))


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for comparisons in which NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class CopiedShards:
    """All ranks' copies of their shards, gathered by the threads that write a checkpoint.

    Rank 0 gathers while the others `serve` it. The methods are collectives of
    `world.checkpoint_group`.
    """

    shards: Shards
    world: World

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The full parameters, on rank 0."""
        self.world.broadcast(tuple(names), group=self.world.checkpoint_group)
        return self.shards.gather(names, self.world.export_group, "cpu")

    def finish(self) -> None:
        """End the other ranks' `serve`, on rank 0."""
        self.world.broadcast(None, group=self.world.checkpoint_group)

    def serve(self) -> None:
        """Send shards until rank 0 needs no more of them."""
        group = self.world.checkpoint_group
        while (names := self.world.broadcast(None, group=group)) is not None:
            self.shards.gather(names, self.world.export_group, "cpu")


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
    copied: this rank's copy of its shards; None on a single process.
    export: the model to save, on rank 0; None elsewhere.
    """

    step: int
    config_hash: str
    dev_accuracy: float | None
    threads: int
    fingerprint: str
    teacher_fingerprint: str
    state: dict[str, Any]
    copied: CopiedShards | None
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
        copied = export = None
        if (shards := learner.copied_shards()) is not None:
            copied = CopiedShards(shards, learner.world)
        if copied is None:
            export = None if tokenizer is None else Export.of(learner, tokenizer)
        else:
            export = gathered_export(learner, tokenizer, copied)
        return cls(
            step=step,
            config_hash=config_hash,
            dev_accuracy=dev_accuracy,
            threads=torch.get_num_threads(),
            fingerprint=learner.fingerprint,
            teacher_fingerprint=learner.teacher_fingerprint,
            state=BlockingAsyncStager(cache_staged_state_dict=False).stage(learner.state_dict()),
            copied=copied,
            export=export,
        )

    def save_export(self, folder: Path) -> None:
        """Write the exported model on rank 0; the other ranks send their shards."""
        if self.copied is not None and not self.copied.world.is_rank0:
            self.copied.serve()
            return
        try:
            if self.export is not None:
                self.export.save(folder)
        finally:
            if self.copied is not None:
                self.copied.finish()


def gathered_export(
    learner: Learner, tokenizer: PreTrainedTokenizerBase | None, copied: CopiedShards
) -> Export | None:
    """The export of a sharded student on rank 0, None elsewhere. A collective."""
    frame = learner.frame
    names = learner.world.broadcast(None if frame is None else frame.adapters)
    adapter = learner.gather_parameters(names)
    if frame is None or tokenizer is None:
        return None
    weights = ShardedWeights(frame, copied.gather, on_gpu=False)
    return Export.of(learner, tokenizer, weights, frame.adapter_weights(adapter))
