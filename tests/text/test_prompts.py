"""Templates with placeholders, filled with hostile texts, and texts cut to fit."""

from __future__ import annotations

import subprocess
import sys
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.text.prompts import (
    ELLIPSIS,
    SLACK,
    cut_middle,
    fill_template,
    fit_prompt,
    placeholders,
)


@given(text=st.text(), other=st.text())
def test_filling_is_a_single_pass(text, other):
    filled = fill_template("a{problem}b{rollout}c{problem}", {"problem": text, "rollout": other})
    assert filled == f"a{text}b{other}c{text}"


def test_what_is_a_placeholder():
    template = 'Use {"a": 1}, {42}, \\boxed{} and { problem }: {problem} {rollout}'
    assert placeholders(template) == {"problem", "rollout"}
    values = {"problem": "{rollout}", "rollout": r"\1{problem}\g<0>"}
    assert fill_template(template, values) == (
        'Use {"a": 1}, {42}, \\boxed{} and { problem }: {rollout} \\1{problem}\\g<0>'
    )
    with pytest.raises(KeyError):
        fill_template("{surprise}", values)


@given(text=st.text(max_size=40), keep=st.integers(0, 50))
def test_cut_middle_keeps_both_ends(text, keep):
    cut = cut_middle(text, keep)
    if len(text) <= keep:
        assert cut == text
    else:
        head, mark, tail = (
            cut.partition(ELLIPSIS) if ELLIPSIS not in text else (cut[:-keep], ELLIPSIS, "")
        )
        assert mark and len(cut) == keep + len(ELLIPSIS)
        if ELLIPSIS not in text:
            assert text.startswith(head) and text.endswith(tail)
            assert 0 <= len(head) - len(tail) <= 1


@given(
    longest=st.integers(0, 60),
    budget=st.integers(0, 80),
    fixed=st.integers(0, 30),
    density=st.floats(0, 3),
)
def test_fit_prompt_keeps_as_much_as_fits(longest, budget, fixed, density):
    fitted = fit_prompt(
        lambda keep: (7,) * (fixed + min(keep, longest)),
        longest=longest,
        max_tokens=budget,
        size=lambda keep: int(density * min(keep, longest)),
    )
    room = budget - fixed
    if room >= longest:
        assert fitted == (longest, (7,) * (fixed + longest))
    elif room >= 1:
        assert fitted == (room, (7,) * budget)
    else:
        assert fitted is None


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    budget=st.integers(1, 6000),
    density=st.floats(0, 2),
)
def test_a_wrong_size_costs_renders_and_nothing_else(tokens, budget, density):
    """Runs of characters that have no token, one, or several."""
    total = [0, *accumulate(count * 11 // 3 for count in tokens)]
    sizes = [0, *accumulate(int(density * 3) for _ in tokens)]
    kept, ids = fit_prompt(
        lambda keep: (7,) * total[keep],
        longest=len(tokens),
        max_tokens=budget,
        size=lambda keep: sizes[keep],
    ) or (0, ())
    assert len(ids) == total[kept] <= budget
    if total[-1] <= budget:
        assert kept == len(tokens)
    elif kept:
        most = max(count for count in total if count <= budget)
        assert most - len(ids) <= budget // SLACK
    else:
        assert total[1] > budget


def test_one_render_is_enough_where_the_sizes_are_right():
    tried = []

    def render(keep):
        tried.append(keep)
        return (7,) * (100 + keep)

    fitted = fit_prompt(render, longest=9000, max_tokens=4096, size=lambda keep: keep)
    assert fitted is not None
    kept, ids = fitted
    assert tried == [1, kept] and 4096 - 4096 // SLACK <= len(ids) <= 4096


def test_the_pure_modules_do_not_import_torch():
    modules = (
        "text.prompts text.chat text.token_bytes text.decode text.sentences rollout.select "
        "reflection.reflect reflection.locate reflection.requests batch.samples config.load "
        "verify data.problems"
    ).split()
    code = "import sys\n" + "".join(f"import rosd_fast.{module}\n" for module in modules)
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
