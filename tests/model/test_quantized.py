"""Quantized checkpoints: what is loaded is the plain model, in the dtype of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from rosd_fast.engines.factory import model_folder
from rosd_fast.errors import UserError
from rosd_fast.model.export import export_model
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.model.quantized import from_fp8, from_mxfp4, is_quantized
from rosd_fast.model.skeleton import load_skeleton
from rosd_fast.quickstart import MODEL_DIR
from tests.image_text import save_image_text
from tests.tiny import tiny_model

FP8 = torch.float8_e4m3fn
BLOCK = (16, 24)
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
}


def block_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of blocks of 16 x 24, of which the last ones are cut."""
    rows, columns = (-(-size // of) for size, of in zip(weight.shape, BLOCK, strict=True))
    scales = 0.01 + torch.rand(rows, columns) / 100
    return (torch.randn(weight.shape) * 4).to(FP8), scales


def row_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.randn(weight.shape) * 4).to(FP8), 0.01 + torch.rand(len(weight), 1) / 100


def tensor_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.randn(weight.shape) * 4).to(FP8), torch.tensor(0.02)


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "blocks": (block_fp8, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [*BLOCK]}),
    "tensor": (tensor_fp8, "_scale_inv", {"quant_method": "fp8", "weight_block_size": None}),
    "rows": (row_fp8, "_scale", {"quant_method": "fbgemm_fp8"}),
    "compressed": (
        row_fp8,
        "_scale",
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
        },
    ),
}


def exact(quantized: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The weights in float64, value by value."""
    rows, columns = quantized.shape
    weights = quantized.double()
    for i in range(rows):
        for j in range(columns):
            if scales.numel() == 1:
                scale = scales.flatten()[0]
            elif block is None:
                scale = scales[i, 0]
            else:
                scale = scales[i // block[0], j // block[1]]
            weights[i, j] *= float(scale)
    return weights


def write(folder: Path, family: str, case: str, **changes: Any) -> dict[str, Tensor]:
    """Write a tiny model whose linear layers are fp8; return its plain weights in float64."""
    torch.manual_seed(1)
    model = tiny_model(family, torch.float32, **SHAPE | changes)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return quantize(folder, case)


def quantize(folder: Path, case: str) -> dict[str, Tensor]:
    """Make the linear layers of a model folder fp8; return its plain weights in float64."""
    packed, end, about = CASES[case]
    stored = load_file(folder / "model.safetensors")
    plain = {name: tensor.double() for name, tensor in stored.items()}
    linear = [name for name in stored if "proj" in name and name.endswith("weight")]
    for name in [name for name in linear if stored[name].dim() == 2]:
        stored[name], stored[name + end] = packed(stored[name])
        block = BLOCK if case == "blocks" else None
        plain[name] = exact(stored[name], stored[name + end], block)
        stored[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, about)
    return plain


def set_quantization(folder: Path, about: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": about}))


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_fp8(tmp_path: Path, case: str) -> None:
    plain = write(tmp_path, "Llama", case)
    loaded = load(tmp_path)
    own = loaded.model.state_dict()
    assert own.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(own[name].double(), weight, rtol=1e-7, atol=0)
    assert loaded.stop_token_ids == (1,)
    in_bf16 = load(tmp_path, "bfloat16").model.state_dict()
    for name, weight in plain.items():
        assert torch.equal(in_bf16[name], weight.to(torch.bfloat16)), name


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_fp8_of_experts_that_transformers_fuses(tmp_path: Path, family: str) -> None:
    """Each expert is a tensor of its own in the files."""
    plain = write(
        tmp_path,
        family,
        "blocks",
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    model = load(tmp_path).model
    assert not any(parameter.dtype in (FP8,) for parameter in model.parameters())
    model.save_pretrained(tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(exported[name].double(), weight, rtol=1e-7, atol=0)


def test_export_and_server_folder_are_plain(tmp_path: Path) -> None:
    write(tmp_path / "fp8", "Llama", "blocks")
    assert is_quantized(tmp_path / "fp8")
    loaded = load(tmp_path / "fp8", "bfloat16")
    served = model_folder(str(tmp_path / "fp8"), loaded, tmp_path / "run")
    assert served.is_relative_to(tmp_path / "run")
    assert not is_quantized(served)
    assert "quantization" not in (served / "config.json").read_text()
    again = load(served, "bfloat16").model.state_dict()
    assert all(torch.equal(again[name], w) for name, w in loaded.model.state_dict().items())
    planned = load_skeleton(str(tmp_path / "fp8"), dtype="bfloat16")
    assert [p.shape for p in planned.model.parameters()] == [
        p.shape for p in loaded.model.parameters()
    ]
    evaluated = model_folder(str(tmp_path / "fp8"), planned, tmp_path / "run")
    assert evaluated == tmp_path / "fp8"  # a server that gets no weights from here


def test_the_tower_of_an_image_text_model_is_exported_dequantized(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    save_image_text(tmp_path / "fp8", "Mistral3", tokenizer, text={"vocab_size": 1024})
    plain = quantize(tmp_path / "fp8", "blocks")
    assert any("vision_tower" in name and "proj" in name for name in plain)
    loaded = load(tmp_path / "fp8")
    export_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    exported = load_file(tmp_path / "saved" / "model.safetensors")
    assert exported.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(exported[name].double(), weight, rtol=1e-7, atol=0)


def test_mxfp4(tmp_path: Path) -> None:
    shape = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    model = tiny_model("GptOss", torch.float32, **shape)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    plain = {name: tensor.double() for name, tensor in stored.items()}
    torch.manual_seed(1)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = exact_mxfp4(blocks, scales)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_quantization(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    for dtype in ("float32", "bfloat16"):
        own = load(tmp_path, dtype).model.state_dict()
        assert own.keys() == plain.keys()
        for name, weight in plain.items():
            assert torch.equal(own[name], weight.to(own[name].dtype)), name


def exact_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weights [experts, inputs, outputs] in float64, value by value."""
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor([*levels, *(-level for level in levels)], dtype=torch.float64)
    experts, outputs, groups, _ = blocks.shape
    weights = torch.empty(experts, groups * 32, outputs, dtype=torch.float64)
    for group in range(groups):
        scale = 2.0 ** (scales[:, :, group].double() - 127)
        for byte in range(16):
            packed = blocks[:, :, group, byte].int()
            for half, code in enumerate((packed % 16, packed // 16)):
                weights[:, group * 32 + byte * 2 + half] = values[code] * scale
    return weights


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 8, 2), dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(from_mxfp4(blocks, scales, torch.bfloat16), theirs)


def test_scales_that_are_exponents() -> None:
    values = torch.randn(4, 6).to(FP8)
    exponents = torch.tensor([[126, 128], [127, 120]], dtype=torch.uint8)
    scales = 2.0 ** (exponents.double() - 127)
    expected = exact(values, scales, (2, 3))
    assert torch.equal(from_fp8(values, exponents, torch.float64, None), expected)


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}},
        },
    ],
    ids=lambda about: about["quant_method"],
)
def test_other_formats_are_refused_in_one_line(tmp_path: Path, about: dict[str, Any]) -> None:
    write(tmp_path, "Llama", "tensor")
    set_quantization(tmp_path, about)
    with pytest.raises(UserError, match=rf"quantized \({about['quant_method']}\), and only fp8"):
        load(tmp_path)


def test_scales_of_a_weight_of_another_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "Llama", "tensor")
    stored = load_file(tmp_path / "model.safetensors")
    name = next(name for name in stored if name.endswith("_scale_inv")).removesuffix("_scale_inv")
    stored[name] = stored[name].float().to(torch.int8)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is of int8 and has scales"):
        load(tmp_path)
