"""The epoch loop: order of events, records, early stopping, resume after any kind of end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.training import (
    CheckpointError,
    Checkpoints,
    EarlyStopping,
    Interrupted,
    JsonlTracker,
    fit,
    read_jsonl,
)
from tests.training import killed_run
from tests.training.problems import population, same_bits, single


@pytest.fixture(scope="module")
def problem():
    return population(members=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return killed_run.flatten(killed_run.run(tmp_path_factory.mktemp("whole")))


def same_numbers(a, b):
    """Bits of two runs' states and histories, wall time aside."""
    strip = lambda fit: {k: v for k, v in fit.history.items() if k != "seconds"}  # noqa: E731
    return same_bits((a.state, strip(a)), (b.state, strip(b)))


def test_history_and_order_of_events(problem):
    calls = []

    def before_epoch(state, epoch, last):
        calls.append(("before", epoch, None if last is None else sorted(last)))
        return state

    def after_epoch(state, epoch):
        calls.append(("after", epoch))
        return state

    def extra_metrics(state):
        calls.append(("extra",))
        return {"density": jnp.ones(2), "steps": state.step}

    result = fit(
        problem.state,
        **problem.arguments(),
        epochs=2,
        before_epoch=before_epoch,
        after_epoch=after_epoch,
        extra_metrics=extra_metrics,
        evaluate_train=True,
    )
    names = ["accuracy", "loss"]
    assert calls == [
        *(("before", 0, None), ("after", 0), ("extra",)),
        *(("before", 1, names), ("after", 1), ("extra",)),
    ]
    assert set(result.history) == {
        *(f"{part}_{name}" for part in ("train", "validation", "train_eval") for name in names),
        *("density", "steps", "seconds"),
    }
    assert {v.shape for k, v in result.history.items() if k != "seconds"} == {(2, 2)}
    assert result.history["seconds"].shape == (2,)
    assert (result.history["seconds"] > 0).all()
    np.testing.assert_array_equal(result.history["steps"], [[12, 12], [24, 24]])
    assert result.best is None
    assert result.describe() == "state.params: last-epoch weights, after 2 epochs"
    scores = problem.evaluate(result.state.params, *problem.data[2:])
    np.testing.assert_array_equal(result.history["validation_loss"][-1], scores["loss"])
    scores = problem.evaluate(result.state.params, *problem.data[:2])
    np.testing.assert_array_equal(result.history["train_eval_loss"][-1], scores["loss"])


def test_fit_is_the_plain_loop(problem):
    result = fit(problem.state, **problem.arguments(), epochs=3)
    state = problem.state
    for _ in range(3):
        state, _ = problem.epoch(state, *problem.data[:2])
    assert same_bits(result.state, state)


def test_it_learns():
    task = single()
    result = fit(task.state, **task.arguments(), epochs=15)
    assert result.history["validation_accuracy"].shape == (15,)
    assert result.history["validation_accuracy"][-1] > 0.85
    assert result.history["validation_loss"][-1] < 0.5 * result.history["validation_loss"][0]


def test_hooks_act(problem):
    def freeze(state, epoch):
        return state._replace(params=problem.state.params)

    result = fit(problem.state, **problem.arguments(), epochs=2, after_epoch=freeze)
    assert same_bits(result.state.params, problem.state.params)
    np.testing.assert_array_equal(*result.history["validation_loss"])


def test_signals_are_handed_on():
    tx = optax.adam(1e-2)
    from adaptivenet.training import make_epoch
    from tests.training.problems import loss

    task = single(tx)
    epoch = jax.jit(make_epoch(loss, tx, batch_size=50, signals=lambda state: state[0].count))
    seen = []
    arguments = {**task.arguments(), "epoch": epoch}
    fit(task.state, **arguments, epochs=2, on_signals=lambda e, s: seen.append((e, s.tolist())))
    assert seen == [(0, [1, 2, 3, 4]), (1, [5, 6, 7, 8])]
    fit(task.state, **arguments, epochs=1)  # nobody asks for them


def test_early_stopping_keeps_the_best_of_each_member(problem):
    worst = {0: [3.0, 1.0, 2.0, 2.0, 0.0], 1: [3.0, 4.0, 2.0, 5.0, 5.0]}
    count = [0]

    def evaluate(params, inputs, targets):
        count[0] += 1
        return {"loss": jnp.asarray([worst[m][count[0] - 1] for m in (0, 1)], jnp.float32)}

    params = []

    def after_epoch(state, epoch):
        params.append(state.params)
        return state

    result = fit(
        problem.state,
        epoch=problem.epoch,
        evaluate=evaluate,
        data=problem.data,
        epochs=9,
        after_epoch=after_epoch,
        early_stopping=EarlyStopping(patience=2),
    )
    assert len(result.history["seconds"]) == 5  # member 0 stopped after 4, member 1 after 5
    assert result.best is not None
    np.testing.assert_array_equal(result.best.epoch, [1, 2])
    np.testing.assert_array_equal(result.best.value, [1, 2])
    np.testing.assert_array_equal(result.best.stopped, [True, True])
    assert result.best.metric == "validation_loss"
    for member, epoch in ((0, 1), (1, 2)):
        own = jax.tree.map(lambda leaf, i=member: leaf[i], (result.best.params, params[epoch]))
        assert same_bits(*own)
    assert same_bits(result.state.params, params[4])
    assert "after 5 epochs; best.params" in result.describe()
    assert "after epoch 2, 3" in result.describe()


def test_tracker_holds_the_history(problem, tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for name in ("a", "b"):
        result = fit(problem.state, **problem.arguments(), epochs=2, tracker=tracker, name=name)
    records = [record for record in read_jsonl(tracker.path) if record["name"] == "b"]
    assert [record["epoch"] for record in records] == [0, 1]
    for name, values in result.history.items():
        logged = np.asarray([record[name] for record in records], values.dtype)
        np.testing.assert_array_equal(logged, values)
    assert len(read_jsonl(tracker.path)) == 4


@pytest.mark.parametrize("every", [1, 2])
def test_longer_run_continues_a_shorter_one_bit_for_bit(problem, tmp_path, every):
    whole = fit(problem.state, **problem.arguments(), epochs=5)
    checkpoints = Checkpoints(tmp_path, every=every)
    for epochs in (1, 3, 3, 5):
        started = []
        part = fit(
            problem.state,
            **problem.arguments(),
            epochs=epochs,
            checkpoints=checkpoints,
            before_epoch=lambda state, epoch, last, s=started: (s.append(epoch), state)[1],
        )
        assert len(part.history["seconds"]) == epochs
    assert same_numbers(part, whole)
    assert started == [3, 4]


def test_stopped_run_stays_stopped(problem, tmp_path):
    arguments = {
        **problem.arguments(),
        "epochs": 9,
        "early_stopping": EarlyStopping(patience=1, min_delta=100.0),
        "checkpoints": Checkpoints(tmp_path),
    }
    first = fit(problem.state, **arguments)
    again = fit(problem.state, **arguments)
    assert len(first.history["seconds"]) == 2
    assert same_numbers(first, again)
    np.testing.assert_array_equal(first.history["seconds"], again.history["seconds"])
    assert same_bits(first.best.params, again.best.params)
    np.testing.assert_array_equal(again.best.epoch, [0, 0])


def test_checkpoint_of_another_run_is_refused(problem, tmp_path):
    fit(problem.state, **problem.arguments(), epochs=1, checkpoints=Checkpoints(tmp_path))
    three = population(members=3)
    with pytest.raises(CheckpointError, match=r"state/params/dense1/bias is float32\[2, 16\]"):
        fit(three.state, **three.arguments(), epochs=2, checkpoints=Checkpoints(tmp_path))
    sgd = population(members=2, tx=optax.sgd(0.1))
    with pytest.raises(CheckpointError, match="only in the checkpoint"):
        fit(sgd.state, **sgd.arguments(), epochs=2, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match="only in the run"):
        fit(
            problem.state,
            **problem.arguments(),
            epochs=2,
            checkpoints=Checkpoints(tmp_path),
            early_stopping=EarlyStopping(patience=1),
        )


def test_fewer_epochs_than_are_done_are_refused(problem, tmp_path):
    fit(problem.state, **problem.arguments(), epochs=2, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match="after 2 epochs, more than epochs=1"):
        fit(problem.state, **problem.arguments(), epochs=1, checkpoints=Checkpoints(tmp_path))


def test_a_signal_during_the_last_save_is_not_lost(problem, tmp_path):
    class Signalled(Checkpoints):
        def save(self, epoch, tree, meta=None):
            super().save(epoch, tree, meta)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="after epoch 1 of 1"):
        fit(problem.state, **problem.arguments(), epochs=1, checkpoints=Signalled(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_after_a_whole_saved_epoch(problem, tmp_path, capsys, number):
    whole = fit(problem.state, **problem.arguments(), epochs=4)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def before_epoch(state, epoch, last):
        if epoch == 1:
            signal.raise_signal(number)
        return state

    arguments = {**problem.arguments(), "epochs": 4, "name": "arm"}
    with pytest.raises(Interrupted) as error:
        fit(
            problem.state,
            **arguments,
            before_epoch=before_epoch,
            checkpoints=Checkpoints(tmp_path, every=10),
        )
    message = str(error.value)
    assert f"arm stopped by {number.name} after epoch 2 of 4" in message
    assert str(tmp_path) in message
    assert "Start the same command again" in message
    assert (error.value.name, error.value.epochs) == ("arm", 2)
    assert f"{number.name}: finishing this epoch" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = fit(problem.state, **arguments, checkpoints=Checkpoints(tmp_path, every=10))
    assert same_numbers(resumed, whole)


def test_second_ctrl_c_stops_at_once(problem):
    # A shell that starts a job in the background has it ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_epoch(state, epoch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    try:
        with pytest.raises(KeyboardInterrupt) as error:
            fit(problem.state, **problem.arguments(), epochs=2, after_epoch=after_epoch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(error.value, Interrupted)


def test_without_checkpoints_the_message_says_that_nothing_was_saved(problem):
    def after_epoch(state, epoch):
        signal.raise_signal(signal.SIGINT)
        return state

    with pytest.raises(Interrupted, match="Nothing was saved"):
        fit(problem.state, **problem.arguments(), epochs=2, after_epoch=after_epoch)


def test_fit_runs_in_another_thread(problem):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(problem.state, **problem.arguments(), epochs=1))
    )
    thread.start()
    thread.join()
    assert same_numbers(results[0], fit(problem.state, **problem.arguments(), epochs=1))


def start(folder: Path, point: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", killed_run.__file__, str(folder), point],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def assert_resumes(folder: Path, whole: dict[str, np.ndarray], done: int) -> None:
    """The same command again ends with the bits of the run that nobody killed."""
    assert Checkpoints(folder / "checkpoints").latest() == done
    process = start(folder, "never")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    with np.load(folder / "result.npz") as result:
        assert sorted(result) == sorted(whole)
        for name, values in whole.items():
            assert result[name].dtype == values.dtype
            assert result[name].tobytes() == values.tobytes(), name
        records = read_jsonl(folder / "metrics.jsonl")
        assert [record["epoch"] for record in records] == list(range(killed_run.EPOCHS))
        for name in ("validation_loss", "train_accuracy"):
            logged = np.asarray([record[name] for record in records], np.float32)
            np.testing.assert_array_equal(logged, result[f"history {name}"])


@pytest.mark.parametrize("point", ["after_epoch", "before_save", "in_save"])
def test_kill_9_then_the_same_command_gives_the_same_bits(tmp_path, uninterrupted, point):
    process = start(tmp_path, point)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    # Killed in the fourth epoch: three are whole; the record of the fourth may be there already.
    epochs = [record["epoch"] for record in read_jsonl(tmp_path / "metrics.jsonl")]
    assert epochs == [0, 1, 2] if point == "after_epoch" else epochs == [0, 1, 2, 3]
    leftovers = [p for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]
    assert bool(leftovers) == (point == "in_save")
    assert_resumes(tmp_path, uninterrupted, done=3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_from_outside_then_the_same_command(tmp_path, uninterrupted, number):
    process = start(tmp_path, "slow")
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(read_jsonl(metrics)) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130, errors
        assert "arm stopped by SIGTERM after epoch" in out
    done = Checkpoints(tmp_path / "checkpoints").latest()
    assert done in (1, 2, 3, 4, 5)
    assert_resumes(tmp_path, uninterrupted, done=done)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "must not be negative"),
        ({"data": (1, 2)}, ValueError, "got 2 items"),
        ({"before_epoch": lambda state, epoch, last: None}, TypeError, "before_epoch must return"),
        ({"after_epoch": lambda state, epoch: state.params}, TypeError, "after_epoch must return"),
        (
            {"extra_metrics": lambda state: {"train_loss": 1.0}},
            ValueError,
            "two metrics are named 'train_loss'",
        ),
        ({"extra_metrics": lambda state: {"epoch": 1.0}}, ValueError, "named 'epoch'"),
        (
            {"extra_metrics": lambda state: {f"at {int(state.step[0])}": 1.0}},
            ValueError,
            "come and go: at 12, at 24",
        ),
        (
            {"extra_metrics": lambda state: {"x": np.zeros(int(state.step[0]))}},
            ValueError,
            r"'x' changed its shape from \(12,\) to \(24,\)",
        ),
        (
            {"early_stopping": EarlyStopping(patience=1, metric="loss")},
            KeyError,
            "looks for 'loss'; there are seconds, train_accuracy",
        ),
    ],
)
def test_bad_input_is_refused(problem, change, error, message):
    arguments = {**problem.arguments(), "epochs": 2, **change}
    with pytest.raises(error, match=message):
        fit(problem.state, **arguments)


def test_no_epochs(problem):
    result = fit(problem.state, **problem.arguments(), epochs=0)
    assert same_bits(result.state, problem.state)
    assert result.history == {}
    assert result.describe().endswith("after 0 epochs")
