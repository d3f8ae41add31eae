"""How much memory loading takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rosd_fast.quickstart import MODEL_DIR
from tests.tiny import tiny_model

STATUS = Path("/proc/self/status")
LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from rosd_fast.model.load import load_model

def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024

before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
loaded = load_model(sys.argv[1], dtype="bfloat16", device=torch.device("cpu"))
done.set()
watcher.join()
size = sum(p.nbytes for p in loaded.model.parameters())
print(json.dumps({"size": size, "peak": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system does not say how much memory is used")
@pytest.mark.parametrize(
    ("stored", "limit"), [(torch.bfloat16, 0.35), (torch.float32, 1.35)], ids=str
)
def test_loading_in_bfloat16(tmp_path: Path, stored: torch.dtype, limit: float) -> None:
    """A file of that dtype is mapped and not copied; another one is never whole in memory."""
    shape = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072}
    model = tiny_model("Llama", stored, **shape, num_hidden_layers=6, eos_token_id=1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    used = json.loads(run.stdout)
    assert used["size"] > 100e6
    assert used["peak"] < limit * used["size"]
