"""A model whose parameters have no memory for a while."""

from __future__ import annotations

import torch

from rosd_fast.config import Config
from rosd_fast.model.release import allocate_parameters, release_parameters
from tests.tiny import mark_trainable, tiny_model


def test_it_is_the_same_model_afterwards() -> None:
    model = tiny_model("Llama", torch.float32, tie_word_embeddings=True)
    mark_trainable(model, Config.model_validate({"lora": {"rank": 2}}))
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    release_parameters(model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in kept.items()
    }
    allocate_parameters(model, torch.device("cpu"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    model.load_state_dict(kept)
    assert torch.equal(model(ids).logits, expected)
