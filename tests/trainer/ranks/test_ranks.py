"""Steps on several ranks, real processes under torchrun, against the same steps on one."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import module_command

ROOT = Path(__file__).parents[3]
PACKING = ("loss/num_micro_batches", "loss/num_input_tokens")  # depend on the number of ranks
TOLERANCE = {"grad": 1e-5, "weight": 1e-5, "teacher": 1e-5, "resumed": 1e-5}
# One rank keeps bfloat16 weights, several ranks keep fp32 shards.
NARROW = {"grad": 2e-2, "weight": 2e-2, "teacher": 2e-2, "resumed": 2e-2}


def torchrun(ranks: int, *args: str | Path, timeout: float = 300) -> None:
    """Run the worker, under torchrun if there are several ranks."""
    result = subprocess.run(
        module_command(ranks, "tests.trainer.ranks.worker", *args),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def assert_same(one: Path, many: Path) -> None:
    """Gradients, weights and metrics in the folder `many` equal those in `one`."""
    expected, found = (load_file(path / "results.safetensors") for path in (one, many))
    assert {name for name in found if "/resumed/" not in name} == {
        name for name in expected if "/resumed/" not in name
    }
    assert sum("/grad/" in name for name in found) > 100
    largest: dict[tuple[str, str], float] = defaultdict(float)
    for name, value in found.items():
        case, kind, _ = name.split("/", 2)
        largest[case, kind] = max(largest[case, kind], float(value.abs().max()))
    for name, value in found.items():
        case, kind, _ = name.split("/", 2)
        want = expected[name.replace("/resumed/", "/weight/")].double()
        error = (value.double() - want).abs().max()
        bound = (NARROW if "bfloat16" in case else TOLERANCE)[kind] * want.abs().max()
        bound += 1e-8 * largest[case, kind]  # a bias may have next to no gradient
        assert error <= bound, f"{name}: off by {error:.1e}, may be {bound:.1e}"
    metrics, others = (json.loads((path / "metrics.json").read_text()) for path in (one, many))
    assert metrics.keys() == others.keys()
    for case, steps in metrics.items():
        for (own, per_token), (other, other_per_token) in zip(steps, others[case], strict=True):
            own, other = ({**row, **dict.fromkeys(PACKING, 0)} for row in (own, other))
            rel, zero = (2e-2, 2e-3) if "bfloat16" in case else (1e-4, 1e-6)
            if case == "hybrid":  # its recurrences carry the rounding of rows of other widths on
                rel = 1e-3
            assert other == pytest.approx(own, rel=rel, abs=zero), case
            assert per_token.keys() == other_per_token.keys(), case
            for key, values in per_token.items():
                assert other_per_token[key] == pytest.approx(values, rel=rel, abs=zero), case


def assert_same_adapter(one: Path, many: Path) -> None:
    """The adapters in the checkpoints of two folders, in peft's layout, are the same."""
    folder = Path("lora", "checkpoints", "step_000002", "adapter")
    ours, theirs = (load_file(path / folder / "adapter_model.safetensors") for path in (one, many))
    assert ours.keys() == theirs.keys() and len(ours) == 28
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
    configs = [
        json.loads((path / folder / "adapter_config.json").read_text()) for path in (one, many)
    ]
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one rank."""
    folder = tmp_path_factory.mktemp("one")
    torchrun(1, folder)
    return folder


@pytest.mark.slow
def test_two_ranks_and_back(one: Path, tmp_path: Path) -> None:
    """Two ranks also resume from the checkpoints of one, and one from those of two."""
    two, again = tmp_path / "two", tmp_path / "again"
    two.mkdir()
    again.mkdir()
    torchrun(2, two, "--resume", one)
    assert_same(one, two)
    torchrun(1, again, "--resume", two)
    assert_same(one, again)
    assert_same_adapter(one, two)


@pytest.mark.slow
def test_three_ranks(one: Path, tmp_path: Path) -> None:
    """No size is a multiple of 3, and with one sample two ranks have none."""
    three = tmp_path / "three"
    three.mkdir()
    torchrun(3, three, "--resume", one)
    assert_same(one, three)


@pytest.mark.slow
def test_two_copies_of_two_shards(one: Path, tmp_path: Path) -> None:
    four = tmp_path / "four"
    four.mkdir()
    torchrun(4, four, "--resume", one, "--shard-size", "2")
    assert_same(one, four)


@pytest.mark.slow
def test_the_comparison_finds_a_wrong_gradient(one: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    results = load_file(one / "results.safetensors")
    name = next(name for name in results if name.startswith("tied/grad/"))
    results[name] = results[name] * (1 + 1e-4 * torch.ones(()))
    save_file(results, tmp_path / "results.safetensors")
    (tmp_path / "metrics.json").write_text((one / "metrics.json").read_text())
    with pytest.raises(AssertionError, match=name):
        assert_same(one, tmp_path)
