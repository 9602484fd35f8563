"""The epoch loop on the host: hooks, records, early stopping, checkpoints, resume."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.training.checkpoint import CheckpointError, Checkpoints
from adaptivenet.training.interrupt import Interrupted, StopRequest, stop_on_signal
from adaptivenet.training.progress import Progress
from adaptivenet.training.state import TrainState
from adaptivenet.training.stopping import EarlyStopping, StoppingState
from adaptivenet.training.tracking import Tracker

History = dict[str, np.ndarray]
Metrics = Mapping[str, Any]


class Best(NamedTuple):
    """The weights that early stopping chose, for each member.

    Attributes:
        params: Best weights (the initial ones where no epoch counted).
        epoch: Epoch they are of, counted from 0; -1 where no epoch counted. [members]
        value: Value of the metric there. [members]
        stopped: Whether the member stopped before the last epoch that was allowed. [members]
        metric: Name of the metric.
    """

    params: Any
    epoch: np.ndarray
    value: np.ndarray
    stopped: np.ndarray
    metric: str


class Fit(NamedTuple):
    """What a run ends with.

    Attributes:
        state: State after the last epoch that ran: `state.params` are last-epoch weights.
        history: `{name: [epochs, members]}` (`[epochs]` for a single network); `seconds` is
            `[epochs]`, for the whole population.
        best: Early-stopped weights, or `None` without early stopping.
    """

    state: TrainState
    history: History
    best: Best | None

    def describe(self) -> str:
        """Says in words which weights are which."""
        epochs = len(self.history["seconds"]) if self.history else 0
        last = f"state.params: last-epoch weights, after {epochs} epochs"
        if self.best is None:
            return last
        chosen = (np.atleast_1d(self.best.epoch) + 1).tolist()
        return (
            f"{last}; best.params: early-stopped weights, best {self.best.metric} "
            f"after epoch {', '.join(map(str, chosen))}"
        )


def fit(
    state: TrainState,
    *,
    epoch: Callable[..., Any],
    evaluate: Callable[..., Metrics],
    data: Sequence[Any],
    epochs: int,
    before_epoch: Callable[[TrainState, int, Metrics | None], TrainState] | None = None,
    after_epoch: Callable[[TrainState, int], TrainState] | None = None,
    extra_metrics: Callable[[TrainState], Metrics] | None = None,
    on_signals: Callable[[int, Any], None] | None = None,
    evaluate_train: bool = False,
    early_stopping: EarlyStopping | None = None,
    tracker: Tracker | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> Fit:
    """Trains for a number of epochs, or until early stopping, and keeps the record.

    Each epoch: `before_epoch`, the training epoch, `after_epoch`, evaluation, `extra_metrics`,
    early stopping, the tracker, the checkpoint. With `checkpoints`, a run that was killed goes on
    after its last checkpoint when it is started again, and ends with the same bits as a run that
    was not; hooks must then depend on their arguments alone. SIGINT and SIGTERM let the epoch end,
    save it and raise `Interrupted`.

    Args:
        state: The state to start from; for a population, `state.step` is `[members]`.
        epoch: `epoch(state, inputs, targets) -> (state, metrics)`, optionally with stacked signals
            as a third result. From `make_epoch`, jitted (`over_population`).
        evaluate: `evaluate(params, inputs, targets) -> metrics`. From `make_evaluate`, jitted.
        data: `(train_inputs, train_targets, validation_inputs, validation_targets)`.
        epochs: Epochs in all, those before a resume among them.
        before_epoch: `before_epoch(state, epoch, last_metrics) -> state`. `epoch` counts from 0;
            `last_metrics` is what `evaluate` returned on the validation data after the previous
            epoch, by its own names, or `None` at epoch 0.
        after_epoch: `after_epoch(state, epoch) -> state`, before the evaluation.
        extra_metrics: `extra_metrics(state) -> {name: value}`, recorded each epoch.
        on_signals: `on_signals(epoch, signals)` takes the stacked signals of each epoch. They are
            not checkpointed.
        evaluate_train: Whether to evaluate on the training data too, without dropout.
        early_stopping: When to stop, and which weights to keep as best.
        tracker: Takes a record an epoch: "name", "epoch", "seconds" and the metrics.
        checkpoints: Where to save, and to resume from.
        progress: Shows each record.
        name: Name of the run in records and messages.

    Returns:
        Last state, history and best weights. History names: `train_*` (means over the epoch's
        steps, dropout on), `validation_*`, `train_eval_*` with `evaluate_train`, those of
        `extra_metrics`, and `seconds` (wall time from `before_epoch` to `extra_metrics`; the first
        epoch of a session holds the compilation).

    Raises:
        ValueError: If `epochs` is negative, `data` are not four arrays, or the names of metrics
            collide or change.
        TypeError: If a hook does not return a `TrainState`.
        CheckpointError: If the checkpoint does not fit this run.
        Interrupted: After SIGINT or SIGTERM; the last whole epoch is saved.

    >>> import jax, jax.numpy as jnp, optax
    >>> from adaptivenet.training import init_state, make_epoch, make_evaluate
    >>> error = lambda params, x, y: (x @ params["w"] - y) ** 2
    >>> loss = lambda params, x, y, key: (jnp.mean(error(params, x, y)), {})
    >>> tx = optax.sgd(0.1)
    >>> x = jax.random.normal(jax.random.key(1), (64, 2))
    >>> y = x @ jnp.array([1.0, -2.0])
    >>> result = fit(
    ...     init_state(lambda key: {"w": jnp.zeros(2)}, tx, jax.random.key(0)),
    ...     epoch=jax.jit(make_epoch(loss, tx, batch_size=8)),
    ...     evaluate=make_evaluate(lambda p, x, y: {"loss": error(p, x, y)}),
    ...     data=(x[:48], y[:48], x[48:], y[48:]),
    ...     epochs=10,
    ...     early_stopping=EarlyStopping(patience=3),
    ... )
    >>> sorted(result.history), result.history["validation_loss"].shape
    (['seconds', 'train_loss', 'validation_loss'], (10,))
    >>> result.describe()[:56]
    'state.params: last-epoch weights, after 10 epochs; best.'
    """
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    if len(data) != 4:
        raise ValueError(
            "data must be (train_inputs, train_targets, validation_inputs, validation_targets), "
            f"got {len(data)} items"
        )
    train, validation = tuple(data[:2]), tuple(data[2:])
    run = name or "the run"
    stopping: Any = ()
    update_stopping: Any = None
    if early_stopping is not None:
        stopping = early_stopping.init(state.params, jnp.shape(state.step))
        update_stopping = jax.jit(early_stopping.update)
    rows: dict[str, list[np.ndarray]] = {}
    last: dict[str, jax.Array] | None = None
    done = 0
    if checkpoints is not None:
        if checkpoints.latest() is not None:
            saved, meta = checkpoints.restore({"state": state, "early_stopping": stopping})
            state, stopping = saved["state"], saved["early_stopping"]
            done = int(meta["epochs"])
            if done > epochs:
                raise CheckpointError(
                    f"{checkpoints.folder} holds {run} after {done} epochs, more than epochs="
                    f"{epochs}; ask for at least {done}, or choose another folder"
                )
            rows = {key: list(_decode(value)) for key, value in meta["history"].items()}
            if meta["last"] is not None:
                last = {key: jnp.asarray(_decode(value)) for key, value in meta["last"].items()}
        if tracker is not None:
            tracker.resume(name, done)

    def save() -> None:
        assert checkpoints is not None
        meta = {
            "epochs": done,
            "history": {key: _encode(np.stack(values)) for key, values in rows.items()},
            "last": None if last is None else {k: _encode(v) for k, v in last.items()},
        }
        checkpoints.save(done, {"state": state, "early_stopping": stopping}, meta)

    if progress is not None:
        progress.begin(name, epochs, done)
    message = ""
    try:
        with stop_on_signal() as stop:
            while done < epochs and not _all_stopped(stopping):
                started = time.perf_counter()
                if before_epoch is not None:
                    state = _checked(before_epoch(state, done, last), "before_epoch")
                state, metrics, *signals = epoch(state, *train)
                if after_epoch is not None:
                    state = _checked(after_epoch(state, done), "after_epoch")
                last = {k: jnp.asarray(v) for k, v in evaluate(state.params, *validation).items()}
                record = _merge(
                    train=metrics,
                    validation=last,
                    train_eval=evaluate(state.params, *train) if evaluate_train else {},
                    extra=extra_metrics(state) if extra_metrics is not None else {},
                )
                jax.block_until_ready((state, record))
                record["seconds"] = np.float64(time.perf_counter() - started)
                _append(rows, record)
                if early_stopping is not None:
                    stopping = update_stopping(stopping, done, record, state.params)
                if on_signals is not None and signals:
                    on_signals(done, signals[0])
                shown = {"name": name, "epoch": done, **record}
                done += 1
                if tracker is not None:
                    tracker.log(shown)
                if progress is not None:
                    progress.update(shown)
                last_one = done == epochs or bool(stop) or _all_stopped(stopping)
                if checkpoints is not None and (last_one or done % checkpoints.every == 0):
                    save()
                if stop:
                    break
            if stop:
                raise _interrupted(stop, run, done, epochs, checkpoints)
        if isinstance(stopping, StoppingState) and _all_stopped(stopping) and done < epochs:
            message = f"{run} stopped early after epoch {done}/{epochs}"
    finally:
        if progress is not None:
            progress.end(message)
        if checkpoints is not None:
            checkpoints.close()
    history = {key: np.stack(values) for key, values in rows.items()}
    return Fit(state, history, _best(stopping, early_stopping))


def _all_stopped(stopping: Any) -> bool:
    return isinstance(stopping, StoppingState) and bool(np.all(np.asarray(stopping.stopped)))


def _best(stopping: Any, rule: EarlyStopping | None) -> Best | None:
    if rule is None:
        return None
    facts = (np.asarray(leaf) for leaf in (stopping.epoch, stopping.value, stopping.stopped))
    return Best(stopping.params, *facts, metric=rule.metric)


def _checked(state: Any, hook: str) -> TrainState:
    if not isinstance(state, TrainState):
        raise TypeError(f"{hook} must return a TrainState, got {type(state).__name__}")
    return state


def _merge(
    *, train: Metrics, validation: Metrics, train_eval: Metrics, extra: Metrics
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    groups = (("train_", train), ("validation_", validation), ("train_eval_", train_eval))
    for prefix, group in (*groups, ("", extra)):
        for key, value in group.items():
            if prefix + key in record or prefix + key in ("name", "epoch", "seconds"):
                raise ValueError(f"two metrics are named {prefix + key!r}; rename one")
            record[prefix + key] = np.asarray(value)
    return record


def _append(rows: dict[str, list[np.ndarray]], record: Mapping[str, Any]) -> None:
    if rows and set(rows) != set(record):
        changed = ", ".join(sorted(set(rows) ^ set(record)))
        raise ValueError(f"every epoch must record the same metrics; these come and go: {changed}")
    for key, value in record.items():
        value = np.asarray(value)
        if rows.get(key) and rows[key][0].shape != value.shape:
            raise ValueError(
                f"metric {key!r} changed its shape from {rows[key][0].shape} to {value.shape}"
            )
        rows.setdefault(key, []).append(value)


def _interrupted(
    stop: StopRequest, run: str, done: int, epochs: int, checkpoints: Checkpoints | None
) -> Interrupted:
    if checkpoints is None:
        where = "Nothing was saved, because the run keeps no checkpoints."
    else:
        where = (
            f"That epoch is saved in {checkpoints.folder}. "
            "Start the same command again to go on from there."
        )
    return Interrupted(
        f"{run} stopped by {stop.name} after epoch {done} of {epochs}. {where}",
        name=run,
        epochs=done,
    )


def _encode(value: Any) -> dict[str, Any]:
    """Spells an array bit for bit in JSON."""
    array = np.asarray(value)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def _decode(value: Mapping[str, Any]) -> np.ndarray:
    try:
        dtype = jnp.dtype(value["dtype"])
        flat = np.frombuffer(base64.b64decode(value["base64"]), dtype)
        return flat.reshape(value["shape"]).copy()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"a checkpoint holds a metric that cannot be read: {error}"
        ) from error
