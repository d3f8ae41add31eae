"""Weights for the servers: one model folder per version, complete or absent.

    folder/v000012/  config.json, tokenizer files, model.safetensors

The files other than the weights are copied from the model. A folder is written under a temporary
name and renamed, so that no server reads a partial one. Only the newest is kept. Nothing is
fsynced, since a resumed run writes its weights again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rosd_fast.errors import UserError
from rosd_fast.files import atomic_folder, remove_leftovers
from rosd_fast.model.tensor_file import TensorFile
from rosd_fast.model.weight_stream import WeightStream, read_ahead

WEIGHTS = (".safetensors", ".safetensors.index.json")


class WeightFolder:
    """The versions of one model's weights on disk.

    folder: holds one folder per version.
    model_folder: has the model's config and tokenizer files.
    """

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self.folder, self.model_folder = folder, model_folder

    def path(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"

    def write(self, weights: WeightStream, version: int) -> Path:
        """Write the weights of a version, bucket by bucket, and return its folder.

        Raises UserError when the files cannot be written.
        """
        final = self.path(version)
        try:
            with atomic_folder(final, durable=False) as folder:
                for file in self.model_folder.iterdir():
                    if file.is_file() and not file.name.endswith(WEIGHTS):
                        shutil.copyfile(file, folder / file.name)
                with (
                    TensorFile(folder / "model.safetensors", weights.specs) as file,
                    read_ahead(weights.buckets()) as buckets,
                ):
                    for bucket in buckets:
                        for name, tensor in bucket.items():
                            file.write(name, tensor)
        except OSError as error:
            raise UserError(
                "the weights for the server cannot be written "
                f"({getattr(error, 'strerror', None) or error})",
                where=str(final),
                fix="Free disk space, or set engine.sync_folder to another folder",
            ) from None
        return final

    def drop_all_but(self, version: int | None) -> None:
        """Remove the other versions and what a killed trainer left behind; None: all versions."""
        remove_leftovers(self.folder)
        keep = None if version is None else self.path(version)
        for path in self.folder.glob("v??????"):
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
