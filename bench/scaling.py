"""One optimizer step on one rank and on two: bytes that each rank holds, its peak, and seconds.

    python bench/scaling.py                        # all cases; rewrites the CSV
    python bench/scaling.py --layers 2 --repeats 1 --csv /tmp/scaling.csv

A case is a number of ranks and what becomes of the output head (`parallel.head`). The model has
layers of SmolLM2-135M's shape, its vocabulary and an untied head, random weights, float32, a frozen
teacher; the batch is four groups of four completions. Each rank has one thread, so that one rank
and two are compared on as many cores each as they have.

    state     weights, gradients, moments and the teacher's weights, counted from their tensors
    formula   what docs/scaling.md says of them
    peak      of resident memory, beyond that of the process before there was a model
    seconds   median of the steps, the first left out
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS, record
from learner import build_model, build_samples
from loss import resident
from torch import Tensor
from torch.distributed.tensor import DTensor

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.ranks import LearnerGroup, run_worker
from rosd_fast.utils.distributed import open_world

CASES = ((1, "whole"), (2, "whole"), (2, "shard"))
VOCAB = 49152
MAX_TOKENS = 4096
CSV = RESULTS / "scaling_cpu.csv"
MIB = 2**20


def main() -> None:
    args = parse_arguments()
    if args.worker is not None:
        work(args)
        return
    for row in record(args.csv, (row for case in CASES for row in measure(*case, args))):
        print(
            f"{row['ranks']} ranks, head {row['head']:5} rank {row['rank']}: "
            f"state {row['state_mib']:>7} MiB (formula {row['formula_mib']:>7}) "
            f"peak {row['peak_mib']:>7} MiB {row['seconds']:>6} s",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a folder for results
    parser.add_argument("--head", default="whole", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(ranks: int, head: str, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row per rank."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, __file__, "--worker", folder, "--head", head]
        command += ["--layers", str(args.layers), "--repeats", str(args.repeats)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        files = [Path(folder) / f"rank{rank}.json" for rank in range(ranks)]
        results = [json.loads(file.read_text()) for file in files]
        for rank, result in enumerate(results):
            found = results[0] | result  # the step is all ranks' own
            yield {
                "ranks": ranks,
                "head": head,
                "rank": rank,
                "layers": args.layers,
                "parameters": found["parameters"],
                "tokens": found["tokens"],
                "state_mib": f"{found['state'] / MIB:.1f}",
                "formula_mib": f"{formula(found['parameters'], ranks, rank) / MIB:.1f}",
                "peak_mib": f"{found['peak'] / MIB:.1f}",
                "seconds": f"{found['seconds']:.2f}",
            }


def formula(parameters: int, ranks: int, rank: int) -> float:
    """Bytes that a rank holds with fp32 weights, all trained, and a frozen teacher."""
    shares = (4 + 4 + 8 + 4) * parameters / ranks
    return shares + (4 * parameters if ranks > 1 and rank == 0 else 0)


def work(args: argparse.Namespace) -> None:
    """Run one rank of a case."""
    config = Config.model_validate({"device": "cpu", "parallel": {"head": args.head}})
    counted: list[float] = []
    count_states(counted)
    with open_world(config.parallel, "cpu") as world:
        before = resident("VmRSS")
        found: dict[str, Any] = {}
        if world.is_rank0:
            model = build_model(args.layers, vocab_size=VOCAB, tied=False)
            learners = LearnerGroup.create(model, config, world, tokenizer=None)
            found = lead(learners, args.repeats)
            learners.close()
        else:
            run_worker(world)
        found |= {"state": counted[0], "peak": resident("VmHWM") - before}
        (args.worker / f"rank{world.rank}.json").write_text(json.dumps(found))


def lead(learners: LearnerGroup, repeats: int) -> dict[str, Any]:
    """Time the steps on rank 0, without the first one."""
    lengths = [(256, [96, 160, 64, 128])] * 4
    batches = pack(
        build_samples(lengths),
        max_tokens=MAX_TOKENS,
        num_ranks=learners.world.size,
        hidden_size=learners.learner.model.config.hidden_size,
    )
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        learners.step(batches)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens": sum(batch.num_tokens for batch in batches),
        "parameters": sum(p.numel() for p in learners.learner.model.parameters()),
    }


def count_states(counted: list[float]) -> None:
    """From now on, record the bytes that a learner holds when its gradients are complete."""
    own_update = Learner._update

    def counting(learner: Learner, loss: float) -> float | None:
        masters = learner.optimizer.masters.values()
        counted.append(
            size(learner.state_dict().values())
            + size([p.grad for p in masters if p.grad is not None])
            + size(learner.teacher.model.parameters())
            + size(
                learner.full_model.parameters()
                if learner.full_model not in (None, learner.model)
                else ()
            )
        )
        return own_update(learner, loss)

    setattr(Learner, "_update", counting)  # noqa: B010


def full_weights(learner: Learner) -> Iterable[Tensor]:
    """Rank 0's full model, if the learner does not train it in place."""
    if learner.full_model is None or learner.full_model is learner.model:
        return ()
    return learner.full_model.parameters()


def size(tensors: Iterable[Tensor]) -> int:
    """The bytes of this rank's shards."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in locals_)


if __name__ == "__main__":
    main()
