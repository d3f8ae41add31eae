"""Which parameters are trained, and merging adapters into full weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import fingerprint, has_adapters, merged_weights
from rosd_fast.model.load import find
from rosd_fast.trainer.checkpoint import load_checkpoint, write_checkpoint
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Snapshot
from tests.tiny import mark_trainable

IDS = torch.arange(1, 12)[None]
SHAPES = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def config_of(**sections: Any) -> Config:
    optim = {"lr": 1e-2, "warmup_steps": 0, **sections.pop("optim", {})}
    return Config.model_validate({"optim": optim, **sections})


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_patterns_choose_what_is_trained(make_model) -> None:
    model = make_model("Llama", num_hidden_layers=12, tie_word_embeddings=False)
    mark_trainable(model, config_of(optim={"trainable": "model.layers.1?.mlp.*, lm_head.weight"}))
    names = {
        f"model.layers.{i}.mlp.{n}_proj.weight" for i in (10, 11) for n in "gate up down".split()
    }
    assert trained(model) == names | {"lm_head.weight"}


def test_a_tied_head_is_trained_with_the_embeddings(make_model) -> None:
    model = make_model("Llama", tie_word_embeddings=True)
    mark_trainable(model, config_of(optim={"trainable": "lm_head.weight"}))
    assert trained(model) == {"model.embed_tokens.weight"}


def test_without_patterns_all_is_trained(make_model) -> None:
    model = make_model()
    mark_trainable(model, config_of())
    assert trained(model) == set(dict(model.named_parameters()))


def test_a_pattern_that_matches_nothing_is_a_user_error(make_model) -> None:
    with pytest.raises(UserError, match=r"model\.layer\.\* matches no parameter.*embed_tokens"):
        mark_trainable(make_model(), config_of(optim={"trainable": "model.layer.*"}))


def test_a_model_without_trainable_weights_is_refused(make_model) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(UserError, match="none of the model's weights can be trained"):
        mark_trainable(model, config_of())


def test_only_what_was_chosen_moves(make_model, distill_samples) -> None:
    model = make_model("Qwen3", torch.float32)
    options = config_of(optim={"trainable": "*.self_attn.?_proj.weight"})
    mark_trainable(model, options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = Learner(model, options)
    learner.step(pack(distill_samples, max_tokens=40))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained(model) and len(moved) == 8
    kept = {k.removeprefix("optimizer.master.") for k in learner.state_dict() if ".master." in k}
    assert kept == moved  # a checkpoint leaves out what never changes


def adapted(make_model, dtype=torch.float32, family="Llama", **lora: Any) -> tuple[Any, Config]:
    options = config_of(lora={"rank": 3, **lora})
    model = make_model(family, dtype, **SHAPES.get(family, {}))
    mark_trainable(model, options)
    return model, options


def test_adapters_change_nothing_at_first_and_are_drawn_from_the_seed(make_model) -> None:
    plain = make_model("Llama", torch.float32)
    (one, _), (two, _) = adapted(make_model), adapted(make_model)
    assert torch.equal(one(IDS).logits, plain(IDS).logits)
    assert has_adapters(one) and not has_adapters(plain)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert trained(one) == {name for name, _ in one.named_parameters() if "lora_" in name}


def test_targets(make_model) -> None:
    model, _ = adapted(make_model, targets="q_proj, v_proj")
    assert {name.split(".")[4] for name in trained(model)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"lora\.targets") as error:
        adapted(make_model, targets="no_proj")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe"])
def test_merged_weights_compute_the_same(make_model, distill_samples, family, dtype) -> None:
    model, options = adapted(make_model, dtype, family)
    learner = Learner(model, options)
    learner.step(pack(distill_samples, max_tokens=40))
    plain = make_model(family, dtype, **SHAPES.get(family, {}))
    assert (plain(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    plain.load_state_dict(merged_weights(model), strict=True)
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, **close)


def test_the_fingerprint_ignores_adapters(make_model) -> None:
    plain = make_model("Llama", torch.float32)
    model, _ = adapted(make_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert fingerprint(model) == fingerprint(plain)
    assert fingerprint(make_model("Llama", torch.float32, seed=1)) != fingerprint(plain)
    with torch.no_grad():
        plain.model.norm.weight[3] += 1e-3
    assert fingerprint(model) != fingerprint(plain)


@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
def test_a_checkpoint_holds_adapters_and_exports_full_weights(
    make_model, distill_samples, tokenizer, tmp_path: Path, kind: str
) -> None:
    """A resumed run has the same bits, and the export loads without peft."""
    options = config_of(lora={"rank": 3}, teacher={"kind": kind})
    batches = pack(distill_samples, max_tokens=40)

    def learner() -> Learner:
        model = make_model("Llama", torch.float32)
        mark_trainable(model, options)
        return Learner(model, options)

    straight = learner()
    for _ in range(2):
        straight.step(batches)
    snapshot = Snapshot.of(straight, tokenizer, step=2, config_hash="abc")
    path = write_checkpoint(tmp_path, snapshot)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    assert not has_adapters(loaded)
    torch.testing.assert_close(loaded(IDS).logits, straight.model(IDS).logits, rtol=0, atol=1e-5)
    masters = [name for name in straight.state_dict() if ".master." in name]
    assert masters and all("lora_" in name for name in masters)

    resumed = learner()
    load_checkpoint(path, resumed)
    for _ in range(2):
        assert resumed.step(batches) == straight.step(batches)
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "targets"),
    [("Llama", "all-linear"), ("Llama", "q_proj,down_proj"), ("Qwen3Moe", "all-linear")],
)
def test_peft_loads_the_adapter_of_a_checkpoint(
    make_model,
    distill_samples,
    tokenizer,
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    targets: str,
) -> None:
    model, options = adapted(make_model, dtype, family, targets=targets)
    learner = Learner(model, options)
    learner.step(pack(distill_samples, max_tokens=40))
    snapshot = Snapshot.of(learner, tokenizer, step=1, config_hash="abc")
    path = write_checkpoint(tmp_path, snapshot)
    assert not (path / "adapter_config.json").exists()
    loaded = peft.PeftModel.from_pretrained(
        make_model(family, dtype, **SHAPES.get(family, {})), path / "adapter"
    ).eval()
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    difference = (loaded(input_ids=IDS).logits - model(IDS).logits).abs().max()
    assert difference <= (1e-6 if dtype == torch.float32 else 0.05)
    assert (
        model(IDS).logits - make_model(family, dtype, **SHAPES.get(family, {}))(IDS).logits
    ).abs().max() > 10 * difference
    loaded.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (path / "adapter", tmp_path / "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(dtype)) for name in ours)
    with pytest.raises(UserError, match="is an adapter without its model"):
        find(str(path / "adapter"))
    assert find(str(path)) == path


def test_a_checkpoint_without_adapters_has_no_adapter_folder(
    make_model, tokenizer, tmp_path: Path
) -> None:
    learner = Learner(make_model("Llama", torch.float32), config_of())
    path = write_checkpoint(tmp_path, Snapshot.of(learner, tokenizer, step=1, config_hash="abc"))
    assert not (path / "adapter").exists()


def test_a_copy_has_its_own_adapters(make_model) -> None:
    model, _ = adapted(make_model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.equal(copied(IDS).logits, model(IDS).logits)
