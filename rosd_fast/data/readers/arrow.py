"""Rows of parquet and Arrow files. They need pyarrow, of the extra `data`."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from rosd_fast.data.readers.base import MAX_ROW_BYTES, Rows
from rosd_fast.data.readers.files import RowFile, temporary_file, unreadable
from rosd_fast.errors import UserError

EXTRA = 'pip install "rosd-fast[data]"'
BATCH = 4096  # rows that are unpacked at a time
RELEASE_EVERY = 100  # rows
IPC_FILE = b"ARROW1"  # what a file begins with that is not a stream


def open_parquet(path: Path) -> Rows:
    """The rows of a parquet file, unpacked to a temporary file that is mapped into memory."""
    with reading(path, "parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        file, target = RowFile(path), temporary_file()
        source = parquet.ParquetFile(file.file)
        with pa.ipc.new_stream(target, source.schema_arrow) as writer:
            for batch in source.iter_batches(batch_size=BATCH):
                writer.write_batch(batch)
        target.flush()
        return ArrowRows(path, target)


def open_arrow(path: Path) -> Rows:
    """The rows of an Arrow file or stream, mapped into memory."""
    with reading(path, "Arrow"):
        return ArrowRows(path, RowFile(path).file)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow says of a file into one line."""
    try:
        yield
    except ImportError:
        raise UserError(f"{kind} files need pyarrow", where=str(path), fix=EXTRA) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        if not isinstance(error, OSError | ValueError | NotImplementedError):
            raise
        raise damaged(path, kind, error) from None


def damaged(path: Path, kind: str, error: Exception) -> UserError:
    """The error for a file that pyarrow cannot read."""
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(" .")
    return UserError(
        f"the file cannot be read as {kind} ({reason})",
        where=str(path),
        fix="Copy or download it again, and see whether it is whole",
    )


class ArrowRows(Rows):
    """The rows of an Arrow file or stream, which stays on disk."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        import pyarrow as pa

        self._path = path
        self.folder = path.resolve().parent.name
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._num_reads = 0
        buffer = pa.py_buffer(self._mapped)
        if self._mapped[: len(IPC_FILE)] == IPC_FILE:
            reader = pa.ipc.open_file(buffer)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            self._batches = list(pa.ipc.open_stream(buffer))
        self._firsts = [0, *accumulate(batch.num_rows for batch in self._batches)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Any:
        self._release()
        number = bisect_right(self._firsts, index) - 1
        row = self._batches[number].slice(index - self._firsts[number], 1)
        if row.nbytes > MAX_ROW_BYTES:
            raise UserError(
                f"the row has {row.nbytes / 2**20:,.1f} MiB, more than the "
                f"{MAX_ROW_BYTES // 2**20} MiB that one may have",
                where=self.where(index),
                fix="Shorten it",
            )
        try:
            return row.to_pylist()[0]
        except (ValueError, ArithmeticError) as error:  # UnicodeDecodeError, a date out of range
            raise UserError(
                f"a value cannot be read ({error})", where=self.where(index), fix="Correct the row"
            ) from None

    def batch(self, start: int, stop: int) -> Iterator[Any]:
        while start < stop:
            number = bisect_right(self._firsts, start) - 1
            end = min(stop, self._firsts[number + 1])
            yield from self._some(number, start, end)
            start = end

    def _some(self, number: int, start: int, stop: int) -> Iterator[Any]:
        """The rows from `start` to before `stop`, all of record batch `number`."""
        self._release(stop - start)
        rows = self._batches[number].slice(start - self._firsts[number], stop - start)
        if rows.nbytes <= MAX_ROW_BYTES:
            with suppress(ValueError, ArithmeticError):  # then one row after the other
                return iter(rows.to_pylist())
        return super().batch(start, stop)

    def _release(self, num_rows: int = 1) -> None:
        """Now and then give back the pages of the file that were read: they count as memory."""
        self._num_reads += num_rows
        if self._num_reads >= RELEASE_EVERY and hasattr(mmap, "MADV_DONTNEED"):
            self._num_reads = 0
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"
