"""A safetensors file that is written tensor by tensor: the bytes that `save_file` would write.

safetensors itself wants all tensors at once. The format is a header of JSON, with the place of each
tensor, and then the tensors: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rosd_fast.model.weight_stream import TensorSpec

# safetensors' names of the dtypes, in the order in which it writes tensors of several dtypes.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes, of the first tensor


class TensorFile:
    """A safetensors file that is being written; use it in a `with` block.

    path: of the file.
    specs: every tensor of the file. Raises KeyError for a dtype that the format does not know.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.specs = path, specs
        place = {dtype: index for index, dtype in enumerate(DTYPES)}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for name in sorted(specs, key=lambda name: (place[specs[name].dtype], name)):
            spec, start = specs[name], end
            end = start + spec.nbytes
            offsets[name] = start
            entries[name] = {
                "dtype": DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        begin = 8 + len(header)
        self._offsets = {name: begin + offset for name, offset in offsets.items()}
        self._missing = set(specs)
        self._file = path.open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises OSError, and ValueError if it is not as in `specs`."""
        if TensorSpec.of(tensor) != self.specs[name]:
            raise ValueError(f"{name} is {TensorSpec.of(tensor)}, not {self.specs[name]}")
        values = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        self._file.seek(self._offsets[name])
        self._file.write(values.numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file. Raises ValueError if a tensor was not written."""
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self.path} lacks {len(self._missing)} tensors: {self._missing}")
