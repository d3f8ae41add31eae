"""`choice`: usual slips that still name one letter, and answers that name none or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosd_fast.types import WRONG
from rosd_fast.verify import VERIFIERS, is_verifiable

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = [DATA / f"sciknoweval-{name}/test.json" for name in ("biology", "chemistry", "material")]

LETTER_B = [
    "B",
    "b",
    "(B)",
    "(b)",
    "B.",
    "B)",
    "\nB\n",
    "( B )",
    "(B).",
    "**B**",
    "**(B)**",
    "`B`",
    "$B$",
    r"\boxed{B}",
    r"\text{B}",
    r"$\boxed{\textbf{(B)}}$",
    r"\mathrm{B}",
    "B. 1.69",
    "B: 1.69",
    "B) 1.69",
    "(B) 1.69",
    "(B): 1.69",
    "B - 1.69",
    "**B.** 1.69",
    "**B**: 1.69",
    r"\textbf{(B)} 1.69",
    "B:1.69",
    "b) nitric acid",
    "B: CC(N)C(=O)N1CCOCC1",
    "B. It does not react",
    "B. Salt and water",
    "B. No reaction",
    "B. False positives increase",
    "Option B",
    "option (b)",
    "Answer: B",
    "The answer is B",
    "The correct answer is (B).",
    "The best choice is B",
    "The correct option is: B",
]

NO_LETTER = [
    "",
    "AB",
    "BB",
    "1.69",
    "?",
    "not B",
    "A or B",
    "B or A",
    "B or C",
    "A and B",
    "A, B",
    "A/B",
    "A B",
    "(A)(B)",
    "(A) (B)",
    "**A** **B**",
    "B. or C",
    "B. or c",
    "B: not sure",
    "B: maybe",
    "B, maybe C",
    "B) wrong, C) right",
    "A: 1.2, B: 1.69",
    "A) no B) yes",
    "a) no, b) yes",
    "a) incorrect, b) correct",
    "a: incorrect b: correct",
    "B. No, it is not",
    "B. incorrect; see above",
    "A. C",
    "B: incorrect",
    "B: false",
    "B is wrong",
    "B because of the charge",
    "The answer is not B",
    "Option B is wrong",
    "none of them",
    "A dog",
    "Benzene",
    "e.g. nitric acid",
    "i.e. B",
    r"\text{A} or \text{B}",
    r"\boxed{A} \boxed{B}",
    "2",
    "\u0392",
    "B" + " " * 3000 + "B",
]


def judge(found: str, answer: str = "B"):
    return VERIFIERS["choice"](f"Steps.\n<answer>{found}</answer>", answer)


@pytest.mark.parametrize("found", LETTER_B)
def test_the_right_letter(found: str) -> None:
    assert (judge(found).score, judge(found).answer, judge(found).reason) == (1.0, "B", None)
    wrong = judge(found, "A")
    assert (wrong.score, wrong.answer, wrong.reason) == (0.0, "B", WRONG)


@pytest.mark.parametrize("found", NO_LETTER)
@pytest.mark.parametrize("answer", "ABCDEI")
def test_what_names_no_letter_or_several_is_wrong(found: str, answer: str) -> None:
    judged = judge(found, answer)
    assert judged.score == 0.0 and judged.answer == found.strip()
    assert judged.reason is not None and judged.reason.startswith("not one letter: ")


def test_the_letter_counts_and_not_the_text_behind_it() -> None:
    """The verifier knows no options: "B" with the text of option A is an answer B."""
    assert judge("B: the text of another option").score == 1.0


def test_places() -> None:
    verify = VERIFIERS["choice"]
    assert verify(r"So it is \boxed{B}.", "B").score == 1.0
    assert verify("So\n#### B", "B").score == 1.0
    assert verify("#### A\nno\n#### B\nyes", "B").reason == "no answer tag"
    assert verify("The answer is B", "B").reason == "no answer tag"


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> text of the options of a prompt of SciKnowEval."""
    lines = [line.partition(":") for line in prompt.splitlines()]
    return {
        name: text.strip() for name, colon, text in lines if colon and name in "ABCDEFG" and name
    }


@pytest.mark.skipif(not FILES[0].exists(), reason="the data set is not here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_slips_on_real_rows(path: Path) -> None:
    """A letter with the text of its option is never read as another letter, and mostly read."""
    num_read = num_rows = 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answer = row["answer"]
        assert is_verifiable("choice", answer)
        for letter, text in options_of(row["prompt"]).items():
            is_right = float(letter == answer)
            for plain in ("{}", "({})", "**{}**", r"\boxed{{{}}}", "{}.", "Option {}", " {}\n"):
                assert judge(plain.format(letter), answer).score == is_right
            for template in ("{}: {}", "{}. {}", "({}) {}", "**{}.** {}", r"\text{{{}}}: {}"):
                judged = judge(template.format(letter, text), answer)
                assert judged.score <= is_right
                num_read += judged.answer == letter
                num_rows += 1
            assert judge(text, answer).score == 0.0, "an option's text alone"
    assert num_read > 0.97 * num_rows > 0
