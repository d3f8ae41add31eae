"""States as bytes: the hook of a server, its records, and a teacher that reads them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rosd_fast.batch.packing import pack
from rosd_fast.engines.sglang import states_hook, states_plugin
from rosd_fast.engines.sglang.states_hook import FOLDER_VARIABLE, KEY, append_states, packed
from rosd_fast.engines.sglang.states_plugin import make_states_folder, unpacked, write_plugin
from rosd_fast.errors import RunFailed
from tests.engines.sglang.fake_sglang import FakeSglang
from tests.engines.sglang.test_teacher import SAMPLES, expected, with_teacher


def prefill(*, cached: int, first: int | None, length: int = 9, **changes: Any) -> dict[str, Any]:
    """The arguments of SGLang's method, for the second request of a batch."""
    params = {} if first is None else {KEY: {"first": first}}
    given = {
        "req": SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=params),
            return_hidden_states=True,
            origin_input_ids=list(range(length)),
            hidden_states=[],
            customized_info=None,
        ),
        "logits_output": SimpleNamespace(hidden_states=torch.arange(60.0).view(20, 3)),
        "hidden_state_offset": 4,
        "capture_hidden_mode": SimpleNamespace(is_full=lambda: True),
        "extend_input_len": length - cached,
        "store": True,
    }
    return given | changes


def original(processor: Any, **given: Any) -> int:
    given["req"].hidden_states.append("a list")
    return -1


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_hook, "sends", lambda: True)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("cached", "first", "begin"), [(0, 0, 0), (0, 6, 6), (5, 6, 6), (5, 2, 5), (8, 8, 8)]
)
def test_a_request_gets_its_states_from_the_first_one_on(
    cached: int, first: int, begin: int
) -> None:
    given = prefill(cached=cached, first=first)
    assert append_states(original, None, **given) == 4 + 9 - cached
    [record] = given["req"].customized_info[KEY]
    assert record["first"] == begin and not given["req"].hidden_states
    at, states = unpacked(record, None)
    rows = torch.arange(60.0).view(20, 3)[4 + begin - cached : 4 + 9 - cached]
    assert at == begin and torch.equal(states, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"first": None},
        {"first": 3, "capture_hidden_mode": SimpleNamespace(is_full=lambda: False)},
    ],
)
def test_other_requests_get_what_sglang_gives(changes: dict[str, Any]) -> None:
    given = prefill(cached=0, **changes)
    assert append_states(original, None, **given) == -1
    assert given["req"].hidden_states == ["a list"] and given["req"].customized_info is None


def test_a_chunk_before_the_last_and_another_rank_send_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = prefill(cached=0, first=2, store=False)
    assert append_states(original, None, **given) == 13
    assert given["req"].customized_info is None
    monkeypatch.setattr(states_hook, "sends", lambda: False)
    given = prefill(cached=0, first=2)
    assert append_states(original, None, **given) == 13
    assert given["req"].customized_info is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_record_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    states = torch.randn(rows, 5).to(dtype)
    assert "data" in packed(states, 3)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    for given in (states, states.T.contiguous().T):
        first, found = unpacked(packed(given, 3), tmp_path)
        assert first == 3 and found.dtype == torch.float32
        assert torch.equal(found, states.float()) and found.shape == states.shape
        assert not list(tmp_path.iterdir())  # read once


def test_a_full_folder_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    states = torch.randn(3, 5)
    record = packed(states, 0)
    assert "file" not in record
    assert torch.equal(unpacked(record, tmp_path)[1], states)


def test_a_record_names_no_file_outside_of_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(20))
    (tmp_path / "states").mkdir()
    record = {"first": 0, "shape": [1, 5], "dtype": "float32", "file": str(secret)}
    with pytest.raises(OSError, match="secret"):
        unpacked(record, tmp_path / "states")
    with pytest.raises(ValueError, match="another trainer"):
        unpacked(record, None)
    assert secret.exists()


def test_sglang_finds_the_plugin(tmp_path: Path) -> None:
    """As its `load_plugins` does, from a folder on the path; without this package."""
    folder = write_plugin(tmp_path / "plugin")
    script = (
        "import sys; from importlib.metadata import entry_points\n"
        "[e] = entry_points(group='sglang.srt.plugins', name='rosd_states')\n"
        "print(e.load().__name__, 'rosd_fast' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["register", "False"], done.stderr


def test_folders_of_killed_trainers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_plugin, "IN_MEMORY", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"rosd-states-{dead.pid}-abc", "rosd-states-x", "other"):
        (tmp_path / name).mkdir()
    mine = make_states_folder(tmp_path / "fallback")
    assert mine.parent == tmp_path and mine.stat().st_mode & 0o777 == 0o700
    again = make_states_folder(tmp_path / "fallback")
    assert {path.name for path in tmp_path.iterdir()} == {
        *(mine.name, again.name, "rosd-states-x", "other")
    }


@pytest.mark.parametrize("to_files", [False, True])
def test_a_teacher_reads_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_files: bool
) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    if to_files:
        monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    fake = FakeSglang(faults=("", "500", "lost", "chunked"))
    fake.has_plugin = True
    batches = pack(SAMPLES, max_tokens=60)

    async def test(teacher: Any, _: list[str]) -> list[torch.Tensor]:
        states = await teacher.states(batches)
        assert len(list(folder.iterdir())) <= 2 * to_files  # of the answers that were damaged
        return states

    states = with_teacher(test, fake, states_folder=folder)
    assert all(torch.equal(a, b) for a, b in zip(states, expected(batches), strict=True))
    assert len(fake.bodies) == len(SAMPLES) + 3
    assert not folder.exists()


def test_states_of_another_width_end_the_run() -> None:
    async def score(teacher: Any, _: list[str]) -> None:
        await teacher.score([1, 2, 3, 4], first=2)

    fake = FakeSglang()
    fake.has_plugin = True
    with pytest.raises(RunFailed, match="not 6 wide: the server runs another model"):
        with_teacher(score, fake, hidden_size=6)


def test_reading_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task runs while an answer is unpacked."""
    fake = FakeSglang()
    fake.has_plugin = True
    running: list[bool] = []

    async def score(teacher: Any, _: list[str]) -> None:
        own = teacher._read

        def slow(*given: Any, **named: Any) -> torch.Tensor:
            asyncio.run_coroutine_threadsafe(note(), loop).result(10)
            return own(*given, **named)

        async def note() -> None:
            running.append(True)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(teacher, "_read", slow)
        await teacher.score([1, 2, 3, 4], first=2)

    with_teacher(score, fake)
    assert running == [True]
