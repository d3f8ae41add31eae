"""The same steps on any number of ranks; this is one rank:

    torchrun --nproc-per-node 2 -m tests.trainer.ranks.worker OUT [--resume OUT2] [--shard-size N]

For each case, rank 0 writes the gradients of the first step and, after the last one, the weights of
student and teacher to OUT/results.safetensors, and the metrics of all steps to OUT/metrics.json.
Checkpoints of step 2 are in OUT/CASE; resuming from one of them has to give the same bits. With
--resume, the steps after step 2 are also repeated from the checkpoints of another call.
"""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rosd_fast.batch.diagnosed import with_diagnosed
from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.model.layouts import choose_layout, hidden_states, layout_of
from rosd_fast.model.other_parts import take_out
from rosd_fast.trainer.learner import StepResult
from rosd_fast.trainer.optim import Optimizer
from rosd_fast.trainer.ranks import LearnerGroup, run_worker
from rosd_fast.types import PackedBatch, TrainSample
from rosd_fast.utils.distributed import World, full, open_world
from tests.families import FAMILIES
from tests.image_text import image_text_model
from tests.tiny import SHAPE, VOCAB, mark_trainable, tiny_model

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = FAMILIES["Qwen3_5"].changes  # padded rows, as its layers have a state over the tokens
EXPERTS = FAMILIES["Qwen3Moe"].changes
ROWS, REGION = {"head": "shard"}, {"kind": "trust_region", "mix": 0.4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied": ("Llama", TIED, {}),
    "untied": ("Qwen3", UNTIED, {"loss": {"divergence": "jsd"}}),
    "ema": ("Llama", UNTIED, {"teacher": {"kind": "ema", "ema_rate": 0.3}}),
    "live": ("Gemma3Text", TIED | SLIDING, {"teacher": {"kind": "live"}}),
    "trust region": ("Granite", UNTIED, {"teacher": REGION}),
    "lora": ("Llama", TIED, {"lora": {"rank": 4}}),
    "lora ema": ("Qwen3", UNTIED, {"lora": {"rank": 4}, "teacher": {"kind": "ema"}}),
    "some": ("Llama", UNTIED, {"optim": {"trainable": "model.layers.1.*, lm_head.weight"}}),
    "host": (
        "Llama",
        TIED,
        {"optim": {"offload": True, "schedule": "cosine", "lr_scale": "lm_head.*=0.1"}},
    ),
    "recomputed": ("Llama", TIED, {"learner": {"activation_checkpointing": True}}),
    "fixed head": (
        "Llama",
        TIED,
        {"optim": {"trainable": "model.layers.*"}, "teacher": {"kind": "trust_region"}},
    ),
    "rows": ("Llama", UNTIED, {"parallel": ROWS}),
    "rows biased": ("Phi", UNTIED, {"parallel": ROWS, "loss": {"top_k": 5}}),
    "rows ema": ("Qwen3", UNTIED, {"parallel": ROWS, "teacher": {"kind": "ema"}}),
    "rows trust region": ("Granite", UNTIED, {"parallel": ROWS, "teacher": REGION}),
    "rows lora": ("Llama", UNTIED, {"parallel": ROWS, "lora": {"rank": 4}, "teacher": REGION}),
    "rows one sample": ("Llama", UNTIED, {"parallel": ROWS, "loss": {"strategy": "tiled"}}),
    "rows bfloat16": ("Llama", UNTIED, {"parallel": ROWS, "dtype": "bfloat16"}),
    "grpo": ("Llama", TIED, {"policy": {"entropy_weight": 0.01, "dual_clip": 1.5}}),
    "blend": ("Qwen3", UNTIED, {}),
    "rows grpo": ("Llama", UNTIED, {"parallel": ROWS}),
    "rows blend": ("Qwen3", UNTIED, {"parallel": ROWS, "policy": {"entropy_weight": 0.01}}),
    "offload": ("Llama", TIED, {"teacher": {"offload": True}}),
    "rows offload ema": (
        "Llama",
        UNTIED,
        {"parallel": ROWS, "teacher": {"kind": "ema", "offload": True}},
    ),
    "one sample": ("Llama", TIED, {}),
    "served": ("Llama", TIED, {"engine": {"kind": "sglang"}}),
    "served lora": ("Qwen3", UNTIED, {"engine": {"kind": "sglang"}, "lora": {"rank": 4}}),
    # A seed whose gradients are all well above the rounding of their sums; small steps, as AdamW
    # amplifies the rounding of gradients near its epsilon.
    "hybrid": ("Qwen3_5Text", HYBRID | {"seed": 1}, {"optim": {"lr": 1e-3}}),
    "experts": ("Qwen3Moe", UNTIED | EXPERTS, {"teacher": {"kind": "ema", "ema_rate": 0.3}}),
    "experts sinks": ("GptOss", UNTIED | FAMILIES["GptOss"].changes, {"parallel": ROWS}),
    "experts lora": ("Qwen3Moe", UNTIED | EXPERTS, {"lora": {"rank": 4}}),
    # small steps, as in "hybrid"
    "image text": (
        "Gemma3",
        {},
        {"learner": {"activation_checkpointing": True}, "optim": {"lr": 1e-3}},
    ),
    "bfloat16": ("Llama", TIED, {"dtype": "bfloat16"}),
    "bfloat16 ema": ("Llama", TIED, {"dtype": "bfloat16", "teacher": {"kind": "ema"}}),
}
WIDE = {"hidden_size": 48, "num_hidden_layers": 3}
PADDED = {"vocab_size": VOCAB + 8}
# A separate teacher, of another family, width and number of vocabulary rows than the student.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "other": ("Qwen3", WIDE | UNTIED),
    "other lora offload": ("Granite", WIDE | TIED | PADDED),
    "other rows": ("Qwen3", WIDE | UNTIED),
    "other rows padded": ("Llama", WIDE | TIED | PADDED),
    "other server": ("Qwen3", WIDE | TIED),
    "other server rows": ("Phi", WIDE | UNTIED | PADDED),
}
OTHER = {"model": "other"}
CASES |= {
    "other": ("Llama", TIED | PADDED, {"teacher": OTHER}),
    "other lora offload": (
        "Llama",
        TIED,
        {"lora": {"rank": 4}, "teacher": OTHER | {"offload": True}},
    ),
    "other rows": (
        "Phi",
        UNTIED | PADDED,
        {
            "parallel": ROWS,
            "teacher": OTHER,
            "loss": {"strategy": "tiled"},
            # A key's bias has next to no gradient, whose rounding errors AdamW would magnify.
            "optim": {"trainable": "*.weight, lm_head.bias"},
        },
    ),
    "other rows padded": ("Llama", UNTIED, {"parallel": ROWS, "teacher": OTHER}),
    "other server": ("Llama", TIED | PADDED, {"teacher": OTHER | {"backend": "sglang"}}),
    "other server rows": (
        "Llama",
        UNTIED,
        {"parallel": ROWS, "teacher": OTHER | {"backend": "sglang"}},
    ),
}
NUM_STEPS, SAVED_STEP = 4, 2


def config_of(case: str, shard_size: int | None = None) -> Config:
    options = CASES[case][2]
    optim = {"lr": 3e-3, "warmup_steps": 2, **options.get("optim", {})}
    loss = {"strategy": "chunked", **options.get("loss", {})}
    parallel = {"shard_size": shard_size, **options.get("parallel", {})}
    return Config.model_validate({**options, "loss": loss, "optim": optim, "parallel": parallel})


def model_of(case: str, config: Config) -> Any:
    family, shape, _ = CASES[case]
    if case == "image text":
        model = image_text_model(family, text={"vocab_size": VOCAB})
        take_out(model)
    else:
        model = tiny_model(family, torch.float32, **shape).to(getattr(torch, config.dtype))
    choose_layout(model)
    mark_trainable(model, config)
    if config.lora.rank:  # adapters that change something from the first step on
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def other_teacher(case: str) -> Any:
    """The separate teacher of a case."""
    family, shape = TEACHERS[case]
    return tiny_model(family, torch.float32, seed=1, **shape)


def create(case: str, config: Config, world: World) -> LearnerGroup:
    """The learners of a case, with its separate teacher if it has one.

    Sharded over several ranks, rank 0 keeps no full copy of that.
    """
    model, teacher = model_of(case, config), other_teacher(case) if case in TEACHERS else None
    group = LearnerGroup.create(model, config, world, tokenizer(), teacher=teacher or "initial")
    full = group.learner.full_model
    assert full is not None
    # Where servers sample, rank 0 has no copy of all weights while it learns.
    assert (full.device.type == "meta") == ("served" in case and world.size > 1)
    if "server" in case and world.size == 1:
        group.learner.teacher.discard_model()
    if teacher is not None and world.size > 1:
        left = weakref.ref(teacher)
        del teacher
        gc.collect()
        assert left() is None
    return group


def samples_of(case: str, step: int) -> list[TrainSample]:
    """Samples in groups of unequal sizes; the samples of a group share their prompts."""
    g = torch.Generator().manual_seed(step)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (number(low, high),), generator=g).tolist())

    samples = []
    for group in range(1 if "one sample" in case else 4):
        prompt, privileged = ids(3, 20), ids(3, 20)
        for member in range(1 if "one sample" in case else number(1, 4)):
            completion = ids(4, 14)
            start = number(0, len(completion) - 1)
            samples.append(
                TrainSample(
                    rollout_id=f"{group}/{member}",
                    problem_id=str(group),
                    student_prompt_ids=prompt,
                    teacher_prompt_ids=privileged + ids(1, 6),
                    completion_ids=completion,
                    logprobs=tuple((-4 * torch.rand(len(completion), generator=g)).tolist()),
                    start=start,
                    end=len(completion),
                    weight=0.5 + number(0, 100) / 100,
                )
            )
    if "grpo" in case:
        return [without_teacher(sample, place) for place, sample in enumerate(samples)]
    if "blend" in case:  # of two groups, so that some micro-batches have no policy gradient
        return samples + [without_teacher(sample, n) for n, sample in enumerate(samples[:3])]
    return samples


def without_teacher(sample: TrainSample, place: int) -> TrainSample:
    """The sample of the same rollout by policy gradient, or every third one by likelihood."""
    return replace(
        sample,
        teacher_prompt_ids=None,
        advantage=None if place % 3 == 2 else (-1) ** place * sample.weight,
        weight=sample.weight / 20,
        start=0,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )


class Recorder:
    """Records the full gradients of the last step of any optimizer."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        own_step = Optimizer.step

        def recording(optimizer: Optimizer) -> float:
            for name, master in optimizer.masters.items():
                assert master.grad is not None, name
                self.gradients[name] = full(master.grad).detach().clone()
            return own_step(optimizer)

        setattr(Optimizer, "step", recording)  # noqa: B010


def step(learners: LearnerGroup, case: str, number: int) -> StepResult:
    samples = samples_of(case, number)
    batches = pack(
        samples,
        max_tokens=120,
        min_shared=3,
        num_ranks=learners.world.size,
        hidden_size=SHAPE["hidden_size"],
        padded=layout_of(learners.learner.model) == "padded",
    )
    assert len(batches) % learners.world.size == 0
    on_server = "server" in case
    located = {sample.rollout_id for sample in samples if not on_server}
    diagnosed = with_diagnosed(batches, samples, located=located, max_tokens=10**6)
    result = learners.step(diagnosed, served_states(case, batches) if on_server else None)
    assert "grpo" in case or result.metrics["diag/topk_overlap"] > 0
    return result


@torch.no_grad()
def served_states(case: str, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
    """What a teacher's server would answer."""
    teacher = other_teacher(case)
    none = torch.empty(0, WIDE["hidden_size"])
    return [
        none if b.teacher is None else hidden_states(teacher, b.teacher)[b.teacher.gather]
        for b in batches
    ]


def work(
    world: World, out: Path, *, resume: Path | None = None, shard_size: int | None = None
) -> None:
    """Run all cases on rank 0; the other ranks serve it."""
    recorder, results, metrics = Recorder(), {}, {}
    for case in CASES:
        if not world.is_rank0:
            for _ in range(2 if resume is None else 3):
                run_worker(world)
            continue
        config = config_of(case, shard_size)
        learners = create(case, config, world)
        rows = []
        for number in range(NUM_STEPS):
            recorder.gradients.clear()
            rows.append(step(learners, case, number))
            if number == 0:
                results |= {f"{case}/grad/{k}": v for k, v in recorder.gradients.items()}
            if number + 1 == SAVED_STEP:
                learners.save(out / case, SAVED_STEP, None)
        weights = {k: v.detach().clone() for k, v in learners.weights().items()}
        learners.release_weights()
        full = learners.learner.full_model
        assert full is not None
        assert (full.device.type == "meta") == ("served" in case and world.size > 1)
        results |= {f"{case}/weight/{k}": v for k, v in weights.items()}
        if case not in TEACHERS:
            teacher = model_of(case, config)
            learners.gather_teacher(teacher)
            results |= {f"{case}/teacher/{k}": v.detach() for k, v in teacher.named_parameters()}
        learners.close()
        metrics[case] = [[row.metrics, row.per_token] for row in rows]
        own = continued(case, config, world, out)
        assert all(torch.equal(own[k], v) for k, v in weights.items()), case
        if resume is not None:
            weights = continued(case, config, world, resume)
            results |= {f"{case}/resumed/{k}": v for k, v in weights.items()}
    if world.is_rank0:
        save_file({k: v.contiguous() for k, v in results.items()}, out / "results.safetensors")
        (out / "metrics.json").write_text(json.dumps(metrics))


def continued(case: str, config: Config, world: World, run: Path) -> dict[str, torch.Tensor]:
    """The weights after all steps, resumed from the checkpoint in the folder `run`."""
    learners = create(case, config, world)
    assert learners.load(run / case / "checkpoints" / "step_000002") == SAVED_STEP
    for number in range(SAVED_STEP, NUM_STEPS):
        step(learners, case, number)
    weights = {k: v.detach().clone() for k, v in learners.weights().items()}
    learners.close()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--shard-size", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open_world(config_of("tied", args.shard_size).parallel, "cpu") as world:
        work(world, args.out, resume=args.resume, shard_size=args.shard_size)


if __name__ == "__main__":
    main()
