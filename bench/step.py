"""One optimizer step of SDPO: TRL's trainer and this one, alone and beside a busy process.

    python bench/step.py                          # both models; rewrites the CSV; about 6 minutes
    python bench/step.py --models quickstart --repeats 1 --csv /tmp/step.csv
    python bench/step.py --busy 0 1               # also with one process that keeps a core busy

Both take the same model, the same prompts, eight completions per prompt of exactly `--length`
tokens (no early stop), the same teacher prompt (the problem and the group's one correct completion,
which the benchmark chooses: the first), JSD over the full vocabulary, a frozen teacher and AdamW in
float32. TRL is `trl.experimental.sdpo`, in micro-batches of `--trl-batch` sequences, without
gradient checkpointing, which is the faster choice.

The candidates run in turns, each in a process of its own: a step to warm up, then `--steps` that
count. Seconds are medians. `peak_mib` is that of the whole process, `used_mib` the same without the
libraries: weights, teacher, gradients, moments, caches and activations. With `--busy 1` another
process computes meanwhile, without a pause. `trl` has torch's own number of threads, as a script
has; `ours` chooses its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import RESULTS, record, version

CANDIDATES = ("trl", "ours")
PROBLEMS = {"quickstart": 16, "30m": 4}
GROUP = 8
LR = 1e-5
MAX_PROMPT, MAX_TEACHER = 192, 512
SOLUTION = "\nCorrect solution:\n\n{}\n\n"
INSTRUCTION = "\n\nCorrectly solve the original question.\n"
STAGES = ("sample", "teacher", "loss", "optimizer")
CSV = RESULTS / "step_cpu.csv"


def main() -> None:
    args = parse_arguments()
    if args.measure:
        run = {"model": make_model, "trl": run_trl, "ours": run_ours}[args.measure]
        measured = run(args.models[0], args)
        args.result.write_text(json.dumps(measured))
        return
    for row in record(args.csv, rows(args)):
        print(
            f"{row['model']:10} {row['busy']} busy  {row['candidate']:5} {row['step_s']:>7} s a "
            f"step (x{row['ours_over_this']} ours/this, x{row['alone_over_this']} alone/this)  "
            f"peak {row['peak_mib']} MiB, without libraries {row['used_mib']} MiB",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--busy", nargs="+", type=int, default=[0], help="busy processes beside it")
    parser.add_argument("--problems", type=int, help="per step; default: 16, and 4 for 30m")
    parser.add_argument("--length", type=int, default=96, help="tokens of each completion")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-batch", type=int, default=16)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--measure", choices=("model", *CANDIDATES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of each model and number of busy processes, the candidates one after another."""
    for model in args.models:
        alone: dict[str, float] = {}
        for busy in sorted(args.busy):
            found = measure(model, busy, args)
            seconds = {name: summary(runs)["step_s"] for name, runs in found.items()}
            alone = alone or seconds
            for name, runs in found.items():
                figures = summary(runs)
                yield {
                    "model": model,
                    "parameters": runs[0]["parameters"],
                    "candidate": name,
                    "trl": version("trl"),
                    "busy": busy,
                    "threads": runs[-1]["threads"],
                    "rollouts": GROUP * num_problems(model, args),
                    "tokens": args.length,
                    **{key: f"{value:.3f}" for key, value in figures.items()},
                    "ours_over_this": f"{seconds.get('ours', float('nan')) / seconds[name]:.2f}",
                    "alone_over_this": f"{alone[name] / seconds[name]:.2f}",
                    "peak_mib": f"{statistics.median(run['peak_mib'] for run in runs):.0f}",
                    "used_mib": f"{statistics.median(run['used_mib'] for run in runs):.0f}",
                }


def measure(model: str, busy: int, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs of each candidate, in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.candidates}
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder, busy_processes(busy):
        if model != "quickstart":
            run_apart(model, "model", Path(folder, "model"), args)
        for turn in range(args.repeats):
            for name, runs in found.items():
                runs.append(run_apart(model, name, Path(folder, f"{name}{turn}"), args))
    return found


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep `count` processes computing for the duration of a block."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_apart(model: str, name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one candidate, or make the model, in a process of its own and a new folder."""
    folder.mkdir()
    result = folder / "result.json"
    command = [sys.executable, __file__, "--measure", name, "--models", model]
    command += ["--length", str(args.length), "--steps", str(args.steps)]
    command += ["--trl-batch", str(args.trl_batch), "--problems", str(num_problems(model, args))]
    command += ["--folder", str(folder), "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed on {model}:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over all steps that count: of the whole step and of its stages."""
    steps = [step for run in runs for step in run["steps"]]
    totals = [step["step"] for step in steps]
    middle = statistics.median(totals)
    stages = {f"{s}_s": statistics.median(step.get(s, 0.0) for step in steps) for s in STAGES}
    return {"step_s": middle, "spread": (max(totals) - min(totals)) / middle, **stages}


def num_problems(model: str, args: argparse.Namespace) -> int:
    return args.problems or PROBLEMS[model]


class Clock:
    """Seconds of the stages of each step. A stage within another counts for itself only."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.libraries = resident("VmRSS")  # bytes; the clock is made when all are loaded
        self.peak = 0  # bytes of the process, up to the last step
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, owner: Any, method: str, stage: str) -> None:
        """Count the time of a method of a class or an object as part of a stage."""
        function: Callable[..., Any] = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self._seconds[stage] += whole - self._inner.pop()
                self._inner[-1] += whole

        setattr(owner, method, run)

    def end_step(self, seconds: float) -> None:
        self.steps.append({"step": seconds, **self._seconds})
        self._seconds.clear()
        self.peak = resident("VmHWM")

    def result(self, model: Any) -> dict[str, Any]:
        """What a process tells, without the first step."""
        import torch

        return {
            "steps": self.steps[1:],
            "parameters": sum(p.numel() for p in model.parameters()),
            "threads": torch.get_num_threads(),
            "peak_mib": self.peak / 2**20,
            "used_mib": (self.peak - self.libraries) / 2**20,
        }


def resident(field: str) -> int:
    """Read VmRSS, or VmHWM (the peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory is measured on Linux only")


def model_folder(model: str, folder: Path) -> Path:
    """The folder of the embedded model, or that which `make_model` has written."""
    from rosd_fast.quickstart import MODEL_DIR

    return MODEL_DIR if model == "quickstart" else folder.parent / "model"


def make_model(_: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write a random model of 30 million parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rosd_fast.quickstart import MODEL_DIR

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    return {}


def run_trl(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of TRL's SDPO trainer."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from rosd_fast.quickstart.tasks import load_split

    source = model_folder(model, args.folder)
    problems = load_split("train")[: args.problems]
    prompts = [{"prompt": [{"role": "user", "content": problem.prompt}]} for problem in problems]
    clock = Clock()

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step(time.perf_counter() - self.begun)

    def first_is_right(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(place % GROUP == 0) for place in range(len(completions))]

    trainer = SDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        reward_funcs=first_is_right,
        args=SDPOConfig(
            output_dir=str(args.folder / "trl"),
            per_device_train_batch_size=args.trl_batch,
            gradient_accumulation_steps=len(problems) * GROUP // args.trl_batch,
            num_generations=GROUP,
            max_prompt_length=MAX_PROMPT,
            max_completion_length=args.length,
            generation_kwargs={"min_new_tokens": args.length},
            top_k=0,
            max_reprompt_len=MAX_TEACHER,
            reprompt_template="{prompt}{solution}{feedback}" + INSTRUCTION,
            solution_template=SOLUTION.format("{successful_previous_attempt}"),
            distillation_mode="full_logits",
            distillation_alpha=0.5,
            distillation_is_clip=None,
            teacher_model_kind="base",
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=1 + args.steps,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[Steps()],
    )
    clock.timed(trainer, "sample_rollouts", "sample")
    clock.timed(trainer, "_prepare_training_batch", "other")
    clock.timed(trainer.teacher_model, "forward", "teacher")
    clock.timed(trainer, "training_step", "loss")
    trainer.create_optimizer()
    clock.timed(trainer.optimizer, "step", "optimizer")
    trainer.train()
    return clock.result(trainer.model)


def run_ours(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of `rosd-fast train --method sdpo`, with the verdicts and the length of the benchmark.

    All else is what the command does: it loads, checks, samples, writes rollouts and metrics.
    """
    from rosd_fast.threads import wait_briefly

    wait_briefly()
    from dataclasses import replace

    from rosd_fast.config.load import load_config
    from rosd_fast.engines import factory
    from rosd_fast.engines.local.engine import LocalEngine
    from rosd_fast.quickstart.tasks import load_split
    from rosd_fast.report.metrics import read_metrics
    from rosd_fast.report.stages import Stage
    from rosd_fast.train import train
    from rosd_fast.trainer.learner import Learner
    from rosd_fast.trainer.teacher import Teacher
    from rosd_fast.types import Verdict
    from rosd_fast.verify import VerifierPool

    clock, models, lengths = Clock(), [], []

    class WithoutStop(LocalEngine):
        """Samples completions of the whole length."""

        def _slices(self, requests: Any) -> Any:
            params = [replace(request.params, stop_token_ids=()) for request in requests]
            return super()._slices(
                [replace(r, params=p) for r, p in zip(requests, params, strict=True)]
            )

    async def first_is_right(_: VerifierPool, groups: Any, **__: Any) -> dict[str, Verdict]:
        lengths.extend(len(r.completion_ids) for group in groups for r in group.rollouts)
        return {
            rollout.id: Verdict(
                rollout_id=rollout.id, score=float(not place), success=not place, answer=None
            )
            for group in groups
            for place, rollout in enumerate(group.rollouts)
        }

    clock.timed(Teacher, "_hidden_states", "teacher")
    clock.timed(Learner, "_update", "optimizer")
    clock.timed(Learner, "step", "loss")
    step = Learner.step

    def counted(learner: Learner, *batches: Any) -> Any:
        models.append(learner.model)
        try:
            return step(learner, *batches)
        finally:
            clock.end_step(0.0)

    replaced = {
        (factory, "LocalEngine"): WithoutStop,
        (VerifierPool, "verify"): first_is_right,
        (Learner, "step"): counted,
    }
    for (owner, name), value in replaced.items():
        setattr(owner, name, value)
    data = args.folder / "train.jsonl"
    names = ("id", "domain", "prompt", "answer", "verifier")
    problems = load_split("train")[: args.problems]
    data.write_text("".join(json.dumps({n: getattr(p, n) for n in names}) + "\n" for p in problems))
    config = load_config(
        {
            "model": str(model_folder(model, args.folder)),
            "method": "sdpo",
            "steps": 1 + args.steps,
            "device": "cpu",
            "out": str(args.folder),
            "name": "run",
            "data.train": str(data),
            "sample.problems_per_step": len(problems),
            "sample.group_size": GROUP,
            "sample.max_new_tokens": args.length,
            "sample.max_prompt_tokens": MAX_PROMPT,
            "teacher.kind": "frozen",
            "teacher.max_prompt_tokens": MAX_TEACHER,
            "teacher.solution_template": "{problem}"
            + SOLUTION.format("{demonstration}")
            + INSTRUCTION,
            "loss.importance_clip": None,
            "optim.lr": LR,
            "optim.warmup_steps": 0,
            "checkpoint.every": 0,
        },
        presets=("quickstart",),
    )
    train(config)
    assert set(lengths) == {args.length}, "a completion stopped early"
    trained = [row for row in read_metrics(args.folder / "run/metrics.jsonl") if row["step"]]
    for row, of_step in zip(trained, clock.steps, strict=True):
        of_step["step"] = row["time/step_s"]
        of_step["sample"] = row.get(Stage.SAMPLE.metric, 0.0)
    return clock.result(models[0])


if __name__ == "__main__":
    main()
