"""Learning rates and decay per parameter, moments of 8 bits, and moments in host memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config, OptimConfig
from rosd_fast.errors import UserError
from rosd_fast.trainer import adamw
from rosd_fast.trainer.checkpoint import load_checkpoint, write_checkpoint
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.optim import Optimizer
from rosd_fast.trainer.param_groups import lr_scales
from rosd_fast.trainer.snapshot import Snapshot
from tests.tiny import mark_trainable, tiny_model


def options(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1e-2, "warmup_steps": 0} | changes)


def make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return {name: Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def run(named: dict[str, Parameter], picked: OptimConfig, updates: int = 5) -> Optimizer:
    """Updates with random gradients, the same ones for the same names and shapes."""
    optimizer = Optimizer(named.items(), picked, horizon=updates)
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        for _ in range(2):  # micro-batches
            for parameter in named.values():
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            optimizer.accumulate()
        optimizer.step()
    return optimizer


SHAPES = {"model.embed.weight": (6, 4), "model.layers.0.w": (3, 4), "model.norm": (4,)}


def test_a_factor_scales_the_learning_rate() -> None:
    """AdamW's first update is the learning rate times the gradient's sign."""
    named = make(SHAPES)
    before = {name: p.detach().clone() for name, p in named.items()}
    text = "*=0.5, model.layers.*=2,model.embed.weight=0.1"
    run(named, options(lr_scale=text, weight_decay=0.0), updates=1)
    moved = {name: (p - before[name]).abs().mean().item() for name, p in named.items()}
    assert moved == pytest.approx(
        {"model.embed.weight": 1e-3, "model.layers.0.w": 2e-2, "model.norm": 5e-3}, rel=1e-3
    )


def test_every_name_of_a_tied_parameter_matches() -> None:
    model = tiny_model(tie_word_embeddings=True)
    named = list(model.named_parameters(remove_duplicate=False))
    scales = lr_scales(named, "lm_head.*=0.1")
    assert scales["model.embed_tokens.weight"] == scales["lm_head.weight"] == 0.1
    assert scales["model.norm.weight"] == 1.0
    optimizer = Optimizer(named, options(lr_scale="lm_head.*=0.1"), horizon=1)
    assert "lm_head.weight" not in optimizer.parameters
    assert set(optimizer.parameters) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("text", ["lm_head", "lm_head=", "=0.1", "*=0", "*=-1", "*=inf", "*=x"])
def test_a_wrong_factor_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError, match=r"optim\.lr_scale: .*pattern and a positive factor"):
        lr_scales([], text)


def test_a_pattern_has_to_match_a_trained_parameter() -> None:
    named = make(SHAPES)
    named["model.norm"].requires_grad_(False)
    with pytest.raises(UserError, match=r"optim\.lr_scale: model\.norm matches no parameter"):
        lr_scales(list(named.items()), "model.norm=2")


@pytest.mark.parametrize(("decay", "vector"), [("matrices", 1.0), ("all", 1 - 0.01 * 0.1)])
def test_which_parameters_decay(decay: str, vector: float) -> None:
    named = make(SHAPES)
    optimizer = Optimizer(named.items(), options(decay=decay, weight_decay=0.1), horizon=1)
    before = {name: p.detach().clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(named["model.norm"].detach(), before["model.norm"] * vector)
    matrix = "model.layers.0.w"
    torch.testing.assert_close(named[matrix].detach(), before[matrix] * (1 - 0.01 * 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_gives_the_same_bits(dtype: torch.dtype) -> None:
    own, offloaded = make(SHAPES, dtype), make(SHAPES, dtype)
    run(own, options())
    optimizer = run(offloaded, options(offload=True))
    for name, parameter in own.items():
        assert torch.equal(offloaded[name], parameter), name
        assert optimizer.masters[name] is not offloaded[name]
        assert optimizer.masters[name].dtype == torch.float32
        assert optimizer.masters[name].device.type == "cpu"


LARGE = {"matrix": (32, 128), "odd": (65, 64), "vector": (300,)}  # 4096 values; 16.25 blocks


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'rosd-fast[lowmem]'")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_8_bits_are_close_to_those_of_32(dtype: torch.dtype) -> None:
    before, own, small = (make(LARGE, dtype) for _ in range(3))
    run(own, options(), updates=8)
    optimizer = run(small, options(kind="adamw8bit"), updates=8)
    for name in LARGE:  # only the matrix gets moments of 8 bits
        moved = (own[name] - before[name]).detach().float().norm().item()
        error = (small[name] - own[name]).detach().float().norm().item()
        rounding = 1e-4 if dtype == torch.float32 else 0.01
        assert moved > 0 and error <= (0.05 if name == "matrix" else rounding) * moved, name
    state = optimizer.state_dict()
    assert state["exp_avg_codes.matrix"].dtype == torch.uint8
    assert state["exp_avg_codes.matrix"].any() and state["exp_avg_sq_codes.matrix"].any()
    assert state["exp_avg_scale.matrix"].shape == (16,)
    assert state["exp_avg.odd"].dtype == torch.float32 and "exp_avg.matrix" not in state
    assert not torch.equal(small["matrix"], own["matrix"])  # it is another optimizer


@pytest.mark.usefixtures("torchao")
def test_8_bits_follow_the_schedule_and_the_factors() -> None:
    named = make(LARGE)
    before = {name: p.detach().clone() for name, p in named.items()}
    picked = options(
        kind="adamw8bit", lr_scale="vector=0.1", weight_decay=0.0, warmup_steps=2, grad_clip=1e9
    )
    run(named, picked, updates=1)
    moved = {name: (p - before[name]).abs().mean().item() for name, p in named.items()}
    assert moved == pytest.approx({"matrix": 5e-3, "odd": 5e-3, "vector": 5e-4}, rel=1e-2)


CASES: dict[str, dict[str, Any]] = {
    "8 bits": {"optim": {"kind": "adamw8bit"}},
    "8 bits bfloat16": {"optim": {"kind": "adamw8bit"}, "dtype": "bfloat16"},
    "8 bits lora": {"optim": {"kind": "adamw8bit"}, "lora": {"rank": 64}},
    "offload": {"optim": {"offload": True}},
    "offload bfloat16 ema": {
        "optim": {"offload": True},
        "dtype": "bfloat16",
        "teacher": {"kind": "ema"},
    },
    "offload lora": {"optim": {"offload": True}, "lora": {"rank": 3}},
    "cosine": {"optim": {"schedule": "cosine", "lr_scale": "*.embed_tokens.*=0.1"}},
    "wsd bfloat16": {"optim": {"schedule": "wsd", "decay_frac": 0.5}, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_same_bits(case, distill_samples, tokenizer, tmp_path) -> None:
    if "8 bits" in case:
        pytest.importorskip("torchao")
    sections = copy.deepcopy(CASES[case])
    sections["optim"] |= {"lr": 1e-2, "warmup_steps": 1}
    config = Config.model_validate(sections | {"steps": 5})
    batches = pack(distill_samples, max_tokens=40)

    def learner() -> Learner:
        model = tiny_model("Llama", getattr(torch, config.dtype), hidden_size=64)
        mark_trainable(model, config)
        return Learner(model, config)

    straight = learner()
    first = {name: weight.clone() for name, weight in straight.weights.items()}
    rates = [straight.step(batches).metrics["loss/lr"] for _ in range(2)]
    path = write_checkpoint(tmp_path, Snapshot.of(straight, tokenizer, step=2, config_hash="abc"))
    resumed = learner()
    load_checkpoint(path, resumed)
    for _ in range(3):
        own, other = straight.step(batches), resumed.step(batches)
        assert own == other
        rates.append(own.metrics["loss/lr"])
    straight.gather_weights()
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    assert any(not torch.equal(first[name], w) for name, w in straight.weights.items())
    if "cosine" in case:
        assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < rates[1] / 2
    assert any("codes" in name for name in straight.state_dict()) == ("8 bits" in case)


def test_8_bits_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small = options(kind="adamw8bit")
    with pytest.raises(UserError, match=r"optim\.kind = adamw8bit: runs on one process only"):
        adamw.check_adamw(small, several_ranks=True)
    monkeypatch.setattr(adamw, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs torchao. pip install "rosd-fast\[lowmem\]"'):
        adamw.check_adamw(small, several_ranks=False)
    adamw.check_adamw(options(), several_ranks=True)
