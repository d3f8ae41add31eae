"""Seconds per step of a model of 32B parameters on two nodes of eight H100, by formula.

    python bench/scaling_formula.py        # the table of docs/scaling.md

Nothing here is measured on that machine. Each stage is bytes over a rate or FLOPs over a rate; the
rates are those of data sheets times a fraction that such code reaches, both in `RATES`. "before"
is this trainer at version 0.1, "after" as it is now. A stage that runs beside another one costs the
step only what is left of it (`overlapped`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Qwen3-32B: its config.json.
PARAMETERS = 32.8e9
LAYERS, HIDDEN, VOCAB = 64, 5120, 151936
KV_HEADS, HEAD_DIM = 8, 128
BLOCK = PARAMETERS / LAYERS

# The step: 32 problems, 8 rollouts each.
ROLLOUTS, PROMPT, COMPLETION = 32 * 8, 512, 8192
TOKENS = ROLLOUTS * (PROMPT + COMPLETION)
REFLECTIONS, REFLECTION_PROMPT, REFLECTION = ROLLOUTS, 8192, 240
DISTILLED = ROLLOUTS * 256  # tokens of the error spans
ACTIVE = 0.15  # f: share of the vocabulary's tiles with mass, of a model that has learned

# The machine: 12 ranks learn, 2 servers of 2 GPUs each sample.
RANKS, SERVERS, TENSOR_PARALLEL = 12, 2, 2
MEMORY = 80e9


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate in units per second. peak: by the source. reached: the fraction that is assumed."""

    peak: float
    reached: float
    source: str

    @property
    def value(self) -> float:
        return self.peak * self.reached


RATES = {
    "flops": Rate(989e12, 0.4, "H100 SXM data sheet, bf16 dense; 40% in training with FSDP"),
    "gemm": Rate(989e12, 0.57, "the same; 57% in large GEMMs (Liger's JSD on an H100)"),
    "hbm": Rate(3.35e12, 0.7, "H100 SXM data sheet; 70%"),
    "network": Rate(50e9, 0.7, "400 Gb/s per GPU (DGX H100); 70%"),
    "pcie": Rate(64e9, 0.7, "PCIe 5.0 x16; 70%"),
    "file": Rate(4e9, 1.0, "one thread into files in memory; assumed"),
    "storage": Rate(2e9, 1.0, "shared storage per node; assumed"),
    "json": Rate(30e6, 1.0, "bytes of a list of numbers parsed by one core; assumed"),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. before, after: seconds. formula: how, with its source."""

    name: str
    before: float
    after: float
    formula: str


def rate(name: str) -> float:
    return RATES[name].value


def decoding(sequences: int, prompt: float, completion: float) -> float:
    """Seconds to sample on all servers: each token of a batch reads weights and cache once.

    A server holds as many sequences at a time as its cache has room for, at their mean length.
    """
    cache = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2  # bytes per token
    length = prompt + completion / 2
    room = 0.9 * TENSOR_PARALLEL * MEMORY - 2 * PARAMETERS
    at_once = max(1.0, min(sequences / SERVERS, room / (cache * length)))
    per_token = (2 * PARAMETERS + at_once * cache * length) / TENSOR_PARALLEL / rate("hbm")
    return sequences / SERVERS * completion / at_once * per_token


def prefill(tokens: float) -> float:
    return 2 * PARAMETERS * tokens / (SERVERS * TENSOR_PARALLEL * rate("flops"))


def overlapped(hidden: float, behind: float) -> float:
    """What a stage costs that runs beside another one of `behind` seconds."""
    return max(0.0, hidden - behind)


def stages() -> list[Stage]:
    """The stages of a step, in their order."""
    sampling = decoding(ROLLOUTS, PROMPT, COMPLETION)
    reflecting = prefill(REFLECTIONS * (REFLECTION_PROMPT - PROMPT)) + decoding(
        REFLECTIONS, REFLECTION_PROMPT, REFLECTION
    )
    compute: Callable[[float], float] = lambda units: (  # noqa: E731
        units * PARAMETERS * TOKENS / (RANKS * rate("flops"))
    )
    unit = 2 * DISTILLED * HIDDEN * VOCAB / (RANKS * rate("gemm"))
    weights, masters = 2 * PARAMETERS, 4 * PARAMETERS
    loaded = weights / TENSOR_PARALLEL / rate("pcie")
    gathered, gathered_fp32 = weights / rate("network"), masters / rate("network")
    to_host, written = weights / rate("pcie"), weights / rate("file")
    staged = 12 * PARAMETERS / RANKS / rate("pcie")
    return [
        Stage(
            "sampling",
            sampling,
            sampling,
            "tokens x (2P + cache) / TP / HBM, as many sequences at once as the cache holds",
        ),
        Stage(
            "reflection (streamed)",
            overlapped(reflecting, 0.5 * sampling),
            overlapped(reflecting, 0.5 * sampling),
            "prefill 2P FLOPs per token, then decoding; half of the sampling hides it",
        ),
        Stage(
            "rank 0's host work",
            78.0,
            10.0,
            "one core's seconds by `bench/host.py`; after, 8.1 of them are beside the sampling",
        ),
        Stage("teacher forward", compute(2), compute(2), "2 P T FLOPs"),
        Stage(
            "learner forward and backward",
            compute(8),
            compute(8),
            "8 P T FLOPs (activation checkpointing); weights and gradients travel meanwhile",
        ),
        Stage(
            "loss",
            4 * unit,
            4 * unit,
            f"4 units of 2 N H V FLOPs; with a sparsity 2 + 6f, {(2 + 6 * ACTIVE) * unit:.2g} s at "
            f"f = {ACTIVE}",
        ),
        Stage(
            "optimizer",
            28 * PARAMETERS / RANKS / rate("hbm"),
            28 * PARAMETERS / RANKS / rate("hbm"),
            "28 bytes per parameter and rank over HBM",
        ),
        Stage(
            "hand-over, files",
            gathered_fp32 + to_host + written + loaded,
            max(gathered, to_host, written) + loaded,
            "before: all gathered in fp32 (4P), to the host, written, loaded, one after the other; "
            "after: 2P once, the first three at the same time",
        ),
        Stage(
            "hand-over, broadcast",
            gathered_fp32 + to_host + SERVERS * (weights / rate("network")),
            weights / RANKS / rate("pcie") + max(gathered, SERVERS * weights / rate("network")),
            "before: as above, then 2P to each server; after: each rank keeps its 2P / S, then 2P "
            "gathered while they are sent",
        ),
        Stage(
            "checkpoint, what the step waits for",
            gathered_fp32 + to_host + staged,
            staged + weights / RANKS / rate("pcie"),
            "masters and moments (12P / S) to the host; before: and all weights through rank 0",
        ),
        Stage(
            "checkpoint, behind the next step",
            12 * PARAMETERS / 2 / rate("storage") + weights / rate("storage"),
            12 * PARAMETERS / 2 / rate("storage") + weights / rate("storage"),
            "12P by two nodes, and the export 2P by rank 0, over the storage's rate",
        ),
        Stage(
            "teacher's states from a server, instead of a forward here",
            DISTILLED * HIDDEN * 20 / rate("json"),
            DISTILLED * HIDDEN * 2 / rate("pcie"),
            "20 bytes of JSON per value on one core; after: 2 bytes in memory",
        ),
    ]


HOST_BESIDE_S = 8.1  # of the host's work: read, decode, prompts, write; the rest is after sampling
IN_TURN = (
    *("sampling", "reflection (streamed)", "rank 0's host work", "teacher forward"),
    *("learner forward and backward", "loss", "optimizer", "hand-over, files"),
)


def steps(found: list[Stage]) -> list[Stage]:
    """The whole step from its stages, without a checkpoint."""
    parts = {stage.name: stage for stage in found}
    before = sum(parts[name].before for name in IN_TURN)
    after = sum(parts[name].after for name in IN_TURN) - HOST_BESIDE_S
    sampled = parts["sampling"].after + parts["reflection (streamed)"].after
    handed = parts["hand-over, files"]
    learned_before, learned = before - sampled - handed.before, after - sampled - handed.after
    return [
        Stage(
            "**a step, in turn**",
            before,
            after,
            "the sum; after, most of the host's work is hidden",
        ),
        Stage(
            "**a step, `engine.one_step_ahead`**",
            max(sampled, learned_before) + handed.before,
            max(sampled, learned) + handed.after,
            "the longer of sampling and all else, then the hand-over",
        ),
    ]


def whole_gib() -> tuple[float, float]:
    """GiB of weights on rank 0 beside its shards, before and after: all, and three buckets."""
    bucket = max(512 * 2**20, 2 * VOCAB * HIDDEN)  # the embedding is one tensor
    return 2 * PARAMETERS / 2**30, 3 * bucket / 2**30


def main() -> None:
    print("| stage | before, s | after, s | formula |\n|---|---:|---:|---|")
    found = stages()
    for stage in [*found, *steps(found)]:
        print(
            f"| {stage.name} | {number(stage.before)} | {number(stage.after)} | {stage.formula} |"
        )
    before, after = whole_gib()
    print(f"\nrank 0, weights beside its shards: {before:.0f} GiB before, {after:.1f} GiB after\n")
    print("| rate | peak | reached | source |\n|---|---:|---:|---|")
    for name, one in RATES.items():
        print(f"| {name} | {one.peak:.3g}/s | {one.reached:.0%} | {one.source} |")


def number(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


if __name__ == "__main__":
    main()
