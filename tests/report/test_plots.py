"""All plots are drawn at a sensible size, and each panel shows the right values."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from rosd_fast.errors import UserError
from rosd_fast.report import diagnostic_panels, draw_plots, panels, policy_panels
from rosd_fast.report.metrics import MetricsLog, read_metrics
from rosd_fast.report.plots import _eval_samples, _figure, pictures, png
from rosd_fast.report.series import domains, series, smoothing_window, stage_times
from rosd_fast.report.stages import Stage

NAMES = {"overview", "accuracy", "loss", "distilled", "spans", "time"}
LOSSES = ("divergence", "grad_norm", "student_entropy", "teacher_entropy", "importance_weight_mean")


def make_row(step: int) -> dict[str, float]:
    wave = 0.5 + 0.1 * math.sin(step)
    row = {f"loss/{name}": wave for name in LOSSES} | {"loss/num_distilled_tokens": 900.0}
    row |= {f"rollout/{name}": wave for name in ("accuracy", "distilled_frac", "groups_kept_frac")}
    row |= {
        f"reflect/{n}_frac": wave
        for n in ("well_formed", "found", "ambiguous", "span_start", "truncated", "leak")
    }
    row |= {"reflect/span_tokens": 20 * wave, "perf/rollout_tokens_per_s": 9e3 * wave}
    return row | {"time/sample_s": 1.0, "time/learn_s": 2.0, "time/verify_s": 0.01}


def make_run(run: Path, num_steps: int) -> Path:
    with MetricsLog(run / "metrics.jsonl") as log:
        log.write(0, {"eval/dev/accuracy": 0.4, "eval/ood/accuracy": 0.3, "eval/dev/shop": 0.4})
        for step in range(1, num_steps + 1):
            log.write(step, make_row(step))
        log.write(num_steps, {"eval/dev/accuracy": 0.6, "eval/ood/accuracy": 0.3})
    return run


def decode(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()  # checks the checksum of every chunk
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_all_plots_of_a_run(tmp_path: Path) -> None:
    paths = draw_plots(make_run(tmp_path, 30))
    assert {path.stem for path in paths} == NAMES | {"domains"}
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    for path in paths:
        pixels = decode(path)
        height, width, _ = pixels.shape
        assert 700 <= width <= 2400, path
        assert 400 <= height <= 1200, path
        assert 0.01 < (pixels.min(axis=-1) < 250).mean() < 0.6, path  # neither blank nor filled


def test_a_run_with_servers_has_a_plot_of_the_engine(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 4):
            own = {"rollout/cached_frac": 0.5, "rollout/shareable_frac": 0.6}
            gaps = {"loss/logprob_gap_max": 1e-3, "loss/logprob_gap_mean": 1e-5}
            log.write(step, make_row(step) | own | gaps)
    paths = draw_plots(tmp_path)
    assert {path.stem for path in paths} == NAMES | {"engine"}
    for path in paths:
        decode(path)


def diagnostics_row(step: int) -> dict[str, float]:
    names = ("topk_overlap", "student_mass_topk", "teacher_mass_topk", "special_frac")
    names += ("thinking_frac", "divergence_before", "divergence_error", "divergence_after")
    row = {f"diag/{name}": 0.1 * step for name in names} | {"rollout/tokens_mean": 40.0}
    row |= {f"diag/divergence_pos_{tenth}": 0.01 * tenth for tenth in range(10)}
    row |= {"rollout/truncated_frac": 0.1, "loss/logprob_gap_mean": 1e-6}
    return row


def policy_row(step: int) -> dict[str, float]:
    names = ("loss", "entropy_mean", "logprob_mean", "ratio_mean", "clipped_frac")
    row = {f"policy/{name}": 0.1 * step for name in names} | {"loss/num_policy_tokens": 900.0}
    row |= {"loss/grad_norm": 0.1, "rollout/accuracy": 0.5, "rollout/trained_frac": 0.5}
    own = ("special_frac", "thinking_frac")
    row |= {k: v for k, v in diagnostics_row(step).items() if k.removeprefix("diag/") in own}
    row |= {"rollout/tokens_mean": 40.0, "rollout/truncated_frac": 0.0}
    return row | {"policy/logprob_gap_mean": 1e-6, "time/sample_s": 1.0}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("policy", {"overview", "accuracy", "distilled", "time", "policy", "diagnostics"}),
        ("divergence", NAMES | {"diagnostics"}),
        ("both", NAMES | {"diagnostics", "policy"}),
    ],
)
def test_the_plots_are_those_of_the_losses(tmp_path: Path, kind: str, names: set[str]) -> None:
    """And no panel of them lacks its metrics."""
    rows = []
    for step in range(1, 4):
        row = {} if kind == "policy" else make_row(step) | diagnostics_row(step)
        rows.append({"step": step, **row, **({} if kind == "divergence" else policy_row(step))})
    grids = pictures(rows)
    assert set(grids) == names
    for name, grid in grids.items():
        for panel in [each for line in grid for each in line]:
            # Evaluations and throughput come from other stages.
            if name not in ("accuracy", "time") and "accuracy" not in str(panel):
                assert "no data" not in texts(draw(panel, rows)), (name, panel)


def test_a_method_without_reflections_has_no_plot_of_them() -> None:
    row = {k: v for k, v in make_row(1).items() if not k.startswith("reflect/")}
    grids = pictures([{"step": 1, **row, "reflect/cut_frac": 0.0, "rollout/tokens_mean": 40.0}])
    assert set(grids) == NAMES - {"spans"}
    shown = [panel for line in grids["overview"] for panel in line]
    assert not {panels.span_start, panels.reflection_quality}.intersection(shown)
    assert panels.entropies in shown
    measured = {k: v for k, v in diagnostics_row(1).items() if k != "diag/divergence_error"}
    grid = pictures([{"step": 1, **row, **measured}])["diagnostics"]
    assert diagnostic_panels.span_contrast not in [panel for line in grid for panel in line]


def test_the_map_has_a_column_per_step_and_a_row_per_tenth() -> None:
    rows: list[dict[str, Any]] = [{"step": i, **diagnostics_row(i)} for i in (1, 2, 4)]
    del rows[1]["diag/divergence_pos_3"]
    ax = draw(diagnostic_panels.position_map, rows)
    (mesh,) = ax.collections
    values = np.ma.filled(mesh.get_array(), np.nan).reshape(10, 3)
    expected = np.tile(0.01 * np.arange(10.0)[:, None], 3)
    expected[3, 1] = np.nan
    np.testing.assert_allclose(values, expected)
    assert ax.get_ylim() == (0, 1)
    many: list[dict[str, Any]] = [{"step": i, "diag/divergence_pos_0": i} for i in range(1, 301)]
    mesh = draw(diagnostic_panels.position_map, many).collections[0]
    first = np.ma.filled(mesh.get_array(), np.nan).reshape(10, -1)[0]
    assert len(first) == 100
    assert first[0] == 2.0  # of steps 1 to 3


def test_equal_metrics_give_equal_bytes() -> None:
    rows = [{"step": step, **make_row(step)} for step in range(1, 30)]
    first, second = (png(_figure([[panels.divergence]], rows, "run")) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("num_steps", [0, 1])
def test_runs_of_one_step_or_none(tmp_path: Path, num_steps: int) -> None:
    for path in draw_plots(make_run(tmp_path, num_steps)):
        decode(path)


def test_a_run_without_rows(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").close()
    assert {path.stem for path in draw_plots(tmp_path)} == NAMES


def test_non_finite_values_and_hostile_names(tmp_path: Path) -> None:
    run = tmp_path / "a $\\frac{ run"
    with MetricsLog(run / "metrics.jsonl") as log:
        log.write(1, dict.fromkeys([*make_row(1), "eval/dev/accuracy"], math.nan))
        log.write(2, {"eval/dev/$\\frac{": 0.5, "eval/dev/_hidden": 0.6, "eval/dev/化学": 0.7})
    assert len(draw_plots(run)) == len(NAMES) + 1


def test_the_importance_weight_of_an_old_run_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/is_weight_mean": 1.5}\n')
    ax = draw(panels.importance_weight, read_metrics(tmp_path / "metrics.jsonl"))
    assert [tuple(line.get_ydata()) for line in ax.lines] == [(1.5,)]


def test_a_missing_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        draw_plots(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "panel",
    [
        diagnostic_panels.agreement,
        diagnostic_panels.span_contrast,
        diagnostic_panels.position_map,
        diagnostic_panels.token_kinds,
        diagnostic_panels.lengths,
        diagnostic_panels.truncated,
        policy_panels.policy_loss,
        policy_panels.logprob,
        policy_panels.ratio,
        policy_panels.clipping,
    ],
)
def test_a_newer_panel_without_its_metrics_says_so(panel: Any) -> None:
    assert "no data" in texts(draw(panel, [{"step": 1, "other": 1.0}]))
    rows = [{"step": 1, **diagnostics_row(1), **policy_row(1)}]
    assert "no data" not in texts(draw(panel, rows))


def draw(panel: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    figure = Figure()
    ax = figure.subplots()
    panel(ax, rows, **options)
    figure.savefig(io.BytesIO())
    return ax


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    "name",
    [
        *("accuracy", "divergence", "grad_norm", "entropies", "importance_weight", "distilled"),
        *("trained_tokens", "span_start", "span_length", "reflection_quality"),
        *("time_per_step", "time_shares", "throughput"),
    ],
)
def test_a_panel_without_its_metrics_says_so(name: str) -> None:
    assert "no data" in texts(draw(getattr(panels, name), [{"step": 1, "other": 1.0}]))
    drawn = draw(getattr(panels, name), [{"step": 1, **make_row(1)}])
    assert "no data" not in texts(drawn)
    assert drawn.get_title(loc="left")
    assert drawn.get_xlabel()


@pytest.mark.parametrize("name", ["reflection_quality", "distilled", "time_per_step", "entropies"])
def test_a_legend_is_not_wider_than_its_panel(name: str) -> None:
    """A wider legend would push the columns of a plot apart."""
    panel = getattr(panels, name)
    rows = [make_row(1) | {"step": 1, **{stage.metric: 1.0 for stage in Stage}}]
    figure = _figure([[panel] * 3] * 2, rows, "run")
    figure.draw_without_rendering()
    for ax in figure.axes:
        legend = ax.get_legend()
        assert legend is not None
        assert legend.get_window_extent().x1 <= ax.get_window_extent().x1


def test_the_accuracy_panel_shows_the_first_and_last_values() -> None:
    rows = [
        {"step": 0, "eval/dev/accuracy": 0.412, "eval/ood/accuracy": 0.5},
        {"step": 5, "rollout/accuracy": 0.1},
        {"step": 9, "eval/dev/accuracy": 0.634, "eval/ood/accuracy": 0.49},
    ]
    ax = draw(panels.accuracy, rows, samples=4)
    assert texts(ax) == ["41.2%", "63.4%", "50.0%", "49.0%"]
    assert ax.get_ylabel() == "accuracy (mean@4)"
    low, high = ax.get_ylim()
    assert 0 <= low < 0.1
    assert 0.634 < high <= 1


def test_the_accuracy_panel_has_a_band_where_there_are_intervals() -> None:
    rows = [
        {
            "step": step,
            "eval/dev/accuracy": 0.5,
            "eval/dev/accuracy_low": 0.375,
            "eval/dev/accuracy_high": 0.625,
            "eval/ood/accuracy": 0.25,
        }
        for step in range(3)
    ]
    ax = draw(panels.accuracy, rows)
    (band,) = ax.collections
    drawn = band.get_paths()[0].vertices
    assert {float(y) for y in drawn[:, 1]} == {0.375, 0.625}
    assert "95%" in ax.get_ylabel()
    without = draw(panels.accuracy, [{"step": 0, "eval/dev/accuracy": 0.5}])
    assert not without.collections and "95%" not in without.get_ylabel()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_percent_axis_stays_within_0_and_100(value: float) -> None:
    ax = draw(panels.accuracy, [{"step": 0, "eval/dev/accuracy": value}])
    low, high = ax.get_ylim()
    assert 0 <= low <= value <= high <= 1
    assert high - low >= 0.3 - 1e-9


def test_mean_at_k_comes_from_the_config(tmp_path: Path) -> None:
    assert _eval_samples(tmp_path) is None
    for text, expected in {
        "[eval]\nsamples = 4\n": 4,
        "[eval]\nsamples = 4\ntemperature = 0.0\n": 1,
        "seed = 1\n": None,
        "broken": None,
    }.items():
        (tmp_path / "config.toml").write_text(text)
        assert _eval_samples(tmp_path) == expected


def bars(ax: Any) -> dict[str, tuple[str, float]]:
    """Return the colour and size of the bar of each stage in a time panel."""
    if ax.get_legend() is None:
        names = [label.get_text() for label in ax.get_yticklabels()]
        patches, sizes = ax.patches, [patch.get_width() for patch in ax.patches]
    else:
        names = [container.get_label() for container in ax.containers]
        patches = [container.patches[0] for container in ax.containers]
        sizes = [patch.get_height() for patch in patches]
    colours = [to_hex(patch.get_facecolor()).upper() for patch in patches]
    return dict(zip(names, zip(colours, sizes, strict=True), strict=True))


@pytest.mark.parametrize("panel", [panels.time_per_step, panels.time_shares])
def test_every_stage_is_drawn_with_its_time_and_colour(panel: Any) -> None:
    row = {"step": 1, **{stage.metric: 10.0 + i for i, stage in enumerate(Stage)}}
    drawn = bars(draw(panel, [row | {"time/step_s": 99.0}]))
    assert drawn == {stage: (stage.colour, row[stage.metric]) for stage in Stage}
    assert len({colour for colour, _ in drawn.values()}) == len(Stage)


@pytest.mark.parametrize("panel", [panels.time_per_step, panels.time_shares])
def test_stages_of_another_version_are_drawn_in_separate_colours(panel: Any) -> None:
    """Their time must neither be missing nor look like the time of a known stage."""
    times = {"time/warp_s": 3.0, "time/sample_s": 2.0, "time/distill_s": 4.0, "time/warp_ms": 7.0}
    drawn = bars(draw(panel, [{"step": 1, **times}]))
    assert {name: size for name, (_, size) in drawn.items()} == {
        "sample": 2.0,
        "distill": 4.0,
        "warp": 3.0,
    }
    colours = {colour for colour, _ in drawn.values()}
    assert len(colours) == 3
    assert colours & {stage.colour for stage in Stage} == {Stage.SAMPLE.colour}


def test_stage_times_are_in_running_order_with_unknown_stages_last() -> None:
    row = {"step": 1, "time/zip_s": 1.0, "time/learn_s": 1.0, "time/add_s": 1.0}
    times = stage_times([row | {"time/sample_s": 1.0, "time/build_s": math.nan}])
    assert list(times.seconds) == list(times.totals) == ["sample", "learn", "add", "zip"]


def test_the_later_row_of_a_step_counts() -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": 3.0}, {"step": 2, "a": 2.0}, {"step": 3}]
    got = series(rows, "a")
    assert (got.steps, got.values) == ((1, 2), (3.0, 2.0))
    assert not series(rows, "b")
    assert not series([{"step": 1, "a": math.nan}], "a")


def test_smoothing_ignores_a_spike_and_gaps() -> None:
    values = [1.0] * 10 + [100.0, math.nan] + [1.0] * 10
    got = series([{"step": i, "a": v} for i, v in enumerate(values)], "a").smoothed(5)
    assert got.values == (1.0,) * 22
    assert smoothing_window(19) == 1
    assert all(smoothing_window(n) % 2 for n in (20, 100, 1000))


def test_totals_are_not_domains() -> None:
    rows = [{"step": 0, "eval/dev/accuracy": 1.0, "eval/dev/tokens_mean": 9.0, "eval/dev/b/c": 0.0}]
    assert domains([*rows, {"step": 1, "eval/dev/a": 1.0}], "dev") == ["a", "b/c"]
    assert domains(rows, "ood") == []


def test_stage_times_add_rows_of_a_step_and_average_bars() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "time/sample_s": 2.0} for i in range(1, 6)]
    rows += [{"step": 1, "time/sample_s": 1.0, "time/evaluate_s": 4.0}, {"step": 0}]
    times = stage_times(rows, max_bars=3)
    assert times.num_steps == (2, 2, 1)
    assert times.steps == (1.5, 3.5, 5.0)
    assert times.seconds == {"sample": (2.5, 2.0, 2.0), "evaluate": (2.0, 0.0, 0.0)}
    assert times.totals == {"sample": 11.0, "evaluate": 4.0}
    assert not stage_times([])


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bare machine has trained its run by then."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert draw_plots(make_run(tmp_path, 3)) == []
    assert capsys.readouterr().out == "no plots: matplotlib is not installed\n"
