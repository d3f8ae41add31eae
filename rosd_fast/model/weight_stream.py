"""One version of a model's weights, in the layout of its files, bucket by bucket.

    WeightStream -> {name: tensor}, {name: tensor}, ... -> files, or servers

A consumer sees a bucket, uses it and drops it, so that it never needs memory for all weights. What
it has to know beforehand, such as for the header of a file, is in `specs`. Where the weights are
sharded over ranks, a bucket is gathered when it is asked for (`rosd_fast.trainer.shards`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

BUCKET_BYTES = 512 * 2**20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightStream(ABC):
    """One version of a model's weights. Of tied weights only one is among them.

    specs: every tensor by its name in the model's files, in the order in which transformers would
        save them.
    on_gpu: whether the model they come from is on a GPU.
    """

    specs: Mapping[str, TensorSpec]
    on_gpu: bool

    @abstractmethod
    def buckets(self) -> Iterator[dict[str, Tensor]]:
        """Yield every tensor once, contiguous, some at a time. May be called again."""

    @abstractmethod
    def held(self) -> WeightStream:
        """The same values, which later updates of the model do not change."""

    def whole(self) -> dict[str, Tensor]:
        """All of them at once, where they are few or belong to a model that is there anyway."""
        return {name: tensor for bucket in self.buckets() for name, tensor in bucket.items()}


class WholeWeights(WeightStream):
    """Weights that are in this process's memory anyway, and stay there."""

    def __init__(self, weights: Mapping[str, Tensor], *, on_gpu: bool | None = None) -> None:
        self._weights = distinct(weights)
        self.specs = {name: TensorSpec.of(tensor) for name, tensor in self._weights.items()}
        if on_gpu is None:
            on_gpu = any(tensor.is_cuda for tensor in self._weights.values())
        self.on_gpu = on_gpu

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        bucket: dict[str, Tensor] = {}
        for name, tensor in self._weights.items():
            if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = {}
            bucket[name] = tensor.detach().contiguous()
        yield bucket

    def held(self) -> WeightStream:
        """A copy in host memory."""
        copies = {name: w.detach().to("cpu", copy=True) for name, w in self._weights.items()}
        return WholeWeights(copies, on_gpu=self.on_gpu)


def as_stream(weights: Mapping[str, Tensor] | WeightStream) -> WeightStream:
    """Weights in memory as a stream; a stream stays what it is."""
    return weights if isinstance(weights, WeightStream) else WholeWeights(weights)


def distinct(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one's memory; the first of the names is kept."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tensors = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen:
            seen.add(key)
            tensors[name] = tensor
    return tensors


@contextmanager
def read_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Within the block, `items`, each computed in a thread while the caller uses the one before.

    So two of them are in memory at a time. The thread has ended when the block ends.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:

        def ahead() -> Iterator[T]:
            pending = pool.submit(next, items, None)
            while (item := pending.result()) is not None:
                pending = pool.submit(next, items, None)
                yield item
                del item

        yield ahead()
