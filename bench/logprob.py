"""Cross entropy, forward and backward: `span_logprob` against eager PyTorch and Liger.

    python bench/logprob.py                                  # rewrites the CSV
    python bench/logprob.py --tokens 128 --repeats 2 --csv /tmp/logprob.csv

The loss is minus the log-prob of sampled tokens: cross entropy, or a policy gradient whose ratios
and advantages are 1. float32, gradients to hidden states and head. Liger's candidate is its GRPO
loss, as its cross entropy needs a GPU. States, timing and memory are those of bench/loss.py; the
floor is three GEMM sweeps over the head. A frozen head, as with LoRA, has no gradient: two.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, record, time_alternating, version
from loss import LEARN_TOKENS, SHAPES, made_states, peak_of, smollm2_states
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosd_kernels import VocabularyOrder, entry, span_logprob
from rosd_kernels.testing.peers import (
    eager_cross_entropy,
    gemm_floor,
    liger_grpo,
    minus_logprob,
)

EPS = 2.0**-12
SOURCES = ("smollm2", "made")
CSV = RESULTS / "logprob_cpu.csv"
# name: (strategy, sparsity, whether the head is trained, whether the loss is a token_loss)
OURS = {
    "chunked": ("chunked", "exact", True, True),
    "chunked, frozen head": ("chunked", "exact", False, True),
    "chunked, loss afterwards": ("chunked", "exact", True, False),
    "chunked entry": ("chunked", "entry", True, True),
    "chunked entry, frozen head": ("chunked", "entry", False, True),
    "tiled exact": ("tiled", "exact", True, True),
    "tiled entry, ordered": ("tiled", "entry", True, True),
}
PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eager": eager_cross_entropy,
    "liger": liger_grpo,
}
CANDIDATES = (*OURS, *PEERS)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one shape."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    ids: Tensor  # [N] sampled from the hidden states' own distributions
    permutation_mass: Tensor  # [V] state of a VocabularyOrder that saw other tokens

    @classmethod
    def load(cls, file: Path, num_tokens: int) -> Inputs:
        # Copied, because a mapped file counts as resident memory only after it was read.
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        hidden, ids = tensors["student"][:num_tokens], tensors["ids"][:num_tokens]
        return cls(hidden.requires_grad_(), tensors["head"], ids, tensors["mass"])


def main() -> None:
    args = parse_arguments()
    if args.memory:
        print(json.dumps(peak_memory(args)))
        return
    for _ in record(args.csv, measure_all(args)):
        pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=CSV, help="file to write")
    parser.add_argument("--memory", nargs=2, metavar=("CANDIDATE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            file = Path(folder) / f"{source}.safetensors"
            make = {"smollm2": smollm2_states, "made": made_states}[source]
            save_file(with_ids(make(max(args.tokens))), file)
            for num_tokens in args.tokens:
                yield from measure(source, file, num_tokens, args)
            file.unlink()


def with_ids(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states, and a token sampled from each of the student's."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.multinomial((rows @ states["head"].T).softmax(-1), 1, generator=generator)[:, 0]
        for rows in states["student"].split(64)
    ]
    return states | {"ids": torch.cat(parts)}


def measure(
    source: str, file: Path, num_tokens: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a CSV row per candidate, and one for the floor."""
    inputs = Inputs.load(file, num_tokens)
    steps: dict[str, Callable[[], Any]] = {name: candidate(name, inputs) for name in CANDIDATES}
    steps["floor"] = gemm_floor(inputs.hidden, None, inputs.head)
    timed = time_alternating(steps, repeats=args.repeats)
    seconds = {name: timing.median_s for name, (timing, _) in timed.items()}
    V, H = SHAPES[source]
    for name, (timing, results) in timed.items():
        memory = math.nan if name == "floor" else run_memory(name, file, num_tokens)
        row = {
            "liger_kernel": version("liger_kernel"),
            "threads": torch.get_num_threads(),
            "states": source,
            "tokens": num_tokens,
            "vocab": V,
            "hidden": H,
            "candidate": name,
            "repeats": args.repeats,
            "median_s": f"{timing.median_s:.4f}",
            "spread_frac": f"{timing.spread_frac:.2f}",
            "vs_eager": f"{timing.median_s / seconds['eager']:.3f}",
            "vs_liger": f"{timing.median_s / seconds['liger']:.3f}",
            "vs_floor": f"{timing.median_s / seconds['floor']:.3f}",
            "active_frac": "" if results[-1] is None else f"{results[-1]:.3f}",
            "peak_mib": f"{memory:.0f}",
        }
        print(
            f"{source:8} N {num_tokens:5}  {name:24} {timing.median_s:8.3f} s  "
            f"x eager {row['vs_eager']}  x liger {row['vs_liger']}  x floor {row['vs_floor']}  "
            f"peak {row['peak_mib']:>6} MiB  active {row['active_frac']}",
            flush=True,
        )
        yield row


def candidate(name: str, inputs: Inputs) -> Callable[[], float | None]:
    """Return a function that runs forward and backward, and returns the active fraction or None."""
    hidden, head, ids = inputs.hidden, inputs.head, inputs.ids
    if name in PEERS:
        trains_head, call = True, lambda: PEERS[name](hidden, head, ids)
    else:
        strategy, rule, trains_head, fused = OURS[name]
        options: dict[str, Any] = {"strategy": strategy}
        options["token_loss"] = minus_logprob if fused else None
        if rule == "entry":
            order = VocabularyOrder(head.shape[0], LEARN_TOKENS)
            seen = torch.tensor(LEARN_TOKENS)
            order.load_state_dict({"mass": inputs.permutation_mass, "num_seen": seen})
            options["sparsity"] = entry(EPS, order)
        call = lambda: span_logprob(hidden, head, ids, **options)  # noqa: E731

    def step() -> float | None:
        hidden.grad = head.grad = None
        head.requires_grad_(trains_head)
        out = call()
        if isinstance(out, Tensor):
            out.backward()
            return None
        out.loss.backward()
        return out.stats.active_frac

    return step


def run_memory(name: str, file: Path, num_tokens: int) -> float:
    """Peak MiB of one candidate, measured in a separate process."""
    command = [sys.executable, __file__, "--tokens", str(num_tokens), "--memory", name, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(args: argparse.Namespace) -> float:
    """Peak resident MiB of one step, beyond the memory before it and the gradients."""
    name, file = args.memory
    inputs = Inputs.load(Path(file), args.tokens[0])
    leaf = inputs.hidden[:2].detach().requires_grad_()
    few = Inputs(leaf, inputs.head[:256].clone(), inputs.ids[:2] % 256, torch.ones(256))
    candidate(name, few)()  # for one-time loading
    trained = inputs.head.numel() if name not in OURS or OURS[name][2] else 0
    return peak_of(candidate(name, inputs), gradients=4 * (inputs.hidden.numel() + trained))


if __name__ == "__main__":
    main()
