"""The subjects of the shrinking study: five families of networks, and the data they are taught."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet import models
from adaptivenet.data.digest import digest_bytes
from research.rounds import Task

PyTree = Any

# Groups of no use on their own: the scale of attention is a number of the model's text, so that
# models without some dimensions of query and key would need another text.
SCALED = r"attention/(query|key)\[2\]"
WIDTH, HEADS, BLOCKS, CELLS, IMAGE_WIDTHS = 64, 4, 2, 64, (16, 32, 64)


class Subject(NamedTuple):
    """A network of a family.

    Attributes:
      title: its name in tables.
      init: ``(key, task) -> variables``.
      apply: ``(variables, inputs) -> logits``.
      train: ``(variables, inputs) -> (logits, variables)``, with new statistics if there are any.
      inputs: ``images [n, h, w, c] -> inputs``; None where the data are tokens.
      calls: batches that are evaluated one after the other, in one program, in a timed call.
      stays: pattern of the groups that stay whole.
    """

    title: str
    init: Callable[..., PyTree]
    apply: Callable[..., jax.Array]
    train: Callable[..., tuple[jax.Array, PyTree]]
    inputs: Callable[[np.ndarray], np.ndarray] | None
    calls: int = 1
    stays: str = ""


class Lessons(NamedTuple):
    """The tasks of all subjects, with the name and the fingerprint that a results file wants."""

    name: str
    sha256: str
    tasks: dict[str, Task]


def stays_whole(subject: Subject, group: str) -> bool:
    """Whether the units of a group are none that the subject gives up."""
    return bool(subject.stays) and re.search(subject.stays, group) is not None


def _stateless(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda variables, inputs: (apply(variables, inputs), variables)


def _mlp(key: jax.Array, task: Task) -> PyTree:
    return models.mlp_init(key, (task.inputs.shape[-1], 128, 64, 10))


def _lenet5(key: jax.Array, task: Task) -> PyTree:
    if task.inputs.shape[-1] != 784:
        raise ValueError("lenet5.data: LeNet-5 takes images of 28 x 28 pixels, such as mnist.")
    return models.lenet5_init(key)


def _resnet(key: jax.Array, task: Task, depth: int = 1) -> PyTree:
    params, stats = models.resnet_init(key, task.inputs.shape[-1], IMAGE_WIDTHS, 10, depth=depth)
    return {"params": params, "stats": stats}


def _resnet_apply(variables: PyTree, inputs: jax.Array) -> jax.Array:
    return models.resnet(variables["params"], variables["stats"], inputs)


def _resnet_train(variables: PyTree, inputs: jax.Array) -> tuple[jax.Array, PyTree]:
    logits, stats = models.resnet(variables["params"], variables["stats"], inputs, train=True)
    return logits, {**variables, "stats": stats}


def _lstm(key: jax.Array, task: Task) -> PyTree:
    return models.lstm_init(key, task.inputs.shape[-1], CELLS, 10)


def _transformer(key: jax.Array, task: Task) -> PyTree:
    tokens = 1 + int(max(task.inputs.max(), task.targets.max()))
    sizes = {"width": WIDTH, "heads": HEADS, "blocks": BLOCKS}
    return models.transformer_init(key, tokens, task.inputs.shape[-1], **sizes)


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


_lenet = partial(models.lenet5, activation=jax.nn.relu)
SUBJECTS = {
    "mlp": Subject("founding MLP", _mlp, models.mlp, _stateless(models.mlp), _flat, calls=1000),
    "lenet5": Subject("LeNet-5-Caffe", _lenet5, _lenet, _stateless(_lenet), _flat, calls=20),
    "resnet": Subject("residual CNN", _resnet, _resnet_apply, _resnet_train, lambda x: x),
    "lstm": Subject("LSTM", _lstm, models.lstm, _stateless(models.lstm), lambda x: x[..., 0]),
    "transformer": Subject(
        "transformer",
        _transformer,
        models.transformer,
        _stateless(models.transformer),
        None,
        stays=SCALED,
    ),
}


def subject_of(config: Any, name: str) -> Subject:
    """A subject as the config wants it: the residual CNN as deep as it says.

    Args:
      config: the study's config.
      name: of the subject.

    Returns:
      The subject.
    """
    if name != "resnet":
        return SUBJECTS[name]
    return SUBJECTS[name]._replace(init=partial(_resnet, depth=config.depth))


def load(config: Any) -> Lessons:
    """The data of every subject that the config runs, each standardised by its training part.

    Args:
      config: the study's config.

    Returns:
      The tasks.

    Raises:
      DataError: data are missing.
    """
    tasks, sets = {}, {}
    for name, subject in SUBJECTS.items():
        setting = getattr(config, name)
        if setting.shares:
            tasks[name], sets[setting.data] = _task(subject, setting, config)
    titles = ", ".join(name for name, _ in sets.values())
    return Lessons(titles, digest_bytes("".join(sha for _, sha in sets.values()).encode()), tasks)


def _task(subject: Subject, setting: Any, config: Any) -> tuple[Task, tuple[str, str]]:
    if subject.inputs is None:
        return _tokens(setting, config)
    data = an.data.load(setting.data)
    data = an.data.split(an.data.standardise(data, axis=(0, 1, 2)), config.validation, seed=0)
    arrays = [data.train_inputs, data.train_targets, *_checked(data, config)]
    images = [a[..., None] if a.ndim == 3 else a for a in arrays[::2]]
    inputs, check = (jnp.asarray(subject.inputs(np.asarray(part))) for part in images)
    task = Task(inputs, jnp.asarray(arrays[1]), check, jnp.asarray(arrays[3]))
    return task, (data.name, data.sha256)


def _tokens(setting: Any, config: Any) -> tuple[Task, tuple[str, str]]:
    """Sequences of tokens, and the token that follows at each of their places."""
    data = an.data.load(setting.data)
    if setting.data == "digits":
        # Pixels are read one after the other, as whole numbers from 0 to 16.
        data = an.data.split(data, config.validation, seed=0)
        images = (data.train_inputs, _checked(data, config)[0])
        parts = [_flat(np.asarray(part).astype(np.int32)) for part in images]
    else:
        size = setting.length + 1
        data = an.data.split_text(data, config.validation * size)
        check = data.test if config.measured_on == "test" else data.validation
        codes = [data.encode(text) for text in (data.train, check or "")]
        parts = [c[: len(c) // size * size].reshape(-1, size) for c in codes]
    arrays = [jnp.asarray(a) for part in parts for a in (part[:, :-1], part[:, 1:])]
    return Task(*arrays), (data.name, data.sha256)


def _checked(data: Any, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets that accuracies are measured on."""
    test = (data.test_inputs, data.test_targets)
    return data.validation if config.measured_on == "validation" else test
