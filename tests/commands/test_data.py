"""`rosd-fast data --show`: the prompts of every role."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.cli import main
from tests.chat_templates import OPENED, SWITCHED, THINK_TOKENS, with_template
from tests.qwen3_folder import write_qwen3_folder

DATA = ["data", "quickstart:dev", "--show", "1"]


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    """What is printed for each role, and under "notes" what follows."""
    assert main([*DATA, *args]) == 0
    text = capsys.readouterr().out
    parts = re.split(r"^--- (.*): [\d,]+ tokens$", text, flags=re.MULTILINE)
    prompts = dict(zip(parts[1::2], parts[2::2], strict=True))
    notes = re.findall(r"^Note on the chat template: .*$", text, re.MULTILINE)
    return prompts | {"notes": "\n".join(notes)}


def model(tmp_path: Path, tokenizer: Any, template: str) -> str:
    other = with_template(tokenizer, template, tokens=THINK_TOKENS)
    return str(write_qwen3_folder(tmp_path / "model", other, template))


def test_every_role_with_text_and_ids(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--model", "quickstart", "--chat.eval.system", "Be brief.")
    assert list(found) == [
        "student",
        "reflector, correct rollout",
        "reflector, wrong rollout",
        "teacher, correct rollout",
        "teacher, wrong rollout",
        "eval",
        "notes",
    ]
    from transformers import AutoTokenizer

    from rosd_fast.quickstart import MODEL_DIR

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    for role, text in found.items():
        if role != "notes":
            *lines, ids = text.strip().split("\n")
            assert tokenizer.decode([int(n) for n in ids.split()]) == "\n".join(lines).strip()
    assert found["eval"].strip().startswith("<|system|>Be brief.<|end|><|user|>")
    assert found["notes"] == ""


def test_the_prompts_of_another_method(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--model", "quickstart", "--method", "opsd")
    assert list(found) == [
        "student",
        "teacher, correct rollout",
        "teacher, wrong rollout",
        "notes",
    ]
    assert "</answer>" in found["teacher, wrong rollout"]  # of the reference solution


def test_thinking_is_opened_and_closed_once_per_role(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path, tokenizer, OPENED)
    found = shown(capsys, "--model", folder)
    for role in ("student", "teacher, wrong rollout"):
        assert found[role].count("<think>") == 1 and "</think>" not in found[role]
    wrong = found["reflector, wrong rollout"]
    assert "<|assistant|><think>\n\n</think>\n\n<error_quote>" in wrong
    stripped = shown(capsys, "--model", folder, "--chat.thinking", "strip")
    assert stripped["reflector, wrong rollout"].count("</think>") == 1
    assert wrong.count("</think>") == 3  # of two rollouts, and the reflector's own


def test_options_of_chat_from_file_and_command_line_and_the_notes(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[chat]\nkwargs = 'enable_thinking=false'\n")
    args = ["--model", model(tmp_path, tokenizer, SWITCHED), "--config", str(file)]
    closed = shown(capsys, *args)
    for role in ("student", "teacher, wrong rollout"):
        assert "<|assistant|>\n<think>\n\n</think>\n" in closed[role]
    assert "modes" not in closed["notes"]
    mixed = shown(capsys, *args, "--chat.teacher.kwargs", "enable_thinking=true")
    assert "</think>" in mixed["student"] and "<think>" not in mixed["teacher, wrong rollout"]
    assert "the student's prompt ends after thinking and the teacher's leaves" in mixed["notes"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(DATA) == 2
    assert "--show needs a tokenizer. Name the model" in capsys.readouterr().err
    assert main([*DATA, "--model", "quickstart", "--chat.kwargs", "x"]) == 2
    assert "chat.kwargs is 'x': arguments are written" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2?", "answer": "2", "verifier": "number"}) + "\n")
    args = ["data", str(rows), "--show", "9", "--model", "quickstart"]
    assert main([*args, "--chat.student.template", str(tmp_path / "none.jinja")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(args) == 0  # fewer problems than asked for
