"""The engine that a run's options ask for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.fleet import Member
from rosd_fast.engines.http import Endpoint
from rosd_fast.engines.local import LocalEngine
from rosd_fast.engines.server import OwnServer, ServerSpec, find_python, per_server
from rosd_fast.engines.sglang import SglangEngine
from rosd_fast.errors import UserError
from rosd_fast.model.load import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosd_fast.config import Config
    from rosd_fast.model.load import LoadedModel

KEY_VARIABLE = "ROSD_SGLANG_API_KEY"
PROBE_BOUND = {"float32": 0.01, "bfloat16": 0.3}


def check_engine(config: Config, model: LoadedModel) -> None:
    """Raise UserError now for what would fail once the run is under way."""
    engine = config.engine
    if engine.kind != "sglang":
        return
    if engine.launch == "local":
        find_python(engine.python)
    if engine.colocated and model.model.device.type == "cpu":
        raise UserError(
            "giving memory back needs a GPU; on a CPU the server would end",
            where="engine.colocated",
            fix="Leave it out",
        )
    for url in addresses(engine.urls):
        if not url.startswith(("http://", "https://")):
            raise UserError("is no address", where=f"engine.urls: {url}", fix="Write http://...")


def open_engine(
    config: Config,
    model: LoadedModel,
    folder: Path,
    *,
    probe_ids: Sequence[int],
    note: Callable[[str], None],
) -> RolloutEngine:
    """Of `model`, for the run in `folder`. Servers are started when they get their first weights.

    probe_ids: a prompt on which server and trainer are compared after each hand-over.
    """
    options = config.engine
    if options.kind == "local":
        return LocalEngine(model.model, max_rows=options.max_rows, tokenizer=model.tokenizer)
    source = model_folder(config, model, folder)
    bound = PROBE_BOUND[config.dtype] if options.probe_bound is None else options.probe_bound
    return SglangEngine(
        members(config, model, source, folder),
        model_folder=source,
        weights_folder=(
            folder / "engine" / "weights"
            if options.sync_folder is None
            else Path(options.sync_folder).expanduser().absolute() / folder.name
        ),
        vocab_size=model.model.config.get_text_config().vocab_size,
        context_length=model.context_length,
        probe_ids=probe_ids,
        probe=lambda ids: token_logprobs(model.model, ids),
        probe_bound=bound,
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        colocated=options.colocated,
        note=note,
    )


def members(config: Config, model: LoadedModel, source: Path, folder: Path) -> list[Member]:
    """The servers of the options, none of them started."""
    options = config.engine
    servers: list[OwnServer | Endpoint]
    if options.launch == "urls":
        key = os.environ.get(KEY_VARIABLE)
        names = addresses(options.urls)
        servers = [Endpoint(url, api_key=key) for url in names]
    else:
        gpus = [int(part) for part in options.gpus.split(",") if part]
        shares = per_server(gpus, options.servers)
        names = [f"server{index}" for index in range(options.servers)]
        servers = [
            OwnServer(
                ServerSpec(
                    python=find_python(options.python),
                    model_folder=source,
                    dtype=config.dtype,
                    on_cpu=model.model.device.type == "cpu",
                    args=(
                        *(("--enable-memory-saver",) if options.colocated else ()),
                        *shlex.split(options.server_args),
                    ),
                    start_timeout_s=options.start_timeout_s,
                    gpus=share,
                ),
                folder / "engine" / name,
            )
            for name, share in zip(names, shares, strict=True)
        ]
    return [
        Member(
            server,
            name=name,
            health_every_s=options.health_every_s,
            health_timeout_s=options.health_timeout_s,
        )
        for server, name in zip(servers, names, strict=True)
    ]


def addresses(urls: str) -> list[str]:
    """Of a list with commas."""
    return [url.strip() for url in urls.split(",") if url.strip()]


def model_folder(config: Config, model: LoadedModel, folder: Path) -> Path:
    """A folder with the model as it was loaded: its own, or one made of a hub model."""
    source = find(config.model)
    if isinstance(source, Path):
        return source.absolute()
    made = folder / "engine" / "model"
    if not made.is_dir():
        model.model.save_pretrained(made)
        model.tokenizer.save_pretrained(made)
    return made


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids[1:]` at temperature 1, each given those before it."""
    inputs = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0].tolist()
