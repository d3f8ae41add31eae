"""Rank 0's own work in a step: what the controller computes around sampling and learning.

    python bench/host.py                # a step of the paper's size: 32 problems, 8 rollouts each
    python bench/host.py --scale 0.125  # 4 problems x 8 rollouts x 8192 tokens
    python bench/host.py --scale 0.001  # a miniature, for tests

No server and no model: the rollouts are made of words of the tokenizer's vocabulary, Zipf
distributed, with sums between them. Half of them are right. The tokenizer is SmolLM2's, or with
--model quickstart that of the quickstart model. All options have their defaults, but that
completions are as long as `--tokens`.

    reflection_prompts   `build_reflection_requests`: prompts cut to 8192 tokens, and grammars
    read_answers         the servers' answers, as bytes, to completions
    decode               ids to text
    send_requests        the reflectors' requests, to bytes
    thinking             where the answer begins
    locate               the errors' tokens, their bytes included
    build_samples        the teacher's prompts, with explanations of 256 words
    pack                 micro-batches for 12 ranks
    pickle               these, to the ranks and back
    metrics              `diag/*`
    write_rollouts       `rollouts/step_*.jsonl`

Seconds are those of one process: `cpu_s` of all its threads, `wall_s` by the clock; `step_cpu_s` is
cpu_s divided by the scale. Each stage runs once, as in a run, on inputs that it has not seen. Adds
rows to bench/results/host.csv.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, append_row, environment
from transformers import AutoTokenizer

from rosd_fast.batch.packing import pack
from rosd_fast.batch.samples import build_samples
from rosd_fast.config import ChatConfig, PackConfig, ReflectConfig, SpanConfig, TeacherConfig
from rosd_fast.config.chat import make_chats
from rosd_fast.engines.sglang.answers import read_json
from rosd_fast.engines.sglang.engine import request_body
from rosd_fast.model.smollm2 import smollm2_folder
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.requests import build_reflection_requests
from rosd_fast.report import write_rollouts
from rosd_fast.report.diagnostics import position_metrics, span_metrics, token_metrics
from rosd_fast.text.decode import decode
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Group, Problem, Reflection, Rollout, Verdict

CSV = RESULTS / "host.csv"
PROBLEMS, GROUP_SIZE, RANKS = 32, 8, 12
EXPLANATION_WORDS = 256


def main() -> None:
    args = parse_arguments()
    folder = smollm2_folder() if args.model == "smollm2" else MODEL_DIR
    step = MadeStep.make(AutoTokenizer.from_pretrained(folder), args.scale, args.tokens)
    shared = {
        **environment(),
        "tokenizer": args.model,
        "problems": len(step.groups),
        "group_size": len(step.groups[0].rollouts),
        "tokens": args.tokens,
    }
    scale = len(step.rollouts) / (PROBLEMS * GROUP_SIZE)
    total = 0.0
    for name, cpu_s, wall_s in measured(step):
        total += cpu_s / scale
        row = {
            **shared,
            "stage": name,
            "cpu_s": f"{cpu_s:.3f}",
            "wall_s": f"{wall_s:.3f}",
            "step_cpu_s": f"{cpu_s / scale:.2f}",
        }
        append_row(args.csv, row)
        print(f"{name:20} {cpu_s:8.2f} s of CPU  {cpu_s / scale:8.1f} s a step", flush=True)
    print(f"{'sum':20} {'':8}             {total:8.1f} s a step")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rollouts")
    parser.add_argument("--tokens", type=int, default=8192, help="per rollout")
    parser.add_argument("--model", choices=("smollm2", "quickstart"), default="smollm2")
    parser.add_argument("--csv", type=Path, default=CSV)
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeStep:
    """A step's rollouts, with all that is said about them, by rollout id."""

    tokenizer: Any
    groups: list[Group]
    verdicts: Mapping[str, Verdict]
    reflections: Mapping[str, Reflection]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @classmethod
    def make(cls, tokenizer: Any, scale: float, tokens: int) -> MadeStep:
        """A step of `scale` times the paper's rollouts, of `tokens` tokens each, at least two."""
        write = Writer(tokenizer)
        count = max(2, round(scale * PROBLEMS * GROUP_SIZE))
        size = min(count, GROUP_SIZE)
        groups = [write.group(index, size, tokens) for index in range(max(1, count // size))]
        verdicts, reflections = {}, {}
        for group in groups:
            for index, rollout in enumerate(group.rollouts):
                success = index % 2 == 1
                verdicts[rollout.id] = Verdict(
                    rollout_id=rollout.id, score=float(success), success=success, answer="4"
                )
                reflections[rollout.id] = write.reflection(rollout, correct=success)
        return cls(tokenizer=tokenizer, groups=groups, verdicts=verdicts, reflections=reflections)


class Writer:
    """Writes texts of a tokenizer's words."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        words = [text.strip() for text in texts if text.startswith(" ")]
        self.words = [word for word in words if word.isalpha() and word.isascii()]
        self.draw = random.Random(0)

    def sentence(self, words: int) -> str:
        """Words of which the frequent ones are as frequent as in prose, and a sum."""
        count, draw = len(self.words), self.draw
        text = " ".join(self.words[int(count ** draw.random()) - 1] for _ in range(words))
        return f"{text} is {draw.randrange(1000)} + {draw.randrange(99)} = {draw.randrange(2000)}."

    def text(self, words: int) -> str:
        return "\n".join(self.sentence(12) for _ in range(-(-words // 12)))

    def group(self, index: int, size: int, tokens: int) -> Group:
        problem = Problem(
            id=f"made:{index}", domain="made", prompt=self.text(48), answer="4", verifier="number"
        )
        prompt_ids = tuple(self.tokenizer.encode(problem.prompt))
        rollouts = tuple(self.rollout(problem, i, prompt_ids, tokens) for i in range(size))
        return Group(problem=problem, rollouts=rollouts)

    def rollout(
        self, problem: Problem, index: int, prompt_ids: tuple[int, ...], tokens: int
    ) -> Rollout:
        ids: list[int] = []
        while len(ids) < tokens - 1:
            ids += self.tokenizer.encode(self.text(600) + "\n", add_special_tokens=False)
        ids = [*ids[: tokens - 1], self.tokenizer.eos_token_id]
        return Rollout(
            id=f"{problem.id}/{index}",
            problem_id=problem.id,
            prompt_ids=prompt_ids,
            completion_ids=tuple(ids),
            logprobs=tuple(-self.draw.random() for _ in ids),
            text=decode(self.tokenizer, ids),
            finish_reason="stop",
            policy_version=0,
        )

    def reflection(self, rollout: Rollout, *, correct: bool) -> Reflection:
        """A reflection that quotes a few words from the middle of the rollout."""
        middle = len(rollout.text) // 2
        quote = None if correct else " ".join(rollout.text[middle : middle + 80].split()[1:6])
        explanation = self.text(EXPLANATION_WORDS)
        return Reflection(
            rollout_id=rollout.id,
            demonstration_id=None,
            correct=correct,
            text=f"<error_quote>{quote}</error_quote><explanation>{explanation}</explanation>",
            quote=quote,
            explanation=explanation,
            well_formed=True,
            num_tokens=EXPLANATION_WORDS,
            mode="verbatim",
        )


def measured(step: MadeStep) -> Iterator[tuple[str, float, float]]:
    """(stage, seconds of CPU, seconds by the clock) of each stage."""
    chats = make_chats(ChatConfig(), step.tokenizer)
    token_bytes = TokenBytes(step.tokenizer)
    answers = made_answers(step)

    def timed(name: str, run: Callable[[], Any]) -> tuple[Any, tuple[str, float, float]]:
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        return result, (name, time.process_time() - cpu, time.perf_counter() - wall)

    _, times = timed("read_answers", lambda: [read_answer(data) for data in answers])
    yield times
    _, times = timed(
        "decode", lambda: [decode(step.tokenizer, r.completion_ids) for r in step.rollouts]
    )
    yield times
    tasks, times = timed(
        "reflection_prompts",
        lambda: [
            build_reflection_requests(
                [group],
                step.verdicts,
                config=ReflectConfig(),
                chats=chats,
                stop_token_ids=(step.tokenizer.eos_token_id,),
                seed=0,
                step=1,
                token_bytes=token_bytes,
            )
            for group in step.groups
        ],
    )
    yield times
    requests = [task.request for group_tasks in tasks for task in group_tasks]
    _, times = timed(
        "send_requests",
        lambda: [
            json.dumps(request_body(request, 4096, 0, trainer_id="bench")).encode()
            for request in requests
        ],
    )
    yield times
    lengths, times = timed("thinking", lambda: chats.thinking_lengths(step.groups))
    yield times
    located, times = timed(
        "locate",
        lambda: locate_errors(
            step.groups,
            step.verdicts,
            step.reflections,
            token_bytes=token_bytes,
            config=SpanConfig(),
            thinking=lengths,
        ),
    )
    yield times
    samples, times = timed(
        "build_samples",
        lambda: build_samples(
            step.groups,
            step.reflections,
            located.spans,
            chat=chats.teacher,
            config=TeacherConfig(),
        ),
    )
    yield times
    batches, times = timed(
        "pack", lambda: pack(samples, max_tokens=PackConfig().max_tokens, num_ranks=RANKS)
    )
    yield times
    _, times = timed("pickle", lambda: pickle.loads(pickle.dumps(batches)))
    yield times
    per_token = {name: [0.123456] * (s.end - s.start) for name, s in located.spans.items()}
    _, times = timed(
        "metrics",
        lambda: (
            position_metrics(samples, per_token),
            span_metrics(located.spans, per_token, before=0.1),
            token_metrics(
                samples,
                special_ids={*step.tokenizer.all_special_ids},
                num_thinking=lambda name: lengths.get(name, 0),
            ),
        ),
    )
    yield times
    with tempfile.TemporaryDirectory() as folder:
        _, times = timed(
            "write_rollouts",
            lambda: write_rollouts(
                Path(folder) / "step_000001.jsonl",
                step=1,
                groups=step.groups,
                verdicts=step.verdicts,
                reflections=step.reflections,
                spans=located.spans,
                per_token=per_token,
                token_bytes=token_bytes,
            ),
        )
    yield times


def made_answers(step: MadeStep) -> list[bytes]:
    """One answer of /generate per group, as SGLang 0.5.23 writes it."""
    return [
        json.dumps(
            [completion(rollout) for rollout in group.rollouts], separators=(",", ":")
        ).encode()
        for group in step.groups
    ]


def completion(rollout: Rollout) -> dict[str, Any]:
    pairs = zip(rollout.logprobs, rollout.completion_ids, strict=True)
    return {
        "text": rollout.text,
        "output_ids": list(rollout.completion_ids),
        "meta_info": {
            "id": rollout.id,
            "finish_reason": {"type": "stop", "matched": rollout.completion_ids[-1]},
            "prompt_tokens": len(rollout.prompt_ids),
            "weight_version": "0",
            "num_retractions": 0,
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
            "completion_tokens": len(rollout.completion_ids),
            "cached_tokens": 0,
        },
    }


def read_answer(data: bytes) -> Any:
    """The ids and log-probabilities of the completions, as the engine reads them."""
    return [
        (tuple(item["output_ids"]), tuple(item["meta_info"]["output_token_logprobs"]))
        for item in read_json(data)
    ]


if __name__ == "__main__":
    main()
