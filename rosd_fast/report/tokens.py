"""The token page: which tokens of the rollouts of a step were trained, how strongly, and why.

A distilled token is coloured by its divergence. One whose loss needs no teacher is coloured by its
surprise, -log p, in the colour of its advantage: raised or lowered.

The page is one HTML file without scripts and without external resources. All text from models and
data sets is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.files import write_atomic
from rosd_fast.report.colours import BLUE, GREEN, VERMILLION
from rosd_fast.report.rollouts import read_rollouts

Row = Mapping[str, Any]

END = "⟨end⟩"  # shown for a last token without text, such as the stop token
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters -> visible symbols, as browsers drop or alter control characters."""


def render_tokens_html(run: str | Path, step: int, *, max_rollouts: int = 128) -> Path:
    """Write `RUN/rollouts/step_*.html` from the .jsonl of the step, and return its path.

    At most `max_rollouts` rollouts are shown, those of kept groups first. Rollouts without token
    texts are shown without colours. Raises UserError if the step has no readable rollouts.
    """
    source = _source(Path(run), step)
    rows = read_rollouts(source)
    rows.sort(key=lambda row: bool(row["group_dropped"]))  # stable: groups stay together
    page = _page(rows[:max_rollouts], step=step, run_name=Path(run).resolve().name, total=len(rows))
    return write_atomic(source.with_suffix(".html"), page.encode("utf-8", "replace"))


def _source(run: Path, step: int) -> Path:
    folder = run / "rollouts"
    found = {}
    for path in folder.glob("step_*.jsonl"):
        digits = path.stem.removeprefix("step_")
        if digits.isdecimal():
            found[int(digits)] = path
    if step in found:
        return found[step]
    fix = "It has no rollouts of any step."
    if found:
        fix = f"The first step with rollouts is {min(found)}, the last is {max(found)}."
    raise UserError(f"there are no rollouts of step {step}", where=str(folder), fix=fix)


def _page(rows: list[dict[str, Any]], *, step: int, run_name: str, total: int) -> str:
    values = sorted(v for row in rows for v in row["divergence"] or () if v is not None)
    surprises = sorted(-v for row in rows for v in _logprobs(row) if v is not None)
    scales = Scales(divergence=_scale_top(values), surprise=_scale_top(surprises))
    trained = _count(rows, "trained by the policy loss", "policy", len(surprises))
    if values or not trained:
        trained = [*_count(rows, "distilled", "divergence", len(values), always=True), *trained]
    shown = f"{len(rows)} rollouts" if len(rows) == total else f"{len(rows)} of {total} rollouts"
    facts = f"{shown}, {sum(row['success'] for row in rows)} correct, {', '.join(trained)}"
    groups = "\n".join(
        _group(list(members), scales)
        for _, members in groupby(rows, key=lambda row: row["problem"]["id"])
    )
    legend = ""
    if values:
        legend += (
            f'<p class="key">Divergence of distilled tokens: 0 <span class="ramp"></span> '
            f"{scales.divergence:.2g} nats or more (square-root scale). <u>Underlined</u>: the "
            "quote of the reflection. Grey: not distilled.</p>"
        )
    if surprises:
        legend += (
            f'<p class="key">Surprise, -log p, of tokens that the policy loss trains: 0 '
            f'<span class="ramp up"></span> made more likely, 0 <span class="ramp"></span> made '
            f"less likely; the full colour is {scales.surprise:.2g} nats or more. Grey: not "
            "trained.</p>"
        )
    title = _text(f"{run_name}, step {step}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{title}</h1><p>{_text(facts)}</p>{legend}</header>\n"
        f"{groups}\n</body></html>\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The values of the full colour, in nats."""

    divergence: float
    surprise: float


def _count(
    rows: list[dict[str, Any]], verb: str, field: str, num_tokens: int, *, always: bool = False
) -> list[str]:
    """Return [how many rollouts have this field], or [] if none has it, unless `always`."""
    count = sum(row.get(field) is not None for row in rows)
    return [f"{count} {verb} ({num_tokens} tokens)"] if count or always else []


def _logprobs(row: Row) -> list[float | None]:
    """Return the log-probabilities of the tokens whose loss needs no teacher."""
    policy = row.get("policy")
    return [] if policy is None else policy["logprob"] or []


def _scale_top(values: list[float]) -> float:
    """Return the value of the full colour: the 98th percentile, robust against outliers."""
    if not values:
        return 1.0
    return max(values[math.ceil(0.98 * len(values)) - 1], 1e-6)


def _group(rows: list[dict[str, Any]], scales: Scales) -> str:
    problem = rows[0]["problem"]
    note = ' <span class="tag">dropped: no reflection</span>' if rows[0]["group_dropped"] else ""
    return (
        f"<section><h2>{_text(problem['id'])} "
        f'<span class="tag">{_text(problem["domain"])}</span>{note}</h2>\n'
        f'<div class="text problem">{_text(problem["prompt"])}</div>\n'
        f"<p>Correct answer: <code>{_text(problem['answer'])}</code></p>\n"
        + "\n".join(_rollout(row, scales) for row in rows)
        + "\n</section>"
    )


def _rollout(row: Row, scales: Scales) -> str:
    verdict, mark = ("correct", "✓") if row["success"] else ("wrong", "✗")
    answer = row["extracted_answer"]
    found = "no answer found" if answer is None else f"answer <code>{_text(answer)}</code>"
    facts = [
        found,
        f"score {row['score']:g}",
        f"{len(row['completion_ids'])} tokens",
        "truncated at the limit" if row["finish_reason"] == "length" else "",
        _span_note(row["span"]) if row["span"] or not row.get("policy") else "",
        _policy_note(row.get("policy")),
    ]
    return (
        f'<article class="{verdict}"><h3><span class="verdict">{mark} {verdict}</span> '
        f'{_text(row["rollout_id"])}</h3><p class="facts">{" · ".join(filter(None, facts))}</p>\n'
        f'<div class="text">{_completion(row, scales)}</div>\n{_reflection(row)}</article>'
    )


def _span_note(span: Row | None) -> str:
    if span is None:
        return "not distilled"
    if span["source"] == "full":
        return "distilled: all tokens"
    return f"distilled: tokens {span['start']} to {span['end'] - 1}"


def _policy_note(policy: Row | None) -> str:
    if policy is None:
        return ""
    advantage = policy["advantage"]
    if advantage is None:
        return "likelihood raised"
    return f"advantage {advantage:+.3g}" + ("" if advantage else ": not trained")


def _reflection(row: Row) -> str:
    reflection = row["reflection"]
    if reflection is None:
        return ""
    lines = []
    if reflection["quote"] is not None:
        lines.append(f"<p><b>Error</b> <q>{_text(reflection['quote'])}</q></p>")
    if reflection["explanation"] is not None:
        lines.append(f"<p><b>Explanation</b> {_text(reflection['explanation'])}</p>")
    if not reflection["well_formed"]:
        lines.append("<p><b>The reflection is malformed.</b></p>")
    if not lines or not reflection["well_formed"]:
        lines.append(f'<div class="text raw">{_text(reflection["text"])}</div>')
    shown = reflection["demonstration_id"]
    if shown is not None:
        lines.append(f'<p class="facts">Demonstration: {_text(shown)}</p>')
    return f'<div class="reflection">{"".join(lines)}</div>'


def _completion(row: Row, scales: Scales) -> str:
    """Return the completion as HTML: one element per trained token, the quote underlined."""
    tokens, span = row.get("tokens"), row["span"]
    if tokens is None:
        return _text(row["completion"])
    start = span["start"] if span else 0
    quote = _quote_range(tokens, row["reflection"], start)
    colours = _colours(row, scales)
    parts, position = [], 0
    carried: list[Colour] = []
    for i, token in enumerate(tokens):
        if i in colours:
            carried.append(colours[i])
        pieces = _split(token, position, quote)
        position += len(token)
        if not pieces and i + 1 < len(tokens):
            continue  # part of a character, which is coloured with its last token
        html = "".join(f"<u>{_text(t)}</u>" if quoted else _text(t) for t, quoted in pieces)
        if carried:
            parts.append(_token(html or END, carried))
        elif html:
            parts.append(f"<span>{html}</span>")
        carried = []
    # Merge neighbours that were not trained, which are most of a long page.
    return "".join(parts).replace("</span><span>", "").replace("</u><u>", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Colour:
    """The colour of a trained token.

    value: in nats; None: the step has none.
    strength: in [0, 1].
    title: what the value is, shown where the pointer rests.
    raised: whether the policy loss makes the token more likely.
    """

    value: float | None
    strength: float = 0.0
    title: str = "no divergence"
    raised: bool = False


def _colours(row: Row, scales: Scales) -> dict[int, Colour]:
    """Return the colour of each trained token, by its place.

    Where a token has a divergence and another loss, the divergence counts.
    """
    found: dict[int, Colour] = {}
    policy, span = row.get("policy"), row["span"]
    if policy is not None and policy["advantage"] != 0:
        raised = policy["advantage"] is None or policy["advantage"] > 0
        for place, logprob in enumerate(_logprobs(row), start=policy["start"]):
            surprise = None if logprob is None else -logprob
            found[place] = _colour(surprise, scales.surprise, "surprise {:.4g} nats", raised)
    if span is not None:
        values = row["divergence"] or [None] * (span["end"] - span["start"])
        for place, value in enumerate(values, start=span["start"]):
            if value is not None or place not in found:
                found[place] = _colour(value, scales.divergence, "{:.4g} nats", False)
    return found


def _colour(value: float | None, top: float, title: str, raised: bool) -> Colour:
    if value is None:
        return Colour(value=None)
    # The square root, as most values are near 0.
    strength = math.sqrt(min(max(value, 0.0) / top, 1.0))
    return Colour(value=value, strength=strength, title=title.format(value), raised=raised)


def _token(html: str, colours: Iterable[Colour]) -> str:
    """Return the element of a token, or of the tokens of one character: the strongest counts."""
    known = [colour for colour in colours if colour.value is not None]
    if not known:
        return f'<i title="no divergence">{html}</i>'
    colour = max(known, key=lambda each: each.strength)
    kind = ' class="up"' if colour.raised else ""
    return f'<i{kind} style="--d:{colour.strength:.2f}" title="{colour.title}">{html}</i>'


def _quote_range(tokens: list[str], reflection: Row | None, start: int) -> range:
    """Return the characters of the quote in the completion; empty if it does not occur.

    The first occurrence at or after the start of the span counts, or else the first of all.
    Whitespace in the quote matches any whitespace.
    """
    words = (reflection["quote"] or "").split() if reflection else []
    if not words:
        return range(0)
    text = "".join(tokens)
    pattern = re.compile(r"\s+".join(map(re.escape, words)))
    found = pattern.search(text, len("".join(tokens[:start]))) or pattern.search(text)
    return range(*found.span()) if found else range(0)


def _split(token: str, position: int, quote: range) -> list[tuple[str, bool]]:
    """Split a token, which begins at character `position`, where the quote begins or ends."""
    cuts = {0, len(token)} | {
        min(max(p - position, 0), len(token)) for p in (quote.start, quote.stop)
    }
    edges = sorted(cuts)
    return [(token[low:high], position + low in quote) for low, high in pairwise(edges)]


def _text(value: object) -> str:
    return escape(str(value).translate(CONTROL))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1c1c1c; --muted: #666; --page: #fff; --card: #f6f6f4;
  --line: #ddd; --heat: 213, 94, 0; --cool: 0, 158, 115;
  --right: {GREEN}; --wrong: {VERMILLION}; --note: {BLUE}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8e8e8; --muted: #9a9a9a; --page: #161616;
  --card: #202020; --line: #383838; --heat: 240, 120, 30; --cool: 44, 194, 149;
  --right: #2cc295; --wrong: #ff8a3d; --note: #56b4e9; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }}
h3 {{ font-size: .9rem; font-weight: 500; margin: 0; color: var(--muted); }}
p {{ margin: .25rem 0; }}
code {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
.tag {{ font-size: .75rem; font-weight: 400; color: var(--muted); border: 1px solid var(--line);
  border-radius: 1rem; padding: .1rem .6rem; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font-family: ui-monospace, monospace; font-size: .85rem; line-height: 1.75; }}
.problem {{ border-left: 3px solid var(--line); padding-left: .8rem; }}
article {{ background: var(--card); border-left: 4px solid var(--right); border-radius: 0 6px 6px 0;
  margin: .8rem 0; padding: .6rem .9rem; }}
article.wrong {{ border-color: var(--wrong); }}
.verdict {{ color: var(--right); font-weight: 700; }}
.wrong .verdict {{ color: var(--wrong); }}
.facts {{ color: var(--muted); font-size: .8rem; }}
i {{ font-style: normal; border-radius: 2px;
  background: rgba(var(--heat), calc(var(--d, 0) * .75)); }}
i.up {{ background: rgba(var(--cool), calc(var(--d, 0) * .75)); }}
i:hover {{ outline: 1px solid var(--ink); }}
.text > span {{ color: var(--muted); }}
u {{ text-decoration: underline 2px var(--note); text-underline-offset: 3px; }}
.reflection {{ border-top: 1px dashed var(--line); margin-top: .5rem; padding-top: .4rem;
  unicode-bidi: isolate; overflow-wrap: anywhere; }}
.reflection b {{ color: var(--note); font-weight: 600; margin-right: .3rem; }}
.raw {{ color: var(--muted); }}
.key {{ color: var(--muted); font-size: .85rem; }}
.ramp {{ display: inline-block; width: 7rem; height: .8rem; border-radius: 2px;
  vertical-align: middle;
  background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .75)); }}
.ramp.up {{ background: linear-gradient(90deg, rgba(var(--cool), 0), rgba(var(--cool), .75)); }}
"""
