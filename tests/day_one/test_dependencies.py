"""Which wheels a machine needs; and an installation that asks no index."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from day_one import dependencies, wheels
from day_one.dependencies import Needs, install, project_requirements, resolve

ROOT = Path(__file__).parents[2]


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    """A wheel of one module that holds its version."""
    stem = f"{name}-{version}"
    path = folder / f"{stem}-{tag}.whl"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {text}" for text in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def names(needs: Needs) -> dict[str, str]:
    return {name: path.name.split("-")[1] for name, path in needs.wheels.items()}


def test_only_what_is_missing_or_too_old_is_taken(tmp_path: Path) -> None:
    for name in ("present", "old", "absent"):
        wheel(tmp_path, name, "2.0")
    needs = resolve(
        ["present>=1", "old>=1.5", "absent"], tmp_path, installed={"present": "1.0", "old": "1.0"}
    )
    assert names(needs) == {"old": "2.0", "absent": "2.0"}
    assert needs.present == {"present": "1.0"}
    assert needs.missing == {} == needs.fatal


def test_requirements_of_wheels_are_followed_and_the_newest_fitting_is_taken(
    tmp_path: Path,
) -> None:
    wheel(
        tmp_path,
        "first",
        "1.0",
        "second<3",
        "third; python_version < '3'",
        "fourth; extra == 'more'",
    )
    for version in ("1.0", "2.0", "3.0"):
        wheel(tmp_path, "second", version)
    assert names(resolve(["first"], tmp_path, installed={})) == {"first": "1.0", "second": "2.0"}


def test_what_is_missing_names_who_wants_it(tmp_path: Path) -> None:
    wheel(tmp_path, "first", "1.0", "second>=2")
    wheel(tmp_path, "second", "1.0")
    wheel(tmp_path, "torch", "9.0")  # never from the folder
    needs = resolve(["first", "torch>=2", "matplotlib"], tmp_path, installed={"torch": "1.0"})
    assert needs.missing == {
        "second>=2": "first",
        "torch>=2": "rosd-fast",
        "matplotlib": "rosd-fast",
    }
    assert set(needs.fatal) == {"second>=2", "torch>=2"}


def test_wheels_of_another_python_or_system_are_not_taken(tmp_path: Path) -> None:
    wheel(tmp_path, "first", "1.0", tag="cp27-cp27m-win32")
    assert resolve(["first"], tmp_path, installed={}).missing == {"first": "rosd-fast"}


def test_the_projects_own_requirements_are_read() -> None:
    found = project_requirements(ROOT)
    packages = {dependencies.requirement_name(text) for text in found}
    assert {"torch", "triton", "transformers", "liger-kernel", "pydantic"} <= packages
    assert "sglang" not in packages


def test_nothing_but_the_side_folder_changes_and_no_index_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is a place that nobody may ask: a listening socket would count its callers."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", url)
        folder, site = tmp_path / "wheels", tmp_path / "site"
        folder.mkdir()
        needs = Needs(wheels={"aside": wheel(folder, "rosd_aside", "1.0", "numpy>99")})
        install(needs, site)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert {path.name for path in site.iterdir()} - {"__pycache__"} == {
        *("rosd_aside.py", "rosd_aside-1.0.dist-info")
    }
    code = "import rosd_aside; print(rosd_aside.VERSION)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "1.0\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1


def test_what_was_installed_is_not_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(wheels={"aside": wheel(tmp_path, "rosd_aside", "1.0")})
    install(needs, tmp_path / "site")
    monkeypatch.setattr(subprocess, "run", None)
    install(needs, tmp_path / "site")


def test_bulky_packages_are_left_out_of_a_small_folder(tmp_path: Path) -> None:
    downloads, folder = tmp_path / "downloads", tmp_path / "folder"
    for path in (downloads / "3.11", downloads / "3.12", folder):
        path.mkdir(parents=True)
    wheel(downloads / "3.11", "first", "1.0")
    wheel(downloads / "3.12", "first", "1.0")
    wheel(downloads / "3.11", "hf_xet", "1.0")
    big = wheel(downloads / "3.12", "numpy", "2.0")
    big.write_bytes(big.read_bytes() + bytes(10_000))
    wheel(downloads / "3.12", "matplotlib", "3.0")
    wheel(downloads / "3.12", "pillow", "9.0")
    assert wheels.fill(folder, downloads, max_bytes=9_000) == ["numpy"]
    kept = sorted(path.name.split("-")[0] for path in folder.iterdir())
    assert kept == ["first", "matplotlib", "pillow"]
    assert wheels.folder_size(folder) < 9_000


def test_a_folder_with_other_files_is_not_emptied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert wheels.main([str(tmp_path)]) == 2
    assert (tmp_path / "letter.txt").exists()
    assert "other files" in capsys.readouterr().err


def test_wheels_that_it_did_not_make_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = wheel(tmp_path, "own", "1.0")
    assert wheels.main([str(tmp_path)]) == 2
    assert kept.exists() and "name a new folder" in capsys.readouterr().err
    (tmp_path / wheels.SOURCE).write_bytes(b"")  # now an earlier call made it
    assert wheels.prepare(tmp_path)
    assert not kept.exists()


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "wheels"):
        assert wheels.main([str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("gpu_wheels: ") and said.count("\n") == 1 and str(folder) in said


def test_a_tree_without_git_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "TREE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert wheels.main([str(tmp_path / "wheels")]) == 1
    assert "git cannot archive" in capsys.readouterr().err


def test_the_source_archive_names_its_commit(tmp_path: Path) -> None:
    import tarfile

    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    commit = wheels.archive_source(tmp_path / "source.tar.gz")
    with tarfile.open(tmp_path / "source.tar.gz") as archive:
        mark = archive.extractfile("rosd-fast/COMMIT")
        assert mark is not None and mark.read().decode().strip() == commit
        archive.getmember("rosd-fast/scripts/gpu_day_one.sh")
