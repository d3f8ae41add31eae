"""States of a teacher on a real server on this machine: bytes and seconds per distilled token.

    make sglang                                                   # builds the environment
    python bench/teacher_states.py --python .venv-sglang/bin/python

The server runs a random model of two layers and the width `--hidden`, in float32, since what is
measured is how the states travel. A step scores `--samples` sequences, four per prompt, of 64
prompt and `--tokens` completion tokens; the prompt of a step is new, so its states are computed.

json      lists of numbers, as SGLang sends them
base64    bytes in the answer (`states_hook.py`), as from a server on another machine
memory    bytes in a file in memory, as from a server that the trainer starts

    network_bytes   received over HTTP, per distilled token; in memory there are 4 `--hidden` more
    seconds         of a step, median of `--repeats` after one more; the spread is that of the same

Rewrites bench/results/teacher_states.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, record, version
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec
from rosd_fast.engines.sglang.states_hook import FOLDER_VARIABLE
from rosd_fast.engines.sglang.states_plugin import make_states_folder, write_plugin
from rosd_fast.engines.sglang.teacher import SERVER_ARGS, SglangTeacher
from rosd_fast.quickstart import MODEL_DIR

CSV = RESULTS / "teacher_states.csv"
WAYS = ("json", "base64", "memory")
PROMPT, GROUP = 64, 4


def main() -> None:
    args = parse_arguments()
    if not args.python:
        print("skipped: no SGLang; see the top of bench/teacher_states.py")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", args.hidden)
        for row in record(args.csv, measure(args, model, Path(folder))):
            print(
                f"{row['way']:8} {row['network_bytes']:>8} bytes per token over HTTP "
                f"{row['seconds']:>8} s",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=os.environ.get("ROSD_SGLANG_PYTHON", ""))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    return parser.parse_args()


def save_model(folder: Path, hidden: int) -> Path:
    """A random model with the quickstart's tokenizer."""
    vocabulary = json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def measure(args: argparse.Namespace, model: Path, folder: Path) -> Iterator[dict[str, object]]:
    """One row per way."""
    plugin = write_plugin(folder / "plugin")
    for way in WAYS:
        environment = {} if way == "json" else {"PYTHONPATH": str(plugin)}
        states_folder = make_states_folder(folder) if way == "memory" else None
        if states_folder is not None:
            environment[FOLDER_VARIABLE] = str(states_folder)
        spec = ServerSpec(
            python=Path(args.python),
            model_folder=model,
            dtype="float32",
            on_cpu=True,
            start_timeout_s=600,
            args=(*SERVER_ARGS, "--max-total-tokens", "16384"),
            environment=tuple(environment.items()),
        )
        server = ManagedServer(spec, folder / way)
        found = asyncio.run(score(args, server, states_folder))
        yield {
            "way": way,
            "sglang": version("sglang") or "0.5.23",
            "hidden": args.hidden,
            "tokens": args.samples * args.tokens,
            **found,
        }


async def score(
    args: argparse.Namespace, server: ManagedServer, states_folder: Path | None
) -> dict[str, Any]:
    """Time the steps of one server, and count its bytes."""
    handle = ServerHandle(server, name="teacher", health_every_s=60.0, health_timeout_s=60.0)
    scorer = SglangTeacher(
        [handle],
        hidden_size=args.hidden,
        concurrency=16,
        max_failures=2,
        request_timeout_s=600.0,
        states_folder=states_folder,
        note=print,
    )
    seconds, counts = [], []
    try:
        for step in range(1 + args.repeats):
            torch.manual_seed(step)
            before = handle.num_bytes
            start = time.perf_counter()
            await asyncio.gather(
                *(
                    scorer.score(ids, first=PROMPT, affinity="one")
                    for ids in sequences(args.samples, args.tokens)
                )
            )
            seconds.append(time.perf_counter() - start)
            counts.append(handle.num_bytes - before)
    finally:
        await scorer.close()
    tokens = args.samples * args.tokens
    times = seconds[1:]
    return {
        "network_bytes": round(counts[-1] / tokens),
        "seconds": f"{statistics.median(times):.3f}",
        "spread_s": f"{max(times) - min(times):.3f}",
    }


def sequences(samples: int, tokens: int) -> list[list[int]]:
    """Random ids; each prompt is shared by `GROUP` sequences."""
    prompts = torch.randint(10, 90, (-(-samples // GROUP), PROMPT))
    return [
        [*prompts[index // GROUP].tolist(), *torch.randint(10, 90, (tokens,)).tolist()]
        for index in range(samples)
    ]


if __name__ == "__main__":
    main()
