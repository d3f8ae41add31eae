"""Weight sync of LoRA adapters alone: servers keep the base weights and load the adapters.

    folder/v000012/  adapter_config.json, adapter_model.safetensors

Each version is an adapter of its own on the server, under a new name, which requests ask for by
`lora_path`. The server keeps the KV cache of adapters apart, so nothing has to be flushed. The
version before is unloaded once the new one is loaded.

The endpoints are those of SGLang 0.5.23: /load_lora_adapter, /unload_lora_adapter and
/update_weight_version, with the fields of their bodies in `managers/io_struct.py`
(docs.sglang.io/advanced_features/lora.html).
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rosd_fast.engines.sglang.client import Refused, ServerError
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_sync import SYNC_TIMEOUT_S, WeightSync, post_checked
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.files import atomic_folder, remove_leftovers
from rosd_fast.model.adapter_files import write_adapter
from rosd_fast.model.weight_stream import WeightStream

LORAS_PER_BATCH = 2  # the current version, and the base weights


class AdapterSync(WeightSync):
    """Weight sync of adapters by a folder that the servers read.

    folder: gets one folder per version.
    config: the peft config of the adapters.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config
        self._version = 0
        self._loaded: dict[ServerHandle, set[str]] = {}  # names that a server may hold

    def stage(self, weights: WeightStream, version: int) -> None:
        path = self._path(version)
        try:
            with atomic_folder(path, durable=False) as folder:
                write_adapter(self.config, weights.whole(), folder)
        except (OSError, SafetensorError) as error:
            raise UserError(
                "the adapter for the server cannot be written "
                f"({getattr(error, 'strerror', None) or error})",
                where=str(path),
                fix="Free disk space, or set engine.sync_folder to another folder",
            ) from None
        self._version = version

    async def push(self, handle: ServerHandle, tag: str, version: int) -> None:
        await self._check_server(handle)
        names = self._loaded.setdefault(handle, set())
        if tag in names:  # an earlier try was interrupted
            await self._unload(handle, tag)
        names.add(tag)
        body = {"lora_name": tag, "lora_path": str(self._path(version))}
        await post_checked(handle, "/load_lora_adapter", body, what="load the adapter")
        await post_checked(
            handle,
            "/update_weight_version",
            {"new_version": tag, "abort_all_requests": False},
            what="take the version of the weights",
        )
        for name in names - {tag}:
            await self._unload(handle, name)
        self._loaded[handle] = {tag}

    def request_fields(self, tag: str) -> dict[str, Any]:
        return {"lora_path": tag}

    def are_lost(self, error: Refused) -> bool:
        return "never been loaded" in error.what

    def discard_stale(self) -> None:
        self._drop_all_but(self._path(self._version))

    async def close(self) -> None:
        self._drop_all_but(None)

    async def _check_server(self, handle: ServerHandle) -> None:
        """Raise RunFailed unless the server can load the adapters, ServerError if it is down."""
        info = await handle.get("/server_info", timeout_s=SYNC_TIMEOUT_S)
        max_rank = info.get("max_lora_rank")
        if not info.get("enable_lora") or (max_rank is not None and max_rank < self.config.r):
            raise RunFailed(
                f"{handle.url}: engine.sync adapter needs a server that was started with "
                f"{' '.join(server_args(self.config))}, or set engine.sync = disk"
            )
        if info.get("dp_size", 1) != 1:
            raise RunFailed(
                f"{handle.url}: SGLang loads adapters only without data parallelism, but this "
                f"server has dp_size {info['dp_size']}; set engine.sync = disk"
            )

    async def _unload(self, handle: ServerHandle, name: str) -> None:
        """Unload an adapter, which a restarted server does not have."""
        with contextlib.suppress(ServerError):
            await handle.post("/unload_lora_adapter", {"lora_name": name}, timeout_s=SYNC_TIMEOUT_S)

    def _path(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"

    def _drop_all_but(self, keep: Path | None) -> None:
        remove_leftovers(self.folder)
        for path in self.folder.glob("v??????"):
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)


def server_args(config: Any) -> tuple[str, ...]:
    """The arguments of sglang.launch_server for adapters of a peft config.

    Raises UserError for adapters of fused experts, whose files SGLang cannot read.
    """
    if getattr(config, "target_parameters", None):
        raise UserError(
            "SGLang cannot load adapters of fused experts",
            where="engine.sync = adapter",
            fix="Use disk, which sends weights with the adapters merged, or name only layers of "
            "attention in lora.targets, such as q_proj,k_proj,v_proj,o_proj",
        )
    targets = config.target_modules
    return (
        "--enable-lora",
        *("--max-lora-rank", str(config.r)),
        *("--lora-target-modules", *([targets] if isinstance(targets, str) else targets)),
        *("--max-loras-per-batch", str(LORAS_PER_BATCH)),
    )
