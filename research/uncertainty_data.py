"""The data of the study of uncertainty: each set beside inputs that are foreign to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet.data.digest import digest_bytes
from research.rounds import Task

SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "mnist1d": "MNIST-1D"}
FOREIGN = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}


class Lessons(NamedTuple):
    """The tasks of all data sets, with the name and the fingerprint that a results file wants.

    Attributes:
      name: of all sets.
      sha256: of all sets.
      tasks: by the name of the set.
      held_out: inputs and targets that nothing was trained on, for temperatures; by name.
      foreign: inputs of another kind, in the scale of the set's own; by name.
    """

    name: str
    sha256: str
    tasks: dict[str, Task]
    held_out: dict[str, tuple[jax.Array, jax.Array]]
    foreign: dict[str, jax.Array]


def load(config: Any) -> Lessons:
    """The data of every set that the config trains on, each standardised by its training part.

    Args:
      config: the study's config.

    Returns:
      Tasks and foreign inputs. Where accuracies are measured on validation data, temperatures are
      fitted on the first half of them, which is not measured on.

    Raises:
      DataError: data are missing.
    """
    tasks, held_out, foreign, prints = {}, {}, {}, []
    for name in SETS:
        if not getattr(config, name).epochs:
            continue
        raw = an.data.flatten(an.data.load(name))
        data = an.data.split(an.data.standardise(raw), config.validation, seed=0)
        check, held = (data.test_inputs, data.test_targets), data.validation
        if config.measured_on == "validation":
            held, check = _halves(data.validation, config.validation // 2)
        assert held is not None  # split() makes it
        arrays = map(jnp.asarray, (data.train_inputs, data.train_targets, *check))
        tasks[name] = Task(*arrays)
        held_out[name] = (jnp.asarray(held[0]), jnp.asarray(held[1]))
        foreign[name] = jnp.asarray(_foreign(name, raw, check[0]))
        prints.append((data.name, data.sha256))
    titles = ", ".join(title for title, _ in prints)
    digest = digest_bytes("".join(sha for _, sha in prints).encode())
    return Lessons(titles, digest, tasks, held_out, foreign)


def _halves(part: Any, half: int) -> tuple[Any, Any]:
    inputs, targets = part
    return (inputs[:half], targets[:half]), (inputs[half:], targets[half:])


def _foreign(name: str, raw: Any, own: np.ndarray) -> np.ndarray:
    if name not in FOREIGN:
        # The same values at the wrong times: nothing but their order is foreign.
        order = np.random.Generator(np.random.PCG64(0)).permutation(own.shape[1])
        return np.asarray(own)[:, order]
    other = np.asarray(an.data.flatten(an.data.load(FOREIGN[name])).test_inputs, np.float32)
    train = np.asarray(raw.train_inputs, np.float64)
    return ((other - train.mean()) / train.std()).astype(np.float32)
