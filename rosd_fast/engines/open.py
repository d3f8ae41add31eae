"""The engine, and the teacher's servers, that a run's options ask for."""

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
from rosd_fast.engines.scorer import SERVER_ARGS, SglangScorer
from rosd_fast.engines.server import OwnServer, ServerSpec, find_python, per_server
from rosd_fast.engines.sglang import SglangEngine
from rosd_fast.engines.weight_sync import DiskSync, DistributedSync, WeightSync
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.attention import hidden_states
from rosd_fast.model.head import head
from rosd_fast.model.load import find
from rosd_fast.options import listed
from rosd_fast.parallel import pick_device
from rosd_fast.types import PackedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosd_fast.config import Config
    from rosd_fast.model.load import LoadedModel
    from rosd_fast.run import Run

KEY_VARIABLE = "ROSD_SGLANG_API_KEY"
LIKELY = 1e-3  # the least probability of a token that servers and trainer are compared at
PROBE_BOUND = {"float32": 0.01, "bfloat16": 0.3}


def check_engine(config: Config) -> None:
    """Raise UserError now for what would fail once the run is under way."""
    engine, teacher = config.engine, config.teacher
    own_engine = engine.kind == "sglang" and engine.launch == "local"
    if own_engine or (teacher.where == "sglang" and not teacher.url):
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
    probe_ids: Sequence[int],
    note: Callable[[str], None],
) -> RolloutEngine:
    """Of `model`, for the run in `folder`. Servers are started when they get their first weights.

    probe_ids: a prompt on which server and trainer are compared after each hand-over.
    """
    options = config.engine
    if options.kind == "local":
        return LocalEngine(
            model.model, max_rows=options.max_rows, tokenizer=model.tokenizer, follows=True
        )
    return SglangEngine(
        members(
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
        probe_ids=probe_ids,
        probe=lambda ids: token_logprobs(model.model, ids),
        probe_bound=bound_of(options.probe_bound, config.dtype),
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


def open_scorer(
    config: Config, model: LoadedModel, folder: Path, *, note: Callable[[str], None]
) -> SglangScorer | None:
    """Of a teacher on a server, None: it is in the trainer's process. A server of our own is
    started by the first request."""
    teacher, options = config.teacher, config.engine
    if teacher.where != "sglang":
        return None
    return SglangScorer(
        members(
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


async def check_scorer(run: Run, scorer: SglangScorer) -> None:
    """Compare the teacher's server with the initial weights, and then let these go.

    Raises RunFailed when they differ. On several ranks a resumed run has no initial weights left,
    and goes by the comparison at its beginning.
    """
    teacher, config = run.crew.learner.teacher, run.config
    bound = bound_of(config.teacher.server_bound, config.dtype)
    alone = run.crew.world.size == 1
    if bound and (alone or run.first_step == 1):
        model = teacher.model if alone else run.model.model
        await check_teacher(scorer, model, run.probe_ids, bound=bound)
    if alone:
        teacher.keep_head_only()


async def check_teacher(
    scorer: SglangScorer, teacher: PreTrainedModel, ids: Sequence[int], *, bound: float
) -> None:
    """Raise RunFailed unless the server's teacher gives the log-probabilities of `teacher`.

    ids: a text, whose second half is compared, at all tokens of a probability of at least 0.001.
    """
    first = len(ids) // 2
    theirs = (await scorer.score(ids, first=first)).to(head(teacher).weight)
    packed = PackedSequences(
        input_ids=torch.tensor(list(ids)),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=(0, len(ids)),
        gather=torch.arange(first, len(ids)),
    )
    with torch.no_grad():
        own = hidden_states(teacher, packed)[first:]
        expected, found = (head(teacher).logprobs(states) for states in (own, theirs))
    gap = (expected - found).abs().where(expected.exp() >= LIKELY, 0.0)
    worst = int(gap.argmax())
    if not float(gap.flatten()[worst]) <= bound:  # nor NaN
        raise RunFailed(
            f"the teacher's server gives a token the log-probability "
            f"{float(found.flatten()[worst]):.4f}, and the teacher in the trainer's process "
            f"{float(expected.flatten()[worst]):.4f}, more than teacher.server_bound = {bound:g} "
            "apart: does the server run the model that the run starts from?"
        )


def bound_of(given: float | None, dtype: str) -> float:
    """Largest difference of log-probabilities that is no error, in nats."""
    return PROBE_BOUND[dtype] if given is None else given


def members(
    config: Config,
    model: LoadedModel,
    folder: Path,
    *,
    urls: str,
    names: Sequence[str],
    gpus: str,
    args: Sequence[str],
) -> list[Member]:
    """Servers at `urls`, or without any of our own with these names; none of them is started."""
    options = config.engine
    servers: list[OwnServer | Endpoint]
    if urls:
        key = os.environ.get(KEY_VARIABLE)
        names = listed(urls)
        servers = [Endpoint(url, api_key=key) for url in names]
    else:
        shares = per_server([int(part) for part in listed(gpus)], len(names))
        servers = [
            OwnServer(
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
        Member(
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


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids[1:]` at temperature 1, each given those before it."""
    inputs = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0].tolist()
