"""Progress: plain lines without a terminal, a bar in one."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest

from adaptivenet.training import Progress, fit
from tests.training.problems import population


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(epoch, **metrics):
    return {"name": "x", "epoch": epoch, "seconds": 0.5, **metrics}


def test_plain_lines_show_the_mean_of_the_population():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.begin("dense", 3, done=1)
    progress.update(record(1, validation_accuracy=np.array([0.5, 1.0]), density=np.float32(0.25)))
    progress.update(record(2, train_loss=1.0, other=3.0))
    progress.end("dense ended")
    assert stream.getvalue().splitlines() == [
        "dense  resumed after epoch 1/3",
        "dense  epoch 2/3  validation_accuracy 0.7500  density 0.2500  0.50 s",
        "dense  epoch 3/3  train_loss 1.0000  0.50 s",
        "dense ended",
    ]


def test_time_to_go_leaves_out_the_first_epoch(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 106.0])
    monkeypatch.setattr("adaptivenet.training.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.begin("", 5)
    for epoch in range(3):
        progress.update(record(epoch))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "run  epoch 1/5  0.50 s"
    assert lines[1].endswith("to go 6 s")  # three epochs of two seconds
    assert lines[2].endswith("to go 6 s")  # two epochs of three seconds


def test_what_is_shown_can_be_chosen():
    stream = io.StringIO()
    progress = Progress(("b", "a"), stream=stream)
    progress.begin("x", 1)
    progress.update(record(0, a=1.0, b=2.0, train_loss=3.0))
    assert stream.getvalue() == "x  epoch 1/1  b 2.0000  a 1.0000  0.50 s\n"


def test_nan_is_shown():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.begin("x", 1)
    progress.update(record(0, train_loss=np.array([np.nan, 1.0])))
    assert "train_loss nan" in stream.getvalue()


@pytest.mark.parametrize("in_ci", [False, True])
def test_a_terminal_gets_a_bar_unless_in_ci(monkeypatch, in_ci):
    monkeypatch.setenv("CI", "true" if in_ci else "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress = Progress(stream=stream)
    progress.begin("dense", 2)
    for epoch in range(2):
        progress.update(record(epoch, validation_loss=0.5))
    progress.end()
    text = stream.getvalue()
    assert "dense" in text
    assert "validation_loss 0.5000" in text
    assert "2/2" in text
    assert ("\x1b[" in text) != in_ci


def test_fit_drives_it():
    stream = io.StringIO()
    problem = population(members=2)
    fit(
        problem.state,
        **problem.arguments(),
        epochs=2,
        progress=Progress(stream=stream),
        name="arm",
    )
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("arm  epoch 2/2  train_loss ")


def test_heavy_packages_load_when_they_are_used():
    program = (
        "import sys, adaptivenet.training\n"
        "heavy = ('orbax', 'rich', 'tyro', 'flax', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == "[]"
