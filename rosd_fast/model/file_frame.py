"""From some parameters of a model to the tensors of its files that they make up.

    parameters of a bucket -> frame, a model without memory -> adapters merged -> layout of files

A unit is the least that has to be together: a tensor with the adapters that are added to it, or a
whole layer where transformers merges several tensors of it into one of the files
(`rosd_fast.model.file_layout`). A bucket is as many units as fit, but at least one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.errors import UserError
from rosd_fast.model.adapter_files import adapter_weights
from rosd_fast.model.adapters import merged_weights, plain_name
from rosd_fast.model.file_layout import file_weights, layer_of
from rosd_fast.model.fsdp import skeleton
from rosd_fast.model.release import filled, places
from rosd_fast.model.weight_stream import BUCKET_BYTES, TensorSpec


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of files that are made together.

    units: for each unit its names in the state dict of the model without adapters.
    parameters: the names of the model's parameters that they are made from.
    """

    units: tuple[tuple[str, ...], ...]
    parameters: tuple[str, ...]


class FileFrame:
    """A model without memory for its parameters, and what its files will hold.

    specs: every tensor of the files, in the order in which transformers would save them.
    buckets: each of at most `bucket_bytes`, or of one unit.
    adapters: the names of the adapters' parameters.
    """

    def __init__(self, model: PreTrainedModel, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Raises UserError if transformers cannot undo a conversion."""
        self._model = skeleton(model, None)
        self._places = places(self._model)
        self._lock = Lock()
        named = list(self._model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in reversed(named)}
        self.adapters = tuple(name for name, _ in named if "lora_" in name)
        self._shared: dict[str, int] = {}  # which tensor a name stands for; tied ones share it
        sources: dict[str, list[str]] = defaultdict(list)
        for name, parameter in named:
            if "lora_" in name:
                sources[adapted(self._model, name)].append(name)
            else:
                sources[plain_name(name)].append(first[id(parameter)])
                self._shared[plain_name(name)] = id(parameter)
        state = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in merged_weights(self._model).items()
        }
        self.specs = {
            name: TensorSpec.of(tensor)
            for name, tensor in self._unique(state, file_weights(self._model, state)).items()
        }
        self.buckets: list[Bucket] = []
        room = 0
        for unit in self._units(state):
            size = sum(spec.nbytes for spec in self._specs(state, unit).values())
            needed = {source: None for name in unit for source in sources[name]}
            if not self.buckets or size > room:
                self.buckets.append(Bucket((unit,), tuple(needed)))
                room = bucket_bytes - size
            else:
                last = self.buckets[-1]
                parameters = dict.fromkeys([*last.parameters, *needed])
                self.buckets[-1] = Bucket((*last.units, unit), tuple(parameters))
                room -= size

    def tensors(self, bucket: Bucket, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bucket's tensors, by the names of the files.

        parameters: full tensors by the names in `bucket.parameters`.
        """
        with self._lock, torch.no_grad(), filled(self._places, parameters):
            state = merged_weights(self._model)
            own = {name: state[name] for unit in bucket.units for name in unit}
            made = self._unique(own, file_weights(self._model, own))
        return {name: tensor.detach().contiguous() for name, tensor in made.items()}

    def adapter_weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapters by the names of peft's files. parameters: those that `adapters` names."""
        with self._lock, filled(self._places, parameters):
            return {name: t.detach() for name, t in adapter_weights(self._model).items()}

    def _units(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
        """The names of the state dict, those that have to be together in one tuple."""
        layers: dict[str, list[str]] = defaultdict(list)
        for name in state:
            layers[layer_of(name)].append(name)
        for names in layers.values():
            tied: dict[int | str, list[str]] = defaultdict(list)
            for name in names:
                tied[self._shared.get(name, name)].append(name)
            units = [tuple(group) for group in tied.values()]
            together = self._specs(state, names)
            apart: list[tuple[str, TensorSpec]] = []
            try:
                for unit in units:
                    apart += self._specs(state, unit).items()
            except UserError:  # a conversion wants all of its tensors
                apart = []
            same = len(apart) == len(together) and dict(apart) == together
            yield from units if same else [tuple(names)]

    def _specs(self, state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, TensorSpec]:
        own = {name: state[name] for name in names}
        made = self._unique(own, file_weights(self._model, own))
        return {name: TensorSpec.of(tensor) for name, tensor in made.items()}

    def _unique(self, state: Mapping[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
        """`made` without further names of tensors that have one already."""
        seen: set[int] = set()
        left = dict(made)
        for name in state:
            shared = self._shared.get(name)
            if shared is None or name not in made:
                continue
            if shared in seen:
                del left[name]
            seen.add(shared)
        return left


def adapted(model: PreTrainedModel, name: str) -> str:
    """The state-dict name of the weight that an adapter's parameter `name` is added to."""
    layer = name.partition(".lora_")[0]
    module = model.get_submodule(layer)
    # The adapters of a layer's experts adapt parameters that are not called weight.
    return plain_name(f"{layer}.{getattr(module, 'parameter_name', 'weight')}")
