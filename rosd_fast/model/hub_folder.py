"""The folder of a hub model in the cache, with the files that programs other than this one read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from rosd_fast.model.load import explain

FILES = ("*.json", "*.jinja", "*.model", "*.py", "*.safetensors", "*.txt")
# The same weights again, in the layouts of other programs.
REPEATED = ("*/*", "consolidated*")


def hub_folder(hub_id: str) -> Path:
    """Return the folder of a hub model in the cache, and download what it lacks.

    Raises UserError if the model cannot be reached.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*FILES], ignore_patterns=[*REPEATED]))
    except Exception as error:  # of HTTP, of the hub and of the disk: the library has many
        raise explain(OSError(error), hub_id, "model") from error
