"""The presets: every value has a source, and they say what they are said to say."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset, preset_names, preset_path
from rosd_fast.config.templates import check_solution_template, check_templates

METHODS = ("reference", "paper", "fixed", "sdpo", "opsd", "grpo", "equal")
MODELS = ("qwen3-4b", "qwen3-8b")
SOURCE = re.compile(r"#.*\[[\w. ]+\]")
OPTION = re.compile(r"[a-z_]+ = ")


def unsourced(text: str) -> list[str]:
    """The option lines without a source on the line, or in the comment right above it."""
    missing, comment, in_text = [], "", False
    for line in text.split("\n"):
        if not in_text and line.startswith("#"):
            comment += line
            continue
        if not in_text and OPTION.match(line) and not SOURCE.search(comment + line):
            missing.append(line)
        in_text ^= line.count('"""') % 2 == 1
        comment = ""
    return missing


@pytest.mark.parametrize("name", [*METHODS, *MODELS])
def test_every_value_has_its_source(name: str) -> None:
    text = preset_path(name).read_text()
    assert OPTION.search(text)
    assert unsourced(text.partition("\n\n")[2] if "[verl]" not in text else text) == []
    labels = set(re.findall(r"\[([\w.]+)\] ", "".join(re.findall("#.*", text))))
    header = text[: text.index("\n\n")]
    assert all(f"[{label}]" in header for label in labels)


def test_a_value_without_a_source_is_found() -> None:
    text = '# [a] one\nx = 1\ny = 2\nz = """\nq = 3\n"""  # [a]\n# no source\nw = 4 # [b c]\nv = 5'
    assert unsourced(text) == ["y = 2", 'z = """', "v = 5"]


def test_all_presets_are_known() -> None:
    assert {*METHODS, *MODELS, "quickstart", "smollm2"} == set(preset_names())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_and_a_model_compose_in_either_order(name: str, model: str) -> None:
    both = load_preset(name, model)
    assert both == load_preset(model, name)
    assert both.model == load_preset(model).model
    check_templates(both.reflect, both.teacher)
    check_solution_template(both.teacher)


def test_a_later_method_replaces_an_earlier_one() -> None:
    assert load_preset("sdpo", "paper").method == "rosd"
    fixed = load_preset("reference", "fixed")
    assert fixed.compat == Config().compat and fixed.reflect.mode == "verbatim"


def test_the_paper_is_the_reference_without_its_bugs() -> None:
    bugs = {"compat": Config().compat}
    assert load_preset("paper") == load_preset("reference").model_copy(update=bugs)
    compat = load_preset("reference").compat
    assert compat.reencode_span and compat.cut_prompts_right and compat.micro_batch_rollouts == 2


def test_the_published_setting() -> None:
    paper = load_preset("paper")
    assert (paper.sample.problems_per_step, paper.sample.group_size) == (32, 8)
    assert (paper.sample.max_prompt_tokens, paper.sample.max_new_tokens) == (2048, 8192)
    assert (paper.reflect.max_prompt_tokens, paper.reflect.max_new_tokens) == (8192, 4096)
    assert paper.teacher.max_prompt_tokens == 10240
    assert (paper.loss.divergence, paper.loss.beta, paper.loss.top_k) == ("jsd", 0.5, 100)
    assert paper.loss.tail and paper.loss.importance_clip == 2.0
    assert (paper.optim.lr, paper.optim.warmup_steps, paper.optim.weight_decay) == (1e-5, 10, 0.01)
    assert paper.reflect.show_answer and paper.select.drop_zero_variance
    assert (paper.eval.every, paper.eval.samples) == (10, 16)
    assert (paper.eval.temperature, paper.eval.top_p) == (0.6, 0.95)
    sdpo, grpo = load_preset("sdpo"), load_preset("grpo")
    assert (sdpo.teacher.kind, sdpo.teacher.ema_rate, sdpo.loss.top_k) == ("ema", 0.05, 100)
    assert (grpo.optim.lr, grpo.optim.updates_per_step, grpo.policy.clip_high) == (1e-6, 4, 0.28)


def test_equal_differs_in_the_method_only() -> None:
    configs = [
        apply_args(load_preset("equal"), {"method": method})
        for method in ("rosd", "sdpo", "opsd", "opd", "grpo", "sft")
    ]
    for one, other in pairwise(configs):
        assert one.model_copy(update={"method": other.method}) == other
