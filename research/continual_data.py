"""Sequences of tasks: by permutation, by class, by speaker, and a stream that drifts.

A sequence is drawn anew for every seed (permutations, the order of classes or speakers). Its tasks
have arrays of one shape, so that what is compiled for one serves all; where tasks have unlike
numbers of examples, short ones are filled up with examples that no batch draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import adaptivenet as an

PROTOCOLS = {
    "permuted": "the pixels of every task in another order",
    "split_task": "two classes a task, and the task is told",
    "split_domain": "two classes a task, first or second of its pair",
    "split_class": "two classes a task, among all classes seen so far",
    "speakers": "a speaker a task",
    "stream": "permutations that blend into each other, and nobody says when",
}
BANDS, FRAMES = 16, 16


class Examples(NamedTuple):
    """Inputs [n, features] and targets [n], on the device."""

    inputs: Any
    targets: Any


class Base(NamedTuple):
    """The data that tasks are made of, with the name and the fingerprint of a results file.

    Attributes:
      name: of the data set.
      sha256: of the data set.
      train: inputs [n, features] float32 and targets.
      check: what accuracies are measured on.
      groups: the speaker of every training example, and of every other; None where there is none.
    """

    name: str
    sha256: str
    train: tuple[np.ndarray, np.ndarray]
    check: tuple[np.ndarray, np.ndarray]
    groups: tuple[np.ndarray, np.ndarray] | None = None

    def __repr__(self) -> str:
        """One line."""
        shape = self.train[0].shape
        return (
            f"{self.name}: {shape[0]} x {shape[1]} to learn from, {len(self.check[1])} to test on"
        )


@dataclass(frozen=True)
class Sequence:
    """Tasks in the order they are learnt in.

    Attributes:
      teach: what a task is learnt from, by its number; of some rows only where they are given.
      test: what it is tested on; no more than the first ones where a number is given.
      sizes: training examples of each task.
      active: bool [tasks, classes]: what a task may be answered with while it is learnt.
      cumulative: whether, when tested, all classes of the tasks so far compete.
      features: of an input.
      ordered: whether examples come in the order of the arrays, once.
    """

    teach: Callable[..., Examples]
    test: Callable[..., Examples]
    sizes: tuple[int, ...]
    active: np.ndarray
    features: int
    cumulative: bool = False
    ordered: bool = False

    @property
    def count(self) -> int:
        """How many tasks."""
        return len(self.sizes)

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        return self.active.shape[1]

    def answers(self, task: int, after: int) -> np.ndarray:
        """What a task may be answered with, bool [classes], once ``after`` was learnt."""
        return np.any(self.active[: after + 1], axis=0) if self.cumulative else self.active[task]

    def lesson(self, task: int) -> Examples:
        """What a task is learnt from, once it is known that the head has its labels.

        Raises:
          ValueError: it has others.
        """
        found = self.teach(task)
        labels = np.unique(np.asarray(found.targets))
        known = np.flatnonzero(self.active[task])
        strange = np.setdiff1d(labels, known)
        if strange.size:
            raise ValueError(
                f"task {task + 1} has the labels {labels.tolist()}, but its outputs are "
                f"{known.tolist()}: no output stands for {strange.tolist()}."
            )
        return found

    def rows(
        self, task: int, batch_size: int, steps: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Which examples every step sees, int32 [steps, batch]: shuffled anew in every pass."""
        wanted, size = steps * batch_size, self.sizes[task]
        passes = -(-wanted // size)
        order = (
            [np.arange(size)] * passes
            if self.ordered
            else [generator.permutation(size) for _ in range(passes)]
        )
        return np.concatenate(order)[:wanted].reshape(steps, batch_size).astype(np.int32)


def load(config: Any) -> Base:
    """The data of a protocol, scaled as the config says; recordings as spectrograms.

    Args:
      config: the study's config.

    Returns:
      The data; with ``measured_on: validation`` the test examples are not touched.

    Raises:
      DataError: data are missing.
      ValueError: the protocol and the data set do not fit.
    """
    speaking = config.data == "fsdd"
    if speaking != (config.protocol == "speakers"):
        raise ValueError(f"protocol {config.protocol!r} is not one of data {config.data!r}.")
    raw = an.data.load(config.data)
    generator = np.random.Generator(np.random.PCG64(0))
    held = generator.permutation(len(raw.train_targets))
    first, rest = held[: config.validation], np.sort(held[config.validation :])
    looked = (
        (raw.train_inputs[first], raw.train_targets[first])
        if config.measured_on == "validation"
        else (raw.test_inputs, raw.test_targets)
    )
    parts = [(raw.train_inputs[rest], raw.train_targets[rest]), looked]
    groups = None
    if speaking:
        groups = (np.asarray(parts[0][0].speaker), np.asarray(parts[1][0].speaker))
        arrays = [spectrograms(waves) for waves, _ in parts]
    else:
        top = float(raw.maximum or 1.0)
        arrays = [_padded(np.asarray(x, np.float32) / top, config.padding) for x, _ in parts]
    if speaking or config.inputs == "standardised":
        mean, scale = arrays[0].mean(), arrays[0].std()
        arrays = [(x - mean) / scale for x in arrays]
    train, check = (
        (np.asarray(x, np.float32), np.asarray(y, np.int32))
        for x, (_, y) in zip(arrays, parts, strict=True)
    )
    return Base(raw.name, raw.sha256, train, check, groups)


def _padded(images: np.ndarray, padding: int) -> np.ndarray:
    """Images as rows, [n, features], with zeros around each."""
    if padding and images.ndim != 3:
        raise ValueError(f"padding: there is nothing to pad; data are no images: {images.shape}.")
    around = ((0, 0), (padding, padding), (padding, padding))
    return (np.pad(images, around) if padding else images).reshape(len(images), -1)


def spectrograms(waves: Any) -> np.ndarray:
    """Logarithms of the power in 16 bands by 16 parts of a recording, [n, 256].

    Args:
      waves: recordings of unequal length.

    Returns:
      Frequency changes fastest; bands are as wide as each other.
    """
    window, found = 256, []
    taper = np.hanning(window)
    for place in range(len(waves)):
        wave = np.asarray(waves[place], np.float64) / 2**15
        wave = np.pad(wave, (0, max(window - len(wave), 0)))
        starts = np.arange(0, len(wave) - window + 1, window // 4)
        frames = wave[starts[:, None] + np.arange(window)] * taper
        power = np.square(np.abs(np.fft.rfft(frames)))[:, 1:]
        bands = power.reshape(len(power), BANDS, -1).mean(-1)
        parts = np.array_split(bands, FRAMES) if len(bands) >= FRAMES else None
        if parts is None:  # a short recording: frames are repeated
            chosen = np.linspace(0, len(bands) - 1, FRAMES).round().astype(int)
            parts = [bands[[c]] for c in chosen]
        found.append(np.log(np.stack([part.mean(0) for part in parts]) + 1e-8).ravel())
    return np.stack(found)


def sequence(config: Any, base: Base, seed: int, protocol: str = "") -> Sequence:
    """The tasks of a seed.

    Args:
      config: the study's config, with ``protocol``, ``tasks`` and ``blend``.
      base: the data.
      seed: draws permutations and orders.
      protocol: one of ``PROTOCOLS``; by default that of the config.

    Returns:
      The sequence.

    Raises:
      ValueError: more tasks than there are pairs of classes, or speakers.
    """
    protocol = protocol or config.protocol
    generator = np.random.Generator(np.random.PCG64([seed, 7]))
    if protocol in ("permuted", "stream"):
        orders = [generator.permutation(base.train[0].shape[1]) for _ in range(config.tasks)]
        if protocol == "stream":
            return _stream(config, base, orders, generator)
        return _permuted(base, orders)
    if protocol == "speakers":
        assert base.groups is not None
        names = generator.permutation(np.unique(base.groups[0]))
        chosen = [tuple(group == name for group in base.groups) for name in names]
        return _parts(config, base, chosen, np.ones((len(names), 10), bool))
    pairs = generator.permutation(1 + int(base.train[1].max())).reshape(-1, 2)
    chosen = [tuple(np.isin(y, pair) for y in (base.train[1], base.check[1])) for pair in pairs]
    if protocol == "split_domain":
        second = [np.isin(y, pairs[:, 1]).astype(np.int32) for y in (base.train[1], base.check[1])]
        base = base._replace(train=(base.train[0], second[0]), check=(base.check[0], second[1]))
        return _parts(config, base, chosen, np.ones((len(pairs), 2), bool))
    active = np.zeros((len(pairs), pairs.size), bool)
    for place, pair in enumerate(pairs):
        active[place, pair] = True
    return _parts(config, base, chosen, active, cumulative=protocol == "split_class")


def _permuted(base: Base, orders: list[np.ndarray]) -> Sequence:
    (x, y), (u, v) = base.train, base.check

    def teach(task: int, rows: Any = slice(None)) -> Examples:
        return Examples(jnp.asarray(x[rows][:, orders[task]]), jnp.asarray(y[rows]))

    def test(task: int, most: int | None = None) -> Examples:
        return Examples(jnp.asarray(u[:most][:, orders[task]]), jnp.asarray(v[:most]))

    active = np.ones((len(orders), 1 + int(y.max())), bool)
    return Sequence(teach, test, (len(y),) * len(orders), active, x.shape[1])


def _stream(
    config: Any, base: Base, orders: list[np.ndarray], generator: np.random.Generator
) -> Sequence:
    """Every part of the stream begins with examples of the part before it, ever fewer."""
    x, y = base.train
    size = min(config.stream_length or len(y), len(y))
    blended = int(config.blend * size)
    shuffles = [generator.permutation(len(y))[:size] for _ in orders]
    older = [generator.random(blended) > (np.arange(blended) + 0.5) / blended for _ in orders]

    def teach(task: int, rows: Any = slice(None)) -> Examples:
        chosen = shuffles[task][rows]
        inputs = x[chosen][:, orders[task]]
        if task and blended:
            late = np.pad(older[task], (0, size - blended))[rows]
            inputs[late] = x[chosen[late]][:, orders[task - 1]]
        return Examples(jnp.asarray(inputs), jnp.asarray(y[chosen]))

    whole = _permuted(base, orders)
    return dataclasses.replace(whole, teach=teach, sizes=(size,) * len(orders), ordered=True)


def _parts(
    config: Any,
    base: Base,
    chosen: list[tuple[np.ndarray, ...]],
    active: np.ndarray,
    cumulative: bool = False,
) -> Sequence:
    """Tasks that are parts of the data set."""
    if config.tasks > len(chosen):
        raise ValueError(f"tasks: {config.data} has parts for {len(chosen)}, not {config.tasks}.")
    chosen, active = chosen[: config.tasks], active[: config.tasks]
    (x, y), (u, v) = base.train, base.check
    sizes = [[int(mask.sum()) for mask in pair] for pair in chosen]
    most = max(train for train, _ in sizes)

    def teach(task: int, rows: Any = slice(None)) -> Examples:
        mine = np.resize(np.flatnonzero(chosen[task][0]), most)[rows]
        return Examples(jnp.asarray(x[mine]), jnp.asarray(y[mine]))

    def test(task: int, most: int | None = None) -> Examples:
        # Whole test sets: the shortest would cut them, so these shapes differ.
        theirs = np.flatnonzero(chosen[task][1])[:most]
        return Examples(jnp.asarray(u[theirs]), jnp.asarray(v[theirs]))

    sizes = tuple(train for train, _ in sizes)
    return Sequence(teach, test, sizes, active, x.shape[1], cumulative=cumulative)
