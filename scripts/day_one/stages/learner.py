"""A step of the learner on a model of Qwen3-0.6B's shape with random weights.

    packed   every sequence whole      shared   common prefixes once
    sdpa     PyTorch's attention       flash    flash-attn, where it is installed

Each case is a process of its own, so that its peak memory is its own. One more step runs under
`torch.cuda.set_sync_debug_mode`: the table of host syncs names the lines at which the host waited.
"""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from day_one.results import Row
from day_one.stage import Phase, Plan, Stage
from day_one.timing import synchronize
from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.memory_plan import ModelShape, memory_plan
from rosd_fast.model import attention
from rosd_fast.model.flash import flash_attention
from rosd_fast.trainer.learner import Learner
from rosd_fast.types import PackedBatch, TrainSample

STEPS, SYNCS, PLANNED = "A step", "Host syncs in a step", "Peak memory against the plan"
CASES = ("packed, sdpa", "shared, sdpa", "packed, flash", "shared, flash")
TREE = Path(__file__).parents[3]
GIB = 2**30
REFLECTION = 64  # tokens that a teacher's prompt has beyond the student's
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, and the batch of a step."""

    model: Mapping[str, Any]
    dtype: str
    groups: int
    rollouts: int
    prompt: int
    completion: int
    max_tokens: int


SIZES = {
    "cuda": Size(
        model={
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        dtype="bfloat16",
        groups=8,
        rollouts=8,
        prompt=512,
        completion=1024,
        max_tokens=16384,
    ),
    "cpu": Size(
        model={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        dtype="float32",
        groups=2,
        rollouts=2,
        prompt=24,
        completion=16,
        max_tokens=256,
    ),
}


class LearnerStage(Stage):
    name = "learner"
    item_s = 90.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        for case in CASES:
            # A phase each: a new process has no memory of the case before it.
            yield Phase(items={case: {"case": case, "ceiling": plan.ceiling_tflops}})

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        layout, kernel = args["case"].split(", ")
        on = torch.device(device)
        if kernel == "flash" and flash_attention() is None:
            return [{"table": STEPS, "case": key, "text": "flash-attn is absent"}]
        if kernel == "sdpa":
            attention.can_flash = lambda *_: False
        return measure(key, layout, SIZES[device], on, args["ceiling"])


def measure(
    case: str, layout: str, size: Size, device: torch.device, ceiling: float | None
) -> list[Row]:
    """The rows of a case: time, rate, utilization; syncs; peak memory beside the plan's."""
    config = make_config(size, layout, device)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with device:
            model = Qwen3ForCausalLM(Qwen3Config(**size.model, tie_word_embeddings=True)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    shape = ModelShape.of(model)
    learner = Learner(model, config)
    batches = pack(
        make_samples(size),
        max_tokens=size.max_tokens,
        num_ranks=1,
        hidden_size=size.model["hidden_size"],
        min_shared=config.pack.min_shared,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        learner.step(batches)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    took = sorted(seconds[1:])[REPEATS // 2]
    tokens = sum(batch.num_tokens for batch in batches)
    tflops = flops(model, batches, learner) / took / 1e12
    row: Row = {
        "table": STEPS,
        "case": case,
        "model": f"{shape.parameters / 1e6:.0f}M {size.dtype}",
        "tokens": tokens,
        "micro-batches": len(batches),
        "first s": seconds[0],
        "seconds": took,
        "tokens/s": tokens / took,
        "TFLOP/s": tflops,
        "MFU": tflops / ceiling if ceiling else None,
    }
    rows = [row]
    if device.type == "cuda":
        rows.append(memory_row(case, shape, config, torch.cuda.max_memory_allocated()))
    rows += sync_rows(case, learner, batches, device)
    return rows


def make_config(size: Size, layout: str, device: torch.device) -> Config:
    return Config.model_validate(
        {
            "device": device.type,
            "dtype": size.dtype,
            "sample": {
                "group_size": size.rollouts,
                "problems_per_step": size.groups,
                "max_prompt_tokens": size.prompt,
                "max_new_tokens": size.completion,
            },
            "pack": {
                "max_tokens": size.max_tokens,
                "min_shared": 16 if layout == "shared" else 0,
            },
        }
    )


def make_samples(size: Size) -> list[TrainSample]:
    """Groups of random tokens; half of a completion is distilled."""
    draw, vocab = random.Random(0), size.model["vocab_size"]

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(count))

    samples = []
    for group in range(size.groups):
        prompt = ids(size.prompt)
        for index in range(size.rollouts):
            length = draw.randint(size.completion // 2, size.completion)
            samples.append(
                TrainSample(
                    rollout_id=f"{group}/{index}",
                    problem_id=str(group),
                    student_prompt_ids=prompt,
                    teacher_prompt_ids=prompt + ids(REFLECTION),
                    completion_ids=ids(length),
                    logprobs=(0.0,) * length,
                    start=length // 2,
                    end=length,
                )
            )
    return samples


def flops(model: Any, batches: Sequence[PackedBatch], learner: Learner) -> float:
    """FLOPs of a step: 2 per weight and token, 4 per channel and pair of query and key, times three
    for the student, whose backward pass counts twice; and four units of the loss."""
    config = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters())
    channels = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    total = 0.0
    for batch in batches:
        for side, passes in ((batch.student, 3), (batch.teacher, 1)):
            if side is not None:
                pairs = int((side.position_ids + 1).sum())
                total += passes * (2.0 * weights * len(side.input_ids) + 4.0 * channels * pairs)
        total += 4 * 2.0 * batch.num_distilled * learner.vocab_size * config.hidden_size
    return total


def memory_row(case: str, shape: ModelShape, config: Config, peak: int) -> Row:
    """The peak beside the plan's learning rows; sampling does not run here."""
    plan = memory_plan(shape, config, on_gpu=True)
    rows = [row for row in plan.rows if row.place == "device" and row.when != "sampling"]
    planned, exact = (
        sum(row.size for row in rows if row.exact or not only) for only in (False, True)
    )
    return {
        "table": PLANNED,
        "case": case,
        "peak GiB": peak / GIB,
        "planned GiB": planned / GIB,
        "of it exact GiB": exact / GIB,
        "peak / planned": peak / planned,
    }


def sync_rows(
    case: str, learner: Learner, batches: Sequence[PackedBatch], device: torch.device
) -> list[Row]:
    """One step with torch's warnings about host syncs, counted by the line that they name."""
    if device.type != "cuda":
        return [{"table": SYNCS, "case": case, "line": "only a GPU has them", "count": 0}]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            learner.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{short(one.filename)}:{one.lineno}" for one in found if "synchroniz" in str(one.message)
    )
    if not lines:
        return [{"table": SYNCS, "case": case, "line": "none", "count": 0}]
    return [
        {"table": SYNCS, "case": case, "line": line, "count": count}
        for line, count in lines.most_common()
    ]


def short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(TREE)) if path.is_relative_to(TREE) else "/".join(path.parts[-3:])


STAGE = LearnerStage()
