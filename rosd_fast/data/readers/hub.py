"""Data sets of the library `datasets`: hub ids, and folders of `save_to_disk`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosd_fast.data.readers.arrow import EXTRA
from rosd_fast.data.readers.base import Rows
from rosd_fast.data.sources import Source
from rosd_fast.errors import UserError

TIMEOUT_S = 5.0  # for the hub's first answer
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder of `save_to_disk` is known; the second means that it has splits."""


class DatasetRows(Rows):
    """The rows of a `datasets.Dataset`, mapped into memory."""

    def __init__(self, dataset: Any, source: Source) -> None:
        self._dataset, self._source = dataset, source
        self.folder = source.name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:  # whatever the decoder of a column raises
            raise UserError(
                f"a value cannot be read ({_first_line(error)})", where=self.where(index)
            ) from None

    def where(self, index: int) -> str:
        return f"{self._source.text}, row {index + 1}"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    saved, splits = (folder / name for name in SAVED)
    return splits.is_file() or (saved.is_file() and (folder / "state.json").is_file())


def needs_library(source: Source, folder: Path) -> bool:
    """Whether a local folder is a data set with configurations, as its card says."""
    if source.config is not None:
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    with card.open("rb") as file:
        head = file.read(2**16).decode(errors="replace")
    return head.startswith("---") and "\nconfigs:" in head.partition("\n---")[0]


def open_saved(source: Source, folder: Path) -> Rows:
    """The rows of a folder of `save_to_disk`."""
    with reading(source):
        from datasets import load_from_disk

        loaded: Any = load_from_disk(str(folder))
        return DatasetRows(one_split(loaded, source), source)


def open_dataset(source: Source, folder: Path | None = None) -> Rows:
    """The rows of a data set of the hub, or of a folder in its layout.

    Where the hub does not answer, the copy of an earlier download is read. Raises UserError.
    """
    with reading(source), contextlib.ExitStack() as stack:
        from datasets import load_dataset

        if folder is None and not is_reachable(source):
            stack.enter_context(offline())
        name = source.text if folder is None else str(folder)
        loaded: Any = load_dataset(name, source.config, split=source.split)
        return DatasetRows(one_split(loaded, source), source)


def is_reachable(source: Source) -> bool:
    """Whether the hub answers soon. Raises UserError where it does not have the data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source.text, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"there is no such file, and no such data set on the hub ({_first_line(error)})",
            where=source.text,
            fix="Correct the name; a private or gated data set needs a login: hf auth login",
        ) from None
    except Exception:  # no name server, no connection, too slow, or told to stay offline
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Have the libraries look into their caches only: they try the hub for half a minute first."""
    from datasets import config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def one_split(loaded: Any, source: Source) -> Any:
    """The split of a data set that the source names, or its only one. Raises UserError."""
    if not isinstance(loaded, dict):
        return loaded
    splits = list(loaded)
    split = splits[0] if source.split is None and len(splits) == 1 else source.split
    if split in splits:
        return loaded[split]
    named = ", ".join(splits)
    what = f"has the splits {named}" if split is None else f"has no split {split}, but {named}"
    raise UserError(what, where=source.text, fix=f"Name one, as in {source.text}@split={splits[0]}")


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn what `datasets` says of a data set into one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(
            "there is no such file, and data sets of the hub need the package datasets"
            if source.is_on_hub
            else "it needs the package datasets",
            where=source.text,
            fix=EXTRA,
        ) from None
    except ConnectionError:
        raise UserError(
            "there is no such file, and the hub cannot be reached",
            where=source.text,
            fix="Correct the name, or download the data set before",
        ) from None
    except Exception as error:  # builders of data sets raise anything
        raise UserError(
            f"the data set cannot be read ({_first_line(error)})",
            where=source.text,
            fix="Name its configuration or split, as in @config=main@split=train"
            if source.config is None
            else "",
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
