"""Processes that hold shards of the vocabulary, for tests of `vocab_group`.

A test file that is run as a script is one rank: `python FILE RANK NUM_RANKS FOLDER`. It writes its
results to `FOLDER/rank{RANK}.pt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 30


def join(rank: int, num_ranks: int, folder: Path) -> None:
    """Make this process a rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )


def run_ranks(file: str, num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run a test file as every rank, side by side, and return their results."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "ROSD_KERNELS_BACKEND": "torch"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = []
    for rank in range(num_ranks):
        with (folder / f"log{rank}.txt").open("w") as log:
            command = [sys.executable, file, str(rank), str(num_ranks), str(folder)]
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.02)
    codes = [process.poll() for process in processes]  # None: it waits for the others
    for process in processes:
        process.kill()
        process.wait()
    logs = [(folder / f"log{rank}.txt").read_text() for rank in range(num_ranks)]
    assert codes == [0] * num_ranks, "\n".join(
        f"rank {rank} (last line before an error: the task):\n{log[-3000:]}"
        for rank, log in enumerate(logs)
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(num_ranks)]
