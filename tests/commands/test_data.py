"""`rosd-fast data`: what is in a data set, what is wrong with it, and the prompts of every role."""

from __future__ import annotations

import json
import re
import shutil
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
    assert main([*DATA, "--model", "quickstart", "--chat.kwargs", "x"]) == 2
    assert "chat.kwargs is 'x': arguments are written" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2?", "answer": "2", "verifier": "number"}) + "\n")
    args = ["data", str(rows), "--show", "9", "--model", "quickstart"]
    assert main([*args, "--chat.student.template", str(tmp_path / "none.jinja")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(args) == 0  # fewer problems than asked for


GOOD = [
    {"prompt": f"What is {i} + 1?", "answer": i + 1, "domain": "sums", "id": f"s{i}"}
    for i in range(30)
]


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert main(["data", *args]) == code
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def cells(text: str) -> list[str]:
    return [part.strip() for part in re.split("[│┃]", text)]


def test_what_a_data_set_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "sums.jsonl", *GOOD)
    text = printed(capsys, source, "--verifier", "number")
    assert f"{source}: 30 problems, read as plain rows" in text
    assert "30 of 30 prompts end with: Give the final answer as a number" in text
    found = cells(text)
    assert found[found.index("sums") :][:4] == ["sums", "number", "0", "30"]
    assert "characters per prompt: median 8" in text
    assert "no problem twice, no near-duplicates" in text
    row = found[found.index("right answer") :]
    assert row[1:4] == ["<answer>1</answer>", "1", "1"]
    row = found[found.index("no answer") :]
    assert row[1:5] == ["I am not sure.", "0", "none", "no answer tag"]
    assert [f"id      s{i}" in text for i in range(4)] == [True, True, True, False]
    text = printed(capsys, source, "--data.verifier", "number", "--show", "99")
    assert "id      s29" in text
    assert "id      s0" not in printed(capsys, "--data", source, "--verifier=number", "--show=0")
    off = printed(capsys, source, "--verifier", "number", "--data.answer-instruction", "off")
    assert "no answer instruction is added to a prompt" in off


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    command = "$ rosd-fast data quickstart:dev --show 1\n"
    shown = page.partition(command)[2].partition("```")[0]
    text = printed(capsys, "quickstart:dev", "--show", "1")
    assert [line.rstrip() for line in text.strip().split("\n")] == shown.strip().split("\n")


def test_bad_rows_are_listed_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"prompt": f"Why {i}?", "answer": "because"} for i in range(25)]
    source = write(tmp_path / "sums.jsonl", *GOOD, *bad, {"prompt": "What?"}, "{oops")
    text = printed(capsys, source, "--verifier", "number", code=1)
    assert "30 problems, and 27 bad rows, listed below" in text
    assert "25 bad rows: no completion can match the answer ... under the verifier number" in text
    lines = [line for line in text.split("\n") if "answer 'because'" in line]
    assert len(lines) == 20
    assert lines[0].startswith(f"  {source}:31: no completion can match")
    assert "  and 5 more" in text
    assert f'  {source}:56: the field "answer" is missing' in text
    assert f"  {source}:57: malformed JSON" in text
    skipped = printed(capsys, source, "--verifier", "number", "--data.bad-rows", "skip")
    assert "27 bad rows, listed below" in skipped
    text = printed(capsys, write(tmp_path / "none.jsonl", bad[0]), "--verifier=number", code=1)
    assert "0 problems, and 1 bad row, listed below" in text


def test_repetitions_and_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", *GOOD, {"prompt": "what is 3+1", "answer": 5})
    write(tmp_path / "dev.jsonl", GOOD[7], {"prompt": "What is 77 + 1?", "answer": 78})
    args = ["train.jsonl", "--verifier", "number", "--show", "0"]
    text = printed(capsys, *args, "--data.dev", "dev.jsonl")
    assert "problems more than once: 1\n  train.jsonl:31 = train.jsonl:4\n" in text
    assert "of these with another answer: 1\n" in text
    assert "splits: 30 problems to train on" in text
    assert "data.train: 1 problem is in data.dev too and left out: train.jsonl:8 = dev.jsonl:1" in (
        text
    )
    text = printed(capsys, *args, "--data.dev", "20%", "--data.split-seed", "3")
    held = re.search(r"20% held out: (\d+) problems, by split_seed 3; (\d+) are left", text)
    assert held is not None and int(held[1]) + int(held[2]) == 31
    assert f"splits: {held[2]} problems to train on" in text
    for share in ("0%", "x%"):
        assert main(["data", *args, "--data.dev", share]) == 2
        assert capsys.readouterr().out == ""


def test_text_of_data_never_acts_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[31mred\u202e [bold]\x07 [/nothing]"
    row = {name: f"{evil} {name}" for name in ("prompt", "system", "reference", "domain", "id")}
    good = {**row, "answer": f"words {evil}", "verifier": "exact"}
    source = write(tmp_path / "a.jsonl", good, {**good, "id": evil, "prompt": "", "domain": evil})
    text = printed(capsys, source, code=1)
    assert not set("\x1b\u202e\x07") & set(text)
    assert text.count("\\x1b[31mred\\u202e [bold]\\x07 [/nothing]") >= 5
    text = printed(capsys, source, "--model", "quickstart", code=1)
    assert not set("\x1b\u202e\x07") & set(text)


def test_tokens_and_prompts_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "sums.jsonl", *GOOD)
    text = printed(capsys, source, "--verifier", "number", "--model", "quickstart")
    assert re.search(r"tokens per prompt: median \d+, most \d+ \(.*sums\.jsonl:\d+\)", text)
    assert text.count("--- student: ") == text.count("--- teacher, wrong rollout: ") == 3
    assert not re.search(r"^\d+( \d+)+$", text, re.MULTILINE)  # ids only when they are asked for
    with_ids = printed(capsys, source, "--verifier", "number", "--model=quickstart", "--show=1")
    assert re.search(r"^\d+( \d+)+$", with_ids, re.MULTILINE)


@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap"
)
def test_code_is_read_and_shown_without_running_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = json.dumps({"tests": ["assert add(1, 2) == 3"]})
    row = {"prompt": "Write add.", "answer": answer, "verifier": "code"}
    source = write(tmp_path / "code.jsonl", row)
    text = printed(capsys, source)
    assert "1 problem, read as" in text
    assert "--verify.run-code" in text and "answer found" not in text


def test_output_without_unicode(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    source = write(tmp_path / "sums.jsonl", *GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "rosd_fast", "data", source, "--verifier", "number"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert "  ####" in done.stdout
    assert done.stdout.isascii()
