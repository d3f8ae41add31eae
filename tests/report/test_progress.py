"""The stage clock, and the display on a terminal and elsewhere."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
from rich.console import Console

from rosd_fast.report.progress import (
    BarProgress,
    Progress,
    StageClock,
    describe_metrics,
    describe_shares,
    format_s,
    progress,
)
from rosd_fast.report.stages import Stage

METRICS = {
    "rollout/accuracy": 0.4125,
    "loss/divergence": 0.02134,
    "perf/rollout_tokens_per_s": 1234.5,
    "time/sample_s": 3.0,
    "time/learn_s": 1.0,
    "time/step_s": 4.25,
}


def test_a_run_without_a_teacher_shows_its_own_loss() -> None:
    assert describe_metrics({"policy/loss": -0.00125}) == "policy loss -0.00125"
    both = describe_metrics({"policy/loss": 0.5, "loss/divergence": 0.25})
    assert both == "loss 0.25  policy loss 0.5"


class Ticks:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=160, color_system=None), out


def test_the_clock_times_nested_stages_separately() -> None:
    ticks = Ticks()
    clock = StageClock(ticks)
    with clock.stage(Stage.SAMPLE):
        ticks.now += 2
        with clock.stage(Stage.VERIFY):
            assert clock.current is Stage.VERIFY
            ticks.now += 3
        ticks.now += 4
    ticks.now += 10  # between stages
    with clock.stage(Stage.SAMPLE):
        ticks.now += 0.5
    assert clock.current is None
    assert clock.pop() == {"sample": 6.5, "verify": 3.0}
    assert clock.pop() == {}


def test_the_clock_counts_a_stage_that_raises() -> None:
    ticks = Ticks()
    clock = StageClock(ticks)

    def fail() -> None:
        with clock.stage(Stage.LEARN):
            ticks.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.current is None
    assert clock.pop() == {"learn": 1.0}


def test_metrics_reset_the_clock() -> None:
    ticks = Ticks()
    clock = StageClock(ticks)
    with clock.stage(Stage.SAMPLE):
        ticks.now += 2
        clock.tokens(30)
        clock.tokens(10)
        assert clock.tokens_per_s() == 20
    with clock.stage(Stage.REFLECT):
        ticks.now += 1
        clock.tokens(5)
    ticks.now += 1
    assert clock.metrics() == {
        "time/sample_s": 2.0,
        "time/reflect_s": 1.0,
        "time/step_s": 4.0,
        "perf/rollout_tokens_per_s": 20.0,
    }
    ticks.now += 1
    assert clock.metrics() == {"time/step_s": 1.0}
    assert clock.tokens_per_s() == 0.0


def test_a_stage_may_be_given_as_its_value_and_must_exist() -> None:
    clock = StageClock(Ticks())
    with clock.stage("sync"):  # type: ignore[arg-type]
        assert clock.current is Stage.SYNC
    with pytest.raises(ValueError, match="warp"), clock.stage("warp"):  # type: ignore[arg-type]
        pass
    assert clock.current is None


def test_progress_needs_no_matplotlib() -> None:
    """Modules that draw nothing import it, too."""
    code = "import sys, rosd_fast.report.progress as _; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_plain_output_is_one_line_per_step() -> None:
    console, out = make_console(terminal=False)
    with progress(40, 3, console=console) as shown:
        assert type(shown) is Progress
        with shown.stage(Stage.SAMPLE):
            shown.tokens(7)
        shown.step_done(3, METRICS)
        shown.note("step 4: [nothing] to distil")
        shown.step_done(4, METRICS | {"eval/dev/accuracy": 0.5, "eval/ood/accuracy": 0.2})
    first, note, second = out.getvalue().splitlines()
    assert first.startswith("step 3/40  accuracy 41.2%  loss 0.02134  1,234 tokens/s  4.2 s  ETA ")
    assert first.endswith("sample 75%, learn 25%")
    assert note == "step 4: [nothing] to distil"
    assert "dev 50.0%  ood 20.0%" in second
    assert "\x1b" not in out.getvalue()


def test_the_bar_shows_the_step_its_metrics_and_the_stage() -> None:
    console, out = make_console(terminal=True)
    with progress(40, 1, plain=False, console=console) as shown:
        assert type(shown) is BarProgress
        shown.step_done(1, METRICS)
        with shown.stage(Stage.REFLECT):
            shown.tokens(1000)
            console.print(shown)
        shown.step_done(2, METRICS | {"eval/dev/accuracy": 0.5})
        shown.note("stopping after this step")
    text = out.getvalue()
    for part in ("step 1/40", "accuracy 41.2%", "loss 0.02134", "ETA 0:", "reflect", "tokens/s"):
        assert part in text
    assert "sample 75%, learn 25%" in text
    assert "step 2: accuracy 41.2%" in text
    assert "stopping after this step" in text


def test_a_note_during_another_write_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = make_console(terminal=False)
    with progress(2, 1, console=console) as shown:
        with monkeypatch.context() as patch:

            def busy(*args: object, **kwargs: object) -> None:
                raise RuntimeError("reentrant call")

            patch.setattr(console, "print", busy)
            shown.note("stopping")
        assert out.getvalue() == ""
        with shown.stage(Stage.LEARN):
            assert out.getvalue() == "stopping\n"


def test_shares_of_the_time() -> None:
    assert describe_shares({}) == describe_shares({"sync": 0.0}) == ""
    assert (
        describe_shares({"sync": 0.001, "learn": 1.0, "sample": 2.999}) == "sample 75%, learn 25%"
    )


def test_time_left() -> None:
    console, _ = make_console(terminal=False)
    shown = Progress(10, 5, console)
    assert shown.remaining_s() is None
    shown.step_done(5, {})
    left = shown.remaining_s()
    assert left is not None
    assert 0 <= left < 1
    for step in range(6, 11):
        shown.step_done(step, {})
    assert shown.remaining_s() == 0


def test_missing_and_non_finite_metrics_are_left_out() -> None:
    assert describe_metrics({}) == ""
    metrics = {"rollout/accuracy": 0.0, "loss/divergence": math.nan}
    assert describe_metrics(metrics) == "accuracy 0.0%"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "0:05"), (754, "12:34"), (3723, "1:02:03"), (0, "0:00")]
)
def test_format_s(seconds: float, text: str) -> None:
    assert format_s(seconds) == text
