"""The divergence, forward and backward: `span_divergence` against eager PyTorch, Liger and TRL.

    python bench/loss.py      # all shapes; rewrites the CSV, the picture and README.md's table
    python bench/loss.py --tokens 128 --repeats 2 --csv /tmp/loss.csv --picture /tmp/loss.png
    python bench/loss.py --tokens 2048 --csv /tmp/loss.csv --picture /tmp/loss.png   # slow

Float32, gradients to student hidden states and head. The candidates alternate in one process, and
their medians are compared, also with the floor: the GEMM sweeps over the head that dense gradients
need (4; without the head's gradient 3), and nothing else. In a separate process per candidate, peak
memory beyond the inputs and the gradients is measured and the GEMMs' FLOPs are counted, in units of
one sweep over the head.

The settings are JSD, and in fewer candidates the forward KL, JSD with a frozen head (LoRA), with a
soft cap of 30, and over the student's 100 most likely tokens and the tail. TRL's divergence runs in
chunks of 256 tokens.

Inputs for a vocabulary of 49152: SmolLM2-135M-Instruct samples answers. Its states on them are the
student's; its states on the same tokens, under a prompt that reveals the right answer, are the
teacher's. "sharp" are the same states multiplied by 2.7, as if sampled at a temperature of 0.37:
their entropy is 0.5 nats on average and not 2.2, like that of larger models. For a vocabulary of
151936 the states and the head are synthetic: each state is a mixture of eight rows of a random
head, drawn by Zipf's law, so that the entropies are similar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness import record, time_alternating, version
from loss_report import CSV, PICTURE, README, draw, report
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rosd_kernels import VocabularyOrder, entry, span_divergence
from rosd_kernels.testing.peers import (
    eager_jsd,
    gemm_floor,
    liger_jsd,
    peaked_states,
    trl_divergence,
)

EPS = 2.0**-12
BETA = 0.5
LEARN_TOKENS = 1024  # tokens from which the order is learned; none of them is timed
SHAPES = {"smollm2": (49152, 576), "sharp": (49152, 576), "made": (151936, 1024)}
TOKENS = {"smollm2": (128, 512), "sharp": (512,), "made": (128,)}  # that fit a few minutes
SHARPNESS = 2.7
PEERS = ("eager", "liger", "trl")
CANDIDATES = (
    *("chunked", "chunked entry", "tiled exact", "tiled entry", "tiled entry, ordered"),
    *PEERS,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is computed, and by whom."""

    options: dict[str, Any] = field(default_factory=dict)  # of `span_divergence`
    candidates: tuple[str, ...] = ("chunked", "chunked entry", "trl")
    is_frozen: bool = False  # the head has no gradient


SETTINGS = {
    "jsd": Setting(candidates=CANDIDATES),
    "forward_kl": Setting({"divergence": "forward_kl"}),
    "frozen head": Setting(is_frozen=True),
    "softcap": Setting({"softcap": 30.0}),
    "top-100 + tail": Setting({"top_k": 100}, candidates=("chunked",)),
}
FEWER = ("smollm2", 512)  # states and tokens of the settings beyond JSD

Step = Callable[[], Any]  # forward and backward


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one shape; student and teacher share the head."""

    student: Tensor  # [N, H]
    teacher: Tensor  # [N, H]
    head: Tensor  # [V, H]
    permutation_mass: Tensor  # [V] state of a VocabularyOrder that saw other tokens

    @classmethod
    def load(cls, file: Path, num_tokens: int) -> Inputs:
        # Copied, because a mapped file counts as resident memory only after it was read.
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        return cls(
            tensors["student"][:num_tokens],
            tensors["teacher"][:num_tokens],
            tensors["head"],
            tensors["mass"],
        )

    def of(self, setting: Setting) -> Inputs:
        """These tensors, with the gradients that a setting wants."""
        self.student.requires_grad_()
        self.head.requires_grad_(not setting.is_frozen)
        return self


def main() -> None:
    args = parse_arguments()
    if args.memory:
        print(json.dumps(peak_and_units(args)))
        return
    rows = [*record(args.csv, measure_all(args))]
    if args.csv == CSV:
        report(rows, args.picture, README)
    else:
        draw(rows, args.picture)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="for every source; default: TOKENS")
    parser.add_argument("--sources", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=CSV, help="file to write")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument(
        "--memory", nargs=3, metavar=("SETTING", "CANDIDATE", "FILE"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokens = {source: tuple(args.tokens or TOKENS[source]) for source in args.sources}
    most = max((max(tokens[s]) for s in args.sources if s != "made"), default=0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "states.safetensors"
        sampled: dict[str, Tensor] | None = None
        for source in args.sources:
            if source == "made":
                states = made_states(max(tokens[source]))
            else:
                sampled = sampled or smollm2_states(most)
                states = sharpened(sampled) if source == "sharp" else sampled
            save_file(states, file)
            for num_tokens in tokens[source]:
                for name in SETTINGS:
                    if name == "jsd" or (source, num_tokens) == FEWER:
                        yield from measure(source, name, file, num_tokens, args)


def measure(
    source: str, setting_name: str, file: Path, num_tokens: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a CSV row per candidate, and one for the floor."""
    setting = SETTINGS[setting_name]
    inputs = Inputs.load(file, num_tokens).of(setting)
    steps: dict[str, Step] = {name: candidate(name, setting, inputs) for name in setting.candidates}
    steps["floor"] = gemm_floor(
        inputs.student, inputs.teacher, inputs.head, is_frozen=setting.is_frozen
    )
    timed = time_alternating(steps, repeats=args.repeats)
    shown = span_divergence(
        inputs.student.detach(),
        inputs.teacher,
        inputs.head.detach(),
        token_ids=torch.zeros(num_tokens, dtype=torch.long),
    )
    assert shown.student_entropy is not None
    seconds = {name: timing.median_s for name, (timing, _) in timed.items()}
    V, H = SHAPES[source]
    for name, (timing, results) in timed.items():
        memory, units = math.nan, 3.0 if setting.is_frozen else 4.0
        if name != "floor":
            memory, units = run_memory(setting_name, name, file, num_tokens)
        ratios = {
            f"vs_{other}": f"{timing.median_s / seconds[other]:.3f}" if other in seconds else ""
            for other in (*PEERS, "floor")
        }
        row = {
            "liger_kernel": version("liger_kernel"),
            "trl": version("trl"),
            "threads": torch.get_num_threads(),
            "states": source,
            "setting": setting_name,
            "tokens": num_tokens,
            "vocab": V,
            "hidden": H,
            "student_entropy": f"{shown.student_entropy.mean():.3f}",
            "candidate": name,
            "repeats": args.repeats,
            "median_s": f"{timing.median_s:.4f}",
            "spread_frac": f"{timing.spread_frac:.2f}",
            **ratios,
            "active_frac": "" if results[-1] is None else f"{results[-1]:.4f}",
            "units": f"{units:.2f}",
            "peak_mib": f"{memory:.0f}",
        }
        print(
            f"{source:8} N {num_tokens:5} {setting_name:14} {name:21} {timing.median_s:8.3f} s  "
            f"x eager {row['vs_eager']:5}  x liger {row['vs_liger']:5}  x trl {row['vs_trl']:5}  "
            f"x floor {row['vs_floor']}  units {row['units']}  peak {row['peak_mib']:>6} MiB  "
            f"active {row['active_frac']}",
            flush=True,
        )
        yield row


def candidate(name: str, setting: Setting, inputs: Inputs, *, factor: float = 1.0) -> Step:
    """Return a function that runs forward and backward, and returns the active fraction or None.

    factor: of the loss; one other than 1 has the whole gradient of the head written.
    """
    if name in PEERS:
        peer: Callable[..., Tensor] = {"eager": eager_jsd, "liger": liger_jsd}.get(
            name, trl_divergence
        )
        options: dict[str, Any] = {"beta": BETA}
        if setting.options.get("divergence") == "forward_kl":
            options["beta"] = 0.0
        if "softcap" in setting.options:
            options["softcap"] = setting.options["softcap"]

        def forward(inputs: Inputs) -> Any:
            return peer(inputs.student, inputs.teacher, inputs.head, **options)
    else:
        chosen = ours(name, inputs) | setting.options

        def forward(inputs: Inputs) -> Any:
            return span_divergence(inputs.student, inputs.teacher, inputs.head, **chosen)

    def step() -> float | None:
        inputs.student.grad = inputs.head.grad = None
        out = forward(inputs)
        loss = out if isinstance(out, Tensor) else out.loss
        (loss if factor == 1 else factor * loss).backward()
        return None if isinstance(out, Tensor) else out.stats.active_frac

    return step


def ours(name: str, inputs: Inputs) -> dict[str, Any]:
    options: dict[str, Any] = {"divergence": "jsd", "beta": BETA, "strategy": name.split()[0]}
    if "entry" in name:
        order = None
        if "ordered" in name:
            order = VocabularyOrder(inputs.head.shape[0], LEARN_TOKENS)
            seen = torch.tensor(LEARN_TOKENS)
            order.load_state_dict({"mass": inputs.permutation_mass, "num_seen": seen})
        options["sparsity"] = entry(EPS, order)
    return options


def run_memory(setting: str, name: str, file: Path, num_tokens: int) -> list[float]:
    """Peak MiB and units of one candidate, measured in a separate process."""
    command = [sys.executable, __file__, "--tokens", str(num_tokens)]
    command += ["--memory", setting, name, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_and_units(args: argparse.Namespace) -> list[float]:
    """Peak resident MiB of one step, beyond the memory before it and the gradients; GEMM units."""
    setting_name, name, file = args.memory
    setting = SETTINGS[setting_name]
    inputs = Inputs.load(Path(file), args.tokens[0]).of(setting)
    few = Inputs(inputs.student[:2], inputs.teacher[:2], inputs.head[:256], torch.ones(256))
    leaves = replace(few, student=few.student.detach(), head=few.head.detach()).of(setting)
    candidate(name, setting, leaves)()  # for one-time loading
    trained = [inputs.student] if setting.is_frozen else [inputs.student, inputs.head]
    gradients = 4 * sum(tensor.numel() for tensor in trained)
    step = candidate(name, setting, inputs, factor=2.0)
    peak = peak_of(step, gradients=gradients)
    (N, H), V = inputs.student.shape, inputs.head.shape[0]
    mapping = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return [peak, counter.get_total_flops() / (2 * N * V * H)]


def peak_of(step: Callable[[], Any], *, gradients: int) -> float:
    """Peak resident MiB of a step, beyond the memory before it and the bytes of its gradients."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    return max(0.0, resident("VmHWM") - before - gradients) / 2**20


def resident(field: str) -> int:
    """Read VmRSS, or VmHWM (the peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status; memory is measured on Linux only")


def smollm2_states(num_tokens: int) -> dict[str, Tensor]:
    """Student and teacher states of tokens that the model sampled; see the module's docstring."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rosd_fast.engines.local.engine import LocalEngine
    from rosd_fast.model.smollm2 import smollm2_folder
    from rosd_fast.quickstart.tasks import load_split
    from rosd_fast.text.chat import chat_format
    from rosd_fast.types import GenerationRequest, SamplingParams

    folder = smollm2_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat, problems = chat_format(tokenizer), load_split("dev")
    stop = tokenizer.eos_token_id
    engine = LocalEngine(model, pad_token_id=stop)
    params = SamplingParams(max_new_tokens=128, stop_token_ids=(stop,))
    wanted = num_tokens + LEARN_TOKENS
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    count = seed = 0
    while count < wanted:
        batch = [problems[(seed * 16 + i) % len(problems)] for i in range(16)]
        told = "{}\n\nThe right answer is {}. Explain it step by step."
        prompts = [
            (
                chat.render(problem.prompt),
                chat.render(told.format(problem.prompt, problem.answer)),
            )
            for problem in batch
        ]
        requests = [
            GenerationRequest(id=str(i), prompt_ids=plain, params=params, n=1, seed=seed)
            for i, (plain, _) in enumerate(prompts)
        ]
        generations = asyncio.run(engine.generate(requests))
        for generation, pair in zip(generations, prompts, strict=True):
            completion = list(generation.completion_ids)
            for side, prompt in zip(states, pair, strict=True):
                ids = torch.tensor([list(prompt) + completion])
                with torch.no_grad():
                    hidden = model.model(ids).last_hidden_state[0]
                side.append(hidden[len(prompt) - 1 : -1].clone())
            count += len(completion)
        seed += 1
    student, teacher = (torch.cat(side)[:wanted] for side in states)
    return with_mass(student, teacher, model.lm_head.weight.detach().clone(), num_tokens)


def sharpened(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """States of less entropy; the order of the vocabulary stays that of the others."""
    return states | {side: states[side] * SHARPNESS for side in ("student", "teacher")}


def made_states(num_tokens: int) -> dict[str, Tensor]:
    """States of a made model; see above."""
    V, H = SHAPES["made"]
    generator = torch.Generator().manual_seed(0)
    student, teacher, head = peaked_states(num_tokens + LEARN_TOKENS, V, H, generator)
    return with_mass(student, teacher, head, num_tokens)


def with_mass(student: Tensor, teacher: Tensor, head: Tensor, num_tokens: int) -> dict[str, Tensor]:
    """The timed tokens, and what an order learns from the others."""
    order = VocabularyOrder(head.shape[0], LEARN_TOKENS)
    for hidden in (student[num_tokens:], teacher[num_tokens:]):
        for rows in hidden.split(256):
            lse = torch.cat([(part @ head.T).logsumexp(1) for part in rows.split(64)])
            order.observe(rows, head, None, lse, softcap=None, temperature=1.0)
    return {
        "student": student[:num_tokens].contiguous(),
        "teacher": teacher[:num_tokens].contiguous(),
        "head": head.contiguous(),
        "mass": order.state_dict()["mass"].contiguous(),
    }


if __name__ == "__main__":
    main()
