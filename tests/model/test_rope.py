"""RoPE whose frequencies depend on the length: a run has the same for every sequence."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from rosd_fast.config import Config
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.inputs import load_inputs
from rosd_fast.methods import find_method
from rosd_fast.methods.budgets import longest_sequence
from rosd_fast.model.fsdp import skeleton
from rosd_fast.model.head import head, logits
from rosd_fast.model.layouts import hidden_states
from rosd_fast.model.rope import FIXED, find_rotary, fix_rope, server_rope_args
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.types import GenerationRequest, PackedSequences, SamplingParams

BORDER = 16  # tokens up to which the frequencies are those of the pretraining
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.5, 4.0, 8.0],
    "original_max_position_embeddings": BORDER,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LENGTHS = (5, BORDER, BORDER + 1, 40)


def phi3(**changes: Any) -> dict[str, Any]:
    return {
        "family": "Phi3",
        "rope_parameters": dict(LONGROPE),
        "original_max_position_embeddings": BORDER,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    } | changes


def dynamic(**changes: Any) -> dict[str, Any]:
    return {
        "family": "Llama",
        "rope_parameters": dict(DYNAMIC),
        "max_position_embeddings": BORDER,
    } | changes


CASES = {"longrope": phi3, "dynamic": dynamic}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]()


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def in_pack(model: Any, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The states of each sequence, computed in one pack."""
    lengths = [len(part) for part in parts]
    packed = PackedSequences(
        input_ids=torch.cat(parts),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=(0, *accumulate(lengths)),
        gather=torch.arange(sum(lengths)),
        parents=(-1,) * len(lengths),
    )
    with torch.no_grad():
        return list(hidden_states(model, packed).split(lengths))


def alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def test_without_it_a_pack_changes_a_short_sequence(make_model, case) -> None:
    """The failure that is mended: what else is in the pack decides."""
    parts = sequences()
    model = make_model(**case)
    together = in_pack(model, parts)
    assert not torch.allclose(together[0], alone(make_model(**case), parts[0]), atol=1e-3)


def test_pack_is_each_sequence_alone(make_model, case) -> None:
    model = make_model(**case)
    assert "for every sequence" in (fix_rope(model, 40) or "")
    parts = sequences()
    for together, ids in zip(in_pack(model, parts), parts, strict=True):
        torch.testing.assert_close(together, alone(model, ids), rtol=0, atol=1e-10)


def test_frequencies_are_transformers_own_of_the_longest_sequence(make_model, case) -> None:
    longest = sequences()[-1]
    expected = alone(make_model(**case), longest)
    model = make_model(**case)
    fix_rope(model, len(longest))
    torch.testing.assert_close(alone(model, longest), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("longest", [5, BORDER])
def test_nothing_changes_within_the_border(make_model, case, longest) -> None:
    ids = sequences((longest,))[0]
    model = make_model(**case)
    assert fix_rope(model, longest) is None
    assert torch.equal(alone(model, ids), alone(make_model(**case), ids))


@pytest.mark.parametrize("longest", [BORDER, 40])
def test_local_engine_and_learner_agree(make_model, longest) -> None:
    """Prompts of unequal length, of which some cross the border while they are decoded."""
    model = make_model(**phi3())
    fix_rope(model, longest)
    engine = LocalEngine(model, max_rows=4)
    prompts = [tuple(ids.tolist()) for ids in sequences((3, 9, 12))]
    requests = [
        GenerationRequest(
            id=str(index),
            prompt_ids=prompt,
            params=SamplingParams(
                max_new_tokens=longest - 12, temperature=1.0, stop_token_ids=(1,)
            ),
            n=2,
            seed=0,
        )
        for index, prompt in enumerate(prompts)
    ]
    generations = asyncio.run(engine.generate(requests))
    parts = [
        torch.tensor([*prompts[int(made.request_id)], *made.completion_ids]) for made in generations
    ]
    for made, states in zip(generations, in_pack(model, parts), strict=True):
        start = len(states) - len(made.completion_ids)
        scores = logits(states[start - 1 : -1], head(model)).log_softmax(-1)
        ours = scores.gather(1, torch.tensor(made.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(made.logprobs, dtype=torch.float64), ours, rtol=0, atol=1e-6
        )


def test_copies_have_the_same_frequencies_and_the_config_is_not_changed(make_model, case) -> None:
    model = make_model(**case)
    before = model.config.to_json_string()
    fix_rope(model, 40)
    ids = sequences()[0]
    expected = alone(model, ids)
    other = skeleton(model, torch.float64)
    assert not list(find_rotary(other))
    other.to_empty(device="cpu")
    for (_, to), (_, of) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        of.copy_(to)
    for to, of in zip(model.parameters(), other.parameters(), strict=True):
        of.data.copy_(to)
    assert torch.equal(alone(other, ids), expected)
    assert torch.equal(alone(copy.deepcopy(model), ids), expected)
    assert model.config.to_json_string() == before


def test_a_second_call_changes_nothing(make_model, case) -> None:
    model = make_model(**case)
    fix_rope(model, 40)
    expected = alone(model, sequences()[0])
    assert fix_rope(model, BORDER) is None
    assert torch.equal(alone(model, sequences()[0]), expected)


def test_rope_per_type_of_layer(make_model) -> None:
    rope = {
        "full_attention": dict(DYNAMIC),
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    shape = {
        "family": "Gemma3Text",
        "rope_parameters": rope,
        "max_position_embeddings": BORDER,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    }
    longest = sequences()[-1]
    expected = alone(make_model(**shape), longest)
    model = make_model(**shape)
    fix_rope(model, len(longest))
    kinds = {
        kind
        for module in model.modules()
        if isinstance(getattr(module, "rope_type", None), dict)
        for kind in module.rope_type.values()
    }
    assert kinds == {FIXED, "default"}
    torch.testing.assert_close(alone(model, longest), expected, rtol=0, atol=1e-6)
    parts = sequences()
    for together, ids in zip(in_pack(model, parts), parts, strict=True):
        torch.testing.assert_close(together, alone(model, ids), rtol=0, atol=1e-10)


def test_scale_that_depends_on_the_length(make_model) -> None:
    """Phi-3.5-MoE has two scales of cosines and sines besides the factors."""
    shape = {
        "family": "Phimoe",
        "rope_parameters": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.7},
        "original_max_position_embeddings": BORDER,
        "max_position_embeddings": 64,
    }
    rotary = make_model(**shape).get_decoder().rotary_emb
    states, positions = torch.zeros(1, 1, dtype=torch.float64), torch.arange(40)[None]
    assert not torch.equal(rotary(states, positions)[0][:, :5], rotary(states, positions[:, :5])[0])
    model = make_model(**shape)
    fix_rope(model, 40)
    rotary = model.get_decoder().rotary_emb
    cosines = rotary(states, positions)[0]
    assert torch.equal(cosines[:, :5], rotary(states, positions[:, :5])[0])
    assert float(cosines.max()) == pytest.approx(1.7)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": BORDER,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": BORDER,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_rope_is_left_alone(make_model, rope) -> None:
    model = make_model("Llama", rope_parameters=rope, max_position_embeddings=64)
    before = [buffer.clone() for buffer in model.buffers()]
    assert fix_rope(model, 40) is None
    assert fix_rope(model, 40, served=True) is None
    assert all(map(torch.equal, before, model.buffers()))
    assert server_rope_args(model, where="engine.urls", managed=False) == ()


def test_served_dynamic_has_the_base_of_the_whole_scaled_context(make_model) -> None:
    """As SGLang 0.5.23 (DynamicNTKScalingRotaryEmbedding) computes it."""
    model = make_model(**dynamic())
    line = fix_rope(model, 12, served=True)
    assert line is not None
    assert "as SGLang has them" in line
    rope = model.get_decoder().rotary_emb
    factor, dim = DYNAMIC["factor"], 8
    base = 10000.0 * (factor * factor - (factor - 1)) ** (dim / (dim - 2))
    expected = torch.tensor([base ** -(2 * i / dim) for i in range(dim // 2)])
    torch.testing.assert_close(rope.inv_freq.float(), expected, rtol=1e-6, atol=0)


def test_a_server_of_long_sequences_has_the_long_factors_only(make_model) -> None:
    model = make_model(**phi3())
    line = fix_rope(model, 40, served=True)
    assert line is not None
    assert "the long factors for every sequence" in line
    flag, text = server_rope_args(model, where="engine.urls", managed=True)
    assert flag == "--json-model-override-args"
    told = json.loads(text)
    assert told["original_max_position_embeddings"] == 64
    rope = told["rope_parameters"]
    assert rope["short_factor"] == rope["long_factor"] == LONGROPE["long_factor"]
    scale = math.sqrt(1 + math.log(64 / BORDER) / math.log(BORDER))
    assert rope["short_mscale"] == rope["long_mscale"] == pytest.approx(scale)
    with pytest.raises(UserError, match=r"engine\.urls: http://a:1.*server then chooses"):
        server_rope_args(model, where="engine.urls: http://a:1", managed=False)


def test_a_server_of_short_sequences_needs_nothing(make_model) -> None:
    model = make_model(**phi3())
    fix_rope(model, BORDER, served=True)
    assert server_rope_args(model, where="engine.urls", managed=False) == ()


@pytest.mark.parametrize(
    ("method", "longest"), [("rosd", 30 + 300), ("opsd", 30 + 300), ("grpo", 20 + 70), ("sft", 90)]
)
def test_longest_sequence_of_a_run(method: str, longest: int) -> None:
    """Teacher prompts and reflections count only where there are any."""
    config = Config.model_validate(
        {
            "method": method,
            "sample": {"max_prompt_tokens": 20, "max_new_tokens": 70},
            "reflect": {"max_prompt_tokens": 30, "max_new_tokens": 300},
            "teacher": {"max_prompt_tokens": 260},
        }
    )
    nothing: Any = None
    own = find_method(method)(config, nothing, nothing, nothing)
    assert longest_sequence(own, 1000) == longest
    assert longest_sequence(own, 80) == (260 + 70 if own.needs_teacher else 80)


def test_a_run_says_so_and_refuses_servers_that_would_differ(tmp_path: Path) -> None:
    config = transformers.Phi3Config(
        vocab_size=1024,
        eos_token_id=1,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        original_max_position_embeddings=512,
        max_position_embeddings=8192,
        rope_parameters={**LONGROPE, "original_max_position_embeddings": 512},
        pad_token_id=0,
    )
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "data": {"train": "quickstart:train"}}
    inputs = load_inputs(Config.model_validate(options), weights=False)
    assert [note.partition(" for every")[0] for note in inputs.model_notes] == [
        f"{tmp_path.name}: RoPE longrope: the long factors"
    ]
    options["engine"] = {"kind": "sglang", "launch": "urls", "urls": "http://host:1"}
    with pytest.raises(UserError, match=r"engine\.urls: http://host:1"):
        load_inputs(Config.model_validate(options), weights=False)
    short = {"max_prompt_tokens": 256, "max_new_tokens": 256}
    for section in ("sample", "reflect", "teacher"):
        options[section] = short if section != "teacher" else {"max_prompt_tokens": 256}
    assert load_inputs(Config.model_validate(options), weights=False).model_notes == []
