"""Image-text models: their language model is trained, and the rest of their files is kept."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.weight_check import token_logprobs
from rosd_fast.model.adapters import fingerprint
from rosd_fast.model.attention import backbone, num_embeddings
from rosd_fast.model.fsdp import skeleton
from rosd_fast.model.head import head
from rosd_fast.model.layouts import layout_of
from rosd_fast.model.load import context_length, load_model, load_weights
from rosd_fast.model.other_parts import auto_class_of, other_parts
from rosd_fast.model.skeleton import build_skeleton
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Export
from rosd_fast.types import GenerationRequest, SamplingParams, TrainSample
from tests.image_text import FAMILIES, image_text_model, save_image_text

IDS = torch.arange(3, 14)[None]
# Parts of parameter names that no language model has.
OTHER = ("vision", "visual", "projector", "embed_vision")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_weights(folder, dtype=dtype, trust_remote_code=False).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def is_other(name: str) -> bool:
    return any(part in name for part in OTHER)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_is_loaded(tmp_path: Path, tokenizer: Any, family: str) -> None:
    whole = save_image_text(tmp_path, family, tokenizer)
    model = loaded(tmp_path)
    assert type(model) is type(whole)
    names = set(dict(model.named_parameters()))
    assert names == {name for name, _ in whole.named_parameters() if not is_other(name)}
    torch.testing.assert_close(
        model(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=1e-3
    )
    assert num_embeddings(model) == 64 and head(model).weight.shape == (64, 32)
    assert context_length(model, tokenizer, where="") == 128
    states = backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state
    assert states.shape == (1, 11, 32)
    shapes = build_skeleton(str(tmp_path), dtype="float32").named_parameters()
    assert {name: p.shape for name, p in shapes} == {
        name: p.shape for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_has_the_layout_of_the_files(
    tmp_path: Path, tokenizer: Any, family: str
) -> None:
    """Other dtypes than those of the run stay as they are."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    save_image_text(source, family, tokenizer, dtype=torch.bfloat16)
    learner = Learner(loaded(source), Config())
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    Export.of(learner, tokenizer).save(saved)
    before, after = tensors(source), tensors(saved)
    assert after.keys() == before.keys()
    others = [name for name in before if is_other(name)]
    assert others
    for name, tensor in before.items():
        kept = after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor)
        assert kept == is_other(name), name
    file = "preprocessor_config.json"
    assert (saved / file).read_bytes() == (source / file).read_bytes()
    again: Any = AutoModelForMultimodalLM.from_pretrained(saved, dtype=torch.float32).eval()
    assert type(again) is type(learner.model)
    torch.testing.assert_close(
        again(input_ids=IDS).logits, learner.model(input_ids=IDS).logits, rtol=0, atol=1e-3
    )
    assert AutoConfig.from_pretrained(saved).architectures == [type(again).__name__]


def test_other_parts_are_shared_by_copies_and_left_out_of_messages(
    tmp_path: Path, tokenizer: Any
) -> None:
    save_image_text(tmp_path, "Gemma3", tokenizer)
    model = loaded(tmp_path)
    assert other_parts(model).weights
    assert other_parts(copy.deepcopy(model)) is other_parts(model)
    sent = pickle.loads(pickle.dumps(skeleton(model)))
    assert not other_parts(sent).weights and not other_parts(sent).files
    assert fingerprint(loaded(tmp_path)) == fingerprint(model)


def test_a_text_model_has_no_other_parts(tmp_path: Path, tokenizer: Any) -> None:
    assert not other_parts(loaded(MODEL_DIR)).weights
    assert auto_class_of(AutoConfig.from_pretrained(MODEL_DIR)) is AutoModelForCausalLM


def test_the_language_model_of_an_image_text_config_is_a_text_model() -> None:
    """A checkpoint that says so in `architectures` has only the language model's weights."""
    config = image_text_model("Qwen3_5").config
    assert auto_class_of(config) is AutoModelForMultimodalLM
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class_of(config) is AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_training(
    tmp_path: Path, tokenizer: Any, distill_samples: list[TrainSample], family: str
) -> None:
    """Whatever the layout, sampled log-probabilities are the learner's, and all weights move."""
    rows = {"vocab_size": 640}
    if family == "Gemma4":
        rows["vocab_size_per_layer_input"] = 640
    save_image_text(tmp_path, family, tokenizer, text=rows)
    loaded_model = load_model(str(tmp_path), dtype="float32", device=torch.device("cpu"))
    model = loaded_model.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = Config.model_validate({"optim": {"lr": 1e-3, "warmup_steps": 0}})
    learner = Learner(model, config)
    padded = layout_of(model) == "padded"
    for _ in range(2):
        learner.step(pack(distill_samples, max_tokens=60, padded=padded))
    after = dict(model.named_parameters())
    assert not [n for n, p in after.items() if torch.equal(p, before[n])]
    request = GenerationRequest(
        id="one",
        prompt_ids=tuple(range(20, 29)),
        params=SamplingParams(max_new_tokens=8, stop_token_ids=(639,)),
        n=2,
    )
    engine = LocalEngine(model, tokenizer=tokenizer)
    for generation in asyncio.run(engine.generate([request])):
        expected = token_logprobs(model, [*request.prompt_ids, *generation.completion_ids])
        assert expected[8:] == pytest.approx(list(generation.logprobs), abs=1e-4)
