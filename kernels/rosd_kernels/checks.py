"""Checks of arguments. Each raises a ValueError: the argument, what it got, what it wants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rosd_kernels.order import VocabularyOrder
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0


def check_scales(*, optional: bool = False, **values: object) -> None:
    """Every value is a finite number above 0, or None where `optional`."""
    for name, value in values.items():
        if not (value is None and optional) and not is_positive(value):
            wish = "None or a finite number > 0" if optional else "a finite number > 0"
            raise ValueError(f"{name}: got {value!r}, want {wish}")


def shape_text(name: str, tensor: Tensor, wish: str) -> str:
    return f"{name}: got shape {list(tensor.shape)}, want {wish}"


def check_float(name: str, tensor: Tensor, wish: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, want a tensor {wish}")
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise ValueError(f"{name}: got dtype {tensor.dtype}, want one of {names}")


def check_matrix(name: str, tensor: Tensor, wish: str) -> None:
    check_float(name, tensor, wish)
    if tensor.ndim != 2:
        raise ValueError(shape_text(name, tensor, wish))


def check_vector(name: str, tensor: Tensor, letter: str, size: int) -> None:
    wish = f"[{letter}] = [{size}]"
    check_float(name, tensor, wish)
    if tuple(tensor.shape) != (size,):
        raise ValueError(shape_text(name, tensor, wish))


def check_sparsity(sparsity: object) -> None:
    if not isinstance(sparsity, Sparsity):
        raise ValueError(f"sparsity: got {sparsity!r}, want 'exact', entry(eps) or mass(tol)")
    if sparsity.rule == "exact":
        return
    if not (is_positive(sparsity.bound) and sparsity.bound < 1):
        name = {"entry": "eps", "mass": "tol"}[sparsity.rule]
        raise ValueError(
            f"sparsity: got {sparsity.rule}({sparsity.bound!r}), want {name} in the open interval "
            "(0, 1); 'exact' computes everything"
        )
    if sparsity.order is not None and not isinstance(sparsity.order, VocabularyOrder):
        raise ValueError(
            f"sparsity: got an order of type {type(sparsity.order).__name__}, want a "
            "VocabularyOrder or None"
        )


def check_token_ids(token_ids: Tensor, num_tokens: int) -> Tensor:
    wish = f"[N] = [{num_tokens}]"
    if not isinstance(token_ids, Tensor):
        raise ValueError(f"token_ids: got {type(token_ids).__name__}, want a tensor {wish}")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids: got dtype {token_ids.dtype}, want int64 or int32")
    if tuple(token_ids.shape) != (num_tokens,):
        raise ValueError(shape_text("token_ids", token_ids, wish))
    return token_ids.long().contiguous()


def forbid_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but none flows into it; pass {name}.detach()"
            )


def check_devices(**tensors: Tensor | None) -> None:
    """All tensors are where the first one is."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, wanted = next(iter(devices.items()))
    for name, device in devices.items():
        if device != wanted:
            raise ValueError(f"{name}: is on {device}, want {wanted}, where {first} is")


def check_strategy(strategy: str, strategies: tuple[str, ...]) -> None:
    if strategy != "auto" and strategy not in strategies:
        names = ", ".join(repr(name) for name in ("auto", *strategies))
        raise ValueError(f"strategy: got {strategy!r}, want one of {names}")


def check_group(vocab_group: object, strategy: str) -> None:
    if vocab_group is not None and strategy == "reference":
        raise ValueError(
            "vocab_group: got a group with strategy 'reference', which needs whole heads; want "
            "'chunked', 'tiled' or 'auto'"
        )


def check_order(sparsity: Sparsity, vocab_size: int) -> None:
    order = sparsity.order
    if order is not None and order.vocab_size != vocab_size:
        raise ValueError(
            f"sparsity: got an order of {order.vocab_size} entries, want V = {vocab_size}"
        )


def check_ids(ids: Tensor | None, vocabulary: Vocabulary) -> None:
    """The ids are within the whole vocabulary.

    Reading them on another device would wait for it, so there the device itself asserts.
    """
    if ids is None or len(ids) == 0:
        return
    if ids.device.type != "cpu":
        assert_ids(ids, vocabulary)
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary.size:
        wrong = low if low < 0 else high
        raise ValueError(f"token_ids: got id {wrong}, want 0 <= id < V = {vocabulary.size}")


def assert_ids(ids: Tensor, vocabulary: Vocabulary) -> None:
    """`check_ids` without a synchronization: a later one raises, and no kernel reads the ids."""
    inside = (ids >= 0) & (ids < vocabulary.size)
    message = f"token_ids: got an id outside of 0 <= id < V = {vocabulary.size}"
    torch.ops.aten._assert_async.msg(inside.all(), message)
