"""Quantized checkpoints, dequantized when they are loaded: fp8 and MXFP4.

    fp8     8-bit floats with a scale per tensor, per row or per block of rows and columns:
            w = q * scale                      (DeepSeek-V3, Qwen3-FP8, Ministral; fbgemm_fp8 and
            the 8-bit floats of compressed-tensors)
    MXFP4   blocks of 32 values of 4 bits with a scale that is a power of two (GPT-OSS),
            https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

The model is then a plain one of the run's dtype: it is trained, exported and handed to servers as
such, and its config does not mention a quantization any more. Other formats are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from rosd_fast.errors import UserError
from rosd_fast.model.weight_files import open_weights

FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")  # what the name of a weight's scales ends with
UNUSED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".q_scale")
"""Ends of the names of scales that a plain model has no use for: those of activations and cache."""
MX_BLOCKS, MX_SCALES = "_blocks", "_scales"
MX_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of a sign and 3 bits
MX_BIAS = 127  # of the exponent that is stored as a scale


def quantization_of(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """What config.json says of a quantization; None: the weights are plain."""
    for part in (config, config.get_text_config()):
        found: Any = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, Mapping) else found.to_dict()
    return None


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without what it says of a quantization, in place."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def is_quantized(folder: Path) -> bool:
    """Whether a model folder has quantized weights."""
    config = json.loads((folder / "config.json").read_text())
    return any("quantization_config" in part for part in (config, config.get("text_config") or {}))


def weights_of(
    source: Path | str,
    auto_class_of: Callable[[Any], Any],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[Any, Path | str | None, dict[str, Any]]:
    """The class whose `from_pretrained` loads a folder or hub model, its first argument, and more.

    They are the auto class, `source` and nothing, but for a quantized model its own class, None and
    its weights in `dtype`. Raises UserError for a format that cannot be dequantized, and whatever
    transformers raises for a config that cannot be read.

    auto_class_of: gives transformers' auto class for a config.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    auto_class = auto_class_of(config)
    quantization = quantization_of(config)
    if quantization is None:
        return auto_class, source, {}
    block = check_quantization(quantization, where=str(source))
    with open_weights(source) as files:
        weights = dequantized(files, block=block, dtype=dtype, where=str(source))
    with torch.device("meta"):
        model = auto_class.from_config(plain_config(config), trust_remote_code=trust_remote_code)
    return type(model), None, {"config": config, "state_dict": weights}


def check_quantization(quantization: Mapping[str, Any], *, where: str) -> Sequence[int] | None:
    """The (rows, columns) of a block of weights with one scale; None: the scales' shapes tell.

    Raises UserError for a format that cannot be dequantized.
    """
    method = str(getattr(quantization.get("quant_method"), "value", quantization["quant_method"]))
    block = quantization.get("weight_block_size")
    known = method in (*FP8_METHODS, "mxfp4") and quantization.get("expert_dtype") != "fp4"
    if method == "compressed-tensors":
        groups = [group.get("weights") or {} for group in quantization["config_groups"].values()]
        known = all((own.get("type"), own.get("num_bits")) == ("float", 8) for own in groups)
        block = next((own["block_structure"] for own in groups if own.get("block_structure")), None)
    if not known:
        raise UserError(
            f"its weights are quantized ({method}), and only fp8 and MXFP4 can be dequantized",
            where=where,
            fix="Give the model that it was made from, or save it dequantized",
        )
    return block


def dequantized(
    files: Mapping[str, Any], *, block: Sequence[int] | None, dtype: torch.dtype, where: str
) -> dict[str, Tensor]:
    """All weights of a checkpoint by their names in it, of `dtype` if they were quantized.

    files: as `open_weights` yields them. block: see `check_quantization`. Raises UserError for a
    weight of another type that has scales.
    """
    weights = {}
    read_elsewhere = {name + end for name in files for end in SCALES}
    read_elsewhere |= {name.removesuffix(MX_BLOCKS) + MX_SCALES for name in files}
    for name, file in files.items():
        if name in read_elsewhere or name.endswith(UNUSED):
            continue
        tensor = file.get_tensor(name)
        if name.endswith(MX_BLOCKS):
            name = name.removesuffix(MX_BLOCKS)
            packed_scales = files[name + MX_SCALES].get_tensor(name + MX_SCALES)
            weights[name] = from_mxfp4(tensor, packed_scales, dtype)
            continue
        own = next((name + end for end in SCALES if name + end in files), None)
        if own is None:
            weights[name] = tensor
        elif tensor.dtype in FP8_TYPES:
            weights[name] = from_fp8(tensor, files[own].get_tensor(own), dtype, block)
        else:
            raise UserError(
                f"{name} is of {str(tensor.dtype).removeprefix('torch.')} and has scales; only fp8 "
                "and MXFP4 can be dequantized",
                where=where,
                fix="Give the model that it was made from, or save it dequantized",
            )
    return weights


def from_fp8(
    quantized: Tensor, scales: Tensor, dtype: torch.dtype, block: Sequence[int] | None
) -> Tensor:
    """The weights [..., R, C] of fp8 values and their scales, which are multiplied in fp32.

    scales: one value; or [..., r, c], one per block; an exponent of 2 where they are 8 bits wide.
    block: rows and columns of a block, of which the last may be cut; None: R / r and C / c.
    """
    if scales.dtype == torch.uint8:
        scales = (scales.float() - MX_BIAS).exp2()
    values, scales = quantized.float(), scales.float()
    if scales.numel() > 1:
        if scales.dim() < values.dim():  # one per row
            scales = scales[..., None]
        for axis in (-2, -1):
            size, count = values.shape[axis], scales.shape[axis]
            repeats = block[axis] if block is not None and count > 1 else -(-size // count)
            scales = scales.repeat_interleave(repeats, dim=axis).narrow(axis, 0, size)
    return values.mul_(scales).to(dtype)


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [E, C, R] of experts as GPT-OSS's model has them: inputs before outputs.

    blocks: [E, R, C / 32, 16] uint8, two values per byte, the low half first. scales: [E, R,
    C / 32] uint8, exponents of 2 with a bias of 127. The result is exact in bfloat16.
    """
    table = torch.tensor([*MX_VALUES, *(-value for value in MX_VALUES)], dtype=torch.float32)
    experts, rows, groups, width = blocks.shape
    weights = torch.empty(experts, groups * width * 2, rows, dtype=dtype)
    for packed, exponents, out in zip(blocks, scales, weights, strict=True):  # one at a time
        pairs = torch.stack((packed & 15, packed >> 4), dim=-1).int()
        values = table[pairs].flatten(-2) * (exponents.float() - MX_BIAS).exp2()[..., None]
        out.copy_(values.flatten(-2).T)
    return weights
