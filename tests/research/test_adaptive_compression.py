"""The main job from end to end at the smallest scale, and its messages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from adaptivenet import compression
from research import adaptive_compression as job
from research import adaptive_compression_figure, study

ROOT = Path(__file__).parents[2]
SMALL = ["--epochs", "4", "--batch-size", "64", "--seeds", "0", "1", "--hidden", "16", "8"]


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax's schedules and Adam mix dtypes, which the strict setting of these tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _run(tmp_path, *more):
    job.main([*SMALL, "--output", str(tmp_path), *more])
    (folder,) = (tmp_path / "adaptive_compression").iterdir()
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of every arm: its root, folder, results, and what it printed."""
    root, out = tmp_path_factory.mktemp("whole"), io.StringIO()
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(out):
        folder, results = _run(root, "--sparsities", "0.5", "0.9")
    return root, folder, results, out.getvalue()


def test_all_arms_end_with_table_results_figure_and_files(whole):
    _, folder, results, printed = whole
    names = ["dense", "note", "percentile", "scheduled 50.0%", "scheduled 90.0%", "auto"]
    assert list(results["metrics"]) == names
    assert all(name in printed for name in names)
    weights = 64 * 16 + 16 * 8 + 8 * 10
    sparsity = results["metrics"]["scheduled 90.0%"]["sparsity"]["mean"]
    assert sparsity == round(0.9 * weights) / weights
    assert results["metrics"]["dense"]["parameters"]["mean"] == weights + 16 + 8 + 10
    assert results["data"]["name"] == "Optical digits 8x8"
    for suffix in ("png", "pdf"):
        assert (folder / f"figure.{suffix}").stat().st_size > 10_000
    file = folder / "networks" / "scheduled_90.0_seed1.adnt"
    net = compression.load_packed(file)
    zeros = sum(int(np.sum(layer["kernel"] == 0)) for layer in net.values())
    assert zeros == round(0.9 * weights)
    assert file.stat().st_size < (folder / "networks" / "dense_seed1.adnt").stat().st_size / 3


def test_the_results_file_alone_gives_table_and_figure(whole, tmp_path, capsys):
    _, folder, _, printed = whole
    file = folder / "results.json"
    document = study.read_results(file)
    assert "2 seeds, mean ± 95 % interval, last-epoch weights" in printed
    job.table(document)
    assert capsys.readouterr().out in printed
    adaptive_compression_figure.save(document, again := tmp_path / "again.png")
    assert again.read_bytes() == (folder / "figure.png").read_bytes()
    # Another document is another figure.
    document["history"]["note"]["density"][2] = [0.9, 0.9]
    adaptive_compression_figure.save(document, again)
    assert again.read_bytes() != (folder / "figure.png").read_bytes()
    assert file.stat().st_size < 200_000


def test_the_results_file_holds_what_was_measured(whole):
    _, folder, results, _ = whole
    assert results["layers"] == {"dense1": [64, 16], "dense2": [16, 8], "dense3": [8, 10]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["validation_loss"][2:] for line in lines if line["name"] == "scheduled"]
    history = results["history"]["scheduled 90.0%"]
    np.testing.assert_allclose(history["validation_loss"], logged, rtol=1e-5)
    assert np.shape(history["density"]) == (4, 2)
    net = compression.load_packed(folder / "networks" / "scheduled_90.0_seed1.adnt")
    for layer, densities in results["layer_density"]["scheduled 90.0%"].items():
        assert densities[1] == pytest.approx(np.mean(net[layer]["kernel"] != 0), rel=1e-5)
    first = compression.load_packed(folder / "networks" / "scheduled_90.0_seed0.adnt")
    for layer, histogram in results["histograms"].items():
        assert list(histogram["networks"]) == ["dense", "note", "scheduled 90.0%"]  # the sparsest
        weights = np.asarray(first[layer]["kernel"])
        shown = histogram["networks"]["scheduled 90.0%"]
        assert shown["zeros"] == np.sum(weights == 0)
        inside = (np.abs(weights) <= histogram["edges"][-1]) & (weights != 0)
        assert sum(shown["counts"]) == np.sum(inside) > 0
        assert len(histogram["edges"]) == len(shown["counts"]) + 1


def test_arms_share_batches_until_the_first_event(whole):
    lines = [json.loads(line) for line in (whole[1] / "metrics.jsonl").read_text().splitlines()]
    first = {line["name"]: line["train_loss"] for line in lines if line["epoch"] == 0}
    # Other programs round otherwise; other batches would differ in the first digits.
    np.testing.assert_allclose(first["dense"], first["scheduled"][:2], rtol=1e-5)


def test_a_finished_run_is_not_trained_again(whole):
    root, folder, before, _ = whole
    lines = (folder / "metrics.jsonl").read_text()
    _, after = _run(root, "--sparsities", "0.5", "0.9")
    assert (folder / "metrics.jsonl").read_text() == lines
    assert before["metrics"] == after["metrics"]


def test_in_step_events_reach_the_target(tmp_path):
    _, results = _run(tmp_path, "--arms", "scheduled", "--sparsities", "0.8", "--every", "7")
    weights = 64 * 16 + 16 * 8 + 8 * 10
    sparsity = results["metrics"]["scheduled"]["sparsity"]
    assert sparsity["mean"] == round(0.8 * weights) / weights


def test_early_stopped_weights_are_pruned_weights(tmp_path, capsys):
    _, results = _run(tmp_path, "--arms", "scheduled", "--sparsities", "0.8", "--patience", "1")
    assert "early-stopped weights" in capsys.readouterr().out
    assert results["chosen"] == "early-stopped"
    assert results["metrics"]["scheduled"]["sparsity"]["mean"] > 0.79


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], "did you mean --epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--dropout", "1.5"], "dropout"),
        (["--seeds", "1", "1"], "distinct"),
        (["--prune-end", "0.01"], "prune_end"),
        (["--validation", "1430"], "validation=1430"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        job.main([*words, "--output", str(tmp_path)])
    said = capsys.readouterr().err + str(stop.value)
    assert message in said
    assert "Traceback" not in said


def test_absent_data_are_named_with_the_way_out(tmp_path, monkeypatch):
    def missing(name):
        raise job.an.data.MissingDataError(f"python -m adaptivenet.data fetch {name}")

    monkeypatch.setattr(job.an.data, "load", missing)
    with pytest.raises(SystemExit, match="fetch mnist"):
        job.main(["--data", "mnist", "--output", str(tmp_path)])


def test_killed_in_mid_run_and_started_again_is_the_same_run(tmp_path):
    words = [sys.executable, "-m", "research.adaptive_compression", "--arms", "scheduled"]
    words += ["--sparsities", "0.9", "--seeds", "3", "--epochs", "20", "--every", "5"]
    # The three processes run one program: it is compiled once.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, "CI": "true", **cache}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(
        [*words, "--output", str(whole)], cwd=ROOT, env=environment, check=True, timeout=240
    )
    run = subprocess.Popen(
        [*words, "--output", str(cut)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:  # until the third epoch is on record
        logs = list(cut.glob("*/*/metrics.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait(30) == -signal.SIGKILL
    (log,) = cut.glob("*/*/metrics.jsonl")
    assert len(log.read_text().splitlines()) < 20
    subprocess.run(
        [*words, "--output", str(cut)], cwd=ROOT, env=environment, check=True, timeout=240
    )
    names = [path.relative_to(whole) for path in whole.glob("*/*/networks/*.adnt")]
    assert len(names) == 2
    for name in names:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
