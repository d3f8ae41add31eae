"""The engine that samples with the model to evaluate, and the tokenizer that belongs to it.

local            the model is loaded here
sglang           servers are started here, which load the model's folder themselves
sglang, by URL   servers have loaded a model already; only its tokenizer is read here
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast.config import Config
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.factory import KEY_VARIABLE, open_served_engine
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.sglang.client import Endpoint, ServerError
from rosd_fast.errors import UserError
from rosd_fast.model.hub_folder import hub_folder
from rosd_fast.model.load import find, load_model, short_name
from rosd_fast.model.rope import find_rotary, fix_rope
from rosd_fast.model.skeleton import load_skeleton
from rosd_fast.utils.distributed import pick_device

if TYPE_CHECKING:
    from rosd_fast.evaluation.model import EvaluatedModel
    from rosd_fast.model.load import LoadedModel

INFO_TIMEOUT_S = 30.0


@asynccontextmanager
async def open_model(
    config: Config,
    folder: Path,
    *,
    longest: Callable[[LoadedModel], int],
    note: Callable[[str], None],
) -> AsyncIterator[tuple[RolloutEngine, LoadedModel]]:
    """Yield the engine for `config.model`, and the model, which may have no weights here.

    config: model, dtype, device and engine, as in a run. folder: gets the files of servers.
    longest: the number of tokens that a sequence can have; asked where RoPE depends on it.
    """

    def fix(loaded: LoadedModel) -> None:
        if any(find_rotary(loaded.model)):
            served = config.engine.kind == "sglang"
            line = fix_rope(loaded.model, longest(loaded), served=served)
            if line is not None:
                note(line)

    if config.engine.kind == "local":
        loaded = load_model(
            config.model,
            dtype=config.dtype,
            device=pick_device(config.device),
            trust_remote_code=config.trust_remote_code,
        )
        fix(loaded)
        local = LocalEngine(loaded.model, max_rows=config.engine.max_rows)
        if local.note:
            note(local.note)
        engine: RolloutEngine = local
    else:
        if not config.engine.urls:
            config = config.model_copy(update={"model": servable(config.model)})
        loaded = load_skeleton(
            config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        fix(loaded)
        engine = open_served_engine(config, loaded, folder, note=note)
    try:
        yield engine, loaded
    finally:
        await engine.close()


def servable(model: str) -> str:
    """The name of a model that a server can load: a folder, for a hub model that of its cache."""
    found = find(model)
    return model if isinstance(found, Path) else str(hub_folder(found))


def served_model(model: EvaluatedModel, urls: Sequence[str]) -> EvaluatedModel:
    """The model that servers have loaded, whose tokenizer is that of `model`.

    Raises UserError when a server does not answer, and when two serve different models.
    """
    served = asyncio.run(_ask(urls))
    for url, info in zip(urls, served, strict=True):
        if info != served[0]:
            raise UserError(
                f"serves {info['served']} ({info['weight_version']}), but {urls[0]} serves "
                f"{served[0]['served']} ({served[0]['weight_version']})",
                where=url,
                fix="Give servers of one model",
            )
    path = served[0]["served"]
    return replace(
        model,
        name=short_name(path),
        note=f"{', '.join(urls)}: serves {path}; the tokenizer is that of {model.source}",
        identity=served[0] | {"tokenizer": model.identity},
        run=None,
    )


async def _ask(urls: Sequence[str]) -> list[dict[str, Any]]:
    """What each server has loaded."""
    found = []
    for url in urls:
        endpoint = Endpoint(url, api_key=os.environ.get(KEY_VARIABLE))
        try:
            info: Any = await endpoint.get("/model_info", timeout_s=INFO_TIMEOUT_S)
        except ServerError as error:
            raise UserError(
                str(error), where="engine.urls", fix="Start the server, or correct the address"
            ) from None
        finally:
            await endpoint.close()
        found.append(
            {
                "served": str(info.get("model_path", "an unnamed model")),
                "weight_version": str(info.get("weight_version")),
            }
        )
    return found
