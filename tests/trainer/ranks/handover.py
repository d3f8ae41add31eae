"""What rank 0 writes of a student that is sharded over ranks; this is one rank:

    torchrun --nproc-per-node 2 -m tests.trainer.ranks.handover OUT [--shard-size N] [--few]

For each case, rank 0 writes to OUT/CASE the folder for servers and the checkpoint of the
initial weights, and compares both with what is made from the whole model.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import StorageWeakRef

from rosd_fast.engines.sglang.weight_folder import WeightFolder
from rosd_fast.errors import UserError
from rosd_fast.model.adapter_files import adapter_weights
from rosd_fast.model.adapters import without_adapters
from rosd_fast.model.file_frame import FileFrame
from rosd_fast.model.tensor_file import TensorFile
from rosd_fast.model.weight_stream import WeightStream, distinct
from rosd_fast.trainer import shards
from rosd_fast.trainer.ranks import LearnerGroup, run_worker
from rosd_fast.utils.distributed import World, open_world
from tests.trainer.ranks.worker import config_of, create, step

CASES = (
    *("tied", "untied", "rows biased", "rows bfloat16", "served", "served lora"),
    *("experts", "experts lora", "hybrid", "image text"),
)
FEW = ("rows biased", "served lora", "experts")
BUCKET = 5_000  # bytes


class Gathered:
    """The bytes of full tensors on this rank that are still in memory."""

    def __init__(self) -> None:
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.peak = self.total = 0
        own = shards.gather_rows

        def counting(rows: Tensor, shape: torch.Size, group: ProcessGroup) -> Tensor | None:
            full = own(rows, shape, group)
            if full is not None:
                self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
                storage = full.untyped_storage()
                self.alive.append((StorageWeakRef(storage), storage.nbytes()))
                self.total += storage.nbytes()
                self.peak = max(self.peak, sum(size for _, size in self.alive))
            return full

        shards.gather_rows = counting

    def clear(self) -> None:
        self.alive, self.peak, self.total = [], 0, 0


def work(world: World, out: Path, shard_size: int | None, cases: Sequence[str]) -> None:
    gathered = Gathered()
    for case in cases:
        if not world.is_rank0:
            run_worker(world)
            continue
        config = config_of(case, shard_size)
        learners = create(case, config, world)
        full = learners.learner.full_model
        assert full is not None
        if world.size > 1:
            learners.learner.frame = FileFrame(full, bucket_bytes=BUCKET)  # type: ignore[misc]
            assert len(learners.learner.frame.buckets) > 4, case
        compare(learners, case, out / case, gathered)
        learners.close()


def compare(learners: LearnerGroup, case: str, out: Path, gathered: Gathered) -> None:
    """Compare all that is streamed with the whole model's weights."""
    learner, several = learners.learner, learners.world.size > 1
    model = out / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    folder = WeightFolder(out / "weights", model)
    gathered.clear()
    before = read(folder, learners.stream(), 0)
    check_memory(learners, gathered, case)
    assert before == whole(learners, out / "whole"), case
    learners.release_weights()
    step(learners, case, 0)
    held = learners.stream().held()
    after = read(folder, learners.stream(), 1)
    assert after != before and after == whole(learners, out / "whole"), case
    step(learners, case, 1)
    gathered.clear()
    assert read(folder, held, 2) == after, case  # the learner has changed since
    check_memory(learners, gathered, case)
    assert read(folder, learners.stream(), 3) != after, case
    export(learners, case, out, gathered)
    check_full_disk(learners, case, out)
    if several:
        ours, full = learners.adapter_weights(), learner.full_model
        learners.gather_weights()
        assert full is not None
        theirs = adapter_weights(full)
        assert ours.keys() == theirs.keys() and bool(ours) == ("lora" in case)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), case
        check_logprobs(learners, full, case)
        learners.release_weights()
        assert (full.device.type == "meta") == ("served" in case)


def check_memory(
    learners: LearnerGroup, gathered: Gathered, case: str, *, with_adapters: bool = False
) -> None:
    """Rank 0 held few buckets at a time. On one process nothing is gathered."""
    if learners.world.size == 1:
        assert gathered.total == 0
        return
    learner, ranks = learners.learner, learners.learner.world.size
    assert learner.full_model is not None and learner.frame is not None
    sizes = {  # as gathered: each rank sends as many rows
        name: p.nbytes // max(1, len(p)) * -(-len(p) // ranks) * ranks
        for name, p in learner.full_model.named_parameters()
    }
    largest = max(sum(sizes[name] for name in b.parameters) for b in learner.frame.buckets)
    # One bucket is written and one gathered; a third may just be let go. Adapters are small.
    limit = 3 * largest + with_adapters * sum(sizes[name] for name in learner.frame.adapters)
    assert gathered.peak <= limit < sum(sizes.values()), (case, gathered.peak, limit)
    assert gathered.total >= sum(sizes.values()) / 2, case


def read(folder: WeightFolder, stream: WeightStream, version: int) -> bytes:
    return (folder.write(stream, version) / "model.safetensors").read_bytes()


def whole(learners: LearnerGroup, file: Path) -> bytes:
    """The file of all weights at once."""
    weights = {k: w.detach().contiguous() for k, w in distinct(learners.weights()).items()}
    save_file(weights, file, {"format": "pt"})
    learners.release_weights()
    return file.read_bytes()


def export(learners: LearnerGroup, case: str, out: Path, gathered: Gathered) -> None:
    """Write a checkpoint while the learner goes on; it is that of transformers."""
    gathered.clear()
    learners.gather_weights()
    full = learners.learner.full_model
    assert full is not None
    plain: Any = without_adapters(full)
    weights = {k: w.detach().clone() for k, w in learners.learner.file_weights.items()}
    plain.save_pretrained(out / "expected", state_dict=weights, save_original_format=False)
    learners.release_weights()
    gathered.clear()
    learners.save(out, 1, None)
    step(learners, case, 2)
    learners.finish_save()
    check_memory(learners, gathered, case, with_adapters=True)
    found = out / "checkpoints" / "step_000001"
    for file in (out / "expected").iterdir():
        if file.name != "config.json":  # it gets an interval of layers
            assert file.read_bytes() == (found / file.name).read_bytes(), (case, file.name)


def check_full_disk(learners: LearnerGroup, case: str, out: Path) -> None:
    """An export that cannot be written ends on all ranks, and the next one is whole."""
    own = TensorFile.write
    left = [3]

    def full(file: TensorFile, name: str, tensor: Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(file, name, tensor)

    TensorFile.write = full  # type: ignore[method-assign]
    try:
        learners.save(out, 2, None)
        with pytest.raises(UserError, match="No space left on device"):
            learners.finish_save()
    finally:
        TensorFile.write = own  # type: ignore[method-assign]
    assert not list(out.glob("checkpoints/*2"))
    learners.save(out, 3, None)
    learners.finish_save()
    assert list(out.glob("checkpoints/*3/model.safetensors")), case


@torch.no_grad()
def check_logprobs(learners: LearnerGroup, full: Any, case: str) -> None:
    ids = [5, 9, 3, 40, 22, 7, 7, 31]
    logits = full(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    expected = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    found = torch.tensor(learners.token_logprobs(ids))
    bound = 5e-2 if full.dtype == torch.bfloat16 else 1e-4
    assert float((found - expected).abs().max()) < bound, case


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard-size", type=int)
    parser.add_argument("--few", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open_world(config_of("tied", args.shard_size).parallel, "cpu") as world:
        work(world, args.out, args.shard_size, FEW if args.few else CASES)


if __name__ == "__main__":
    main()
