"""Which library computes matrix products on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from rosd_fast import products
from rosd_fast.errors import UserError
from rosd_fast.products import Library, choose, chosen, given, measure, onednn_product, use

needs_onednn = pytest.mark.skipif(onednn_product() is None, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The choice is afterwards what it was."""
    before = chosen()
    yield
    use(before)


class Machine:
    """A machine whose speeds a test sets. seconds: of one product, by library."""

    def __init__(self, **seconds: float) -> None:
        self.seconds: Mapping = seconds
        self.measured = 0

    def measure(self) -> Mapping[Library, float]:
        self.measured += 1
        return self.seconds

    def choose(
        self,
        *,
        on_cpu: bool = True,
        num_ranks: int = 1,
        recorded: Library | None = None,
        **environ: str,
    ) -> str:
        return choose(
            on_cpu=on_cpu,
            num_ranks=num_ranks,
            recorded=recorded,
            environ=environ,
            measure=self.measure,
        )


def fast() -> Machine:
    return Machine(torch=2.2, onednn=1.0)


def slow() -> Machine:
    return Machine(torch=1.2, onednn=1.0)


def test_measuring_times_both() -> None:
    seconds = measure()
    assert set(seconds) == ({"torch", "onednn"} if onednn_product() else {"torch"})
    assert 0 < min(seconds.values()) <= max(seconds.values()) < float("inf")


def test_a_product_that_is_not_of_float32_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(x, w, *_):
        return (x.bfloat16() @ w.bfloat16().T).float()

    monkeypatch.setattr(products, "onednn_product", lambda: rounded)
    assert set(measure()) == {"torch"}


@needs_onednn
def test_the_faster_one_is_chosen_and_named() -> None:
    assert fast().choose() == "matrix products: oneDNN, 2.2 times as fast as torch's own here"
    assert chosen() == "onednn"
    assert slow().choose() == ""  # a small gain changes nothing
    assert chosen() == "torch"


def test_a_torch_without_onednn_keeps_its_own() -> None:
    assert Machine(torch=1.0).choose() == ""
    assert chosen() == "torch"


@needs_onednn
@pytest.mark.parametrize("recorded", ["torch", "onednn"])
def test_a_resumed_run_has_the_recorded_one(recorded: Library) -> None:
    machine = fast() if recorded == "torch" else slow()
    line = machine.choose(recorded=recorded)
    assert (chosen(), machine.measured) == (recorded, 0)
    assert line == ("" if recorded == "torch" else "matrix products: oneDNN, as before")


def test_a_recorded_one_that_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_product", lambda: None)
    assert slow().choose(recorded="onednn") == ""
    assert chosen() == "torch"


@needs_onednn
def test_the_environment_fixes_it() -> None:
    assert slow().choose(ROSD_PRODUCTS="onednn").endswith("by ROSD_PRODUCTS")
    assert chosen() == "onednn"
    machine = fast()
    assert machine.choose(ROSD_PRODUCTS="torch", recorded="onednn") == ""
    assert (chosen(), machine.measured) == ("torch", 0)


def test_several_ranks_and_a_gpu_keep_torchs_own() -> None:
    use("onednn")
    machine = fast()
    assert machine.choose(num_ranks=2) == ""
    assert chosen() == "torch"
    use("onednn")
    assert machine.choose(on_cpu=False, recorded="onednn") == ""
    assert (chosen(), machine.measured) == ("torch", 0)


def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given({}) is None
    assert given({"ROSD_PRODUCTS": ""}) is None
    assert given({"ROSD_PRODUCTS": "torch"}) == "torch"
    with pytest.raises(UserError, match="torch or onednn"):
        given({"ROSD_PRODUCTS": "mkl"})
    monkeypatch.setattr(products, "onednn_product", lambda: None)
    with pytest.raises(UserError, match="no products by oneDNN"):
        given({"ROSD_PRODUCTS": "onednn"})
