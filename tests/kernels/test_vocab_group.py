"""`vocab_group`: shards of the vocabulary in several processes against the unsharded call.

Run as a script, this file is one rank (see ranks.py): it runs all tasks on the tensors of
`FOLDER/tensors.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rosd_kernels import VocabularyOrder, entry, mass, native, span_divergence
from tests.kernels.ranks import join, run_ranks

STUDENTS = ("student_hidden", "student_head", "student_bias")
SHARDED = ("student_head", "teacher_head", "student_bias", "teacher_bias")
VALUES = (
    *("loss", "per_token", "student_logprob", "teacher_logprob"),
    *("student_entropy", "teacher_entropy"),
)
MEASURED = ("active_frac", "dropped_mass_max", "grad_error_bound")
ONE = (300,)  # rows of the head on each rank of a group: [0], [1, 2] or all three
PAIR = (193, 107)
TRIO = (150, 5, 145)
TILES = (256, 128, 128)
SCAN_TILES = (512, 256, 256)
GROUPS = {1: (0,), 2: (1, 2), 3: (0, 1, 2)}  # rank in the group is not the global one


@dataclass(frozen=True, kw_only=True)
class Task:
    """A call, and how the ranks differ in it."""

    sizes: tuple[int, ...]
    make: dict[str, Any] = field(default_factory=dict)  # keywords of make_case
    options: dict[str, Any] = field(default_factory=dict)  # of span_divergence
    num_tokens: int = 23
    plain: tuple[int, ...] = ()  # ranks of the group without the C++ extension
    spread: int | None = None  # this rank's heads are not contiguous
    ordered: bool = False  # a VocabularyOrder per shard, in use from the second call on
    is_exact: bool = True  # the unsharded call drops the same tiles, or both none
    sharpness: float = 0.0  # on the logits of every 256th entry


def tasks() -> dict[str, Task]:
    every = {"bias": True, "weights": True, "sampled": True}
    chunked, tiled = {"strategy": "chunked"}, {"strategy": "tiled"}
    small = {"workspace_mib": 0.02}
    found: dict[str, Task] = {}

    def add(name: str, sizes: tuple[int, ...] = TRIO, **fields: Any) -> None:
        assert f"{name} {sizes}" not in found
        found[f"{name} {sizes}"] = Task(sizes=sizes, **fields)

    for strategy in (chunked, tiled):
        of = strategy["strategy"]
        for sizes in (ONE, PAIR, TRIO):
            for divergence in ("forward_kl", "reverse_kl", "jsd"):
                options = strategy | {"divergence": divergence, "beta": 0.3, "temperature": 0.8}
                add(f"{of} {divergence}", sizes, make=every, options=options)
        for sizes in (PAIR, TRIO):
            options = strategy | {"importance_clip": 1.5, "softcap": 3.0, "entry_clip": 0.004}
            add(f"{of} clips", sizes, make=every | {"teacher_width": 5}, options=options | small)
            add(f"{of} no tokens", sizes, make=every, options=strategy, num_tokens=0)
        for divergence in ("forward_kl", "reverse_kl"):
            options = strategy | {"divergence": divergence, "entry_clip": 0.01}
            add(f"{of} entry_clip {divergence}", make=every, options=options)
        for dtype in (torch.bfloat16, torch.float64):
            add(f"{of} {dtype}", make=every | {"dtype": dtype}, options=strategy)
        add(f"{of} no bias", options=strategy)
        add(f"{of} plain", make=every, options=strategy | {"softcap": 3.0}, plain=(0, 1, 2))
        add(f"{of} one token", make=every, options=strategy, num_tokens=1)
        add(f"{of} row blocks", PAIR, make=every, options=strategy, num_tokens=140)
        for spread in range(3):
            options = strategy | {"workspace_mib": 0.03}
            add(f"{of} spread {spread}", make=every, options=options, spread=spread)

    for tail in (True, False):
        for top_k in (1, 4, 60, 299, 300):  # fewer than a shard's entries, more, all
            for sizes in (PAIR, TRIO):
                options = chunked | {"top_k": top_k, "tail": tail, "divergence": "reverse_kl"}
                add(f"top_k {top_k} tail {tail}", sizes, make=every, options=options)
        options = chunked | {"top_k": 7, "tail": tail} | small
        clips = {"softcap": 3.0, "entry_clip": 0.02, "importance_clip": 1.5}
        add(f"top_k tail {tail} clips", make=every, options=options | clips)
        add(f"top_k tail {tail} plain", make=every, options=options, plain=(0, 1, 2))
        add(f"top_k tail {tail} no tokens", make=every, options=options, num_tokens=0)
    for spread in range(3):  # one rank has less memory left for rows
        options = chunked | {"top_k": 7, "workspace_mib": 0.03}
        add(f"top_k spread {spread}", make=every, options=options, spread=spread)
        options = chunked | {"workspace_mib": 0.03}
        fields = {"spread": spread, "plain": (0, 1, 2)}
        add(f"plain spread {spread}", make=every, options=options, **fields)
        options = chunked | {"workspace_mib": 0.02, "top_k": (None, 7, 60)[spread]}
        add(f"plain on rank {spread}", make=every, options=options, plain=(spread,))

    for strategy, sizes_of_tiles in ((chunked, SCAN_TILES), (tiled, TILES)):
        of = strategy["strategy"]
        for name, rule in (("entry", entry(1e-12)), ("mass", mass(1e-9))):
            options = strategy | {"sparsity": rule}
            for sizes in (PAIR, TRIO):
                add(f"{of} {name} of all", sizes, make=every, options=options)
            add(f"{of} {name} no tokens", make=every, options=options, num_tokens=0)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            options = strategy | {"divergence": divergence}
            for name, rule, is_exact in (
                ("entry", entry(1e-3), True),
                ("mass", mass(0.02), False),  # the ranks share its budget
            ):
                add(
                    f"{of} {name} {divergence} drops",
                    sizes_of_tiles,
                    make=every,
                    options=options | {"sparsity": rule},
                    num_tokens=140,
                    is_exact=is_exact,
                    sharpness=12.0,
                )
    for plain in ((0, 1, 2), (1,)):
        add(
            f"chunked entry plain on {plain}",
            SCAN_TILES,
            make=every,
            options=chunked | {"sparsity": entry(1e-3)},
            num_tokens=140,
            plain=plain,
            sharpness=12.0,
        )
    add("order", PAIR, make=every, options=tiled | {"sparsity": entry(1e-12)}, ordered=True)
    add("auto", make=every, options={"sparsity": entry(1e-12)})
    return found


def prepare(task: Task, make_case: Callable[..., Any]) -> dict[str, Tensor]:
    """The whole tensors of a task."""
    tensors = dict(make_case(task.num_tokens, sum(task.sizes), 6, seed=3, **task.make).tensors)
    if task.sharpness:
        for name in ("student_bias", "teacher_bias"):
            tensors[name] = tensors[name].clone()
            tensors[name][::256] += task.sharpness
    return tensors


def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """All results of a call: values, gradients and measurements."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in STUDENTS if name in tensors}
    out = span_divergence(**tensors | leaves, **options)
    result: dict[str, Any] = {name: getattr(out, name) for name in VALUES}
    result["loss"] = out.loss.detach()
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    result |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    result |= {name: getattr(out.stats, name) for name in ("strategy", *MEASURED)}
    return result


# ----------------------------------------------------------------------------- one rank


def shard(task: Task, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors that a rank of the task's group holds."""
    start = sum(task.sizes[:rank])
    mine = dict(tensors)
    for name in SHARDED:
        if name in tensors:
            mine[name] = tensors[name][start : start + task.sizes[rank]].clone()
            if rank == task.spread and tensors[name].ndim == 2:
                mine[name] = mine[name].repeat_interleave(2, dim=1)[:, ::2]
    return mine


def run_shard(task: Task, tensors: dict[str, Tensor], group: Any) -> dict[str, Any]:
    mine = shard(task, tensors, dist.get_rank(group))
    options = task.options | {"vocab_group": group}
    if task.ordered:
        rule = task.options["sparsity"]
        order = VocabularyOrder(mine["student_head"].shape[0], num_tokens=1)
        options["sparsity"] = entry(rule.bound, order)
        run(mine, options)
        assert order.permutation is not None
    is_available = native.is_available
    if dist.get_rank(group) in task.plain:
        native.is_available = lambda: False
    try:
        return run(mine, options)
    finally:
        native.is_available = is_available


def refusals(group: Any, outside: Any) -> dict[str, str]:
    """Make the calls that every rank must refuse; return their error messages."""
    hidden, head = torch.ones(2, 3), torch.ones(4, 3)  # a vocabulary of 4 on each of 3 ranks
    found = {}
    for name, arguments in {
        "token_ids": {"token_ids": torch.tensor([3, 12]), "vocab_group": group},
        "top_k": {"top_k": 13, "vocab_group": group},
        "strategy": {"strategy": "reference", "vocab_group": group},
        "vocab_group": {"vocab_group": outside},
    }.items():
        try:
            span_divergence(hidden, hidden, head, **arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def main(rank: int, num_ranks: int, folder: Path) -> None:
    join(rank, num_ranks, folder)
    groups = {size: dist.new_group(list(ranks)) for size, ranks in GROUPS.items()}
    whole = torch.load(folder / "tensors.pt")
    results: dict[str, Any] = {}
    for name, task in tasks().items():
        if rank in GROUPS[len(task.sizes)]:
            print(name, flush=True)
            results[name] = run_shard(task, whole[name], groups[len(task.sizes)])
    results["refusals"] = refusals(groups[3], groups[2] if rank == 0 else object())
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


# ----------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, make_case) -> list[dict[str, Any]]:
    """The results of each of three processes for every task."""
    folder = tmp_path_factory.mktemp("ranks")
    whole = {name: prepare(task, make_case) for name, task in tasks().items()}
    torch.save(whole, folder / "tensors.pt")
    return run_ranks(__file__, 3, folder)


def assert_close(name: str, got: Tensor, want: Tensor, allowed: float = 0.0) -> None:
    """Equal up to rounding: another sequence of float32 sums, one rounding of a narrow dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
    if want.numel() == 0:
        return
    narrow = 0.0 if want.dtype.itemsize > 2 else torch.finfo(want.dtype).eps
    relative = 1e-12 if want.dtype == torch.float64 else 2e-6
    error, size = (got.double() - want.double()).abs(), want.double().abs()
    bound = relative * (size.max() + 0.1) + narrow * size + allowed
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: element {worst} is {got.flatten()[worst]}, want {want.flatten()[worst]}"
    )


@pytest.mark.parametrize("name", [name for name, task in tasks().items() if task.is_exact])
def test_shards_give_what_the_whole_gives(ranks, make_case, name, request):
    task = tasks()[name]
    if len(task.plain) > 1:
        request.getfixturevalue("without_native")
    tensors = prepare(task, make_case)
    want = run(tensors, task.options)
    results = [ranks[rank][name] for rank in GROUPS[len(task.sizes)]]
    starts = [sum(task.sizes[:rank]) for rank in range(len(task.sizes))]
    for rank, (result, start, size) in enumerate(zip(results, starts, task.sizes, strict=True)):
        for key, value in want.items():
            got, label = result[key], f"{key} on rank {rank}"
            is_shard = key.removeprefix("gradient of ") in SHARDED
            if not is_shard:  # the same bits on all ranks
                same = torch.equal(got, results[0][key]) if isinstance(got, Tensor) else None
                assert same or got == results[0][key], f"{label} is not that on rank 0"
            if value is None or key == "strategy":
                assert got == value, label
            elif isinstance(value, Tensor):
                assert_close(label, got, value[start : start + size] if is_shard else value)
            else:
                assert got == pytest.approx(value, rel=1e-4, abs=1e-6), label


@pytest.mark.parametrize("name", [name for name, task in tasks().items() if not task.is_exact])
def test_mass_is_dropped_within_the_budget_of_the_row(ranks, make_case, name):
    """The ranks drop other tiles than one rank would, so the test checks their report."""
    task = tasks()[name]
    tensors = {
        n: x.double() if x.is_floating_point() else x for n, x in prepare(task, make_case).items()
    }
    want = run(tensors, task.options | {"strategy": "reference", "sparsity": "exact"})
    results = [ranks[rank][name] for rank in GROUPS[len(task.sizes)]]
    first = results[0]
    assert first["active_frac"] < 1
    assert 0 < first["dropped_mass_max"] <= task.options["sparsity"].bound
    for key in (*MEASURED, "loss", "per_token", "gradient of student_hidden"):
        assert all(
            torch.equal(torch.as_tensor(r[key]), torch.as_tensor(first[key])) for r in results
        ), key
    assert bool((first["per_token"] <= want["per_token"] * (1 + 1e-5) + 1e-6).all())
    gradient = torch.cat([result["gradient of student_bias"] for result in results])
    error = (gradient - want["gradient of student_bias"]).abs().sum()
    assert error <= first["grad_error_bound"] * tensors["weights"].sum() + 1e-5
    assert_close(
        "student_entropy", first["student_entropy"].double(), want["student_entropy"], allowed=1e-5
    )


def test_every_rank_refuses(ranks):
    """All ranks see an error that concerns the whole vocabulary, so none waits for another."""
    for rank, result in enumerate(ranks):
        got = result["refusals"]
        assert got["token_ids"] == "token_ids: got id 12, want 0 <= id < V = 12", rank
        assert got["top_k"] == "top_k: got 13, want at most V = 12", rank
        assert got["strategy"].startswith("vocab_group: got a group with strategy 'reference'")
        assert got["vocab_group"].startswith("vocab_group: got ")
        assert "that this rank belongs to" in got["vocab_group"]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
