"""The learner's forward and backward pass: padded, packed, and packed with shared prefixes.

    python bench/learner.py --data train.json     # all cases; rewrites the CSV
    python bench/learner.py --cases 256,8,64 --repeats 1 --csv /tmp/learner.csv

A case is one group: a prompt, G completions of a mean length (seeded, from half of it to one and a
half), and G teacher prompts, which are the prompt and 64 tokens of a reflection. `sciknoweval` has
the lengths of real prompts (--data) and of what SmolLM2-135M-Instruct answers to them. The layers
are SmolLM2-135M's, four of them unless --layers says otherwise, with random weights, in float32.

    padded  one row a sequence, all as long as the longest, the model's own attention
    packed  end to end, without padding, each sequence whole
    shared  the same, with shared prefixes computed once

The student goes forward and backward, with a random gradient at the distilled tokens' states, the
teacher forward. The candidates run in turns in one process; medians are compared. Peak memory is
that of a process of its own, beyond weights and gradients. FLOPs are computed: two for each weight
and token, four for each channel and pair of query and key that may see each other; a backward pass
counts twice a forward one. Padding counts like other tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, record, time_alternating
from loss import resident
from transformers import LlamaConfig, LlamaForCausalLM

from rosd_fast.batch.packing import pack
from rosd_fast.model.layouts import hidden_states, packed_forward
from rosd_fast.types import PackedSequences, TrainSample

CASES = ("512,8,128", "256,8,256", "2048,8,256", "sciknoweval")
CANDIDATES = ("padded", "packed", "shared")
REFLECTION = 64  # tokens that a teacher's prompt has beyond the student's
MAX_TOKENS = 16384  # pack.max_tokens
GROUPS, ROLLOUTS, LONGEST = 4, 8, 256  # of sciknoweval
VOCAB = 1024
CSV = RESULTS / "learner_cpu.csv"

Sequences = list[PackedSequences]


@dataclass(frozen=True, slots=True)
class Work:
    """What one candidate runs through the model, for the student or for the teacher."""

    packed: Sequences
    padded: bool

    @property
    def num_tokens(self) -> int:
        """The number of tokens, padding included."""
        return sum(
            len(one.lengths) * max(one.lengths) if self.padded else len(one.input_ids)
            for one in self.packed
        )

    def flops(self, model: LlamaForCausalLM) -> float:
        """The FLOPs of a forward pass."""
        config = model.config
        weights = sum(p.numel() for p in model.model.layers.parameters())
        channels = config.hidden_size * config.num_hidden_layers
        pairs = 0
        for one in self.packed:
            lengths = one.lengths
            if self.padded:
                pairs += len(lengths) * max(lengths) * (max(lengths) + 1) // 2
            else:
                pairs += int((one.position_ids + 1).sum())
        return 2.0 * weights * self.num_tokens + 4.0 * channels * pairs


def main() -> None:
    args = parse_arguments()
    model = build_model(args.layers)
    if args.memory:
        print(json.dumps(peak_memory(model, args.cases[0], args)))
        return
    cases = [case for case in args.cases if case != "sciknoweval" or args.data is not None]
    for case in set(args.cases) - set(cases):
        print(f"{case} is left out: it needs --data")
    for row in record(args.csv, (row for case in cases for row in measure(model, case, args))):
        print(
            f"{row['case']:12} {row['pass']:8} {row['candidate']:7} "
            f"{row['tokens']:>6} tokens {row['tflops']:>6} TFLOP {row['seconds']:>7} s "
            f"{row['packed_over_this']:>5}x peak {row['peak_mib']:>6} MiB",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--cases", nargs="+", default=CASES, help="prompt,G,response or sciknoweval"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, help="SciKnowEval's train.json, for sciknoweval")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--lengths", help=argparse.SUPPRESS)  # of sciknoweval, for --memory
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # pass, candidate
    return parser.parse_args()


def measure(
    model: LlamaForCausalLM, case: str, args: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """The rows of both passes."""
    lengths = sciknoweval_lengths(args.data) if case == "sciknoweval" else made_lengths(case)
    samples = build_samples(lengths)
    for side in ("student", "teacher"):
        works = {name: work_of(samples, side, name) for name in CANDIDATES}
        runs = {name: partial(run_pass, model, work, side) for name, work in works.items()}
        timed = {
            name: timing
            for name, (timing, _) in time_alternating(runs, repeats=args.repeats).items()
        }
        for name, work in works.items():
            seconds = timed[name].median_s
            yield {
                "case": case,
                "pass": "student fwd+bwd" if side == "student" else "teacher fwd",
                "candidate": name,
                "layers": args.layers,
                "sequences": len(samples),
                "tokens": work.num_tokens,
                "tflops": f"{work.flops(model) * (3 if side == 'student' else 1) / 1e12:.3f}",
                "seconds": f"{seconds:.3f}",
                "spread": f"{timed[name].spread_frac:.2f}",
                "packed_over_this": f"{timed['packed'].median_s / seconds:.2f}",
                "peak_mib": f"{run_memory(case, side, name, lengths, args):.0f}",
            }


def build_model(num_layers: int, *, vocab_size: int = VOCAB, tied: bool = True) -> LlamaForCausalLM:
    """A model with layers of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def made_lengths(case: str) -> list[tuple[int, list[int]]]:
    """ "512,8,128" -> the length of the prompt, and those of eight completions."""
    prompt, group_size, response = map(int, case.split(","))
    draw = random.Random(case)
    return [(prompt, [draw.randint(response // 2, response * 3 // 2) for _ in range(group_size)])]


def sciknoweval_lengths(data: Path) -> list[tuple[int, list[int]]]:
    """The lengths of real prompts and of SmolLM2's answers to them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rosd_fast.data.problems import load_problems
    from rosd_fast.engines.local.engine import LocalEngine
    from rosd_fast.model.smollm2 import smollm2_folder
    from rosd_fast.text.chat import chat_format
    from rosd_fast.types import GenerationRequest, SamplingParams

    folder = smollm2_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = chat_format(tokenizer)
    problems = load_problems(str(data))[:GROUPS]
    stop = tokenizer.eos_token_id
    params = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=(stop,))
    requests = [
        GenerationRequest(
            id=problem.id,
            prompt_ids=chat.render_problem(problem),
            params=params,
            n=ROLLOUTS,
        )
        for problem in problems
    ]
    done = asyncio.run(LocalEngine(model, pad_token_id=stop).generate(requests))
    return [
        (
            len(request.prompt_ids),
            [len(one.completion_ids) for one in done if one.request_id == request.id],
        )
        for request in requests
    ]


def build_samples(lengths: Sequence[tuple[int, list[int]]]) -> list[TrainSample]:
    """Samples of random tokens; half of a completion is distilled."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(count))

    samples = []
    for group, (prompt_length, completions) in enumerate(lengths):
        prompt_ids = ids(prompt_length)
        for index, length in enumerate(completions):
            samples.append(
                TrainSample(
                    rollout_id=f"{group}/{index}",
                    problem_id=str(group),
                    student_prompt_ids=prompt_ids,
                    teacher_prompt_ids=prompt_ids + ids(REFLECTION),
                    completion_ids=ids(length),
                    logprobs=(0.0,) * length,
                    start=length // 2,
                    end=length,
                )
            )
    return samples


def work_of(samples: Sequence[TrainSample], side: str, candidate: str) -> Work:
    min_shared = 16 if candidate == "shared" else 0
    batches = pack(samples, max_tokens=MAX_TOKENS, min_shared=min_shared)
    return Work([getattr(batch, side) for batch in batches], padded=candidate == "padded")


def run_pass(model: LlamaForCausalLM, work: Work, side: str) -> None:
    """Run forward and backward for the student, forward for the teacher."""
    model.zero_grad(set_to_none=False)
    forward: Callable[..., torch.Tensor] = padded_states if work.padded else packed_states
    with (
        torch.set_grad_enabled(side == "student"),
        nullcontext() if work.padded else packed_forward(model),
    ):
        for one in work.packed:
            states = forward(model, one)
            if side == "student":
                generator = torch.Generator().manual_seed(0)
                states.backward(torch.randn(states.shape, generator=generator))


def packed_states(model: LlamaForCausalLM, packed: PackedSequences) -> torch.Tensor:
    return hidden_states(model, packed).index_select(0, packed.gather)


def padded_states(model: LlamaForCausalLM, packed: PackedSequences) -> torch.Tensor:
    """States from one row per sequence, padded on the right."""
    lengths = packed.lengths
    rows = packed.input_ids.split(lengths)
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    output = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return output.last_hidden_state[mask].index_select(0, packed.gather)


def run_memory(
    case: str, side: str, candidate: str, lengths: Any, args: argparse.Namespace
) -> float:
    """The peak MiB of one candidate, measured in a process of its own."""
    command = [sys.executable, __file__, "--cases", case, "--layers", str(args.layers)]
    command += ["--lengths", json.dumps(lengths), "--memory", side, candidate]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(model: LlamaForCausalLM, case: str, args: argparse.Namespace) -> float:
    """Peak resident memory of one pass beyond weights and gradients, in MiB."""
    side, candidate = args.memory
    few = build_samples([(20, [4, 4])])
    run_pass(model, work_of(few, side, candidate), side)  # loads what is loaded once
    work = work_of(build_samples(json.loads(args.lengths)), side, candidate)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    run_pass(model, work, side)
    return max(0.0, resident("VmHWM") - before) / 2**20


if __name__ == "__main__":
    main()
