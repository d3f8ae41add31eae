"""The token page colours distilled tokens and escapes all text."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.errors import UserError
from rosd_fast.report import render_tokens_html

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;\x00\u202e</div>'


def make_row(tokens: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "step": 7,
        "problem": {"id": "p1", "domain": "sums", "prompt": "1 + 1 = ?", "answer": "2"},
        "rollout_id": "p1/0",
        "completion": "".join(tokens),
        "completion_ids": list(range(len(tokens))),
        "tokens": tokens,
        "score": 0.0,
        "success": False,
        "extracted_answer": "3",
        "finish_reason": "stop",
        "policy_version": 6,
        "group_dropped": False,
        "reflection": None,
        "span": None,
        "divergence": None,
    } | changes


def make_reflection(quote: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "demonstration_id": "p1/1",
        "text": "as generated",
        "quote": quote,
        "explanation": "count again",
        "well_formed": True,
    } | changes


def render(run: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    folder = run / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step_000007.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = render_tokens_html(run, 7, **options)
    assert path == folder / "step_000007.html"
    return path.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """A parser that collects tags and attributes, and checks that elements are properly nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def completion(page: str) -> str:
    """Return the completion of the only rollout as HTML."""
    (found,) = re.findall(r'<article.*?<div class="text">(.*?)</div>', page, re.DOTALL)
    return found


def test_distilled_tokens_are_coloured_and_the_quote_underlined(tmp_path: Path) -> None:
    row = make_row(
        ["So", " 1", " +", " 1", " = 3", ".", "<end>"],
        reflection=make_reflection("1 = 3"),
        span={"start": 3, "end": 7, "source": "quote", "text": " 1 = 3.<end>"},
        divergence=[0.04, 1.0, 0.0, None],
    )
    assert completion(render(tmp_path, [row])) == (
        "<span>So 1 +</span>"
        '<i style="--d:0.20" title="0.04 nats"> <u>1</u></i>'
        '<i style="--d:1.00" title="1 nats"><u> = 3</u></i>'
        '<i style="--d:0.00" title="0 nats">.</i>'
        '<i title="no divergence">&lt;end&gt;</i>'
    )


def test_the_occurrence_within_the_span_is_underlined(tmp_path: Path) -> None:
    tokens = ["3", " and", " 3", "\n", "x"]
    span = {"start": 2, "end": 5, "source": "quote", "text": ""}
    row = make_row(tokens, reflection=make_reflection("3  x"), span=span, divergence=[0.1] * 3)
    page = completion(render(tmp_path, [row]))
    assert page.startswith("<span>3 and</span>")
    assert re.sub(r"</?i[^>]*>", "", page).endswith(" <u>3</u><u>\n</u><u>x</u>")


def test_a_quote_that_does_not_occur_underlines_nothing(tmp_path: Path) -> None:
    row = make_row(["a", "b"], reflection=make_reflection("c"))
    assert completion(render(tmp_path, [row])) == "<span>ab</span>"


def test_a_character_in_several_tokens_is_coloured_with_the_last(tmp_path: Path) -> None:
    span = {"start": 0, "end": 3, "source": "full", "text": "é"}
    row = make_row(["", "é", ""], span=span, divergence=[0.5, 0.1, 0.2])
    page = completion(render(tmp_path, [row]))
    assert unescape(re.sub(r"<[^>]*>", "", page)) == "é⟨end⟩"  # the stop token has no text
    assert re.findall(r'title="(.*?)"', page) == ["0.5 nats", "0.2 nats"]


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    problem = {"id": HOSTILE, "domain": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE}
    shared = {
        "problem": problem,
        "rollout_id": HOSTILE,
        "extracted_answer": HOSTILE,
        "reflection": make_reflection(
            HOSTILE, demonstration_id=HOSTILE, explanation=HOSTILE, text=HOSTILE, well_formed=False
        ),
    }
    span = {"start": 0, "end": 2, "source": "quote", "text": HOSTILE}
    rows = [
        make_row(["a", HOSTILE], span=span, divergence=[0.1, 0.2], **shared),
        make_row(["a", HOSTILE], **shared),
        {k: v for k, v in make_row([HOSTILE], **shared).items() if k != "tokens"},
    ]
    page = render(tmp_path / "<script>", rows)
    found = Balance(page)
    assert not found.seen & {"script", "img", "a", "link", "iframe", "object"}
    assert found.attributes <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "title")
    }
    assert "\x00" not in page
    assert "://" not in page  # nothing is fetched
    assert "default-src 'none'" in page


def test_lone_surrogates_and_malformed_reflections_are_shown(tmp_path: Path) -> None:
    page = render(
        tmp_path,
        [
            make_row(
                ["\ud800"], reflection=make_reflection(None, explanation=None, well_formed=False)
            )
        ],
    )
    assert "The reflection is malformed" in page
    assert "as generated" in page


def test_verdicts_and_facts(tmp_path: Path) -> None:
    rows = [
        make_row(["2"], success=True, score=1.0, extracted_answer="2"),
        make_row(["3"], rollout_id="p1/1", extracted_answer=None, finish_reason="length"),
    ]
    page = render(tmp_path, rows)
    assert page.count('<article class="correct">') == page.count('<article class="wrong">') == 1
    assert "no answer found · score 0 · 1 tokens · truncated at the limit · not distilled" in page
    assert "2 rollouts, 1 correct, 0 distilled (0 tokens)" in page
    assert "prefers-color-scheme: dark" in page
    Balance(page)


def test_tokens_of_the_policy_loss_show_surprise_and_direction(tmp_path: Path) -> None:
    policy = {"start": 0, "end": 2, "advantage": 1.25, "logprob": [-0.5, -2.0]}
    rows = [
        make_row(["2", " +"], policy=policy),
        make_row(["3", " -"], rollout_id="p1/1", policy={**policy, "advantage": -0.5}),
        make_row(["4"], rollout_id="p1/2", policy={**policy, "advantage": 0.0, "logprob": None}),
        make_row(["5"], rollout_id="p1/3", policy={**policy, "advantage": None, "logprob": [-1]}),
    ]
    page = render(tmp_path, rows)
    assert "4 trained by the policy loss (5 tokens)" in page
    assert "distilled" not in page
    assert '<i class="up" style="--d:0.50" title="surprise 0.5 nats">2</i>' in page
    assert '<i style="--d:1.00" title="surprise 2 nats"> -</i>' in page
    assert "<span>4</span>" in page
    for note in ("advantage +1.25", "advantage -0.5", "advantage +0: not trained", "likelihood"):
        assert note in page
    Balance(page)


def test_where_a_token_has_both_losses_the_divergence_counts(tmp_path: Path) -> None:
    row = make_row(
        ["2", " +"],
        policy={"start": 0, "end": 2, "advantage": 1.0, "logprob": [-0.5, -2.0]},
        span={"start": 1, "end": 2, "source": "quote", "text": " +"},
        divergence=[0.25],
    )
    page = render(tmp_path, [row])
    assert '<i class="up" style="--d:0.50" title="surprise 0.5 nats">2</i>' in page
    assert '<i style="--d:1.00" title="0.25 nats"> +</i>' in page
    assert "1 distilled (1 tokens), 1 trained by the policy loss (2 tokens)" in page


def test_kept_groups_come_first_under_the_limit(tmp_path: Path) -> None:
    dropped = make_row(["a"], group_dropped=True, rollout_id="dropped/0")
    kept = make_row(["b"], rollout_id="kept/0")
    page = render(tmp_path, [dropped, kept], max_rollouts=1)
    assert "1 of 2 rollouts" in page
    assert "kept/0" in page
    assert "dropped/0" not in page


def test_a_step_without_rollouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rollouts of step 8.*no rollouts of any step"):
        render_tokens_html(tmp_path, 8)
    render(tmp_path, [make_row(["a"])])
    with pytest.raises(UserError, match="first step with rollouts is 7, the last is 7"):
        render_tokens_html(tmp_path, 8)
