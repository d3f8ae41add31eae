"""A fake SGLang server, over real HTTP, that can be told to fail.

It answers a request with ids that depend only on the prompt, so that a test knows the right answer
however often a request was retried.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from datetime import timedelta
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from rosd_fast.engines.sglang.server_group import c10d, gloo_options
from rosd_fast.engines.sglang.states_hook import KEY, packed

# Options of servers and engines for tests that do not set them.
WATCH: dict[str, Any] = {"health_every_s": 30.0, "health_timeout_s": 30.0}
LIMITS: dict[str, Any] = {"concurrency": 64, "max_failures": 10, "request_timeout_s": 3600.0}
ENGINE: dict[str, Any] = LIMITS | {
    "weight_check_ids": (),
    "expected_logprobs": None,
    "max_logprob_gap": 0.0,
    "colocated": False,
    "note": print,
}


class FakeSglang:
    """A server for the duration of an `async with` block.

    faults: faults of the next requests to /generate, one each; "": none.
    tokens: number of tokens of each completion.
    port: 0: any free port.
    """

    def __init__(self, *, faults: tuple[str, ...] = (), tokens: int = 3, port: int = 0) -> None:
        self.faults = deque(faults)
        self.port = port
        self.tokens = tokens
        self.version = "default"
        self.model_path = "/models/served"
        self.bodies: list[dict[str, Any]] = []  # of requests to /generate
        self.loaded: list[str] = []  # versions, "release" and "resume", in order of the requests
        self.folders: list[str] = []  # that weights were loaded from
        self.refuse_weights = 0  # how many of the next weight updates fail
        self.joins: dict[str, Any] = {}  # process groups by name
        self.num_joins = 0
        self.refuse_joins = False
        self.tensors: dict[str, Tensor] = {}  # received by broadcast
        self.num_buckets = 0  # received by broadcast
        self.break_at = ""  # fault of the next bucket: "refuse", "fail" or "lost"
        self.updating = False  # between begin and end of a weight update
        self.max_lora_rank: int | None = None  # None: no adapters can be loaded
        self.adapters: dict[str, str] = {}  # folders by name
        self.tp_size = 1
        self.dp_size = 1
        self.healthy = True
        self.delay_s: dict[str, float] = {}  # by request id
        self.running = self.most_running = 0
        self.check_logprob = -1.0
        self.has_plugin = False  # that of `states_hook`
        self.states = expected_states  # returns the states for the ids of a scoring request
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def __aenter__(self) -> FakeSglang:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/model_info", self._info),
                web.post("/update_weights_from_disk", self._load),
                web.get("/server_info", self._server_info),
                web.post("/init_weights_update_group", self._join),
                web.post("/destroy_weights_update_group", self._leave),
                web.post("/begin_weight_update", self._session),
                web.post("/end_weight_update", self._session),
                web.post("/update_weights_from_distributed", self._receive),
                web.post("/load_lora_adapter", self._load_adapter),
                web.post("/unload_lora_adapter", self._unload_adapter),
                web.post("/update_weight_version", self._rename),
                web.post("/generate", self._generate),
                web.post("/release_memory_occupation", self._memory),
                web.post("/resume_memory_occupation", self._memory),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version, "model_path": self.model_path})

    async def _memory(self, request: web.Request) -> web.Response:
        self.loaded.append(request.path.split("_")[0].lstrip("/"))
        return web.Response()

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.refuse_weights:
            self.refuse_weights -= 1
            return web.json_response({"success": False, "message": "no such file"}, status=400)
        self.version = body["weight_version"]
        self.loaded.append(self.version)
        self.folders.append(body["model_path"])
        return web.json_response({"success": True, "message": ""})

    async def _server_info(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "tp_size": self.tp_size,
                "dp_size": self.dp_size,
                "pp_size": 1,
                "enable_lora": self.max_lora_rank is not None,
                "max_lora_rank": self.max_lora_rank,
            }
        )

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        if name in self.adapters or self.refuse_weights:
            self.refuse_weights = max(0, self.refuse_weights - 1)
            answer = {"success": False, "error_message": f"{name} is already loaded"}
            return web.json_response(answer, status=400)
        self.adapters[name] = body["lora_path"]
        return web.json_response({"success": True, "error_message": ""})

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        path = self.adapters.pop((await request.json())["lora_name"], None)
        return web.json_response({"success": path is not None}, status=400 if path is None else 200)

    async def _rename(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["abort_all_requests"] is False
        self.version = body["new_version"]
        self.loaded.append(self.version)
        return web.json_response({"success": True, "new_version": self.version})

    async def _join(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.refuse_joins:
            return web.json_response({"success": False, "message": "no such backend"}, status=400)
        assert (body["backend"], body["rank_offset"]) == ("gloo", 1)
        self.num_joins += 1
        self.joins[body["group_name"]] = await asyncio.to_thread(self._open_group, body)
        return web.json_response({"success": True, "message": ""})

    async def _leave(self, request: web.Request) -> web.Response:
        group = self.joins.pop((await request.json())["group_name"], None)
        return web.json_response({"success": group is not None, "message": ""})

    def _open_group(self, body: dict[str, Any]) -> Any:
        """Open a group as torch.distributed does, without its registry of groups."""
        name, size = body["group_name"], body["world_size"]
        address, port = body["master_address"], body["master_port"]
        store = c10d.PrefixStore(name, c10d.TCPStore(address, port, size, is_master=False))
        store = c10d.PrefixStore("cpu/", c10d.PrefixStore(f"{name}/", store))
        return c10d.ProcessGroupGloo(store, 1, size, gloo_options(address, timedelta(seconds=10)))

    async def _session(self, request: web.Request) -> web.Response:
        begins = "begin" in request.path
        if begins == self.updating:
            return web.json_response({"success": False, "message": "is it open?"}, status=400)
        self.updating = begins
        return web.json_response({"success": True, "message": ""})

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.json()
        fault, self.break_at = self.break_at, ""
        if fault == "lost":  # as after a restart
            self.joins.clear()
        group = self.joins.get(body["group_name"])
        if group is None or fault == "refuse" or not self.updating:
            return web.json_response({"success": False, "message": "not now"}, status=400)
        assert body["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(body["shapes"], dtypes, strict=True)
        ]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        await asyncio.to_thread(lambda: group.broadcast(flat, 0).wait())
        parts = zip(body["names"], dtypes, body["shapes"], flat.split(sizes), strict=True)
        self.tensors |= {name: part.view(dtype).view(shape) for name, dtype, shape, part in parts}
        self.num_buckets += 1
        if fault == "fail":
            return web.json_response({"success": False, "message": "failed"}, status=400)
        self.version = body["weight_version"]
        self.loaded.append(self.version)
        return web.json_response({"success": True, "message": ""})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("lora_path") not in (None, *self.adapters):
            answer = {"error": {"message": "an adapter that has never been loaded"}}
            return web.json_response(answer, status=400)
        if body["sampling_params"]["max_new_tokens"] == 0:
            logprobs = [[None, 0, None]] + [[self.check_logprob, 0, None]] * (
                len(body["input_ids"]) - 1
            )
            return web.json_response({"meta_info": {"input_token_logprobs": logprobs}})
        self.bodies.append(body)
        fault = self.faults.popleft() if self.faults else ""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s.get(body["rid"].split("/", 1)[1].split("#")[0], 0.0))
            return await self._answer(request, body, fault)
        finally:
            self.running -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], fault: str
    ) -> web.StreamResponse:
        if fault.isdecimal():
            return web.json_response({"error": {"message": "queue full"}}, status=int(fault))
        if fault == "hang":
            self.healthy = False
            await asyncio.sleep(60)
        version = {"stale": "default", "foreign": "0badcafe-7"}.get(fault, self.version)
        if body.get("return_hidden_states"):
            items = [self.scoring(body, version, fault)]
        else:
            items = [self.completion(body["input_ids"], i, version) for i in range(count(body))]
        if fault == "short":
            for item in items:
                item["meta_info"]["finish_reason"] = {"type": "length", "length": 3}
        if fault == "abort":
            items[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "retracted"}
        if fault == "incomplete":
            del items[0]["meta_info"]["output_token_logprobs"]
        if (
            fault == "not finite" and "return_hidden_states" not in body
        ):  # in the JSON of SGLang's library
            items[-1]["meta_info"]["output_token_logprobs"][0][0] = None
        if fault == "fewer":
            items = items[1:]
        answer = items if "n" in body["sampling_params"] else items[0]
        data = json.dumps(answer, separators=(",", ":")).encode()
        if fault == "truncated":
            return web.Response(body=data[: len(data) // 2], content_type="application/json")
        if fault == "reset":
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=data, content_type="application/json")

    def completion(self, prompt_ids: list[int], index: int, version: str) -> dict[str, Any]:
        ids = expected_ids(prompt_ids, index, self.tokens)
        return {
            "output_ids": list(ids),
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": ids[-1]},
                "output_token_logprobs": [[-0.5 - index, token, None] for token in ids],
                "weight_version": version,
                "cached_tokens": len(prompt_ids) - 1 if index else 0,
                "num_retractions": 0,
            },
        }

    def scoring(self, body: dict[str, Any], version: str, fault: str) -> dict[str, Any]:
        """The states of uncached tokens; half of those before the first needed one are cached."""
        ids, cached = body["input_ids"], body["logprob_start_len"] // 2
        states = self.states(ids)[cached:]
        if fault == "chunked":  # the first chunk's states are lost
            states = states[1:]
        if fault == "narrow":
            states = [row[1:] for row in states]
        if fault == "not finite":
            states[-1][0] = float("nan")
        if fault == "stateless":
            states = None
        sent: dict[str, Any] = {"hidden_states": None if states is None else [states]}
        wanted = body["sampling_params"].get("custom_params", {}).get(KEY)
        if self.has_plugin and wanted is not None and states is not None:
            begin = max(cached, wanted["first"])
            rows = torch.tensor(states)[begin - cached :]
            if fault == "chunked":
                begin += 1
            sent = {KEY: [packed(rows, begin)]}
            if fault == "lost":
                sent[KEY][0] |= {"file": "0" * 32}
        return {
            "output_ids": [1],
            "meta_info": {
                "finish_reason": {"type": "length", "length": 1},
                "weight_version": version,
                "cached_tokens": cached,
                **sent,
            },
        }


def expected_states(ids: list[int]) -> list[list[float]]:
    """States of width 5, each of which depends on all ids up to its own."""
    return [[float(sum(ids[: i + 1])), i, ids[i], 0.5, -1.0] for i in range(len(ids))]


def expected_ids(
    prompt_ids: list[int] | tuple[int, ...], index: int, tokens: int
) -> tuple[int, ...]:
    return tuple((sum(prompt_ids) + index + position) % 50 for position in range(tokens))


def count(body: dict[str, Any]) -> int:
    return body["sampling_params"]["n"]
