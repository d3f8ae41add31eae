"""What this machine has for a run, and whether the run fits into it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.errors import UserError
from rosd_fast.memory_plan import GIB, MemoryPlan, ModelShape, memory_plan
from rosd_fast.model.skeleton import build_skeleton
from rosd_fast.utils.distributed import pick_device

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's if less.

    None where the system does not say.
    """
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        return None
    for path in map(Path, CGROUP_LIMITS):
        try:
            sizes.append(int(path.read_text()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return min(sizes)


def num_ranks() -> int:
    """The number of ranks that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_local_ranks() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_memory(config: Config, model: PreTrainedModel, *, teacher: bool) -> None:
    """Raise UserError for a model that cannot be trained in the memory of this machine.

    Counted is only what is sure to be needed: weights, gradients, moments and the teacher's copy.

    model: may be on the meta device; `choose_trainable` has marked what is trained.
    teacher: whether the method has a teacher.
    """
    on_gpu = pick_device(config.device).type == "cuda"
    shape = ModelShape.of(model)
    plan = memory_plan(
        shape,
        config,
        num_ranks=num_ranks(),
        teacher=teacher,
        separate=separate_teacher(config),
        on_gpu=on_gpu,
    )
    if on_gpu:
        needed, available = plan.total(exact=True), gpu_memory()
        place, without, fix = "a GPU", "", "Start more ranks with torchrun"
    else:
        needed, available = host_total(plan, num_local_ranks()), host_memory()
        place, fix = "this machine", "Use a machine with GPUs"
        without = " and device is cpu" if torch.cuda.is_available() else " and no GPU"
    if available is not None and needed > available:
        raise UserError(
            f"training {shape.trained:,} of {shape.parameters:,} parameters takes at least "
            f"{needed / GIB:.1f} GiB, and {place} has {available / GIB:.1f} GiB{without}",
            where=config.model,
            fix=f"{fix}, or train adapters (lora.rank); --dry-run prints the memory plan",
        )


def separate_teacher(config: Config) -> ModelShape | None:
    """The sizes of `teacher.model`; None where the teacher is the student's own."""
    name = config.teacher.model
    if name is None:
        return None
    return ModelShape.of(
        build_skeleton(name, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    )


def gpu_memory() -> int | None:
    """Bytes of memory of a GPU that this process sees, the smallest; None without a GPU."""
    cards = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(i).total_memory for i in cards), default=None)


def host_total(plan: MemoryPlan, local_ranks: int) -> int:
    """Bytes that are sure to be needed by ranks that share the memory of one machine."""
    whole = sum(row.size for row in plan.rows if row.rank0_only)
    per_rank = plan.total("device", exact=True) + plan.total("host", exact=True) - whole
    return local_ranks * per_rank + whole
