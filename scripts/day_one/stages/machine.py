"""What the machine is, and how fast it copies and multiplies: the ceilings of all other stages."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from day_one.results import Row
from day_one.stage import GPU_GIB, Phase, Plan, Stage
from day_one.timing import timed

PACKAGES = (
    "torch triton transformers tokenizers numpy safetensors liger-kernel flash-attn "
    "flash-attn-3 flash-attn-4 torchao peft"
).split()
VERSIONS, COPIES, GEMMS = "Versions", "Copies", "GEMMs"
# (rows, vocabulary, width) of the products with a head, and the side of a square product
HEAD = {"cuda": (4096, 151936, 2560), "cpu": (64, 2048, 128)}
SIDE = {"cuda": 8192, "cpu": 256}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 16 << 20}
FLOATS = ("bfloat16", "float16", "tf32", "float32")
PRODUCTS = ("logits", "logits, bfloat16 out", "grad_hidden", "grad_head")


class Machine(Stage):
    name = "machine"
    item_s = 60.0

    def phases(self, plan: Plan) -> Iterator[Phase]:
        items: dict[str, dict[str, Any]] = {"versions": {}, "copy": {}}
        floats = FLOATS if plan.on_gpu else ("bfloat16", "float32")
        items |= {f"gemm {precision}": {"precision": precision} for precision in floats}
        items |= {f"gemm {product}": {"product": product} for product in PRODUCTS}
        yield Phase(items=items)

    def handle(self, key: str, args: Mapping[str, Any], device: str) -> list[Row]:
        on = torch.device(device)
        if key == "versions":
            return versions(on)
        if key == "copy":
            return copies(on)
        return [
            gemm(on, args["precision"]) if "precision" in args else of_head(on, args["product"])
        ]


def versions(device: torch.device) -> list[Row]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "host memory GiB": round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
        ),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    found["cuda of torch"] = torch.version.cuda or "none"
    if device.type == "cuda":
        cuda: Any = torch.cuda
        card: Any = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name,
            "compute capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            GPU_GIB: round(card.total_memory / 2**30, 1),
            "L2 MiB": round(getattr(card, "L2_cache_size", 0) / 2**20),
            "nccl": ".".join(map(str, cuda.nccl.version())),
            **nvidia_smi(),
        }
    return [{"table": VERSIONS, "what": what, "value": str(value)} for what, value in found.items()]


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as the card stands; nothing where the tool does not answer."""
    fields = (
        "driver_version",
        "clocks.max.sm",
        "clocks.max.mem",
        "power.limit",
        "mig.mode.current",
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        values = done.stdout.splitlines()[0].split(", ")
        return dict(zip(fields, values, strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def copies(device: torch.device) -> list[Row]:
    """Copies on the device, read plus written bytes, and to and from pinned host memory."""
    size = COPY_BYTES[device.type]
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows = [_copy_row("device to device", 2 * size, lambda: target.copy_(source), device)]
    if device.type == "cuda":
        part = source[: size // 4]
        host = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
        moved = len(part)
        rows.append(
            _copy_row("host to device", moved, lambda: part.copy_(host, non_blocking=True), device)
        )
        rows.append(
            _copy_row("device to host", moved, lambda: host.copy_(part, non_blocking=True), device)
        )
    return rows


def _copy_row(what: str, num_bytes: int, call: Any, device: torch.device) -> Row:
    took = timed(call, device, limit_s=1.0)
    return {
        "table": COPIES,
        "what": what,
        "GB/s": num_bytes / took.median_s / 1e9,
        "spread": took.spread,
    }


def gemm(device: torch.device, precision: str) -> Row:
    """A square product of random numbers; zeros would be faster than real data."""
    side = SIDE[device.type] // (2 if precision in ("float32", "tf32") else 1)
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return _gemm_row(
            f"{side} x {side} x {side}",
            precision,
            2.0 * side**3,
            lambda: torch.mm(a, b, out=out),
            device,
        )
    finally:
        torch.set_float32_matmul_precision(before)


def of_head(device: torch.device, product: str) -> Row:
    """One of a loss's products: bfloat16 operands, and float32 results as ours has on a GPU."""
    N, V, H = HEAD[device.type]
    product_of: Any = torch.mm
    hidden, head = (torch.randn(n, H, device=device).bfloat16() for n in (N, V))
    wide: dict[str, Any] = {"out_dtype": torch.float32} if device.type == "cuda" else {}
    if product.startswith("logits"):
        options: dict[str, Any] = {} if "bfloat16" in product else wide
        call, shape = (lambda: product_of(hidden, head.T, **options)), f"{N} x {V} x {H}"
    else:
        grad = torch.randn(N, V, device=device).bfloat16()
        if product == "grad_hidden":
            call, shape = (lambda: product_of(grad, head, **wide)), f"{N} x {H} x {V}"
        else:
            call, shape = (lambda: product_of(grad.T, hidden, **wide)), f"{V} x {H} x {N}"
    return _gemm_row(f"{product} {shape}", "bfloat16", 2.0 * N * V * H, call, device)


def _gemm_row(what: str, precision: str, flops: float, call: Any, device: torch.device) -> Row:
    took = timed(call, device, limit_s=1.0, most=20)
    return {
        "table": GEMMS,
        "what": what,
        "precision": precision,
        "ms": 1e3 * took.median_s,
        "tflops": flops / took.median_s / 1e12,
        "spread": took.spread,
    }


STAGE = Machine()
