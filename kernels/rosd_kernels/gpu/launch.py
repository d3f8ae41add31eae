"""Shared by the launchers: a GEMM's config, the loading of its operands, the launch itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from rosd_kernels.gpu.configs import LEAN_WIDTH, Config, Kernel, Precision, has_tma, select
from rosd_kernels.gpu.modes import INTERPRETED
from rosd_kernels.gpu.tuned import tuned

# Few, so that programs in the interpreter loop several times, as they do on a device.
INTERPRETED_PROGRAMS = 3
INTERPRETED_CAPABILITY = 90
TMA_ALIGNMENT = 16  # bytes; of the base address and of the row stride
DOT_PRECISIONS: dict[str, Precision] = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Triton 3.10 turns fusion into FMAs off by default.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """How a kernel multiplies its operands."""

    config: Config
    precision: str  # of tl.dot; ignored for 16-bit operands
    cast: bool  # the operands' dtypes differ: both are cast to float32
    use_tma: bool  # operands are loaded through tensor descriptors

    @classmethod
    def of(
        cls, kernel: Kernel, *operands: Tensor, order: Tensor | None, extras: bool = False
    ) -> Gemm:
        """Choose for these operands on their device.

        order: an index into the head's rows, which TMA cannot follow.
        extras: the kernel does more than a lean one, see configs.py.
        """
        a = operands[0]
        cast = len({operand.dtype for operand in operands}) > 1
        narrow = not cast and a.dtype in NARROW
        precision = "narrow" if narrow else float32_precision()
        aligned = all(_is_aligned(operand) for operand in operands)
        device = capability(a.device)
        use_tma = has_tma(device) and order is None and aligned
        even = all(operand.shape[1] % LEAN_WIDTH == 0 for operand in operands)
        lean = aligned and even and not extras
        return cls(
            config=tuned(kernel, device, precision, lean=lean)
            or select(kernel, device, precision, lean=lean),
            precision="ieee" if narrow else precision,
            cast=cast,
            use_tma=use_tma,
        )

    def operand(self, tensor: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        """The kernel argument for a matrix that is loaded in blocks of [rows, columns]."""
        if not self.use_tma:
            return tensor
        return TensorDescriptor.from_tensor(tensor, [rows, columns])


def float32_precision() -> Precision:
    """How float32 operands are multiplied, by whichever of torch's two settings was used last."""
    try:
        return DOT_PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the older setting cannot be read once the newer one was written
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Launch a kernel with the compile options of its config."""
    kernel[grid](
        **arguments,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        **COMPILER_OPTIONS,
    )


def rowwise(tensor: Tensor) -> Tensor:
    """The tensor, copied unless the elements of each row are adjacent; row strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def capability(device: torch.device) -> int:
    """Compute capability, as 10 * major + minor."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if INTERPRETED:
        return INTERPRETED_CAPABILITY
    return driver.active.get_current_target().arch  # compiled ahead of time


def num_programs(device: torch.device, per_processor: int = 1) -> int:
    """Number of programs of a persistent grid."""
    if INTERPRETED or device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * per_processor


def _is_aligned(tensor: Tensor) -> bool:
    stride_bytes = tensor.stride(0) * tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % TMA_ALIGNMENT == 0
        and stride_bytes % TMA_ALIGNMENT == 0
        and stride_bytes > 0
        and tensor.stride(-1) == 1
    )
