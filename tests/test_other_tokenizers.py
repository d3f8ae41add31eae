"""A run in mode verbatim with a tiny model whose tokenizer llguidance does not read by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.errors import UserError
from rosd_fast.inputs import load_inputs
from rosd_fast.report.metrics import read_metrics
from rosd_fast.train import train
from tests.made_tokenizers import KINDS, word_pieces


def options(folder: Path, tokenizer: Any, **changes: Any) -> Config:
    """Options of two steps on sums; no rollout of the random model is right."""
    model = folder / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [
        {"prompt": f"add {n} and 3", "answer": str(n + 3), "verifier": "number"} for n in range(4)
    ]
    data = folder / "sums.json"
    data.write_text(json.dumps(rows))
    small = {
        "model": str(model),
        "steps": 2,
        "out": str(folder),
        "name": "run",
        "data.train": str(data),
        "data.dev": None,
        "data.dev_ood": None,
        "sample.problems_per_step": 2,
        "sample.group_size": 2,
        "sample.max_new_tokens": 12,
        "select.on_no_success": "answer",
        "reflect.min_quote_words": 1,
        "reflect.max_new_tokens": 64,
        "verify.workers": 1,
    }
    return apply_args(load_preset("quickstart"), small | changes)


@pytest.mark.parametrize("kind", ["metaspace", "words"])
def test_two_steps(tmp_path: Path, kind: str) -> None:
    run = train(options(tmp_path, KINDS[kind](), **{"reflect.mode": "verbatim"}))
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["reflect/num_reflections"] for row in rows[-2:]] == [4, 4]
    assert all(row["reflect/found_frac"] == 1 for row in rows[-2:])
    assert all(row["loss/num_distilled_tokens"] > 0 for row in rows[-2:])


def test_a_server_that_cannot_read_the_tokenizer(tmp_path: Path) -> None:
    """Said before any server is started; in mode free there is no grammar."""
    served = {"engine.kind": "sglang", "engine.launch": "urls", "engine.urls": "http://127.0.0.1:1"}
    config = options(tmp_path, KINDS["unigram"](), **served)
    with pytest.raises(UserError, match=r"llguidance, which a server uses, cannot read it"):
        load_inputs(config)
    load_inputs(apply_args(config, {"reflect.mode": "free"}))


def test_word_pieces_are_trained_without_grammars(tmp_path: Path) -> None:
    config = options(tmp_path, word_pieces(), **{"reflect.mode": "verbatim"})
    with pytest.raises(UserError, match=r"grammars cannot follow WordPiece.*reflect\.mode to free"):
        load_inputs(config)
    run = train(apply_args(config, {"reflect.mode": "free"}))
    assert read_metrics(run / "metrics.jsonl")
