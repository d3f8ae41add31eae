"""The final answer of a worked solution."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.shapes.answers import after_hashes, before_hashes, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 1,234 \n", "1,234"),
        ("#### 1\nno\n####-7", "-7"),
        ("in one line #### 7", "7"),
        ("#### A heading\nand no answer", None),
        ("5", None),
        ("solution ####", None),
        ("solution #### \n ", None),
    ],
)
def test_after_hashes(text: str, answer: str | None) -> None:
    assert after_hashes(text) == answer


def test_a_solution_loses_its_annotations_only() -> None:
    text = "He has 48/2 = <<48/2=24>>24 clips.\n1 << 2 and 3 >> 1\n#### 24"
    assert before_hashes(text) == "He has 48/2 = 24 clips.\n1 << 2 and 3 >> 1"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \mid x > 0\right.}", r"\left\{x \mid x > 0\right."),
        (r"\fbox{3}", "3"),
        (r"thus \boxed 9.", "9"),
        (r"\boxed{1}, and $\boxed 9$", "9"),
        (r"\boxed{\boxed{8}}", r"\boxed{8}"),
        (r"\boxed{1}, \boxed{2", None),  # cut off: the earlier box is not its answer
        (r"\boxed{}", None),
        ("boxed{1}", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


BALANCED = st.recursive(
    st.text(alphabet="ab1+ ", min_size=1, max_size=5),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda p: "{" + "".join(p) + "}"),
    max_leaves=8,
)


@given(st.text(max_size=30), BALANCED, st.text(alphabet="ab.$ }", max_size=10))
def test_any_balanced_content_is_found(before: str, content: str, after: str) -> None:
    assert last_boxed(rf"{before} \boxed{{{content}}} {after}") == (content.strip() or None)


@given(st.text(alphabet="\\boxed{}#< >1\n", max_size=60))
def test_no_text_raises(text: str) -> None:
    for find in (after_hashes, before_hashes, last_boxed):
        assert find(text) is None or isinstance(find(text), str)
