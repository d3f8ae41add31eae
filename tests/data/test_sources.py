"""Sources: what options such as data.train name."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.sources import (
    Source,
    absolute_sources,
    is_share,
    parse_sources,
    split_settings,
)
from rosd_fast.errors import UserError

NAMES = st.text(string.ascii_letters + string.digits + "/._-", min_size=1, max_size=12)
VALUES = st.text(string.ascii_letters + string.digits + "._- ", min_size=1).map(str.strip)


def test_several_sources_have_settings_of_their_own() -> None:
    first, second, third = parse_sources(
        "a.jsonl, b/c.parquet@weight=0.5@verifier=math@domain=sums@prompt=q,o/d@config=x@split=dev",
        verifier="number",
        columns={"answer": "gold", "prompt": None},
    )
    assert first == Source(text="a.jsonl", verifier="number", columns={"answer": "gold"})
    assert (second.text, second.weight, second.verifier) == ("b/c.parquet", 0.5, "math")
    assert (second.domain, second.columns) == ("sums", {"answer": "gold", "prompt": "q"})
    assert (third.text, third.config, third.split) == ("o/d", "x", "dev")
    assert [source.name for source in (first, second, third)] == ["a", "c", "d"]


@given(NAMES, st.dictionaries(st.sampled_from(["domain", "prompt", "split"]), VALUES))
def test_settings_are_what_was_written(place: str, settings: dict[str, str]) -> None:
    settings = {name: value for name, value in settings.items() if value}
    text = place + "".join(f"@{name}={value}" for name, value in settings.items())
    assert split_settings(text) == (place, list(settings.items()))
    (source,) = parse_sources(text)
    assert source.domain == settings.get("domain")
    assert source.columns.get("prompt") == settings.get("prompt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl@weigh=2", "there is no setting weigh. Did you mean weight?"),
        ("a.jsonl@weight=", "the setting weight has no value"),
        ("a.jsonl@weight=two", "the weight is 'two', must be a number above 0"),
        ("a.jsonl@weight=0", "must be a number above 0"),
        ("a.jsonl@weight=nan", "must be a number above 0"),
        ("a.jsonl,,b.jsonl", "a source is empty"),
        ("@weight=2", "a source is empty"),
        ("a.jsonl@weight=2@weight=3", "the setting weight is given twice"),
        ("a.jsonl,b.jsonl,a.jsonl", "a.jsonl is named twice"),
    ],
)
def test_mistakes_get_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_sources(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def is_on_hub(text: str) -> bool:
        return Source(text=text).is_on_hub

    assert is_on_hub("openai/gsm8k") and is_on_hub("gsm8k")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert not is_on_hub("openai/gsm8k")  # a folder of that name goes first
    assert Source(text="openai/gsm8k").is_folder
    for text in ("a/b.jsonl", "./a", "/a/b", "~/a", "a/b/c", "quickstart:dev", "x.csv.gz"):
        assert not is_on_hub(text), text
    assert Source(text="data/*.csv").is_pattern and not Source(text="data/a.csv").is_pattern
    (tmp_path / "a[1].csv").touch()
    assert not Source(text="a[1].csv").is_pattern
    assert Source(text="reasoning_gym:sums").name == "sums"
    assert not Source(text="a\0b").is_folder and not Source(text="x" * 5000 + "/y").is_folder


def test_the_path_of_a_file_is_one_source_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a,b@weight=2.jsonl"
    path.touch()
    assert parse_sources(str(path)) == (Source(text=str(path)),)
    assert absolute_sources(str(path)) == str(path)


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "a.jsonl@weight=2@verifier=v.py:f,./d/*.csv,quickstart:dev,reasoning_gym:x@seed=3,o/d"
    assert absolute_sources(text) == (
        f"{tmp_path}/a.jsonl@weight=2@verifier={tmp_path}/v.py:f,{tmp_path}/d/*.csv,"
        "quickstart:dev,reasoning_gym:x@seed=3,o/d"
    )
    assert absolute_sources(absolute_sources(text)) == absolute_sources(text)
    assert absolute_sources("~/x.jsonl") == str(Path.home() / "x.jsonl")
    assert absolute_sources("10%") == "10%"
    assert is_share("2.5 %") and not is_share("a.jsonl")
