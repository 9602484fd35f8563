"""The course of the study of continual learning: one row through one sequence of tasks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet import training
from research.continual_data import Base, Examples, Sequence, sequence
from research.continual_methods import At, Facts, Joint, Learner, Net
from research.continual_rows import learner

if TYPE_CHECKING:
    from research.continual import Config

PyTree = Any
FIRST = 1000  # examples of the first task that are tested within later ones


class Learned(NamedTuple):
    """What one row gave on one seed.

    Attributes:
      accuracy: [tasks, tasks], after a task (row) on a task (column); nan above the diagonal.
      calibration: likewise, the expected calibration error.
      within: accuracies on the first task within all tasks, [tasks, checks]; empty without checks.
      capacity: [tasks], share of the synapses that is taken after a task; nan where no rule says.
      bytes: of parameters, optimizer state and memory, at the end.
      dormant: share of hidden units that hardly answer to the last task.
    """

    accuracy: np.ndarray
    calibration: np.ndarray
    within: np.ndarray
    capacity: np.ndarray
    bytes: int
    dormant: float


class Course:
    """Learns sequences of tasks, and keeps what is finished in a folder.

    Args:
      config: the study's.
      base: the data.
      folder: for checkpoints, one after every task.
      digest: of the config.
    """

    def __init__(self, config: Config, base: Base, folder: Path, digest: str) -> None:
        self.config, self.base, self.folder, self.digest = config, base, folder, digest

    def learn(self, row: str, seed: int, done: Callable[[int], None]) -> Learned:
        """One row through the tasks of one seed; ``done`` is told of every task."""
        c, (protocol, ends_told, rule) = self.config, self.config.apart(row)
        tasks = sequence(c, self.base, seed, protocol)
        own, key = learner(rule, facts(c, tasks)), jax.random.key(seed)
        net = own.begin(jax.random.fold_in(key, 0))
        place = self.folder / f"{seed}-{re.sub('[^a-z0-9.]', '-', row)}"
        kept = training.Checkpoints(place, keep=1, fingerprint=self.digest)
        number, checks = tasks.count, c.checks
        found: dict[str, np.ndarray] = {
            "accuracy": np.full((number, number), np.nan),
            "calibration": np.full((number, number), np.nan),
            "within": np.full((number, checks), np.nan),
            "capacity": np.full(number, np.nan),
        }
        first = 0
        if kept.latest() is not None:
            net, numbers = kept.restore(net)
            found = {name: _array(values, found[name]) for name, values in numbers.items()}
            first = int(kept.latest() or 0)
            for task in range(first):
                done(task)
        early = tasks.test(0, FIRST) if checks else None
        for task in range(first, number):
            at = At(
                jnp.int32(task),
                jnp.asarray(tasks.answers(task, task)),
                jax.random.fold_in(key, 1 + task),
            )
            generator = np.random.Generator(np.random.PCG64([seed, task, 11]))
            if isinstance(own, Joint):
                net = self._jointly(own, net, tasks, task, at, generator)
            else:
                lesson = tasks.lesson(task)
                rows = tasks.rows(task, c.batch_size, self.steps(tasks, task), generator)
                stocks = own.periodic and not ends_told
                for pause in pauses(len(rows), checks, c.period if stocks else 0):
                    part = jnp.asarray(rows[pause.start : pause.stop])
                    net = taught(own, net, lesson, part, jnp.int32(pause.start), at)
                    if pause.check is not None and early is not None:
                        here = _testing(at, tasks, 0, task)
                        right = tested(own, net, early, here)[0]
                        found["within"][task, pause.check] = float(right)
                    if pause.bounded:
                        latest = rows[: pause.stop].ravel()[-own.facts.fisher_examples :]
                        mark = jax.random.fold_in(at.key, (1 << 31) + pause.stop)
                        seen = Examples(lesson.inputs[latest], lesson.targets[latest])
                        net = bounded(own, net, seen, at._replace(key=mark))
                if own.told and ends_told:
                    net = bounded(own, net, lesson, at)
            found["capacity"][task] = float(own.capacity(net))
            for other in self.examined(own, task, number):
                here = _testing(at, tasks, other, task)
                right, gap = tested(own, net, tasks.test(other, c.tested or None), here)
                found["accuracy"][task, other] = float(right)
                found["calibration"][task, other] = float(gap)
            kept.save(task + 1, net, {name: _listed(a) for name, a in found.items()})
            done(task)
        last = tasks.test(number - 1, FIRST).inputs
        return Learned(**found, bytes=_size(net), dormant=float(_dormant(net.params, last)))

    def steps(self, tasks: Sequence, task: int) -> int:
        """Batches of a task."""
        c = self.config
        return c.steps or c.epochs * tasks.sizes[task] // c.batch_size

    def examined(self, own: Learner, task: int, number: int) -> range:
        """Tasks that are tested after a task; all tasks at once are tested at the end only."""
        if task + 1 == number:
            return range(number)
        if isinstance(own, Joint):
            return range(0)
        return range(max(task + 1 - self.config.latest, 0) if self.config.latest else 0, task + 1)

    def _jointly(
        self, own: Learner, net: Net, tasks: Sequence, task: int, at: At, generator: Any
    ) -> Net:
        """As many batches as a task has, each of examples of all tasks."""
        for wanted in _blocks(self.steps(tasks, task), 100):
            shape = (wanted, self.config.batch_size)
            which = generator.integers(0, tasks.count, shape)
            rows = (generator.random(shape) * np.asarray(tasks.sizes)[which]).astype(np.int32)
            x, y = (np.zeros((*shape, tasks.features), np.float32), np.zeros(shape, np.int32))
            for k in range(tasks.count):
                here = which == k
                source = tasks.teach(k, rows[here])
                x[here], y[here] = np.asarray(source.inputs), np.asarray(source.targets)
            active = tasks.active.any(0) if tasks.cumulative else tasks.active[which]
            active = np.broadcast_to(active, (*shape, tasks.classes))
            net = _blocked(own, net, jnp.asarray(x), jnp.asarray(y), jnp.asarray(active), at)
        return net


def facts(config: Config, tasks: Sequence) -> Facts:
    """What learners are told."""
    return Facts(
        sizes=(tasks.features, *config.hidden, tasks.classes),
        tasks=tasks.count,
        bias=config.bias,
        optimizer=config.optimizer,
        rate=config.rate,
        batch_size=config.batch_size,
        examples=min(tasks.sizes),
        fisher_examples=min(config.fisher_examples, min(tasks.sizes)),
        memory=config.memory,
        draws=config.draws,
        cumulative=tasks.cumulative,
        spread=config.spread,
        initial=config.initial,
    )


class Pause(NamedTuple):
    """Steps from one place to another, and what happens then.

    Attributes:
      start: the first step.
      stop: one behind the last.
      check: number of the look at the first task that follows; None where none does.
      bounded: whether a row that is not told where tasks end takes stock.
    """

    start: int
    stop: int
    check: int | None
    bounded: bool


def pauses(steps: int, checks: int, period: int) -> list[Pause]:
    """Where the steps of a task are interrupted.

    Args:
      steps: of the task.
      checks: looks at the first task, evenly spaced, the last one at the end.
      period: steps between two stocktakings, the first after half of it; 0: none.

    Returns:
      The pieces, in order.

    Raises:
      ValueError: a task has fewer steps than looks, or ends before stock is ever taken.

    >>> [tuple(pause) for pause in pauses(10, 1, 6)]
    [(0, 3, None, True), (3, 9, None, True), (9, 10, 0, False)]
    """
    if checks > steps:
        raise ValueError(f"checks: a task of {steps} steps cannot be looked at {checks} times.")
    if period // 2 > steps:
        raise ValueError(
            f"period: stock would never be taken, as a task has {steps} steps, fewer than half of "
            f"{period}; lower it."
        )
    looks = {steps * (check + 1) // checks: check for check in range(checks)}
    stocks = set(range(max(period // 2, 1), steps + 1, period)) if period else set()
    stops = sorted({steps, *looks, *stocks} - {0})
    starts = [0, *stops]
    return [
        Pause(start, stop, looks.get(stop), stop in stocks)
        for start, stop in zip(starts, stops, strict=False)
    ]


@functools.partial(jax.jit, static_argnums=0)
def taught(
    own: Learner, net: Net, task: Examples, rows: jax.Array, begun: jax.Array, at: At
) -> Net:
    """Learns the batches of some rows, one after the other."""

    def step(net: Net, batch: Any) -> tuple[Net, None]:
        chosen, number = batch
        here = at._replace(key=jax.random.fold_in(at.key, number))
        return own.step(net, task.inputs[chosen], task.targets[chosen], here), None

    numbers = begun + jnp.arange(len(rows), dtype=jnp.int32)
    return jax.lax.scan(step, net, (rows, numbers))[0]


@functools.partial(jax.jit, static_argnums=0)
def _blocked(own: Learner, net: Net, x: jax.Array, y: jax.Array, active: jax.Array, at: At) -> Net:
    def step(net: Net, batch: Any) -> tuple[Net, None]:
        inputs, targets, allowed = batch
        return own.step(net, inputs, targets, at._replace(active=allowed)), None

    return jax.lax.scan(step, net, (x, y, active))[0]


@functools.partial(jax.jit, static_argnums=0)
def bounded(own: Learner, net: Net, task: Examples, at: At) -> Net:
    """The end of a task."""
    return own.boundary(net, task, at)


@functools.partial(jax.jit, static_argnums=0)
def tested(own: Learner, net: Net, task: Examples, at: At) -> tuple[jax.Array, jax.Array]:
    """Accuracy, and the expected calibration error, on what accuracies are measured on."""
    each = 1000
    inputs, targets = task
    logits = jax.lax.map(lambda x: own.logits(net, x[None], at)[0], inputs, batch_size=each)
    right = jnp.mean((logits.argmax(-1) == targets).astype(jnp.float32))
    gap = an.posterior.metrics.expected_calibration_error(logits, targets, from_logits=True)
    return right, gap


@jax.jit
def _dormant(params: PyTree, inputs: jax.Array) -> jax.Array:
    """Share of the hidden units that are dormant (at 0.025 of the mean of their layer)."""
    hidden, found = inputs, []
    for layer in list(params.values())[:-1]:
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer.get("bias", 0.0))
        found.append(hidden)
    return an.consolidation.metrics.dormant_fraction(found)


def _testing(at: At, tasks: Sequence, other: int, task: int) -> At:
    """Where a test of another task happens, once ``task`` was learnt."""
    return at._replace(active=jnp.asarray(tasks.answers(other, task)), tested=jnp.int32(other))


def _blocks(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, most):
        yield min(most, total - start)


def _size(net: Net) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(net))


def _listed(values: np.ndarray) -> list[Any]:
    """For JSON, which has no nan."""
    return [None if np.isnan(v) else float(v) for v in values.ravel()]


def _array(values: list[Any], like: np.ndarray) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float).reshape(like.shape)
