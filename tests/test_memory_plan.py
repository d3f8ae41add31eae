"""The plan's numbers are those that the learner really allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.machine import host_memory, host_total
from rosd_fast.memory_plan import (
    GIB,
    ModelShape,
    Row,
    activation_bytes,
    memory_plan,
    server_rows,
)
from rosd_fast.model.layouts import hidden_states
from rosd_fast.model.load import load_model
from rosd_fast.model.skeleton import build_skeleton
from rosd_fast.trainer.learner import Learner
from rosd_fast.types import PackedSequences
from tests.qwen3_folder import PARAMETERS, write_qwen3_folder
from tests.tiny import mark_trainable, tiny_model


def num_bytes(tensors: Any) -> int:
    """The memory of tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def rows_of(config: Config, shape: ModelShape, **options: Any) -> dict[str, Row]:
    return {row.what: row for row in memory_plan(shape, config, **options).rows}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.kind": "frozen"},
        {"teacher.kind": "ema"},
        {"teacher.kind": "live"},
        {"optim.trainable": "model.layers.4.*"},
        {"optim.offload": True},
        {"lora.rank": "4"},
        {"lora.rank": "4", "teacher.kind": "ema"},
    ],
    ids=str,
)
def test_parameters_moments_masters_and_teacher_are_what_the_learner_allocates(
    dtype: str, changes: dict[str, Any]
) -> None:
    if "lora.rank" in changes:
        pytest.importorskip("peft")
    config = apply_args(load_preset("quickstart"), {"dtype": dtype, **changes})
    skeleton = build_skeleton("quickstart", dtype=dtype)
    mark_trainable(skeleton, config)
    rows = rows_of(config, ModelShape.of(skeleton))
    loaded = load_model("quickstart", dtype=dtype, device=torch.device("cpu"))
    mark_trainable(loaded.model, config)
    assert ModelShape.of(loaded.model) == ModelShape.of(skeleton)

    learner = Learner(loaded.model, config)
    own = [*learner.model.parameters()]
    state = learner.optimizer.state_dict()
    masters = [master for master in learner.optimizer.masters.values() if master not in set(own)]
    moments = [value for name, value in state.items() if name.startswith("exp_avg")]

    def planned(*names: str) -> int:
        return sum(rows[name].size for name in names if name in rows)

    assert planned("weights") == num_bytes(own)
    assert planned("fp32 masters") == num_bytes(masters)
    assert planned("AdamW moments") == num_bytes(moments)
    assert learner.teacher is not None
    copies = [] if learner.teacher.policy is learner.policy else learner.teacher.model.parameters()
    held = num_bytes([*copies, *learner.teacher.state_dict().values()])
    teacher = [name for name in rows if name.startswith("teacher")]
    assert planned(*teacher) == held

    for parameter in learner.optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    fresh = [p.grad for p in own if p.grad is not None]
    low = num_bytes(fresh)
    learner.optimizer.accumulate()
    kept = num_bytes([m.grad for m in learner.optimizer.masters.values() if m.grad is not None])
    assert planned("gradients") == kept
    has_masters = dtype == "bfloat16" or config.optim.offload
    assert planned("gradients of a backward pass") == (low if has_masters else 0)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_attention_heads": 8,
            "head_dim": 32,
        },
    ],
    ids=["small", "wide"],
)
def test_activations_per_token_are_within_a_quarter_of_what_autograd_keeps(
    family: str, dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    model = tiny_model(family, dtype, **sizes)
    tokens, saved = 100, []
    packed = PackedSequences(
        input_ids=torch.arange(tokens) % 64,
        position_ids=torch.arange(tokens),
        cu_seqlens=(0, tokens),
        gather=torch.arange(tokens),
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden_states(model, packed)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = [t for t in saved if t.untyped_storage().data_ptr() not in weights]
    measured = num_bytes(activations) / tokens / model.config.num_hidden_layers
    assert activation_bytes(ModelShape.of(model), dtype.itemsize) == pytest.approx(
        measured, rel=0.25
    )


@pytest.fixture(scope="module")
def qwen3(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = write_qwen3_folder(tmp_path_factory.mktemp("qwen3") / "Qwen3-4B", tokenizer)
    return ModelShape.of(build_skeleton(str(folder), dtype="bfloat16"))


def test_qwen3_4b_on_eight_gpus(qwen3: ModelShape) -> None:
    """docs/scaling.md's table, by hand: P = 4.02e9, R = V H = 3.89e8 (tied), B = 1.009e8."""
    assert qwen3.parameters == qwen3.trained == PARAMETERS
    assert qwen3.outside == 151936 * 2560 + 2560
    assert qwen3.block == (
        2 * 2560 * 32 * 128 + 2 * 2560 * 8 * 128 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    )
    config = apply_args(
        Config(),
        {
            "dtype": "bfloat16",
            "learner.activation_checkpointing": True,
            "engine.kind": "sglang",
        },
    )
    rows = rows_of(config, qwen3, num_ranks=8)
    assert rows["weights (fp32 shard)"].size == 4 * PARAMETERS // 8
    assert rows["AdamW moments"].size == 8 * PARAMETERS // 8
    assert rows["gradients"].size == 4 * PARAMETERS // 8
    assert rows["teacher: weights"].size == 2 * PARAMETERS // 8
    assert rows["gathered weights"].size == 2 * 2 * (qwen3.outside + 2 * qwen3.block)
    assert rows["rank 0: whole model"].place == "host"
    plan = memory_plan(qwen3, config, num_ranks=8)
    assert plan.total("host") == 2 * PARAMETERS
    assert plan.total(exact=True) == sum(
        rows[name].size
        for name in ("weights (fp32 shard)", "AdamW moments", "gradients", "teacher: weights")
    )
    assert 8 * GIB < plan.total(exact=True) < plan.total() < 20 * GIB
    weights, cache = server_rows(qwen3, config)
    assert weights.size == 2 * PARAMETERS
    # 2 (keys and values) x 36 layers x 8 heads x 128 x 2 bytes is 144 KiB per token.
    assert cache.size == (2048 + 8 * 8192) * 144 * 1024


def test_options_move_and_remove_rows(qwen3: ModelShape) -> None:
    config = apply_args(Config(), {"dtype": "bfloat16"})
    one = rows_of(config, qwen3)
    assert one["fp32 masters"].size == 4 * PARAMETERS
    assert one["KV cache of 256 rollouts of 10,240 tokens"].when == "sampling"
    offloaded = rows_of(apply_args(config, {"teacher.offload": True}), qwen3)
    assert offloaded["teacher: weights"].place == "host"
    assert "teacher: weights" not in rows_of(config, qwen3, teacher=False)
    on_host = rows_of(apply_args(config, {"optim.offload": True}), qwen3)
    assert {on_host[name].place for name in ("fp32 masters", "AdamW moments", "gradients")} == {
        "host"
    }
    narrow = rows_of(apply_args(config, {"optim.kind": "adamw8bit"}), qwen3)
    assert narrow["AdamW moments"].size == 2 * PARAMETERS
    halved = apply_args(config, {"parallel.shard_size": "4"})
    assert rows_of(halved, qwen3, num_ranks=8)["weights (fp32 shard)"].size == PARAMETERS
    recomputed = apply_args(config, {"learner.activation_checkpointing": True})
    name = "activations of 10,240 tokens"
    assert rows_of(recomputed, qwen3)[name].size < one[name].size / 8


def test_a_separate_teacher_has_its_own_size(qwen3: ModelShape) -> None:
    large = replace(qwen3, parameters=10 * PARAMETERS)
    config = apply_args(Config(), {"dtype": "bfloat16"})
    assert rows_of(config, qwen3, separate=large)["teacher: weights"].size == 20 * PARAMETERS
    rows = rows_of(config, qwen3, separate=large, num_ranks=8)
    assert rows["teacher: weights"].size == 20 * PARAMETERS // 8
    assert rows["rank 0: whole teacher"].place == "host"
    served = apply_args(config, {"teacher.backend": "sglang"})
    rows = rows_of(served, qwen3, separate=large)
    assert rows["teacher: output head"].size == 2 * large.head and "teacher: weights" not in rows


def test_ranks_of_one_machine_share_its_memory(qwen3: ModelShape) -> None:
    config = apply_args(Config(), {"engine.kind": "sglang"})
    single = memory_plan(qwen3, config, on_gpu=False)
    assert host_total(single, 1) == 20 * PARAMETERS  # weights, gradients, moments, teacher
    eight = memory_plan(qwen3, config, num_ranks=8, on_gpu=False)
    assert host_total(eight, 8) == pytest.approx((20 + 4) * PARAMETERS, rel=1e-6)
    assert (host_memory() or GIB) >= GIB
