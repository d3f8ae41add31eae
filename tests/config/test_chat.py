"""The options of chat templates: arguments, files, and which role has which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import ChatConfig, Config
from rosd_fast.config.arguments import options_of, read_args
from rosd_fast.config.chat import make_chats, parse_kwargs, read_templates
from rosd_fast.config.load import apply_args, apply_toml, config_hash, to_toml
from rosd_fast.errors import UserError
from rosd_fast.inputs import with_absolute_paths
from tests.chat_templates import SWITCHED


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        (" ", {}),
        ("enable_thinking=false", {"enable_thinking": False}),
        ("a=true, b = 3 ,c=1.5,d=null", {"a": True, "b": 3, "c": 1.5, "d": None}),
        ("reasoning_effort=low,", {"reasoning_effort": "low"}),
        ('a="false",b="x, y=z"', {"a": "false", "b": "x, y=z"}),
        ("a=falsey,b=2nd of May,c=", {"a": "falsey", "b": "2nd of May", "c": ""}),
        ("a=[1, 2],b={}", {"a": [1, 2], "b": {}}),
        ("a=1,a=2", {"a": 2}),
        ("a=True,b=False, c = None ", {"a": True, "b": False, "c": None}),
        ('a="False"', {"a": "False"}),
    ],
)
def test_arguments(text: str, values: dict[str, Any]) -> None:
    assert parse_kwargs(text) == values


def read(*args: str) -> Config:
    return apply_args(Config(), read_args(args, options_of(Config)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chat.kwargs", "thinking"], "chat.kwargs is 'thinking': arguments are written name="),
        (["--chat.eval.kwargs", "a=1,2"], "chat.eval.kwargs is 'a=1,2': arguments are written"),
        (["--chat.kwargs", 'a={"b":1'], """chat.kwargs is 'a={"b":1': {"b":1 is not JSON"""),
        (["--chat.kwargs", 'b=1,a="x'], """chat.kwargs is 'b=1,a="x': "x is not JSON"""),
        (
            ["--chat.student.kwargs", "chat_template=x"],
            "chat.student.kwargs is 'chat_template=x': chat_template is not an argument of chat",
        ),
        (
            ["--chat.student.sytem", "x"],
            "unknown option --chat.student.sytem. Did you mean --",
        ),
        (["--chat.thinking", "drop"], "--chat.thinking is 'drop', must be 'keep', 'strip' or"),
        (["--chat.student.system"], "--chat.student.system needs a value"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(*args)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[chat.studnet]\nkwargs = ''",
            ":1: unknown key chat.studnet. Did you mean chat.student",
        ),
        (
            "\n[chat.student]\nkwarg = 'a=1'",
            ":3: unknown key chat.student.kwarg. Did you mean chat.student.kwargs?",
        ),
        ("[chat]\nthinking = 'keep'\neval.kwargs = 'x'", ":3: chat.eval.kwargs is 'x': arguments"),
        ("[chat]\nstudent = 3", ":2: chat.student is 3, must be a table of options"),
    ],
)
def test_mistakes_in_a_file_have_a_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        apply_toml(Config(), path)
    assert str(caught.value).removeprefix(str(path)).startswith(message)


def test_a_file_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "[chat]\nkwargs = 'a=1'\n[chat.student]\nsystem = 'Be brief.'\n"
        "[chat.eval]\nsystem = false\n"
    )
    given = read("--chat.kwargs", "a=1", "--chat.student.system", "Be brief.")
    assert apply_toml(Config(), path) == given
    path.write_text(to_toml(given))
    assert apply_toml(Config(), path) == given


def test_each_role_has_its_own(tokenizer: Any) -> None:
    chat = read(
        *("--chat.kwargs", "a=1,b=2", "--chat.student.kwargs", "b=3,c=4"),
        *("--chat.student.system", "Be brief.", "--chat.teacher.system", "Be kind."),
    ).chat
    chats = make_chats(chat, tokenizer)
    assert chats.student.kwargs == chats.eval.kwargs == {"a": 1, "b": 3, "c": 4}
    assert chats.teacher.kwargs == chats.reflector.kwargs == {"a": 1, "b": 2}
    systems = [getattr(chats, role).system for role in ("student", "reflector", "teacher", "eval")]
    assert systems == ["Be brief.", None, "Be kind.", "Be brief."]
    own = chat.model_copy(
        update={"eval": chat.eval.model_copy(update={"kwargs": "d=5", "system": ""})}
    )
    chats = make_chats(own, tokenizer)
    assert (chats.eval.kwargs, chats.eval.system) == ({"a": 1, "b": 2, "d": 5}, None)


def test_the_text_of_a_template_replaces_its_path(tmp_path: Path, tokenizer: Any) -> None:
    """So a resumed run has the template it began with, whatever became of the file."""
    file = tmp_path / "chat.jinja"
    file.write_text(SWITCHED)
    config = with_absolute_paths(read("--chat.student.template", str(file)))
    assert config.chat.student.template == SWITCHED
    (tmp_path / "config.toml").write_text(to_toml(config))
    file.write_text("{{ messages[0].content }}")
    resumed = with_absolute_paths(apply_toml(Config(), tmp_path / "config.toml"))
    assert resumed == config and config_hash(resumed) == config_hash(config)
    changed = with_absolute_paths(read("--chat.student.template", str(file)))
    assert config_hash(changed) != config_hash(config)
    chats = make_chats(config.chat, tokenizer)
    assert chats.student.template == chats.eval.template == SWITCHED
    assert chats.teacher.template is None


def test_template_files_that_cannot_be_used(tmp_path: Path, tokenizer: Any) -> None:
    def role(path: Path) -> ChatConfig:
        return ChatConfig.model_validate({"teacher": {"template": str(path)}})

    with pytest.raises(UserError, match=r"^chat\.teacher\.template .*no\.jinja: there is no such"):
        read_templates(role(tmp_path / "no.jinja"))
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(role(tmp_path))
    plain = tmp_path / "plain.jinja"
    plain.write_text("Hello.")
    with pytest.raises(UserError, match="is not a chat template"):
        read_templates(role(plain))
    plain.write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(UserError, match="not UTF-8"):
        read_templates(role(plain))
    plain.write_text("{{ 'no text' }}")
    with pytest.raises(UserError, match=r"^chat\.teacher\.template: the chat template leaves out"):
        make_chats(read_templates(role(plain)), tokenizer)


def test_only_what_is_set_counts_in_the_hash() -> None:
    plain = config_hash(Config())
    assert config_hash(read("--chat.eval.kwargs", "a=1")) == plain  # it decides no update
    changes = [
        ["--chat.kwargs", "a=1"],
        ["--chat.student.system", "x"],
        ["--chat.teacher.system", "x"],
        ["--chat.thinking", "strip"],
        ["--span.thinking"],
    ]
    assert len({config_hash(read(*args)) for args in changes} | {plain}) == len(changes) + 1


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 'nothing of the turn' }}"])
def test_a_template_of_one_role_that_fails_is_named(tokenizer: Any, template: str) -> None:
    with pytest.raises(UserError) as caught:
        make_chats(read("--chat.teacher.template", template).chat, tokenizer)
    assert str(caught.value).startswith("chat.teacher.template: the chat template")
    assert str(caught.value).endswith("Fix the template, or leave out --chat.teacher.template")
