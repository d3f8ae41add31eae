"""Layers of options, the errors for wrong ones, and writing them as TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import Config, load, renamed
from rosd_fast.config.arguments import options_of, read_args
from rosd_fast.config.load import (
    apply_args,
    apply_toml,
    config_hash,
    load_config,
    load_preset,
    preset_names,
    to_toml,
)
from rosd_fast.config.renamed import BEFORE
from rosd_fast.config.toml import find_line
from rosd_fast.errors import UserError

texts = st.text(st.characters(codec="utf-8"), max_size=40)
positive = st.floats(1e-300, 1e300)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Configs with awkward texts, numbers and nones."""
    return Config.model_validate(
        {
            "model": draw(texts),
            "name": draw(st.none() | texts),
            "trust_remote_code": draw(st.booleans()),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "data": {"dev": draw(st.none() | texts), "dev_ood": draw(st.none() | texts)},
            "reflect": {"wrong_template": draw(texts), "answer_note": draw(texts)},
            "loss": {
                "importance_clip": draw(st.none() | positive),
                "top_k": draw(st.none() | st.just(3)),
            },
            "optim": {
                "lr": draw(positive),
                "betas": draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999))),
            },
        }
    )


def read(folder: Path, text: str, base: Config | None = None) -> Config:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return apply_toml(base or Config(), path)


def error_of(folder: Path, text: str) -> str:
    """The error message without the folder."""
    with pytest.raises(UserError) as caught:
        read(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


@given(configs())
def test_toml_reads_back_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    assert read(tmp_path_factory.mktemp("toml"), to_toml(config)) == config


@pytest.mark.parametrize(
    "text",
    ["", "\n", "a\nb", "\n\na\n", 'say """x"""\n"', "back\\slash\n\\", "tab\t\r\n\x00\x7f", "none"],
)
def test_texts_survive_toml(tmp_path: Path, text: str) -> None:
    config = Config.model_validate({"name": text, "teacher": {"wrong_template": text}})
    assert read(tmp_path, to_toml(config)) == config


def test_toml_is_fully_resolved() -> None:
    def names(table: dict[str, Any], prefix: str = "") -> set[str]:
        inner = [names(v, f"{prefix}{k}.") for k, v in table.items() if isinstance(v, dict)]
        return {prefix + k for k, v in table.items() if not isinstance(v, dict)}.union(*inner)

    assert names(tomllib.loads(to_toml(Config()))) == set(options_of(Config))


def test_false_removes_a_default(tmp_path: Path) -> None:
    assert Config().loss.importance_clip is not None
    assert Config().data.dev is not None
    config = read(tmp_path, "data.dev = false\n[loss]\nimportance_clip = false\n")
    assert config.loss.importance_clip is None
    assert config.data.dev is None
    assert read(tmp_path, to_toml(config)) == config


def test_later_layers_replace_single_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\n[sample]\ngroup_size = 5\n")
    config = load_config(
        {"sample.group_size": "3", "optim.betas": ["0.8", "0.9"], "select.on_no_success": "keep"},
        presets=["quickstart"],
        file=path,
    )
    assert config.steps == 7
    assert config.sample.group_size == 3
    assert config.sample.max_new_tokens == load_preset("quickstart").sample.max_new_tokens
    assert config.optim.betas == (0.8, 0.9)
    assert config.select.on_no_success == "keep"


def test_the_last_layer_decides_between_steps_and_epochs(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("epochs = 2\n[optim]\nwarmup_frac = 0.1\n")
    assert load_preset("quickstart").epochs is None
    config = load_config({}, presets=["quickstart"], file=path)
    assert (config.epochs, config.optim.warmup_frac, config.optim.warmup_steps) == (2, 0.1, None)
    again = apply_args(config, {"steps": "9", "optim.warmup_steps": "3"})
    assert (again.epochs, again.steps) == (None, 9)
    assert (again.optim.warmup_frac, again.optim.warmup_steps) == (None, 3)
    assert apply_args(again, {"epochs": "0.5"}).epochs == 0.5
    assert apply_args(again, {"epochs": None, "steps": "4"}).steps == 4
    assert read(tmp_path, to_toml(again)) == again


def test_two_ways_of_one_thing_exclude_each_other_within_a_layer(tmp_path: Path) -> None:
    message = "run.toml:2: epochs and steps exclude each other"
    assert error_of(tmp_path, "steps = 3\nepochs = 2") == message
    text = "[optim]\nwarmup_steps = 3\nwarmup_frac = 0.5"
    assert error_of(tmp_path, text).startswith("run.toml:3: optim.warmup_frac and")
    with pytest.raises(UserError, match=r"^--optim\.warmup-frac and --optim\.warmup-steps excl"):
        apply_args(Config(), {"optim.warmup_frac": "0.1", "optim.warmup_steps": "3"})
    with pytest.raises(UserError, match=r"^--epochs and --steps exclude"):
        apply_args(Config(), {"epochs": "1", "steps": "3"})


def test_no_model_means_the_quickstart_and_a_model_brings_its_preset(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps = 7\n")
    assert load_config({}) == load_preset("quickstart")
    assert load_config({"model": "smollm2"}) == load_preset("smollm2")
    assert load_config({"model": "some/folder"}) == Config(model="some/folder")
    assert load_config({}, file=tmp_path / "run.toml") == Config(steps=7)


def test_own_training_problems_drop_the_quickstarts_dev_problems(
    tmp_path: Path,
) -> None:
    data = load_config({"data.train": "my.jsonl"}).data
    assert (data.train, data.dev, data.dev_ood) == ("my.jsonl", None, None)
    data = load_config({"data.train": "my.jsonl", "data.dev": "quickstart:dev"}).data
    assert (data.dev, data.dev_ood) == ("quickstart:dev", None)
    base = read(tmp_path, '[data]\ntrain = "my.jsonl"\ndev = "dev.jsonl"\n')
    assert apply_args(base, {"data.train": "other.jsonl"}).data.dev == "dev.jsonl"
    assert load_config({"data.train": "quickstart:train"}) == load_preset("quickstart")


def test_every_preset_is_whole() -> None:
    assert {"quickstart", "smollm2"} <= set(preset_names())
    for name in preset_names():
        load_preset(name)
    assert all(load_preset(name).model == name for name in ("quickstart", "smollm2"))
    with pytest.raises(UserError, match=r"no preset 'quikstart'\. Did you mean quickstart\?"):
        load_preset("quikstart")


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of presets: two methods, a model, and a model named like its preset."""
    for name, text in {
        "one": "[optim]\nlr = 1.0\nwarmup_steps = 7\n[sample]\ngroup_size = 3",
        "two": "[optim]\nlr = 2.0\n[loss]\nimportance_clip = false",
        "wrong": "\n[optim]\nlr = 'x'",
        "giant-9b": 'model = "giant/Giant-9B"\n[sample]\ngroup_size = 5',
        "quickstart": 'model = "quickstart"\nsteps = 3',
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    monkeypatch.setattr(load, "PRESETS", tmp_path)
    load.load_preset.cache_clear()
    yield tmp_path
    load.load_preset.cache_clear()


@pytest.mark.usefixtures("presets")
def test_presets_compose_in_the_order_given() -> None:
    both = load_preset("one", "two")
    assert (both.optim.lr, both.optim.warmup_steps, both.sample.group_size) == (2.0, 7, 3)
    assert both.loss.importance_clip is None
    assert load_preset("two", "one").optim.lr == 1.0
    given = {"sample.group_size": "4"}
    assert load_config(given, presets=["one", "giant-9b"]).sample.group_size == 4
    assert load_config({}, presets=["one", "giant-9b"]).sample.group_size == 5
    assert load_config({}, presets=["giant-9b", "one"]).sample.group_size == 3


@pytest.mark.usefixtures("presets")
def test_a_mistake_in_composed_presets_names_file_and_line(presets: Path) -> None:
    with pytest.raises(UserError, match=r"wrong\.toml:3: optim\.lr is") as caught:
        load_preset("one", "wrong")
    assert str(presets) in str(caught.value)
    with pytest.raises(UserError, match=r"there is no preset 'ome'\. Did you mean one\?"):
        load_config({}, presets=["two", "ome"])


@pytest.mark.usefixtures("presets")
def test_a_model_may_be_named_by_its_preset(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "run.toml").write_text("steps = 7\n[sample]\ngroup_size = 6")
    expected = load_preset("one", "giant-9b")
    assert expected.model == "giant/Giant-9B"
    assert load_config({"model": "giant-9b"}, presets=["one"]) == expected
    assert load_config({"model": "giant-9b"}) == load_preset("giant-9b")
    from_file = load_config({"model": "giant-9b"}, file=tmp_path / "run.toml")
    assert (from_file.model, from_file.sample.group_size) == ("giant/Giant-9B", 6)
    assert load_config({"model": "quickstart"}, presets=["one"]).steps == Config().steps
    with pytest.raises(UserError, match=r"one is a preset, not a model\. Give --preset one"):
        load_config({"model": "one"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    assert load_config({"model": "one"}).model == "one"  # a folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "run.toml:1: unknown key stepps. Did you mean steps?"),
        (
            "\n[sample]\n\ngroup_sise = 3",
            "run.toml:4: unknown key sample.group_sise. Did you mean sample.group_size?",
        ),
        ("lr = 1e-5", "run.toml:1: unknown key lr. Did you mean optim.lr?"),
        ("[sampel]\ntop_p = 1.0", "run.toml:1: unknown key sampel. Did you mean sample?"),
        ("steps = 3\nzzzzzzzz = 3", "run.toml:2: unknown key zzzzzzzz"),
        ("sample.group_size = 'x'", 'run.toml:1: sample.group_size is "x", must be a whole number'),
        ("steps = 2.0", "run.toml:1: steps is 2.0, must be a whole number"),
        ("steps = true", "run.toml:1: steps is true, must be a whole number"),
        ("steps = '5'", 'run.toml:1: steps is "5", must be a whole number'),
        ("steps = 0", "run.toml:1: steps is 0, must be at least 1"),
        ("model = 3", "run.toml:1: model is 3, must be text in quotes"),
        ("seed = 1979-05-27", 'run.toml:1: seed is "1979-05-27", must be a whole number'),
        ("\n\n[optim]\nlr = -1.0", "run.toml:4: optim.lr is -1.0, must be greater than 0"),
        ("[optim]\nlr = inf", "run.toml:2: optim.lr is "),
        ("[optim]\nbetas = [0.9]", "run.toml:2: optim.betas is [0.9], must be a longer list"),
        ("[optim]\nbetas = [0.9, 1.5]", "run.toml:2: optim.betas is 1.5, must be less than 1"),
        (
            "[loss]\nimportance_clip = 'none'",
            'run.toml:2: loss.importance_clip is "none", must be a number, or false',
        ),
        (
            "[span]\ngranularity = 'word'",
            "run.toml:2: span.granularity is \"word\", must be 'suffix', 'span' or 'sentence'",
        ),
        ("data = 3", "run.toml:1: data is 3, must be a table of options"),
        ("sample = {group_size = 1}", "run.toml:1: sample.group_size is 1: a wrong rollout"),
        (
            '[reflect]\nanswer_note = """\nsteps = 1\n"""\n[sample]\ngroup_size = 0',
            "run.toml:6: sample.group_size is 0, must be at least 1",
        ),
        ("steps = 3\nsteps = 4", "run.toml:2: malformed TOML (Cannot overwrite a value)"),
        ("steps =", "run.toml:1: malformed TOML"),
        ('model = "x', "run.toml"),
    ],
)
def test_mistakes_name_file_line_key_and_what_is_wanted(
    tmp_path: Path, text: str, message: str
) -> None:
    assert error_of(tmp_path, text).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: there is no such file"):
        apply_toml(Config(), tmp_path / "no.toml")
    with pytest.raises(UserError, match="cannot be read"):
        apply_toml(Config(), tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        apply_toml(Config(), tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample.group_size": "x"}, "--sample.group-size is 'x', must be a whole number"),
        ({"sample.group_size": "1"}, "sample.group_size is 1: a wrong rollout"),
        (
            {"sample.group_size": "1", "method": "grpo"},
            "sample.group_size is 1: the policy gradient compares",
        ),
        (
            {"sample.group_size": "1", "method": "opsd", "loss.policy_weight": "1"},
            "sample.group_size is 1: the policy gradient compares",
        ),
        ({"sample.top_p": "1.5"}, "--sample.top-p is '1.5', must be at most 1"),
        ({"optim.lr": "nan"}, "--optim.lr is 'nan', must be a finite number"),
        ({"loss.importance_clip": "x"}, "--loss.importance-clip is 'x', must be a number, or none"),
        ({"trust_remote_code": "x"}, "--trust-remote-code is 'x', must be true or false"),
        ({"steps": "9" * 5000}, "--steps is '999"),
    ],
)
def test_mistakes_on_the_command_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_args(Config(), given)
    assert str(caught.value).startswith(message)


SGLANG = {"engine.kind": "sglang"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine.sync": "distributed"}, "engine.sync distributed needs engine.kind sglang"),
        ({"engine.colocated": True}, "engine.colocated needs engine.kind sglang"),
        (
            {"engine.colocated": True, "engine.sync": "distributed"} | SGLANG,
            "engine.colocated needs engine.sync disk",
        ),
        ({"engine.sync": "adapter"} | SGLANG, "engine.sync adapter sends LoRA adapters"),
        ({"engine.one_step_ahead": True}, "engine.one_step_ahead samples while"),
        ({"eval.overlap": True}, "eval.overlap evaluates on the servers"),
        (
            {"eval.overlap": True, "engine.colocated": True} | SGLANG,
            "engine.kind sglang and no engine.colocated",
        ),
        ({"optim.warmup_steps": None}, "optim.warmup_frac and optim.warmup_steps exclude"),
        ({"optim.kind": "adamw8bit", "optim.offload": True}, "optim.offload needs optim.kind"),
        ({"teacher.url": "http://a"}, "teacher.url needs teacher.backend sglang"),
        ({"teacher.backend": "sglang", "teacher.kind": "ema"}, "needs teacher.kind frozen"),
        ({"teacher.backend": "sglang", "reflect.weights": "teacher"}, "reflect.weights student"),
        ({"teacher.backend": "sglang", "reflect.probe_every": 2}, "reflect.probe_every 0"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        apply_args(load_preset("quickstart"), given)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("a",), 2),
        (("b", "c"), 4),
        (("b", "d", "e"), 5),
        (("b", "quoted"), 6),
        (("f",), 10),
        (("f", "g"), 11),
        (("nowhere",), 1),
    ],
)
def test_find_line(keys: tuple[str, ...], line: int) -> None:
    text = (
        "# a = 0\na = 1\n[b]\nc = 2\nd.e = 3\n\"quoted\" = 4\nx = '''\nf = 5\n'''\n"
        "[ f ] # table\ng = 6\n"
    )
    assert find_line(text, keys) == line


def test_the_hash_covers_what_decides_the_learning() -> None:
    config = load_preset("quickstart")
    longer = apply_args(config, {"epochs": "9", "out": "elsewhere", "optim.offload": True})
    assert config_hash(longer) == config_hash(config)
    hashes = {
        config_hash(apply_args(config, given))
        for given in (
            {},
            {"seed": "1"},
            {"optim.lr": "1e-3"},
            {"data.train": "x"},
            {"optim.schedule": "cosine"},
            {"optim.warmup_frac": "0.1"},
            {"optim.lr_scale": "*=2"},
            {"optim.decay": "all"},
            {"optim.kind": "adamw8bit"},
        )
    }
    assert len(hashes) == 9
    assert all(len(value) == 16 for value in hashes)


OLD_RUN = Path(__file__).parent / "old_run.toml"  # as written before options were renamed
OLD_HASHES = {"old_run": "ea8f93447bca1d5c", "quickstart": "b5a19e2e008f8df1"}


def test_a_run_from_before_the_renames_is_read_and_keeps_its_hash(tmp_path: Path) -> None:
    config = apply_toml(Config(), OLD_RUN, accept_old_names=True)
    assert config.loss.importance_clip == 3.5
    assert config.teacher.backend == "sglang"
    assert config.teacher.max_logprob_gap == 0.02
    assert config.engine.max_logprob_gap == 0.05
    assert config.optim.trainable == "model.layers.2?.*"
    assert config.select.on_no_success == "skip"
    assert config_hash(config) == OLD_HASHES["old_run"]
    # What the preset did not have yet, or had otherwise.
    before: dict[str, Any] = {"engine.max_rows": 256, "loss.workspace_mib": 256, **BEFORE}
    before["teacher.solution_template"] = Config().teacher.solution_template
    assert config_hash(apply_args(load_preset("quickstart"), before)) == OLD_HASHES["quickstart"]
    assert config_hash(read(tmp_path, to_toml(config))) == OLD_HASHES["old_run"]


def test_an_old_switch_is_read_as_the_choice_that_it_was(tmp_path: Path) -> None:
    """The hashes are those of the commit before `require_success` became `on_no_success`."""
    path = tmp_path / "config.toml"
    hashes = {}
    for old, new in (("true", "skip"), ("false", "keep")):
        text = OLD_RUN.read_text()
        path.write_text(text.replace("require_success = true", f"require_success = {old}"))
        config = apply_toml(Config(), path, accept_old_names=True)
        assert config.select.on_no_success == new
        hashes[new] = config_hash(config)
    assert hashes == {"skip": OLD_HASHES["old_run"], "keep": "e39d73d2cbe7f266"}
    others = {
        config_hash(apply_args(config, {"select.on_no_success": value}))
        for value in ("reference", "answer")
    }
    assert len(others | set(hashes.values())) == 4
    warned = apply_args(config, {"select.warn_after_steps": "9"})
    assert config_hash(warned) == hashes["keep"]


def test_every_renamed_option_counts_in_the_hash() -> None:
    config = apply_toml(Config(), OLD_RUN, accept_old_names=True)
    changes = {
        "loss.importance_clip": "2.5",
        "teacher.max_logprob_gap": "0.03",
        "engine.max_logprob_gap": "0.06",
        "optim.trainable": "lm_head.weight",
        "engine.python": "/other/python",
    }
    hashes = {config_hash(apply_args(config, {name: value})) for name, value in changes.items()}
    assert len(hashes | {config_hash(config)}) == len(changes) + 1


def test_an_option_that_was_added_later_counts_only_where_it_is_set() -> None:
    options = {"loss": {"importance_clip": 2.0, "new": 1}, "teacher": {}, "engine": {}, "optim": {}}
    options["select"] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renamed, "ADDED_LATER", ("loss.new", "method"))
        defaults = {"loss": {"new": 1}, "method": "rosd"}
        plain = renamed.legacy_options(options, defaults)
        assert plain["loss"] == {"is_clip": 2.0}
        assert renamed.legacy_options({**options, "method": "rosd"}, defaults) == plain
        assert renamed.legacy_options({**options, "method": "opd"}, defaults)["method"] == "opd"
        options["loss"]["new"] = 2
        assert renamed.legacy_options(options, defaults)["loss"] == {"is_clip": 2.0, "new": 2}


@pytest.mark.parametrize(("old", "new"), renamed.RENAMED.items())
def test_an_old_name_in_a_file_is_answered_with_the_new_one(
    tmp_path: Path, old: str, new: str
) -> None:
    table, _, key = old.partition(".")
    text = f"steps = 3\n[{table}]\n{key} = false\n"
    assert error_of(tmp_path, text) == f"run.toml:3: {old} is now {new}"
    assert new in options_of(Config)


@pytest.mark.parametrize("name", renamed.REMOVED)
def test_an_option_that_is_gone_is_answered_in_one_line(tmp_path: Path, name: str) -> None:
    """In a file and on the command line; the config.toml of an old run is read without it."""
    table, _, key = name.partition(".")
    text = f"steps = 3\n[{table}]\n{key} = true\n"
    assert error_of(tmp_path, text) == f"run.toml:3: {name} {renamed.REMOVED[name]}"
    with pytest.raises(UserError, match=rf"--{name} is no longer an option"):
        read_args([f"--{name}", "true"], options_of(Config))
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert apply_toml(Config(), path, accept_old_names=True) == Config(steps=3)
    assert name not in options_of(Config)


def test_an_option_under_both_names_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[loss]\nis_clip = 1.0\nimportance_clip = 2.0\n")
    with pytest.raises(UserError, match=r"config\.toml:2: loss\.is_clip is now"):
        apply_toml(Config(), path, accept_old_names=True)


def test_a_share_that_is_held_out_counts_in_the_hash() -> None:
    devs = ("dev.jsonl", "10%", "20%")
    base, tenth, fifth = (Config.model_validate({"data": {"dev": dev}}) for dev in devs)
    other = Config.model_validate({"data": {"dev": "other.jsonl"}})
    assert config_hash(base) == config_hash(other)
    assert len({config_hash(base), config_hash(tenth), config_hash(fifth)}) == 3
