"""A bounded memory of examples, each of which is kept with equal probability.

The memory is a pytree that jit, vmap and scan carry along::

    memory = init(example, capacity=500, seed=0)  # an example without the axis of the batch
    memory = add(memory, batch)  # [batch, ...] in every leaf
    drawn = draw(memory, key, 32)  # drawn.items, and drawn.where: which of them are real

An example is anything: inputs and labels, logits for
:func:`adaptivenet.consolidation.sleep.der_loss`, features of a hidden layer. What is decided about
the n-th example of the stream depends on the seed and on n alone, so that the memory is the same,
bit for bit, however the stream is cut into batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import initial_key

PyTree = Any

__all__ = ["Buffer", "Classes", "Drawn", "add", "draw", "filled", "init", "rows"]


class Classes(NamedTuple):
    """What a class-balanced memory knows of the classes.

    Attributes:
      labels: int32 ``[capacity]``, the class of each slot, -1 where it is empty.
      seen: uint32 ``[classes]``, how many examples of each class the stream had.
      full: bool ``[classes]``, which of them have been the largest since the memory was filled.
    """

    labels: jax.Array
    seen: jax.Array
    full: jax.Array


class Buffer(NamedTuple):
    """A memory of examples; slots are filled from the first on.

    Attributes:
      items: pytree of ``[capacity, ...]``, zeros where no example is yet.
      seen: uint32, the number of examples of the stream so far (below 2^32).
      key: uint32, data of the random key; it stays, and is folded with the number of the example.
      classes: what a class-balanced memory knows; empty for a plain one.
    """

    items: PyTree
    seen: jax.Array
    key: jax.Array
    classes: Classes | tuple[()] = ()

    @property
    def capacity(self) -> int:
        """The number of slots (of one memory, not of a stack of them)."""
        return jax.tree.leaves(self.items)[0].shape[0]


class Drawn(NamedTuple):
    """What :func:`draw` returns.

    Attributes:
      items: pytree of ``[batch_size, ...]``.
      where: bool ``[batch_size]``, False where there was no example to draw: give it to a loss as
        its weights.
    """

    items: PyTree
    where: jax.Array


def init(example: PyTree, capacity: int, seed: Any = 0, *, classes: int | None = None) -> Buffer:
    """An empty memory.

    Args:
      example: pytree of arrays or ``jax.ShapeDtypeStruct``, one example without the batch's axis;
        shapes and dtypes are read.
      capacity: how many examples it holds at most.
      seed: integer (possibly traced, for a population) or a random key.
      classes: the number of classes that the memory is to be balanced over; by default every
        example of the stream is as likely to be kept as any other.

    Returns:
      The memory.

    Raises:
      ValueError: the example has no leaf, or a number is not a positive integer.

    >>> memory = init({"x": jnp.zeros(3), "y": jnp.int32(0)}, capacity=5)
    >>> memory.items["x"].shape, memory.items["y"].dtype, int(filled(memory))
    ((5, 3), dtype('int32'), 0)
    """
    _check_size("capacity", capacity)
    if classes is not None:
        _check_size("classes", classes)
    if not jax.tree.leaves(example):
        raise ValueError("the example has no arrays: give one such as (inputs[0], labels[0]).")
    known_classes: Classes | tuple[()] = ()
    if classes is not None:
        known_classes = Classes(
            labels=jnp.full(capacity, -1, jnp.int32),
            seen=jnp.zeros(classes, jnp.uint32),
            full=jnp.zeros(classes, bool),
        )
    return Buffer(
        items=jax.tree.map(
            lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example
        ),
        seen=jnp.zeros((), jnp.uint32),
        key=initial_key(seed, ()),
        classes=known_classes,
    )


def add(
    buffer: Buffer,
    batch: PyTree,
    *,
    labels: jax.Array | None = None,
    where: jax.Array | None = None,
) -> Buffer:
    """Shows a batch of the stream to the memory.

    **Plain.** The first examples fill the slots; the n-th after them takes a random slot with
    probability ``capacity / n``. After any number of examples each of them is in the memory with
    the same probability, and so is each set of them. A batch is taken at once: where several of
    its examples take one slot, the last has it, as if they had come one by one.

    **Balanced over classes** (``init(..., classes=)``). When the memory has been filled, an example
    of a class that never was the largest in it takes the slot of a random example of the largest
    classes; one of another class takes that of its own class with the probability that keeps those
    of the class a uniform sample: stored over seen. Classes come as equal as the stream allows,
    without their number being known beforehand. Which examples take which slots is found one by
    one; they are moved at once.

    Args:
      buffer: the memory.
      batch: pytree like the example, ``[batch, ...]``.
      labels: int ``[batch]``, the classes, for a balanced memory; those outside of its classes
        are passed over (where their values are known, refused).
      where: bool ``[batch]``, which examples count; all by default.

    Returns:
      The memory after the batch.

    Raises:
      ValueError: the batch has other leaves, shapes or dtypes than the memory, or labels are
        missing, not wanted or out of range.

    References:
      Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1985), algorithm R; Chrysakis and
      Moens, "Online continual learning from imbalanced data", ICML 2020, algorithm 1 (CBRS). (A
      class counts as full from the step on in which it is the largest of a memory that is filled.)

    >>> memory = add(init(jnp.int32(0), capacity=3), jnp.arange(100))
    >>> int(memory.seen), memory.items.shape
    (100, (3,))
    """
    number = _check_batch(buffer, batch)
    used = jnp.ones(number, bool) if where is None else jnp.asarray(where)
    if used.shape != (number,):
        raise ValueError(f"where= has the shape {used.shape}; the batch has {number} examples.")
    told = None
    if isinstance(buffer.classes, Classes):
        several = buffer.classes.seen.shape[0]
        told = _check_labels(labels, number, several)
        used = used & (told >= 0) & (told < several)
    elif labels is not None:
        raise ValueError(
            "this memory is not balanced over classes: leave labels= out, or give "
            "init(..., classes=) their number."
        )
    turns = jnp.cumsum(used, dtype=jnp.uint32)
    before = buffer.seen + turns - used.astype(jnp.uint32)  # examples before each of the batch
    key = jax.random.wrap_key_data(buffer.key)
    classes: Classes | tuple[()] = ()
    if isinstance(buffer.classes, Classes) and told is not None:
        slots, classes = _balanced(key, buffer.classes, told, before, used)
    else:
        slots = _reservoir(key, buffer.capacity, before, used)
    # Of several that take a slot the last one keeps it: then slots are unique.
    turn = jnp.arange(number, dtype=jnp.int32)
    last = jnp.full(buffer.capacity, -1, jnp.int32).at[slots].max(turn, mode="drop")
    kept = last.at[slots].get(mode="fill", fill_value=-1) == turn
    slots = jnp.where(kept, slots, buffer.capacity)
    items = jax.tree.map(
        lambda old, new: old.at[slots].set(jnp.asarray(new), mode="drop"), buffer.items, batch
    )
    return Buffer(items, buffer.seen + turns[-1], buffer.key, classes)


def filled(buffer: Buffer) -> jax.Array:
    """How many slots hold an example.

    Args:
      buffer: the memory.

    Returns:
      int32 scalar, at most the capacity.

    >>> int(filled(add(init(jnp.float32(0), 5), jnp.ones(3))))
    3
    """
    return jnp.minimum(buffer.seen, jnp.uint32(buffer.capacity)).astype(jnp.int32)


def rows(buffer: Buffer) -> jax.Array:
    """Which slots hold an example.

    Args:
      buffer: the memory.

    Returns:
      bool ``[capacity]``.

    >>> rows(add(init(jnp.float32(0), 3), jnp.ones(2))).tolist()
    [True, True, False]
    """
    return jnp.arange(buffer.capacity, dtype=jnp.int32) < filled(buffer)


def draw(buffer: Buffer, key: jax.Array, batch_size: int, *, replace: bool = True) -> Drawn:
    """Draws examples from the slots that are filled, uniformly.

    Args:
      buffer: the memory; from an empty one zeros come, with ``where`` False.
      key: random key.
      batch_size: how many.
      replace: whether an example may be drawn several times; else there are as many as are filled,
        and the rest of ``where`` is False.

    Returns:
      The examples and which of them are real.

    Raises:
      ValueError: without replacement, a batch larger than the capacity; a size below 1.

    >>> memory = add(init(jnp.float32(0), 4), jnp.array([5.0, 5.0]))
    >>> draw(memory, jax.random.key(0), 3).items.tolist()
    [5.0, 5.0, 5.0]
    >>> draw(memory, jax.random.key(0), 3, replace=False).where.tolist()
    [True, True, False]
    """
    _check_size("batch_size", batch_size)
    number = filled(buffer)
    if replace:
        places = jax.random.randint(key, (batch_size,), 0, jnp.maximum(number, 1), jnp.int32)
        where = jnp.broadcast_to(number > 0, (batch_size,))
    elif batch_size > buffer.capacity:
        raise ValueError(
            f"batch_size={batch_size} exceeds the capacity of {buffer.capacity}: draw fewer, or "
            "with replace=True."
        )
    else:
        noise = jax.random.uniform(key, (buffer.capacity,), jnp.float32)
        places = jax.lax.top_k(jnp.where(rows(buffer), noise, -1.0), batch_size)[1]
        where = jnp.arange(batch_size, dtype=jnp.int32) < number
    return Drawn(jax.tree.map(lambda leaf: leaf[places], buffer.items), where)


def _reservoir(key: jax.Array, capacity: int, before: jax.Array, used: jax.Array) -> jax.Array:
    """The slot of each example, the capacity where it gets none."""

    def one(before: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, before)
        return jax.random.randint(own, (), 0, before + 1, jnp.uint32)

    size = jnp.uint32(capacity)
    slots = jnp.where(before < size, before, jax.vmap(one)(before))
    return jnp.where(used & (slots < size), slots, size).astype(jnp.int32)


def _balanced(
    key: jax.Array, classes: Classes, labels: jax.Array, before: jax.Array, used: jax.Array
) -> tuple[jax.Array, Classes]:
    capacity, several = classes.labels.shape[0], classes.seen.shape[0]
    kinds = jnp.arange(several, dtype=jnp.int32)

    def one(classes: Classes, example: Any) -> tuple[Classes, jax.Array]:
        label, before, used = example
        accept, choose = jax.random.split(jax.random.fold_in(key, before))
        seen = classes.seen + ((kinds == label) & used).astype(jnp.uint32)
        stored = jnp.sum(classes.labels[:, None] == kinds, axis=0, dtype=jnp.uint32)
        largest = stored == jnp.max(stored)
        whole = before >= jnp.uint32(capacity)
        full = classes.full | (largest & whole & used)
        own = full[label]
        # The slots one of which is given up: of the own class, or of the largest.
        candidates = jnp.where(own, classes.labels == label, largest[classes.labels])
        amount = jnp.sum(candidates, dtype=jnp.int32)
        rank = jax.random.randint(choose, (), 0, jnp.maximum(amount, 1), jnp.int32)
        victim = jnp.argmax(jnp.cumsum(candidates, dtype=jnp.int32) > rank).astype(jnp.int32)
        lot = jax.random.randint(accept, (), 0, jnp.maximum(seen[label], 1), jnp.uint32)
        taken = ~own | (lot < stored[label])
        slot = jnp.where(whole, victim, before.astype(jnp.int32))
        slot = jnp.where(used & (~whole | taken), slot, capacity)
        return Classes(classes.labels.at[slot].set(label, mode="drop"), seen, full), slot

    safe = jnp.clip(labels, 0, several - 1)
    classes, slots = jax.lax.scan(one, classes, (safe, before, used))
    return slots, classes


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}.")


def _check_batch(buffer: Buffer, batch: PyTree) -> int:
    names, items = trees.paths(buffer.items), jax.tree.leaves(buffer.items)
    if jax.tree.structure(batch) != jax.tree.structure(buffer.items):
        raise ValueError(
            f"the batch is {jax.tree.structure(batch)}, but the memory was made for examples "
            f"{jax.tree.structure(buffer.items)}."
        )
    sizes = set()
    for name, item, leaf in zip(names, items, jax.tree.leaves(batch), strict=True):
        expected, shape = item.shape[1:], jnp.shape(leaf)
        if len(shape) != len(expected) + 1 or shape[1:] != expected:
            raise ValueError(
                f"leaf {name!r} of the batch has the shape {shape}; the memory holds examples "
                f"{expected}, so that it must be [batch, ...] of them."
            )
        if jnp.result_type(leaf) != item.dtype:
            raise ValueError(
                f"leaf {name!r} of the batch is {jnp.result_type(leaf)}, but the memory holds "
                f"{item.dtype}: cast it, or make the memory from an example of that dtype."
            )
        sizes.add(shape[0])
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"the leaves of a batch have one length above 0, not {sorted(sizes)}.")
    return sizes.pop()


def _check_labels(labels: Any, number: int, several: int) -> jax.Array:
    if labels is None:
        raise ValueError("this memory is balanced over classes: give add(..., labels=) theirs.")
    labels = jnp.asarray(labels)
    if labels.shape != (number,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels= must be {number} integers, not {labels.dtype}{list(labels.shape)}."
        )
    if known(labels):
        with jax.ensure_compile_time_eval():
            bad = bool(jnp.any((labels < 0) | (labels >= several)))
        if bad:
            raise ValueError(f"labels= must be in [0, {several}), the classes of the memory.")
    return labels.astype(jnp.int32)
