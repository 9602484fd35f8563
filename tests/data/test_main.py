from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptivenet.data import cache_folder, names
from adaptivenet.data.__main__ import main
from adaptivenet.data.registry import Entry

from .conftest import Server


def test_list_shows_every_set(toy: Entry, good: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "--folder", str(good)]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert set(names()) <= set(lines)
    assert str(good / "toy") in lines["toy"]
    assert "absent (can be fetched)" in lines["mnist"]
    assert "absent (no mirror)" in lines["fsdd"]
    assert "in the package" in lines["digits"]
    assert "45.4 kB" in lines["digits"]
    assert "MIT (Zalando SE)" in lines["fashion_mnist"]


def test_verify_tells_absent_from_corrupt(
    toy: Entry, good: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["verify", "--folder", str(good)]) == 0
    out = capsys.readouterr().out
    assert "toy: verified (2 files)" in out
    assert "mnist: absent" in out
    assert main(["verify", "mnist"]) == 1
    assert "python -m adaptivenet.data fetch mnist" in capsys.readouterr().err
    (good / "toy" / "labels.gz").write_bytes(b"damaged")
    assert main(["verify", "--folder", str(good)]) == 1
    assert f"toy: FAILED: {good / 'toy' / 'labels.gz'}" in capsys.readouterr().err


def test_half_a_set_is_a_failure(toy: Entry, good: Path, capsys: pytest.CaptureFixture) -> None:
    (good / "toy" / "labels.gz").unlink()
    assert main(["verify", "--folder", str(good)]) == 1
    assert "toy/labels.gz was not found" in capsys.readouterr().err
    assert main(["list", "--folder", str(good)]) == 0
    assert "1 of 2 files absent" in capsys.readouterr().out


def test_fetch(
    toy: Entry, toy_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = tmp_path / "own"
    assert main(["fetch", "toy", "digits", "--folder", str(own), "--mirror", toy_server.url]) == 0
    out = capsys.readouterr().out
    assert f"toy: fetched and verified: {own / 'toy' / 'images.gz'}" in out
    assert "digits: needs no download" in out
    toy_server.pages.clear()
    assert main(["fetch", "toy", "--folder", str(own), "--mirror", toy_server.url]) == 0
    assert "toy: present and verified" in capsys.readouterr().out


def test_fetch_that_fails_exits_with_one(toy: Entry, capsys: pytest.CaptureFixture) -> None:
    assert main(["fetch", "fsdd", "--folder", "nowhere"]) == 1
    assert "fsdd: FAILED: Free Spoken Digit Dataset: the file fsdd/train.npz" in (
        capsys.readouterr().err
    )
    assert not Path("nowhere").exists()
    assert not cache_folder().exists()


@pytest.mark.parametrize("command", ["verify", "fetch"])
def test_unknown_names_exit_with_two_before_any_work(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([command, "digits", "minst"]) == 2
    captured = capsys.readouterr()
    assert "did you mean 'mnist'" in captured.err
    assert captured.out == ""


def test_the_command_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "ADAPTIVENET_DATA": str(tmp_path / "none")}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "adaptivenet.data"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "which is not a folder" in run.stderr
    assert "Traceback" not in run.stderr
