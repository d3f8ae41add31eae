"""The names of options, and reading them from arguments."""

from __future__ import annotations

import pytest

from rosd_fast.config import Config, DataConfig, Section, SourceConfig
from rosd_fast.config.arguments import BOOLEANS, options_of, read_args
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError

OPTIONS = options_of(Config)


def read(*args: str, positional: tuple[str, ...] = ()) -> dict[str, object]:
    return read_args(args, OPTIONS, positional)


def test_options_are_found_in_tables_too() -> None:
    assert OPTIONS["model"].num_values == 1
    assert OPTIONS["sample.group_size"].flag == "--sample.group-size"
    assert OPTIONS["optim.betas"].num_values == 2
    assert OPTIONS["data.shuffle"].num_values == 0
    assert OPTIONS["loss.importance_clip"].nullable
    assert not OPTIONS["optim.lr"].nullable


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_read_with_dashes_and_underscores(name: str) -> None:
    option = OPTIONS[name]
    values = ["1", "2"][: option.num_values]
    expected = {0: True, 1: "1", 2: ["1", "2"]}[option.num_values]
    assert read(option.flag, *values) == read(f"--{name}", *values) == {name: expected}


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ((), {}),
        (("--steps=3", "--steps", "4"), {"steps": "4"}),
        (("--seed", "-1"), {"seed": "-1"}),
        (("--model", "-"), {"model": "-"}),
        (("--model=--odd=x",), {"model": "--odd=x"}),
        (("--no-trust-remote-code",), {"trust_remote_code": False}),
        (("--data.no-shuffle",), {"data.shuffle": False}),
        (("--data.no_shuffle",), {"data.shuffle": False}),
        (("--data.shuffle=false",), {"data.shuffle": "false"}),
        (("--data.shuffle", "false"), {"data.shuffle": "false"}),
        (("--data.shuffle", "No", "--steps", "3"), {"data.shuffle": "No", "steps": "3"}),
        (("--data.shuffle", "--steps", "3"), {"data.shuffle": True, "steps": "3"}),
        (("--data.dev", "none", "--name", "None"), {"data.dev": None, "name": None}),
        (("--model", "none"), {"model": "none"}),
        (("--optim.betas", "0.9", "0.95"), {"optim.betas": ["0.9", "0.95"]}),
    ],
)
def test_spellings(args: tuple[str, ...], values: dict[str, object]) -> None:
    assert read(*args) == values


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--group-size", "3"], "unknown option --group-size. Did you mean --sample.group-size?"),
        (["--modle=x"], "unknown option --modle. Did you mean --model?"),
        (["--lr", "1"], "unknown option --lr. Did you mean --optim.lr?"),
        (["--no-tail"], "unknown option --no-tail. Did you mean --loss.tail?"),
        (["--data.no-train"], "unknown option --data.no-train. Did you mean --data.train?"),
        (["-steps", "3"], "unknown option -steps. Did you mean --steps?"),
        (["--loss.is-clip", "2"], "--loss.is-clip is now --loss.importance-clip"),
        (["--optim.only=x"], "--optim.only is now --optim.trainable"),
        (["--qqqqqq"], "unknown option --qqqqqq. See --help"),
        (["--"], "unknown option --. See --help"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--seed", "1"], "--steps needs a value"),
        (["--optim.betas", "0.9"], "--optim.betas needs 2 values"),
        (["--data.no-shuffle=false"], "--data.shuffle takes no value when it is negated"),
        (["--data.no-shuffle", "true"], "--data.shuffle takes no value when it is negated"),
        (
            ["--data.shuffle", "maybe"],
            "unexpected argument 'maybe'. --data.shuffle takes true or false",
        ),
        (["steps"], "unexpected argument 'steps'. Did you mean --steps?"),
        (["qqqqqq"], "unexpected argument 'qqqqqq'. Options are written --name value"),
        (["--model", "\udcff"], "the argument '\\udcff' is not UTF-8"),
    ],
)
def test_mistakes(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(*args)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("word", BOOLEANS)
def test_a_switch_takes_each_word_that_says_true_or_false(word: str) -> None:
    expected = word in ("true", "yes", "1", "on")
    for args in (("--data.shuffle", word), (f"--data.shuffle={word.upper()}",)):
        assert apply_args(Config(), read(*args)).data.shuffle == expected
    with pytest.raises(UserError, match=r"--data\.shuffle is 'maybe', must be true or false"):
        apply_args(Config(), read("--data.shuffle=maybe"))


def test_what_follows_a_switch_is_an_argument_unless_it_is_such_a_word() -> None:
    given = read("--trust-remote-code", "folder", positional=("model",))
    assert given == {"trust_remote_code": True, "model": "folder"}
    given = read("--trust-remote-code", "true", "folder", positional=("model",))
    assert given == {"trust_remote_code": "true", "model": "folder"}


def test_a_repeated_option_adds_up() -> None:
    class Options(Section):
        preset: tuple[str, ...] = ()

    options = options_of(Options)
    args = ["--preset", "a,b", "--preset=c", "--preset", "a"]
    assert read_args(args, options) == {"preset": ["a", "b", "c", "a"]}
    with pytest.raises(UserError, match="--preset needs a value"):
        read_args(["--preset"], options)


def test_positional_arguments() -> None:
    assert read("folder", "--steps", "3", positional=("model",)) == {
        "model": "folder",
        "steps": "3",
    }
    with pytest.raises(UserError, match="unexpected argument 'two'"):
        read("one", "two", positional=("model",))


class Shown(Section):
    """Options of a command that reads a data set."""

    show: int = 0
    data: SourceConfig = SourceConfig(source="quickstart:dev")


SHOWN = options_of(Shown)
ALIASES = {"data": "data.source", "verifier": "data.verifier"}


@pytest.mark.parametrize(
    "args", [["f.jsonl"], ["--data", "f.jsonl"], ["--data=f.jsonl"], ["--data.source", "f.jsonl"]]
)
def test_an_alias_and_a_place_set_the_option(args: list[str]) -> None:
    args = [*args, "--verifier", "none", "--show", "2"]
    given = read_args(args, SHOWN, ["data.source"], ALIASES)
    assert given == {"data.source": "f.jsonl", "data.verifier": None, "show": "2"}
    assert apply_args(Shown(), given).data.source == "f.jsonl"


def test_messages_have_the_options_own_name_and_never_the_alias() -> None:
    for args, message in (
        (["--verifier"], "--data.verifier needs a value"),
        (["--verifer", "x"], "unknown option --verifer. Did you mean --data.verifier?"),
        (["--data.surce", "x"], "unknown option --data.surce. Did you mean --data.source?"),
    ):
        with pytest.raises(UserError) as caught:
            read_args(args, SHOWN, aliases=ALIASES)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("alias", [{"show": "data.source"}, {"file": "data.file"}])
def test_an_alias_that_clashes_or_names_nothing_is_a_broken_contract(alias: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"alias {next(iter(alias))}"):
        read_args([], SHOWN, aliases=alias)


def test_a_source_is_trained_on_with_its_own_options() -> None:
    given = {"data.source": "a.jsonl", "data.verifier": "math", "data.columns.prompt": "question"}
    source = apply_args(Shown(), given).data
    data = source.as_training()
    assert (data.train, data.dev, data.dev_ood) == ("a.jsonl", None, None)
    assert (data.verifier, data.columns.prompt) == ("math", "question")
    for name in ("verifier", "answer_instruction", "bad_rows", "columns"):
        mine, runs = SourceConfig.model_fields[name], DataConfig.model_fields[name]
        assert (mine.annotation, mine.default, mine.metadata) == (
            runs.annotation,
            runs.default,
            runs.metadata,
        )
    with pytest.raises(ValueError, match="no source"):
        SourceConfig().as_training()
