"""README's table of the loss, from rows of bench/results/loss_cpu.csv."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import harness

sys.path.append(str(Path(harness.__file__).parent))  # where scripts find each other

from bench import loss_report

UNITS = {"chunked": 4.0, "chunked entry": 2.0998, "tiled exact": 8.0, "trl": 6.0}


def made_rows() -> list[dict[str, str]]:
    """Rows as `csv.DictReader` gives them, some of which the table leaves out."""
    rows = []
    for states, entropy in (("smollm2", "2.220"), ("sharp", "0.497")):
        for setting in ("jsd", "forward_kl"):
            for tokens in ("128", "512"):
                for name in loss_report.COLOURS:
                    is_shown = setting == "jsd" and tokens == "512"
                    rows.append(
                        {
                            "commit": "0123abc",
                            "liger_kernel": "0.8.5",
                            "trl": "1.16.0",
                            "threads": "2",
                            "states": states,
                            "setting": setting,
                            "tokens": tokens,
                            "vocab": "49152",
                            "hidden": "576",
                            "student_entropy": entropy,
                            "candidate": name,
                            "vs_eager": "0.5",
                            "vs_floor": "0.614" if is_shown else "99",
                            "active_frac": "0.0499" if "entry" in name else "",
                            "units": str(UNITS.get(name, 4.0)),
                            "peak_mib": "nan" if name == "floor" else "58",
                        }
                    )
    return rows


def test_the_table_has_units_ratios_and_memory() -> None:
    lines = loss_report.table(made_rows()).splitlines()
    assert "512 tokens" in lines[0] and "(2.2 nats)" in lines[0] and "0123abc" in lines[0]
    assert len(lines) == 4 + len(loss_report.SHOWN)
    assert "| `chunked`, entry 2^-12 (f = 0.05) | 2.1 | 0.61 | 58 MiB |" in lines
    assert "| the same, states of 0.5 nats (f = 0.050) | 2.1 | 0.61 | 58 MiB |" in lines
    assert "| TRL 1.16.0, chunks of 256 tokens | 6.0 | 0.61 | 58 MiB |" in lines
    assert "| Liger 0.8.5 | 4.0 | 0.61 | 58 MiB |" in lines
    assert "99.00" not in "\n".join(lines)


def test_a_row_that_was_not_measured_is_named() -> None:
    rows = [row for row in made_rows() if row["candidate"] != "trl"]
    with pytest.raises(ValueError, match="512 tokens for smollm2: trl"):
        loss_report.table(rows)


def test_a_report_replaces_the_table_and_draws(tmp_path: Path) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "docs" / "loss.png"
    readme.write_text(f"a\n\n{loss_report.BEGIN}\nold\n{loss_report.END}\n\nb\n")
    loss_report.report(made_rows(), picture, readme)
    text = readme.read_text()
    assert text.startswith(f"a\n\n{loss_report.BEGIN}\nJSD of 512")
    assert text.endswith(f"|\n{loss_report.END}\n\nb\n")
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["none", "<b> <b> <e>", "<b>", "<e> <b>"])
def test_missing_or_repeated_markers_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        harness.write_between(path, "<b>", "<e>", "new")
    assert path.read_text() == text
