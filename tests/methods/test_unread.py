"""The options that a method is said not to read are not read: a run asks for none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import Config, Section
from rosd_fast.config.arguments import options_of
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.methods import METHODS, Method
from rosd_fast.train import train

NAMES = list(options_of(Config))
SECTIONS = ("reflect", "span", "select", "teacher", "policy")
CHECKED = {  # at the start, where a method without reflections refuses other values
    "reflect.control",
    "span.control",
    "reflect.weights",
    "reflect.probe_every",
}
OTHERS = {  # read by every run, whether it distils or not
    "teacher.model",
    "teacher.backend",
    "teacher.kind",
    "teacher.offload",
    "teacher.url",
    "teacher.max_logprob_gap",
}


def unread(config: Config) -> set[str]:
    return set(METHODS[config.method].unread(config, NAMES))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rosd", {}),
        ("rosd", {"loss.policy_weight": 1}),
        ("sdpo", {}),
        ("opsd", {}),
        ("opd", {"loss.policy_weight": 1}),
        ("grpo", {}),
        ("grpo", {"loss.distill_weight": 1}),
        ("sft", {}),
    ],
)
def test_a_run_reads_none_of_them(
    method: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "method": method,
        "steps": 1,
        "out": str(tmp_path),
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "data.dev": None,
        "data.dev_ood": None,
        "dump_rollouts": False,
    }
    config = apply_args(load_preset("quickstart"), small | changes)
    names = {id(type(getattr(config, section))): section for section in SECTIONS}
    read: set[str] = set()
    original = Section.__getattribute__

    def recorded(section: Section, name: str) -> Any:
        if (table := names.get(id(type(section)))) is not None and not name.startswith("_"):
            read.add(f"{table}.{name}")
        return original(section, name)

    monkeypatch.setattr(Section, "__getattribute__", recorded)
    train(config)
    monkeypatch.undo()
    assert {"select.threshold", "reflect.control"} <= read
    assert ("reflect.mode" in read) == (method == "rosd")
    assert not (unread(config) & read) - CHECKED - OTHERS


def test_what_is_said_not_to_be_read() -> None:
    def of(method: str, **changes: Any) -> set[str]:
        return unread(apply_args(Config(), {"method": method, **changes}))

    assert {"teacher.solution_template", "policy.clip_low"} <= of("rosd")
    assert not {"reflect.mode", "span.control", "select.on_no_success"} & of("rosd")
    assert {"reflect.mode", "span.granularity", "teacher.kind", "select.on_no_success"} <= of(
        "grpo"
    )
    assert "policy.clip_low" not in of("grpo")
    assert "teacher.kind" not in of("grpo", **{"loss.distill_weight": 1})
    assert "reflect.demonstration" in of("opsd") and "reflect.demonstration" not in of("sdpo")
    assert "policy.dual_clip" in of("sdpo")
    for method in METHODS:
        assert not {"optim.lr", "sample.group_size", "loss.beta"} & of(method)
    assert (
        Method.unread(Config(), ["reflect.mode"]) == []
    )  # nothing is said of a method of your own
