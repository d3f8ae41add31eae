"""`span_logprob` on shards of the vocabulary in several processes against the unsharded call.

Run as a script, this file is one rank, see ranks.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rosd_kernels import VocabularyOrder, entry, mass, native, span_logprob
from tests.kernels import logprob_cases
from tests.kernels.ranks import join, run_ranks

TRIO = (150, 5, 145)
TILES = (256, 128, 128)
MEASURED = ("active_frac", "dropped_mass_max", "grad_error_bound")
SHARDED = ("head", "bias")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A call, and how the ranks differ in it."""

    loss: str = "clipped"
    sizes: tuple[int, ...] = TRIO  # rows of the head on each rank
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    num_tokens: int = 23
    plain: tuple[int, ...] = ()  # ranks without the C++ extension
    spread: int | None = None  # this rank's head is not contiguous
    ordered: bool = False  # a VocabularyOrder per shard, in use from the second call on
    sharpness: float = 0.0  # on the logits of every 256th entry


def tasks() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for of in ("chunked", "tiled"):
        base = Task(options={"strategy": of, "temperature": 0.8, "softcap": 3.0})
        small = {"workspace_mib": 0.03}
        for loss in ("clipped", "cross_entropy", "afterwards clipped"):
            found[f"{of} {loss}"] = replace(base, loss=loss)
        found[f"{of} no tokens"] = replace(base, num_tokens=0)
        found[f"{of} one token"] = replace(base, num_tokens=1)
        found[f"{of} row blocks"] = replace(base, num_tokens=140)
        found[f"{of} small"] = replace(base, options=base.options | small)
        for dtype in (torch.bfloat16, torch.float64):
            found[f"{of} {dtype}"] = replace(base, dtype=dtype)
        found[f"{of} plain"] = replace(base, plain=(0, 1, 2))
        found[f"{of} plain on one"] = replace(base, plain=(1,), options=base.options | small)
        for spread in range(3):
            found[f"{of} spread {spread}"] = replace(
                base, spread=spread, options=base.options | small, loss="afterwards clipped"
            )
        for name, rule in (("entry", entry(1e-12)), ("mass", mass(1e-9))):
            options = {"strategy": of, "sparsity": rule}
            found[f"{of} {name} of all"] = Task(options=options)
            found[f"{of} {name} no tokens"] = Task(options=options, num_tokens=0)
        for loss in ("clipped", "afterwards clipped"):
            found[f"{of} entry drops {loss}"] = Task(
                loss=loss,
                options={"strategy": of, "sparsity": entry(1e-3)},
                sizes=TILES,
                num_tokens=3,
                sharpness=12.0,
            )
    found["chunked entry drops, plain on one"] = Task(
        options={"strategy": "chunked", "sparsity": entry(1e-3)},
        sizes=TILES,
        num_tokens=130,
        sharpness=12.0,
        plain=(2,),
    )
    tiled = {"strategy": "tiled"}
    found["order"] = Task(options=tiled | {"sparsity": entry(1e-12)}, ordered=True)
    found["auto"] = Task(options={"sparsity": entry(1e-12)})
    return found


def prepare(task: Task) -> logprob_cases.Case:
    """The whole tensors of a task."""
    V = sum(task.sizes)
    case = logprob_cases.make(task.num_tokens, V, 6, bias=True, dtype=task.dtype, seed=3)
    if task.sharpness:
        case.tensors["bias"][::256] += task.sharpness
    return case


def run(case: logprob_cases.Case, task: Task, **options: Any) -> dict[str, Any]:
    """All results of a call."""
    done = case.run(task.loss, **task.options | options)
    out = done.output
    found: dict[str, Any] = {f"gradient of {n}": g for n, g in done.gradients.items()}
    found |= {"logprob": out.logprob.detach(), "entropy": out.entropy.detach()}
    found["loss"] = out.loss.detach()
    return found | {name: getattr(out.stats, name) for name in ("strategy", *MEASURED)}


def shard(case: logprob_cases.Case, task: Task, rank: int) -> logprob_cases.Case:
    """What a rank holds."""
    start = sum(task.sizes[:rank])
    tensors = dict(case.tensors)
    for name in SHARDED:
        tensors[name] = tensors[name][start : start + task.sizes[rank]].clone()
    if rank == task.spread:
        tensors["head"] = tensors["head"].repeat_interleave(2, dim=1)[:, ::2]
    return replace(case, tensors=tensors)


def run_shard(task: Task, rank: int) -> dict[str, Any]:
    case = shard(prepare(task), task, rank)
    options: dict[str, Any] = {"vocab_group": dist.group.WORLD}
    is_available = native.is_available
    if rank in task.plain:
        native.is_available = lambda: False
    try:
        if task.ordered:
            order = VocabularyOrder(task.sizes[rank], num_tokens=1)
            options["sparsity"] = entry(1e-12, order)
            run(case, task, **options)
            assert order.permutation is not None
        return run(case, task, **options)
    finally:
        native.is_available = is_available


def main(rank: int, num_ranks: int, folder: Path) -> None:
    join(rank, num_ranks, folder)
    results: dict[str, Any] = {}
    for name, task in tasks().items():
        print(name, flush=True)
        results[name] = run_shard(task, rank)
    hidden, head, ids = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([3, 12])
    try:
        span_logprob(hidden, head, ids, vocab_group=dist.group.WORLD)
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(__file__, 3, tmp_path_factory.mktemp("ranks"))


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    """Equal up to rounding: another sequence of float32 sums, one rounding of a narrow dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
    if want.numel() == 0:
        return
    narrow = 0.0 if want.dtype.itemsize > 2 else torch.finfo(want.dtype).eps
    relative = 1e-12 if want.dtype == torch.float64 else 2e-6
    error, size = (got.double() - want.double()).abs(), want.double().abs()
    bound = relative * (size.max() + 0.1) + narrow * size
    assert bool((error <= bound).all()), f"{name}: error {float(error.max()):.2e}"


@pytest.mark.parametrize("name", tasks())
def test_shards_give_what_the_whole_gives(ranks, name, request):
    task = tasks()[name]
    if len(task.plain) > 1:
        request.getfixturevalue("without_native")
    want = run(prepare(task), task)
    for rank, size in enumerate(task.sizes):
        start = sum(task.sizes[:rank])
        for key, value in want.items():
            got, label = ranks[rank][name][key], f"{key} on rank {rank}"
            is_shard = key.removeprefix("gradient of ") in SHARDED
            if isinstance(value, Tensor):
                assert is_shard or torch.equal(got, ranks[0][name][key]), f"{label}: other bits"
                assert_close(label, got, value[start : start + size] if is_shard else value)
            elif key == "strategy":
                assert got == value
            else:
                assert got == pytest.approx(value, rel=1e-4, abs=1e-6), label
    if name == "entry drops":
        assert 0 < want["active_frac"] < 1


def test_a_wrong_id_is_refused_on_every_rank(ranks):
    for results in ranks:
        assert results["refusal"] == "token_ids: got id 12, want 0 <= id < V = 12"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
