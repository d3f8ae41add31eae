"""Runs in an SGLang server: hidden states as bytes instead of lists of numbers in JSON.

    request {"sampling_params": {"custom_params": {"rosd_states": {"first": 120}}}, ...}
    answer  {"meta_info": {"rosd_states": [{"first": 120, "shape": [40, 4096], "dtype": "bfloat16",
                                            "file": "0f3a..." | "data": "base64"}], ...}}

Only the states from position `first` on are sent, in the dtype of the model. A server that the
trainer has started on its own machine writes them to files in a folder that is memory
(`FOLDER_VARIABLE`); any other one puts them into the answer. Requests without the parameter get
what SGLang gives.

The file is copied beside an entry point of the group `sglang.srt.plugins`, which SGLang 0.5.23
loads in each of its processes (`srt/plugins/__init__.py`); it imports nothing of this package.
"""

from __future__ import annotations

import base64
import os
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

KEY = "rosd_states"
FOLDER_VARIABLE = "ROSD_STATES_FOLDER"
TARGET = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._append_prefill_hidden_states"
)


def register() -> None:
    """The entry point: put `append_states` around SGLang's method."""
    hooks = import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(TARGET, append_states, hooks.HookType.AROUND)


def append_states(original: Any, processor: Any, **given: Any) -> int:
    """Give a request its states of a prefill; returns the offset of the next request's states.

    original, given: SGLang's own method, and its arguments: `req`, `logits_output` with the states
    of all requests of the batch, `hidden_state_offset`, `extend_input_len`, `store` and others.
    """
    req = given["req"]
    wanted = (getattr(req.sampling_params, "custom_params", None) or {}).get(KEY)
    full = given["capture_hidden_mode"].is_full() and req.return_hidden_states is True
    if wanted is None or not full:
        return original(processor, **given)
    start, count = given["hidden_state_offset"], given["extend_input_len"]
    if given.get("store", True) and sends():
        cached = len(req.origin_input_ids) - count
        skipped = min(max(int(wanted["first"]) - cached, 0), count)
        states = given["logits_output"].hidden_states[start + skipped : start + count]
        # Aligned to the sampled tokens, of which a request for states has one.
        req.customized_info = {KEY: [packed(states, cached + skipped)]}
    return start + count


def sends() -> bool:
    """Whether this is the one of the processes of a model that answers."""
    return import_module("sglang.srt.runtime_context").get_parallel().attn_tp_rank == 0


def packed(states: Any, first: int) -> dict[str, Any]:
    """The record of states [n, H], the first of which is at position `first` of the request."""
    import torch

    data = states.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    dtype = str(states.dtype).removeprefix("torch.")
    record = {"first": first, "shape": list(states.shape), "dtype": dtype}
    if folder := os.environ.get(FOLDER_VARIABLE):
        name = secrets.token_hex(16)
        path = Path(folder, name)
        try:
            path.write_bytes(data)
            return record | {"file": name}
        except OSError:  # the folder is full, or gone
            path.unlink(missing_ok=True)
    return record | {"data": base64.b64encode(data).decode()}
