"""Generative replay: dreams of old examples, with the answers of the network as it was.

A generator (:mod:`adaptivenet.consolidation.sleep.vae`,
:mod:`adaptivenet.consolidation.sleep.mixtures`, or any function of a key) makes inputs; the network
before the new task says what they are; the new network is told both::

    old = jax.tree.map(jnp.copy, params)  # before the task
    dreams = replayed(partial(mixtures.dream, memory, number=128), apply, old)

    def loss(params, batch):
        drawn = dreams(batch.key)
        logits = apply(params, drawn.items.inputs)
        replay = distillation(logits, drawn.items.logits, weights=drawn.where)
        return balanced(cross_entropy(apply(params, batch.inputs), batch.labels), replay, tasks=2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.consolidation.sleep.buffer import Drawn
from adaptivenet.consolidation.sleep.rehearsal import Remembered
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import cast

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["balanced", "replayed"]


def replayed(
    dream: Callable[[jax.Array], Any],
    apply: Callable[..., jax.Array],
    params: PyTree,
) -> Callable[[jax.Array], Drawn]:
    """A source of dreams that the old network has answered.

    Args:
      dream: ``dream(key) -> inputs``, or ``(inputs, labels)`` where the generator knows them.
      apply: ``apply(params, inputs) -> logits``.
      params: the parameters of the network as it was; no gradient goes into them.

    Returns:
      ``drawn(key)``, a :class:`adaptivenet.consolidation.sleep.Drawn` whose items are
      :class:`adaptivenet.consolidation.sleep.Remembered`: inputs, labels (those of the generator,
      else the network's likeliest) and logits, the soft targets of
      :func:`adaptivenet.consolidation.sleep.distillation`. It serves wherever draws from a memory
      do, :func:`adaptivenet.consolidation.sleep.der_loss` as well.

    References:
      Shin et al., "Continual learning with deep generative replay", NeurIPS 2017, section 3.1, with
      the likeliest labels; van de Ven and Tolias, "Generative replay with feedback connections as a
      general strategy for continual learning", arXiv:1809.10635, with distilled ones.

    >>> apply = lambda params, inputs: params * inputs
    >>> draw = replayed(lambda key: jnp.array([[1.0, 2.0]]), apply, jnp.float32(3.0))
    >>> draw(jax.random.key(0)).items
    Remembered(inputs=Array([[1., 2.]], dtype=float32), labels=Array([1], dtype=int32),
               logits=Array([[3., 6.]], dtype=float32))
    """

    def drawn(key: jax.Array) -> Drawn:
        found = dream(key)
        inputs, labels = found if isinstance(found, tuple) else (found, None)
        inputs, logits = jax.lax.stop_gradient((inputs, apply(params, inputs)))
        if labels is None:
            labels = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        where = jnp.ones(logits.shape[:1], bool)
        return Drawn(Remembered(inputs, labels, logits), where)

    return drawn


def balanced(current: jax.Array, replay: jax.Array, *, tasks: Number) -> jax.Array:
    """The loss of the new task and that of replay, each task with the same weight.

    Args:
      current: loss of the new task.
      replay: loss of what is replayed, which stands for all tasks before.
      tasks: number of tasks so far, the new one included; 1 leaves replay out.

    Returns:
      ``current / tasks + (1 - 1 / tasks) replay``.

    Raises:
      ValueError: fewer than one task.

    References:
      Shin et al., NeurIPS 2017, section 3.1, for a mixture of the two; van de Ven and Tolias,
      arXiv:1809.10635, for its shares.

    >>> balanced(jnp.float32(4.0), jnp.float32(1.0), tasks=4).item()
    1.75
    """
    if known(tasks) and not np.all(np.asarray(tasks) >= 1):
        raise ValueError(f"tasks must be at least 1, not {tasks}.")
    share = 1.0 / cast(tasks, current)
    return share * current + (1.0 - share) * replay.astype(current.dtype)
