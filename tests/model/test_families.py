"""Every family of causal language models: layout, states, gradients, decoding, adapters, training.

Each cell compares what the trainer does with transformers' own forward pass of each sequence alone,
on a tiny random model (`tests.families`). `docs/models.md` is written from the same table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import choose_trainable, merged_weights
from rosd_fast.model.attention import backbone
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import ATTRIBUTE, Layout, choose_layout, hidden_states, layout_of
from rosd_fast.model.load import load_weights
from rosd_fast.model.rope import fix_rope
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.snapshot import Export
from rosd_fast.types import GenerationRequest, PackedSequences, SamplingParams, TrainSample
from tests.families import names, tiny
from tests.families_page import PAGE, VERSION, row, rows
from tests.float64 import float64
from tests.tiny import SHAPE

LONGEST = 32  # tokens of a sequence in these tests, more than a run may have
LORA = {"lora": {"rank": 2, "alpha": 4}}
all_families = pytest.mark.parametrize("family", names())


@cache
def layout(family: str) -> Layout:
    """The layout that the family's self-check chooses."""
    return choose_layout(tiny(family, torch.float32))


def with_layout(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model that has chosen its layout and fixed its RoPE, as a run does."""
    model = tiny(family, dtype)
    setattr(model, ATTRIBUTE, layout(family))
    fix_rope(model, LONGEST)
    return model


def ids(length: int, seed: int) -> tuple[int, ...]:
    """Random token ids, none of which is special."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 64, (length,), generator=generator).tolist())


def sequences() -> PackedSequences:
    """Sequences of 11, 14, 13, 1 and 19 tokens; the first two have 6 in common."""
    lengths = (6, 5, 8, 13, 1, 19)
    parents = (-1, 0, 0, -1, -1, -1)
    starts = [0, 6, 6, 0, 0, 0]
    return PackedSequences(
        input_ids=torch.tensor(ids(sum(lengths), 0)),
        position_ids=torch.cat(
            [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        ),
        cu_seqlens=(0, *accumulate(lengths)),
        gather=torch.arange(sum(lengths)),
        parents=parents,
    )


def one_at_a_time(model: Any, packed: PackedSequences) -> Tensor:
    """[T, H] states of the model's own forward pass of the sequence that ends a segment."""
    decoder = backbone(model)
    segments = []
    for length, last in zip(packed.lengths, packed.cu_seqlens[1:], strict=True):
        sequence = torch.tensor([packed.sequence(last - 1)])
        states = decoder(input_ids=sequence, use_cache=False).last_hidden_state
        segments.append(states[0, -length:])
    return torch.cat(segments)


@all_families
def test_the_page_says_what_the_family_gets(family: str) -> None:
    """docs/models.md: python -m tests.families_page writes it."""
    page = PAGE.read_text()
    if VERSION not in page:
        pytest.skip("the page was written with another version of transformers")
    assert rows(page)[family] == row(family)


@all_families
def test_states_and_gradients_equal_one_sequence_at_a_time(family: str) -> None:
    model, packed = with_layout(family), sequences()
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(packed.cu_seqlens[-1], head(model).weight.shape[1], generator=generator)
    results = []
    for compute in (hidden_states, one_at_a_time):
        model.zero_grad()
        with float64():
            states = compute(model, packed)
            (states * seed).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"states": states.detach(), **gradients})
    actual, expected = results
    assert actual.keys() == expected.keys()
    assert len(expected) > 10
    for key, value in expected.items():
        error = float((actual[key] - value).abs().max())
        assert error <= 1e-9 * (float(value.abs().max()) + 1e-3), (layout_of(model), key, error)


@all_families
def test_padded_rows_are_exact_whatever_the_layers_are(family: str) -> None:
    model, packed = with_layout(family), sequences()
    setattr(model, ATTRIBUTE, "padded")
    with torch.no_grad(), float64():
        actual, expected = hidden_states(model, packed), one_at_a_time(model, packed)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@all_families
def test_the_head_gives_the_models_own_logits(family: str) -> None:
    model, packed = with_layout(family), sequences()
    last = packed.cu_seqlens[-1]
    sequence = torch.tensor([packed.sequence(last - 1)])
    with torch.no_grad(), float64():
        actual = logits(hidden_states(model, packed), head(model))[-sequence.shape[1] :]
        expected = model(input_ids=sequence, use_cache=False).logits[0]
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=1e-5)


@all_families
def test_the_local_engine_samples_what_the_model_computes(family: str) -> None:
    """Greedy tokens and log-probabilities against forward passes without a cache."""
    model = with_layout(family, torch.float32)
    requests = [
        GenerationRequest(
            id=str(index),
            prompt_ids=ids(length, index),
            n=n,
            params=SamplingParams(max_new_tokens=7, temperature=temperature),
        )
        for index, (length, n, temperature) in enumerate([(3, 1, 0.0), (12, 1, 0.0), (9, 2, 1.0)])
    ]
    prompts = {request.id: request for request in requests}
    generations = asyncio.run(LocalEngine(model).generate(requests))
    assert len(generations) == 4
    for item in generations:
        request = prompts[item.request_id]
        whole = torch.tensor([[*request.prompt_ids, *item.completion_ids]])
        with torch.no_grad():
            found = model(input_ids=whole, use_cache=False).logits[0].double().log_softmax(-1)
        found = found[len(request.prompt_ids) - 1 : -1]
        chosen = torch.tensor(item.completion_ids)
        if request.params.temperature == 0:
            assert found.argmax(-1).tolist() == chosen.tolist()
        expected = found.gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(item.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-4
        )


@all_families
def test_adapters_start_as_nothing_and_merge_exactly(family: str) -> None:
    model, packed = with_layout(family, torch.float32), sequences()
    options = Config.model_validate(LORA)
    with torch.no_grad():
        before = hidden_states(model, packed)
        choose_trainable(model, lora=options.lora, trainable="", seed=0)
        torch.testing.assert_close(hidden_states(model, packed), before)
        generator = torch.Generator().manual_seed(2)
        adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert adapters
        for parameter in adapters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    adapted = hidden_states(model, packed)
    adapted.square().sum().backward()
    for name, parameter in model.named_parameters():
        # The last are Zamba's own adapters, of which a layer has those of other layers, too.
        assert ("lora_" in name) == (parameter.grad is not None) or "adapter_list" in name, name
    merged = with_layout(family, torch.float32)
    merged.load_state_dict(merged_weights(model))
    with torch.no_grad():
        after = hidden_states(merged, packed)
    assert float((after - before).norm() / before.norm()) > 1e-3
    torch.testing.assert_close(after, adapted.detach(), rtol=0, atol=1e-4)


def samples() -> Iterator[TrainSample]:
    """Two groups of two samples; the completions of a group share the prompt."""
    for index in range(4):
        group, completion = index // 2, ids(5 + index, 10 + index)
        prompt = ids(6, group)
        yield TrainSample(
            rollout_id=f"{group}/{index % 2}",
            problem_id=str(group),
            student_prompt_ids=prompt,
            teacher_prompt_ids=prompt + ids(4, 20 + index),
            completion_ids=completion,
            logprobs=(-4.0,) * len(completion),
            start=1,
            end=len(completion),
        )


@all_families
def test_two_steps_of_training_and_the_export(family: str, tmp_path: Path) -> None:
    """The loss is finite, the weights move, and the files hold the trained model."""
    options = Config.model_validate({"optim": {"lr": 1e-3, "warmup_steps": 0}})
    model = with_layout(family, torch.float32)
    choose_trainable(model, lora=options.lora, trainable="", seed=0)
    learner = Learner(model, options)
    padded = layout_of(model) != "shared"
    batches = pack([*samples()], max_tokens=200, min_shared=4, padded=padded)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        metrics = learner.step(batches).metrics
        assert metrics["loss/skipped"] == 0
        assert metrics["loss/grad_norm"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) > len(before) / 2
    learner.gather_weights()
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    Export.of(learner, tokenizer).save(tmp_path)
    loaded: Any = load_weights(tmp_path, dtype=torch.float32, trust_remote_code=False).eval()
    loaded.set_attn_implementation(model.config._attn_implementation)
    fix_rope(loaded, LONGEST)
    sequence = torch.tensor([ids(11, 3)])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=sequence).logits, model(input_ids=sequence).logits
        )


@pytest.mark.parametrize("is_decoder", [False, True])
def test_encoders_and_heads_that_are_not_linear_are_refused(is_decoder: bool) -> None:
    config = transformers.BertConfig(**SHAPE, is_decoder=is_decoder)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="the model's own logits") as refused:
        choose_layout(model)
    assert ("attends in both directions" in str(refused.value)) == (not is_decoder)
