"""A safetensors file that is written tensor by tensor, and the streams that it is written from."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoTokenizer

from rosd_fast.model import export
from rosd_fast.model.adapters import without_adapters
from rosd_fast.model.export import write_model
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.other_parts import OtherParts
from rosd_fast.model.tensor_file import DTYPES, TensorFile
from rosd_fast.model.weight_stream import TensorSpec, WholeWeights, as_stream, read_ahead
from rosd_fast.quickstart import MODEL_DIR
from tests.tiny import tiny_model


def every_dtype() -> dict[str, Tensor]:
    """Tensors of all dtypes, with names that need quoting, a scalar and an empty tensor."""
    tensors: dict[str, Tensor] = {"scalar": torch.tensor(7.5), "none": torch.empty(0, 4)}
    for index, dtype in enumerate(DTYPES):
        values = torch.randint(0, 2, (3 + index, 16), dtype=torch.uint8)
        tensors[f"z{index}"] = values.view(dtype).clone()
        tensors[f'a{index} ü"\\'] = values[1:].view(dtype).clone()
    return tensors


def test_the_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "found", specs) as file:
        for name, tensor in reversed(tensors.items()):
            file.write(name, tensor)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert load_file(tmp_path / "found").keys() == tensors.keys()


def test_a_file_wants_all_of_its_tensors_as_they_were_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2, 3)), "b": TensorSpec(torch.bfloat16, (4,))}
    with TensorFile(tmp_path / "file", specs) as file:
        file.write("b", torch.ones(4, dtype=torch.bfloat16))
        for wrong in (torch.ones(3, 2), torch.ones(2, 3).double()):
            with pytest.raises(ValueError, match="a is TensorSpec"):
                file.write("a", wrong)
        file.write("a", torch.ones(2, 3))
    with (
        pytest.raises(ValueError, match="lacks 1 tensors"),
        TensorFile(tmp_path / "file", specs) as file,
    ):
        file.write("b", torch.ones(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_an_export_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """In one file, or in several with an index."""
    model = tiny_model("Qwen3Moe", torch.float32, num_experts=4, moe_intermediate_size=16)
    weights = file_weights(model, model.state_dict())
    other = {"vision.weight": torch.ones(5, 7, dtype=torch.bfloat16)}
    monkeypatch.setattr(export, "MAX_FILE_BYTES", limit)
    plain = without_adapters(model)
    parts = OtherParts(weights=other, files={"processor_config.json": b"{}"})
    found, expected = tmp_path / "found", tmp_path / "expected"
    write_model(
        plain, WholeWeights(weights), parts, AutoTokenizer.from_pretrained(MODEL_DIR), found
    )
    plain.save_pretrained(
        expected,
        state_dict={**{k: w.clone() for k, w in weights.items()}, **other},
        save_original_format=False,
        max_shard_size=limit,
    )
    assert (limit < 10**9) == (expected / "model.safetensors.index.json").exists()
    for file in expected.iterdir():
        if file.name != "config.json":  # with the interval of `add_interval`
            assert file.read_bytes() == (found / file.name).read_bytes(), file.name
    weights_of = {path.name for path in expected.glob("*.safetensors")}
    assert weights_of == {path.name for path in found.glob("*.safetensors")}


def test_whole_weights_stay_what_they_were_when_held() -> None:
    tied = torch.rand(3, 2)
    weights = {"embed": tied, "head": tied, "part": torch.rand(4, 4)[:, 1]}
    stream = as_stream(weights)
    assert as_stream(stream) is stream and not stream.on_gpu
    held, before = stream.held(), {name: tensor.clone() for name, tensor in weights.items()}
    tied.zero_()
    assert held.specs == stream.specs and list(held.specs) == ["embed", "part"]
    for name, tensor in held.whole().items():
        assert torch.equal(tensor, before[name]) and tensor.is_contiguous()
    assert not stream.whole()["embed"].any()


def test_one_item_is_read_ahead() -> None:
    """While the first is used the second is computed; the third is not yet."""
    second, made = threading.Event(), []

    def items():
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield torch.full((3,), number)

    with read_ahead(items()) as ahead:
        first = next(ahead)
        assert second.wait(10)
        assert int(first[0]) == 0 and made == [0, 1]
        left = StorageWeakRef(first.untyped_storage())
        del first
        assert int(next(ahead)[0]) == 1
        assert left.expired()
        assert [int(item[0]) for item in ahead] == [2, 3, 4]


def test_an_error_of_the_thread_reaches_the_caller() -> None:
    def items():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), read_ahead(items()) as ahead:
        list(ahead)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
    assert not threads
