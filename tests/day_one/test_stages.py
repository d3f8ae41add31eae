"""What the stages make of what they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from day_one import stage
from day_one.registry import STAGES
from day_one.results import Item, Result
from day_one.stage import GPU_GIB, Plan, load_stage
from day_one.stages import learner, loss, numerics, quickstart, tools, tune
from day_one.timing import timed

CPU = torch.device("cpu")


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_every_stage_has_its_module(entry) -> None:
    assert load_stage(entry.name).name == entry.name


def machine(folder: Path, *rows: dict[str, Any]) -> None:
    Result(stage="machine", identity={}, items={"all": Item(rows=list(rows))}).save(folder)


def test_the_ceiling_is_the_fastest_bfloat16_product(tmp_path: Path) -> None:
    plan = Plan(device="cuda", out=tmp_path, seconds=1)
    assert plan.ceiling_tflops is None
    machine(
        tmp_path,
        {"precision": "bfloat16", "tflops": 700.0},
        {"precision": "bfloat16", "tflops": 790.0},
        {"precision": "float16", "tflops": 900.0},
    )
    assert plan.ceiling_tflops == 790.0


def test_workers_fit_the_gpu_and_the_cores(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage.os, "sched_getaffinity", lambda _: set(range(16)))
    plan = Plan(device="cuda", out=tmp_path, seconds=1)
    assert plan.workers(8, gib_each=6) == 1
    machine(tmp_path, {"what": GPU_GIB, "value": "23.5"})
    assert plan.workers(8, gib_each=6) == 3
    machine(tmp_path, {"what": GPU_GIB, "value": "139.8"})
    assert plan.workers(8, gib_each=6) == 8
    assert Plan(device="cpu", out=tmp_path, seconds=1).workers(8, gib_each=6) == 1


def test_times_are_medians_after_a_warm_up() -> None:
    calls: list[int] = []
    took = timed(lambda: calls.append(1), CPU, limit_s=0.0)
    assert took.repeats == 3 and len(calls) == 4
    assert took.median_s >= 0


def test_all_checks_run_on_a_gpu_and_some_in_miniature(tmp_path: Path) -> None:
    def keys(device: str) -> list[str]:
        plan = Plan(device=device, out=tmp_path, seconds=1)
        return [key for phase in numerics.STAGE.phases(plan) for key in phase.items]

    assert keys("cuda") == list(numerics.checks("cuda"))
    machine(tmp_path, {"what": GPU_GIB, "value": "79.6"})
    large = ["addresses chunked", "addresses tiled"]
    assert keys("cuda") == [*numerics.checks("cuda"), *large]
    assert keys("cpu")[-2:] == large
    assert 0 < len(keys("cpu")) - 2 <= len(numerics.checks("cpu")) / 5
    assert {key.split()[0] for key in keys("cpu")} >= {"chunked", "tiled", "logprob"}


def test_loss_candidates_have_a_time_and_a_share() -> None:
    row = loss.time_of("chunked, frozen head", loss.SHAPES["cpu"], 1e-3, CPU)
    assert row["ms"] > 0 and row["share"] > 0
    work = 3 * 2.0 * row["N"] * row["V"] * row["H"]
    assert row["share"] == pytest.approx(work / (row["ms"] / 1e3) / 1e12 / 1e-3)
    assert loss.time_of("eager", loss.SHAPES["cpu"], None, CPU)["share"] is None


def test_a_peer_that_is_absent_is_a_row_and_no_error(monkeypatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError(name="liger_kernel")

    found = {**loss.candidates(), "liger": loss.Candidate(forward=absent)}
    monkeypatch.setattr(loss, "candidates", lambda: found)
    assert "liger_kernel" in loss.time_of("liger", loss.SHAPES["cpu"], None, CPU)["text"]
    monkeypatch.setitem(loss.GRADIENTS, "liger", absent)
    assert "liger_kernel" in loss.error_of("liger", CPU)["text"]


def test_our_bfloat16_gradients_are_closer_than_those_of_eager() -> None:
    ours, eager = (loss.error_of(name, CPU) for name in ("chunked", "eager"))
    assert 0 < ours["dh"] < eager["dh"] and 0 < ours["dW"] < eager["dW"]


def test_flops_of_a_step_by_hand() -> None:
    size = learner.SIZES["cpu"]
    samples = learner.make_samples(size)
    assert len(samples) == size.groups * size.rollouts
    rows = learner.measure("packed, sdpa", "packed", size, CPU, None)
    step = next(row for row in rows if row["table"] == learner.STEPS)
    distilled = sum(sample.num_tokens for sample in samples)
    sides = [
        (passes, len(prompt or ()) + sample.end - 1)
        for sample in samples
        for passes, prompt in ((3, sample.student_prompt_ids), (1, sample.teacher_prompt_ids))
    ]
    H, heads, layers = 64, 4 * 16, 2
    block = 2 * H * heads + 2 * H * 32 + 3 * H * 128 + 2 * H + 2 * 16  # with norms of q and k
    dense = sum(passes * 2.0 * layers * block * length for passes, length in sides)
    pairs = sum(passes * length * (length + 1) / 2 for passes, length in sides)
    wanted = dense + 4.0 * heads * layers * pairs + 8.0 * distilled * 512 * H
    assert step["TFLOP/s"] * step["seconds"] * 1e12 == pytest.approx(wanted, rel=1e-6)
    assert step["tokens"] == sum(length for _, length in sides)


def test_metrics_of_a_run_that_was_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert quickstart.read_metrics(path) == []
    path.write_text('{"step": 0, "eval/dev/accuracy": 0.5}\n{"step": 1, "time/step_s"')
    assert quickstart.read_metrics(path) == [{"step": 0, "eval/dev/accuracy": 0.5}]


@pytest.mark.parametrize(("accuracy", "ok"), [(0.55, True), (0.30, False)])
def test_an_accuracy_is_compared_with_the_cpu_runs(accuracy: float, ok: bool) -> None:
    name = "eval/dev/accuracy"
    metrics = [
        {"step": 0, name: accuracy, f"{name}_low": accuracy - 0.03, f"{name}_high": accuracy + 0.03}
    ]
    row = quickstart.accuracy_rows(metrics, {("dev", 0): [53.0, 57.0]})[0]
    assert row["cpu mean"] == 55.0 and row["cpu range"] == "53.0 to 57.0"
    assert row["allowed"] == pytest.approx(2 * 3.0 + 2.0)
    assert row["ok"] is ok
    assert "ok" not in quickstart.accuracy_rows(metrics, {})[0]


def test_the_recorded_runs_are_read() -> None:
    recorded = quickstart.read_recorded(quickstart.RECORDED)
    assert len(recorded["dev", 0]) == 3
    assert min(recorded["dev", 30]) > max(recorded["dev", 0])


def test_a_run_out_of_time_is_told_to_stop() -> None:
    code, output = quickstart.run_for(["sh", "-c", "echo begun; exec sleep 100"], 1.0)
    assert (code, output) == (0, "begun\n")
    assert quickstart.run_for(["sh", "-c", "exit 3"], 30.0)[0] == 3


@pytest.mark.parametrize(
    ("code", "output", "ok", "text"),
    [
        (0, "done\n========= ERROR SUMMARY: 0 errors\n", True, "0 errors"),
        (
            9,
            "========= Invalid __global__ read of 4 bytes\n========= ERROR SUMMARY: 2 errors\n",
            False,
            "Invalid __global__ read",
        ),
        (1, "========= Error: Device not supported\n", None, "could not run"),
        (1, "Traceback\nImportError: no torch\n", None, "could not run (1): ImportError"),
    ],
)
def test_what_a_sanitizer_says(code: int, output: str, ok: bool | None, text: str) -> None:
    row = tools.judged(code, output)
    assert row.get("ok") is ok
    assert text in row["text"]


def test_counters_are_read_from_ncu() -> None:
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected to process 7",
        head,
        '"0","7","sweep_kernel(a, b)","gpu__time_duration.sum","ns","12,500"',
        '"0","7","sweep_kernel(a, b)","launch__registers_per_thread","register/thread","168"',
        '"1","7","pair_kernel","gpu__time_duration.sum","us","80.5"',
    ]
    assert tools.read_counters("\n".join(lines)) == [
        {"table": tools.COUNTERS, "kernel": "sweep_kernel", "us": 12.5, "registers": 168.0},
        {"table": tools.COUNTERS, "kernel": "pair_kernel", "us": 80.5},
    ]
    assert tools.read_counters("==ERROR== ERR_NVGPUCTRPERM") == []


def timed_item(kernel: str, config: list[Any], base: list[Any], ms: float) -> Item:
    args = {"kernel": kernel, "lean": True, "config": config, "base": base, "capability": 90}
    row = {"kernel": kernel, "lean": True, "config": str(config), "ms": ms, "_args": args}
    return Item(rows=[row])


def test_a_config_is_chosen_where_it_wins_enough(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    base, other = [128, 128, 64, 8, 3, None, 8], [64, 128, 64, 4, 3, None, 8]
    results = {
        "time a": timed_item("sweep", base, base, 10.0),
        "time b": timed_item("sweep", other, base, 8.0),
        "time c": timed_item("pair", base, base, 10.0),
        "time d": timed_item("pair", other, base, 9.9),
        "check e": Item(rows=[{"_good": True}]),
    }
    entries, rows = tune.winners(results, on_gpu=True)
    assert [(row["kernel"], row["chosen"], row["ms"]) for row in rows] == [
        ("sweep", str(other), 8.0),
        ("pair", str(base), 10.0),
    ]
    assert [(e["kernel"], e["capability"], e["block_m"], e["was_ms"]) for e in entries] == [
        ("sweep", 90, 64, 10.0)
    ]
    from rosd_kernels.gpu.tuned import read_table

    assert len(read_table(json.loads(json.dumps({"entries": entries})))) == 1
    on_cpu, _ = tune.winners(results, on_gpu=False)
    assert [entry["capability"] for entry in on_cpu] == [0]


def fake_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{tools.os.environ['PATH']}")


def test_a_sanitizer_is_run_on_the_smallest_case(tmp_path: Path, monkeypatch) -> None:
    fake_tool(
        tmp_path,
        "compute-sanitizer",
        'echo "$@" > "$0.arguments"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$0.arguments"\n'
        "echo '========= ERROR SUMMARY: 1 error'; exit 9",
        monkeypatch,
    )
    row = tools.sanitize("memcheck", "cuda")
    assert row["ok"] is False and row["checker"] == "memcheck"
    arguments = (tmp_path / "compute-sanitizer.arguments").read_text()
    assert "--tool memcheck" in arguments and "-m day_one.smallest cuda\n1\n" in arguments
    assert "ok" not in tools.sanitize("initcheck", "cuda")
    assert tools.sanitize("memcheck", "cpu")["text"] == "absent: no GPU"


def test_counters_that_are_not_allowed_say_so(tmp_path: Path, monkeypatch) -> None:
    text = "==ERROR== ERR_NVGPUCTRPERM - no permission to access GPU Performance Counters"
    fake_tool(tmp_path, "ncu", f'echo "$@" > "$0.arguments"; echo "{text}"; exit 1', monkeypatch)
    assert "ERR_NVGPUCTRPERM" in tools.counters("cuda")[0]["kernel"]
    assert "--clock-control none" in (tmp_path / "ncu.arguments").read_text()


def test_the_smallest_case_launches_the_kernels(monkeypatch, capsys) -> None:
    pytest.importorskip("triton")
    from day_one import smallest
    from rosd_kernels.gpu import gather, logprob_sparse, pair, sparse, sweep

    launched: list[str] = []

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            launched.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(sweep, "launch", counting("sweep", sweep.launch))
    monkeypatch.setattr(pair, "launch", counting("pair", pair.launch))
    monkeypatch.setattr(gather, "launch", counting("gather", gather.launch))
    for name, module in (("sparse", sparse), ("logprob_sparse", logprob_sparse)):
        monkeypatch.setattr(module, "write_grad", counting(name, module.write_grad))
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("sys.argv", ["smallest", "cpu", "9", "130", "16"])
    smallest.main()
    assert capsys.readouterr().out == "done\n"
    assert {"sweep", "pair", "gather", "sparse", "logprob_sparse"} <= set(launched)
