"""The engine, and the teacher's servers, that a run's options ask for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.config.arguments import listed
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.process import ManagedServer, ServerSpec, find_python, per_server
from rosd_fast.engines.sglang.teacher import SERVER_ARGS, SglangTeacher
from rosd_fast.engines.sglang.weight_sync import DiskSync, DistributedSync, WeightSync
from rosd_fast.engines.weight_check import allowed_gap, check_teacher, token_logprobs
from rosd_fast.errors import UserError
from rosd_fast.model.load import find
from rosd_fast.utils.distributed import pick_device

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.model.load import LoadedModel
    from rosd_fast.run import Run

KEY_VARIABLE = "ROSD_SGLANG_API_KEY"


def check_engine(config: Config) -> None:
    """Raise UserError now for what would fail once the run is under way."""
    engine, teacher = config.engine, config.teacher
    own_engine = engine.kind == "sglang" and engine.launch == "local"
    if own_engine or (teacher.backend == "sglang" and not teacher.url):
        find_python(engine.python)
    for name, urls in (("engine.urls", engine.urls), ("teacher.url", teacher.url)):
        for url in listed(urls):
            if not url.startswith(("http://", "https://")):
                raise UserError("is no address", where=f"{name}: {url}", fix="Write http://...")
    if engine.colocated and pick_device(config.device).type == "cpu":
        raise UserError(
            "giving memory back needs a GPU; on a CPU the server would end",
            where="engine.colocated",
            fix="Leave it out",
        )


def open_engine(
    config: Config,
    model: LoadedModel,
    folder: Path,
    *,
    weight_check_ids: Sequence[int],
    note: Callable[[str], None],
) -> RolloutEngine:
    """Of `model`, for the run in `folder`. Servers are started when they get their first weights.

    weight_check_ids: a prompt on which server and trainer are compared after each hand-over.
    """
    options = config.engine
    if options.kind == "local":
        return LocalEngine(
            model.model,
            max_rows=options.max_rows,
            tokenizer=model.tokenizer,
            shares_learner_weights=True,
        )
    return SglangEngine(
        server_handles(
            config,
            model,
            folder,
            urls=options.urls,
            names=[f"server{index}" for index in range(options.servers)],
            gpus=options.gpus,
            args=(
                *(("--enable-memory-saver",) if options.colocated else ()),
                *shlex.split(options.server_args),
            ),
        ),
        sync=open_sync(config, model, folder),
        vocab_size=model.model.config.get_text_config().vocab_size,
        context_length=model.context_length,
        weight_check_ids=weight_check_ids,
        expected_logprobs=lambda ids: token_logprobs(model.model, ids),
        max_logprob_gap=allowed_gap(options.max_logprob_gap, config.dtype),
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        colocated=options.colocated,
        note=note,
    )


def open_sync(config: Config, model: LoadedModel, folder: Path) -> WeightSync:
    """The way of the weights to the servers."""
    options = config.engine
    if options.sync == "distributed":
        return DistributedSync(host=options.sync_host)
    return DiskSync(
        servers_folder(folder) / "weights"
        if options.sync_folder is None
        else Path(options.sync_folder).expanduser().absolute() / folder.name,
        model_folder(config, model, folder),
    )


def open_teacher_server(
    config: Config, model: LoadedModel, folder: Path, *, note: Callable[[str], None]
) -> SglangTeacher | None:
    """Of a teacher on a server, None: it is in the trainer's process. A server of our own is
    started by the first request."""
    teacher, options = config.teacher, config.engine
    if teacher.backend != "sglang":
        return None
    return SglangTeacher(
        server_handles(
            config,
            model,
            folder,
            urls=teacher.url,
            names=["teacher"],
            gpus=teacher.gpus,
            args=(*SERVER_ARGS, *shlex.split(teacher.server_args)),
        ),
        hidden_size=model.hidden_size,
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        request_timeout_s=options.request_timeout_s,
        note=note,
    )


async def check_teacher_server(run: Run, teacher_server: SglangTeacher) -> None:
    """Compare the teacher's server with the initial weights, and then let these go.

    Raises RunFailed when they differ. On several ranks a resumed run has no initial weights left,
    and goes by the comparison at its beginning.
    """
    teacher, config = run.learners.learner.teacher, run.config
    bound = allowed_gap(config.teacher.max_logprob_gap, config.dtype)
    alone = run.learners.world.size == 1
    if bound and (alone or run.first_step == 1):
        model = teacher.model if alone else run.inputs.model.model
        await check_teacher(teacher_server, model, run.weight_check_ids, bound=bound)
    if alone:
        teacher.discard_model()


def server_handles(
    config: Config,
    model: LoadedModel,
    folder: Path,
    *,
    urls: str,
    names: Sequence[str],
    gpus: str,
    args: Sequence[str],
) -> list[ServerHandle]:
    """Servers at `urls`, or without any of our own with these names; none of them is started."""
    options = config.engine
    servers: list[ManagedServer | Endpoint]
    if urls:
        key = os.environ.get(KEY_VARIABLE)
        names = listed(urls)
        servers = [Endpoint(url, api_key=key) for url in names]
    else:
        shares = per_server([int(part) for part in listed(gpus)], len(names))
        servers = [
            ManagedServer(
                ServerSpec(
                    python=find_python(options.python),
                    model_folder=model_folder(config, model, folder),
                    dtype=config.dtype,
                    on_cpu=pick_device(config.device).type == "cpu",
                    args=tuple(args),
                    start_timeout_s=options.start_timeout_s,
                    gpus=share,
                ),
                servers_folder(folder) / name,
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


def servers_folder(folder: Path) -> Path:
    """What a run keeps for its servers: an absolute path, as they run in folders of their own."""
    return folder.absolute() / "engine"


def model_folder(config: Config, model: LoadedModel, folder: Path) -> Path:
    """A folder with the model as it was loaded: its own, or one made of a hub model."""
    source = find(config.model)
    if isinstance(source, Path):
        return source.absolute()
    made = servers_folder(folder) / "model"
    if not made.is_dir():
        model.model.save_pretrained(made)
        model.tokenizer.save_pretrained(made)
    return made
