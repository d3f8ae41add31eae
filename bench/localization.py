"""Measure how many quotes are found, how exact their spans are, and what the constraint costs.

    python bench/localization.py                       # quickstart model, some minutes
    python bench/localization.py --model smollm2 --data FILE.jsonl --rollouts 64
    python bench/localization.py --learn               # also six training runs, about ten minutes

All modes reflect on the same wrong rollouts, in turns.

    found    share of reflections whose quote occurs in the rollout
    exact    share of reflections with a quote whose first and last token contain the quote's first
             and last byte; llguidance's vocabulary reader, not the measured code, gives the bytes
             of a token

Each is compared with the rule of the method's public code, which re-tokenizes the text before the
quote and counts tokens. Time is per token of the reflection's text, including an opening tag that
is part of the prompt.

Rows go to bench/results/localization.csv, those of --learn to localization_learning.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness import RESULTS, append_row, environment
from quickstart import run_trial

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import load_preset
from rosd_fast.data.problems import load_problems
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.reflection.grammar import opening_tag
from rosd_fast.reflection.locate import Located, locate, locate_sentence
from rosd_fast.reflection.reflect import reflect
from rosd_fast.rollout.sample import sample_groups
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Group, Reflection, Rollout, SamplingParams, Verdict
from rosd_fast.utils.distributed import pick_device
from rosd_fast.verify import verify_all

CSV = RESULTS / "localization.csv"
LEARNING_CSV = RESULTS / "localization_learning.csv"
MODES = ("free", "verbatim", "sentence")
WITHOUT_DEMONSTRATION = {
    # Small models rarely have a correct sibling to show.
    "smollm2": {
        "show_answer": True,
        "wrong_template": (
            "{problem}\n\nAn attempt that ends in a wrong answer:\n"
            "<attempt>\n{rollout}\n</attempt>\n"
            "{answer_note}\nCopy the first wrong words of the attempt, then explain the correct "
            "idea. Use exactly this format:\n<error_quote>words copied from the attempt"
            "</error_quote>\n<explanation>the correct idea</explanation>"
        ),
        "sentence_template": (
            "{problem}\n\nAn attempt that ends in a wrong answer:\n"
            "<attempt>\n{rollout}\n</attempt>\n"
            "{answer_note}\nName the number of the first wrong sentence of the attempt, then "
            "explain the correct idea. Use exactly this format:\n<error_sentence>number"
            "</error_sentence>\n<explanation>the correct idea</explanation>"
        ),
    }
}
ARMS = {
    "free, on_miss full": ["--reflect.mode", "free", "--span.on-miss", "full"],
    "verbatim, on_miss skip": ["--reflect.mode", "verbatim", "--span.on-miss", "skip"],
}


@dataclass(slots=True)
class Tally:
    """Counts for one mode under one rule."""

    quotes: int = 0
    found: int = 0
    exact: int = 0
    ambiguous: int = 0


def main() -> None:
    args = parse_arguments()
    asyncio.run(measure(args))
    if args.learn:
        learn(args.seeds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["quickstart", "smollm2"], default="quickstart")
    parser.add_argument("--data", default="quickstart:train", help="problems to sample rollouts of")
    parser.add_argument("--rollouts", type=int, default=500, help="wrong rollouts, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--learn", action="store_true", help="also train with and without the constraint"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV, help="file to add rows to")
    return parser.parse_args()


async def measure(args: argparse.Namespace) -> None:
    config = load_preset(args.model).model_copy(update={"model": args.model})
    model = load_model(config.model, dtype=config.dtype, device=pick_device(config.device))
    engine = LocalEngine(model.model, max_rows=config.engine.max_rows, tokenizer=model.tokenizer)
    groups, verdicts = await wrong_rollouts(engine, model, config, args)
    count = sum(not verdict.success for verdict in verdicts.values())
    print(f"{args.model}: {count} wrong rollouts", flush=True)
    seconds: dict[str, list[float]] = {mode: [] for mode in args.modes}
    found: dict[str, dict[str, Reflection]] = {}
    for _ in range(args.repeats):
        for mode in args.modes:
            options = {
                "mode": mode,
                "on_correct": "skip",
                **WITHOUT_DEMONSTRATION.get(args.model, {}),
            }
            start = time.perf_counter()
            found[mode] = await reflect(
                groups,
                verdicts,
                engine=engine,
                config=config.reflect.model_copy(update=options),
                chats=make_chats(config.chat, model.tokenizer),
                stop_token_ids=model.stop_token_ids,
                seed=0,
                step=1,
            )
            seconds[mode].append(time.perf_counter() - start)
    rollouts = {rollout.id: rollout for group in groups for rollout in group.rollouts}
    oracle = Oracle(model)
    tags = {mode: opening_tag(mode, correct=False) for mode in args.modes}
    opening = {
        mode: len(model.tokenizer.encode(tag, add_special_tokens=False))
        for mode, tag in tags.items()
    }
    tokens_of = {
        mode: sum(opening[mode] + reflection.num_tokens for reflection in own.values())
        for mode, own in found.items()
    }
    per_token = {mode: statistics.median(seconds[mode]) / tokens_of[mode] for mode in args.modes}
    for mode in args.modes:
        own = list(found[mode].values())
        took, tokens = statistics.median(seconds[mode]), tokens_of[mode]
        rules = ("sampled ids", "encoded again") if mode == "free" else ("sampled ids",)
        for rule in rules:
            tally = count_spans(own, rollouts, oracle, rule)
            row = {
                **environment(),
                "model": args.model,
                "problems": Path(args.data).name,
                "mode": mode,
                "rule": rule,
                "reflections": len(own),
                "found": f"{tally.found / len(own):.4f}",
                "exact": f"{tally.exact / max(1, tally.quotes):.4f}",
                "ambiguous": f"{tally.ambiguous / len(own):.4f}",
                "tokens_mean": f"{tokens / len(own):.1f}",
                "ms_per_reflection": f"{1e3 * took / len(own):.2f}",
                "ms_per_token": f"{1e3 * took / tokens:.4f}",
                "token_time_vs_free": (
                    f"{per_token[mode] / per_token['free']:.3f}" if "free" in per_token else ""
                ),
            }
            append_row(args.csv, row)
            print("  ".join(f"{name} {row[name]}" for name in list(row)[9:]), flush=True)


async def wrong_rollouts(
    engine: LocalEngine, model: LoadedModel, config: Config, args: argparse.Namespace
) -> tuple[list[Group], dict[str, Verdict]]:
    """Groups with `args.rollouts` wrong rollouts; with a correct sibling if one is shown."""
    needs_sibling = args.model not in WITHOUT_DEMONSTRATION
    params = SamplingParams(
        max_new_tokens=config.sample.max_new_tokens, stop_token_ids=model.stop_token_ids
    )
    problems = load_problems(args.data)
    groups: list[Group] = []
    verdicts: dict[str, Verdict] = {}
    missing, step = args.rollouts, 0
    while missing > 0 and step * 16 < len(problems):
        sampled = await sample_groups(
            engine,
            problems[step * 16 : (step + 1) * 16],
            chat=make_chats(config.chat, model.tokenizer).student,
            group_size=config.sample.group_size,
            params=params,
            seed=0,
            step=step,
            max_prompt_tokens=config.sample.max_prompt_tokens,
        )
        step += 1
        own = verify_all(sampled, threshold=1.0)
        for group in sampled:
            wrong = sum(not own[rollout.id].success for rollout in group.rollouts)
            if wrong == 0 or (needs_sibling and wrong == len(group.rollouts)):
                continue
            groups.append(group)
            verdicts |= {rollout.id: own[rollout.id] for rollout in group.rollouts}
            missing -= wrong
    if missing > 0:
        raise SystemExit(
            f"{args.data}: {missing} more wrong rollouts are needed; give more problems"
        )
    return groups, verdicts


class Oracle:
    """The tokens that contain a quote, by llguidance's vocabulary reader."""

    def __init__(self, model: LoadedModel) -> None:
        from llguidance.hf import from_tokenizer

        self.tokenizer: Any = model.tokenizer
        self.reader = from_tokenizer(self.tokenizer, eos_token=list(model.stop_token_ids))
        self.token_bytes = TokenBytes(model.tokenizer)

    def tokens(self, rollout: Rollout, quote: str) -> list[tuple[int, int]]:
        """Per occurrence of the quote, the fewest tokens that contain it."""
        special = set(self.tokenizer.all_special_ids)
        pieces = [
            b"" if token in special else self.reader.decode_bytes([token])
            for token in rollout.completion_ids
        ]
        text, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
        needle = quote.encode()
        found, place = [], text.find(needle)
        while place >= 0:
            last = place + len(needle) - 1
            start = next(i for i, end in enumerate(ends) if end > place)
            found.append((start, next(i for i, end in enumerate(ends) if end > last) + 1))
            place = text.find(needle, place + 1)
        return found


def count_spans(
    reflections: Sequence[Reflection], rollouts: dict[str, Rollout], oracle: Oracle, rule: str
) -> Tally:
    tally = Tally()
    for reflection in reflections:
        if not reflection.quote:
            continue
        tally.quotes += 1
        rollout = rollouts[reflection.rollout_id]
        if rule == "encoded again":
            span = encoded_again(reflection.quote, rollout, oracle.tokenizer)
        else:
            pieces = oracle.token_bytes.of(rollout.completion_ids)
            match: Located | None
            if reflection.sentence is not None:
                match = locate_sentence(reflection.sentence, pieces)
            else:
                match = locate(reflection.quote, pieces)
            span = None if match is None else (match.start, match.end)
        places = oracle.tokens(rollout, reflection.quote)
        tally.found += span is not None
        tally.exact += span in places
        tally.ambiguous += len(places) > 1
    return tally


def encoded_again(quote: str, rollout: Rollout, tokenizer: Any) -> tuple[int, int] | None:
    """The rule of the method's public code: re-tokenize the text before the quote and the text up
    to its end, and count their tokens."""
    place = rollout.text.find(quote)
    if place < 0:
        return None

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return count(rollout.text[:place]), count(rollout.text[: place + len(quote)])


def learn(seeds: int) -> None:
    """Accuracy before and after training, for each arm and seed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, options in ARMS.items():
            for seed in range(seeds):
                trial = run_trial(seed, Path(folder) / options[1], options)
                row = {**environment(), "arm": name, "seed": seed}
                for split in ("dev", "ood"):
                    row[f"{split}_before"] = f"{trial.before(split):.1f}"
                    row[f"{split}_after"] = f"{trial.after(split):.1f}"
                append_row(LEARNING_CSV, row)
                print(name, seed, *list(row.values())[-4:], flush=True)


if __name__ == "__main__":
    main()
