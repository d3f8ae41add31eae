"""Makes the rollout engine, and the client of a teacher server, that the options ask for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.config.arguments import listed
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.local.token_view import check_served
from rosd_fast.engines.sglang.adapter_sync import AdapterSync, server_args
from rosd_fast.engines.sglang.broadcast_sync import DistributedSync
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec, find_python, split_gpus
from rosd_fast.engines.sglang.served_weights import ServedWeights
from rosd_fast.engines.sglang.states_hook import FOLDER_VARIABLE
from rosd_fast.engines.sglang.states_plugin import make_states_folder, write_plugin
from rosd_fast.engines.sglang.teacher import SERVER_ARGS, SglangTeacher
from rosd_fast.engines.sglang.weight_sync import DiskSync, WeightSync
from rosd_fast.engines.weight_check import allowed_gap
from rosd_fast.errors import UserError
from rosd_fast.model.adapter_files import adapter_config
from rosd_fast.model.export import export_model
from rosd_fast.model.hub_folder import hub_folder
from rosd_fast.model.load import find
from rosd_fast.model.nf4 import has_packed
from rosd_fast.model.quantized import is_quantized
from rosd_fast.model.rope import server_rope_args
from rosd_fast.utils.distributed import pick_device

if TYPE_CHECKING:
    from rosd_fast.config import Config, EngineConfig, TeacherConfig
    from rosd_fast.model.load import LoadedModel

KEY_VARIABLE = "ROSD_SGLANG_API_KEY"


def check_engine(engine: EngineConfig, teacher: TeacherConfig, device: str) -> None:
    """Raise UserError now for mistakes that would otherwise show only during the run."""
    starts_engine = engine.kind == "sglang" and engine.launch == "local"
    if starts_engine or (teacher.backend == "sglang" and not teacher.url):
        find_python(engine.python)
    for name, urls in (("engine.urls", engine.urls), ("teacher.url", teacher.url)):
        for url in listed(urls):
            if not url.startswith(("http://", "https://")):
                raise UserError("is not a URL", where=f"{name}: {url}", fix="Write http://...")
    if engine.sync == "adapter" and engine.launch == "local" and pick_device(device).type == "cpu":
        raise UserError(
            "needs a GPU: SGLang 0.5.23 pins memory for adapters, which fails without one",
            where="engine.sync = adapter",
            fix="Use disk, which sends weights with the adapters merged",
        )
    if engine.colocated and pick_device(device).type == "cpu":
        raise UserError(
            "needs a GPU: without one the server cannot release its memory and would exit",
            where="engine.colocated",
            fix="Leave it out",
        )


def open_engine(
    config: Config,
    model: LoadedModel,
    run_folder: Path,
    *,
    weight_check_ids: Sequence[int],
    expected_logprobs: Callable[[Sequence[int]], list[float]],
    note: Callable[[str], None],
) -> RolloutEngine:
    """Return the rollout engine that the options ask for.

    SGLang servers start when they get their first weights. weight_check_ids: a prompt on which
    server and trainer are compared after each weight sync; `expected_logprobs` returns the
    trainer's current log-probabilities of all but its first token. note: shows the user a line.
    """
    options = config.engine
    if options.kind == "local":
        engine = LocalEngine(
            model.model,
            max_rows=options.max_rows,
            tokenizer=model.tokenizer,
            shares_learner_weights=True,
        )
        if engine.note:
            note(engine.note)
        return engine
    return SglangEngine(
        server_handles(
            config,
            config.model,
            model,
            run_folder,
            urls=options.urls,
            names=[f"server{index}" for index in range(options.servers)],
            gpus=options.gpus,
            args=(
                *(("--enable-memory-saver",) if options.colocated else ()),
                *(adapter_args(model) if options.sync == "adapter" else ()),
                *shlex.split(options.server_args),
            ),
        ),
        sync=open_sync(options, config.model, model, run_folder),
        vocab_size=model.model.config.get_text_config().vocab_size,
        context_length=model.context_length,
        weight_check_ids=weight_check_ids,
        expected_logprobs=expected_logprobs,
        max_logprob_gap=allowed_gap(options.max_logprob_gap, config.dtype),
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        colocated=options.colocated,
        note=note,
    )


def open_served_engine(
    config: Config, model: LoadedModel, folder: Path, *, note: Callable[[str], None]
) -> SglangEngine:
    """Return an engine for the model that servers have loaded by themselves; they get no weights.

    model: needs no weights; its vocabulary and context length limit the requests. folder: gets the
    files of managed servers, which load the folder that `config.model` names.
    """
    options = config.engine
    return SglangEngine(
        server_handles(
            config,
            config.model,
            model,
            folder,
            urls=options.urls,
            names=[f"server{index}" for index in range(options.servers)],
            gpus=options.gpus,
            args=shlex.split(options.server_args),
        ),
        sync=ServedWeights(),
        vocab_size=model.model.config.get_text_config().vocab_size,
        context_length=model.context_length,
        weight_check_ids=(),
        expected_logprobs=None,
        max_logprob_gap=0.0,
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        colocated=False,
        note=note,
    )


def open_sync(
    options: EngineConfig, source: str, model: LoadedModel, run_folder: Path
) -> WeightSync:
    """Return the way in which weights reach the servers. source: the option `model`."""
    if options.sync == "distributed":
        return DistributedSync(host=options.sync_host)
    folder = (
        servers_folder(run_folder) / "weights"
        if options.sync_folder is None
        else Path(options.sync_folder).expanduser().absolute() / run_folder.name
    )
    if options.sync == "adapter":
        return AdapterSync(folder, adapter_config(model.model))
    return DiskSync(folder, model_folder(source, model, run_folder))


def adapter_args(model: LoadedModel) -> tuple[str, ...]:
    """The arguments of a server that loads the adapters of the model."""
    return server_args(adapter_config(model.model))


def grammar_args(model: LoadedModel) -> tuple[str, ...]:
    """The arguments of a server whose grammars cannot read the tokenizer: it would not start."""
    try:
        check_served(model.tokenizer, model.stop_token_ids)
    except UserError:
        return ("--grammar-backend", "none")
    return ()


def open_sglang_teacher(
    config: Config, model: LoadedModel, run_folder: Path, *, note: Callable[[str], None]
) -> SglangTeacher | None:
    """Return the client of a teacher server; None when the teacher runs in the trainer's process.

    A managed server starts with the first request.

    model: the teacher as loaded: the student, or the model of `teacher.model`.
    """
    teacher, options = config.teacher, config.engine
    if teacher.backend != "sglang":
        return None
    states_folder, environment = None, ()
    if not teacher.url:
        states_folder = make_states_folder(servers_folder(run_folder))
        plugin = write_plugin(servers_folder(run_folder) / "plugin")
        environment = (("PYTHONPATH", str(plugin)), (FOLDER_VARIABLE, str(states_folder)))
    return SglangTeacher(
        server_handles(
            config,
            teacher.model or config.model,
            model,
            run_folder,
            urls=teacher.url,
            names=["teacher"],
            gpus=teacher.gpus,
            args=(*SERVER_ARGS, *shlex.split(teacher.server_args)),
            environment=environment,
        ),
        hidden_size=model.hidden_size,
        states_folder=states_folder,
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        note=note,
    )


def server_handles(
    config: Config,
    source: str,
    model: LoadedModel,
    run_folder: Path,
    *,
    urls: str,
    names: Sequence[str],
    gpus: str,
    args: Sequence[str],
    environment: tuple[tuple[str, str], ...] = (),
) -> list[ServerHandle]:
    """Return the servers at `urls`, or where there are no URLs, a managed server for each name.

    No server is started yet.

    source: the name of the model that they serve, as in the option `model`. model: as loaded.
    environment: more variables of managed servers.
    """
    options = config.engine
    servers: list[ManagedServer | Endpoint]
    rope = server_rope_args(model.model, where=urls or source, managed=not urls)
    if urls:
        key = os.environ.get(KEY_VARIABLE)
        names = listed(urls)
        servers = [Endpoint(url, api_key=key) for url in names]
    else:
        shares = split_gpus([int(part) for part in listed(gpus)], len(names))
        servers = [
            ManagedServer(
                ServerSpec(
                    python=find_python(options.python),
                    model_folder=model_folder(source, model, run_folder),
                    dtype=config.dtype,
                    on_cpu=pick_device(config.device).type == "cpu",
                    args=(*rope, *grammar_args(model), *args),
                    start_timeout_s=options.start_timeout_s,
                    gpus=share,
                    environment=environment,
                ),
                servers_folder(run_folder) / name,
            )
            for name, share in zip(names, shares, strict=True)
        ]
    return [
        ServerHandle(
            server,
            name=name,
            health_every_s=options.health_every_s,
            health_timeout_s=options.health_timeout_s,
        )
        for server, name in zip(servers, names, strict=True)
    ]


def servers_folder(run_folder: Path) -> Path:
    """The folder with all server files of a run. Absolute: servers run in their own folders."""
    return run_folder.absolute() / "engine"


def model_folder(source: str, model: LoadedModel, run_folder: Path) -> Path:
    """Return a folder with the model, without adapters: `source` itself, the cached folder of a hub
    model, or a copy of one that has other weights here, since it was quantized or is now.

    source: the name of the model, as in the option `model`. Raises UserError if a hub model cannot
    be reached.
    """
    found = find(source)
    found = found.absolute() if isinstance(found, Path) else hub_folder(found)
    no_weights = model.model.device.type == "meta"  # the server then loads what `source` names
    same = not (is_quantized(found) or has_packed(model.model))
    if no_weights or same:
        return found
    copy = servers_folder(run_folder) / f"model--{str(found).strip('/').replace('/', '--')}"
    if not copy.is_dir():
        export_model(model.model, model.tokenizer, copy)
    return copy
