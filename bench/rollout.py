"""Rollout speed: the local engine against `transformers.generate` on the same prompts.

    python bench/rollout.py                    # the quickstart model, 32 problems x 8 rollouts
    python bench/rollout.py --model DIR        # another model

Both sample at temperature 1 until the stop token, alternately, in one process; medians are
compared. Tokens up to and including the stop token count, but not the padding that `generate` adds
after it. Adds a row to bench/results/rollout_cpu.csv (rollout_cuda.csv on a GPU).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, append_row, environment, time_alternating
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.quickstart.tasks import load_split
from rosd_fast.text.chat import chat_format
from rosd_fast.types import GenerationRequest, SamplingParams

Prompts = Sequence[tuple[int, ...]]
Lengths = list[int]  # tokens of each completion, including the stop token


@dataclass(frozen=True, slots=True)
class Setting:
    """How many completions are sampled per prompt, and when they end."""

    group_size: int
    max_new_tokens: int
    stop_token_id: int
    pad_token_id: int


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.to(device).eval()  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chat = chat_format(tokenizer)
    prompts = [chat.render_problem(problem) for problem in load_split("dev")[: args.problems]]
    setting = Setting(
        group_size=args.group_size,
        max_new_tokens=args.max_new_tokens,
        stop_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    timed = time_alternating(
        {
            "engine": engine_run(model, prompts, setting),
            "generate": generate_run(model, prompts, setting),
        },
        repeats=args.repeats,
    )
    row: dict[str, object] = {
        **environment(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "model": "quickstart" if args.model == str(MODEL_DIR) else Path(args.model).name,
        "dtype": args.dtype,
        "prompts": len(prompts),
        **{name: getattr(setting, name) for name in ("group_size", "max_new_tokens")},
        "prompt_tokens_mean": f"{statistics.mean(map(len, prompts)):.1f}",
        "repeats": args.repeats,
    }
    speed = {}
    for name, (timing, lengths) in timed.items():
        rates = [sum(run) / s for run, s in zip(lengths, timing.seconds, strict=True)]
        speed[name] = statistics.median(rates)
        completions = [length for run in lengths for length in run]
        print(
            f"{name:9} {speed[name]:8.0f} tokens/s   {timing.median_s:6.2f} s   "
            f"spread {timing.spread_frac:4.0%}   "
            f"{statistics.mean(completions):.1f} tokens per completion (longest {max(completions)})"
        )
        row[f"{name}_tokens_per_s"] = f"{speed[name]:.0f}"
        row[f"{name}_median_s"] = f"{timing.median_s:.3f}"
        row[f"{name}_spread_frac"] = f"{timing.spread_frac:.2f}"
        row[f"{name}_tokens_mean"] = f"{statistics.mean(completions):.1f}"
    row["ratio"] = f"{speed['engine'] / speed['generate']:.2f}"
    print(f"ratio     {row['ratio']}")
    append_row(args.csv or RESULTS / f"rollout_{device}.csv", row)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default=str(MODEL_DIR), help="model folder (default: quickstart)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--csv", type=Path, help="file to add the row to")
    return parser.parse_args()


def engine_run(model: PreTrainedModel, prompts: Prompts, setting: Setting) -> Callable[[], Lengths]:
    engine = LocalEngine(model, pad_token_id=setting.pad_token_id)
    params = SamplingParams(
        max_new_tokens=setting.max_new_tokens, stop_token_ids=(setting.stop_token_id,)
    )
    seed = iter(range(1_000_000))

    def run() -> Lengths:
        now = next(seed)
        requests = [
            GenerationRequest(
                id=str(index), prompt_ids=prompt, params=params, n=setting.group_size, seed=now
            )
            for index, prompt in enumerate(prompts)
        ]
        generations = asyncio.run(engine.generate(requests))
        return [len(generation.completion_ids) for generation in generations]

    return run


def generate_run(
    model: PreTrainedModel, prompts: Prompts, setting: Setting
) -> Callable[[], Lengths]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), setting.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)

    def run() -> Lengths:
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=setting.group_size,
            max_new_tokens=setting.max_new_tokens,
            eos_token_id=setting.stop_token_id,
            pad_token_id=setting.pad_token_id,
        )
        completions = output[:, width:].tolist()
        return [completion_length(row, setting.stop_token_id) for row in completions]

    return run


def completion_length(row: list[int], stop_token_id: int) -> int:
    """The number of tokens up to and including the first stop token."""
    return row.index(stop_token_id) + 1 if stop_token_id in row else len(row)


if __name__ == "__main__":
    main()
