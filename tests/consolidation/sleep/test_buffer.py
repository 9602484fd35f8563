"""The memory is Vitter's reservoir and the class-balancing one, exactly and in distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from adaptivenet.consolidation.sleep import buffer

LEVEL = 1e-5  # of a statistical test: its seeds are fixed


MOST = 60


@functools.partial(jax.jit, static_argnums=(1, 3))
def stream(number, capacity, seed=0, size=MOST):
    """A memory of the numbers 0 .. number - 1, shown in batches of a size."""

    def show(memory, numbers):
        return buffer.add(memory, batch_of(numbers), where=numbers < number), None

    memory = buffer.init({"n": jnp.int32(0), "x": jnp.zeros(2)}, capacity, seed)
    numbers = jnp.arange(MOST, dtype=jnp.int32).reshape(-1, size)
    return jax.lax.scan(show, memory, numbers)[0]


def batch_of(numbers):
    numbers = jnp.asarray(numbers, jnp.int32)
    return {"n": numbers, "x": numbers[:, None].astype(jnp.float32) * jnp.array([1.0, -1.0])}


def slow_reservoir(number, capacity, seed):
    """Algorithm R, one example at a time."""
    key = jax.random.key(seed)
    lots = jax.vmap(
        lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, i + 1, jnp.uint32)
    )(jnp.arange(number, dtype=jnp.uint32))
    kept = [0] * capacity
    for i, lot in enumerate(np.asarray(lots)):
        if i < capacity:
            kept[i] = i
        elif lot < capacity:
            kept[lot] = i
    return kept


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


class TestReservoir:
    def test_it_is_algorithm_r_however_the_stream_is_cut(self):
        expected = slow_reservoir(60, 7, seed=3)
        whole = stream(60, 7, 3)
        assert whole.items["n"].tolist() == expected
        np.testing.assert_array_equal(whole.items["x"][:, 0], expected)
        np.testing.assert_array_equal(whole.items["x"][:, 1], -np.array(expected))
        for size in (1, 4, 15):
            same(stream(60, 7, 3, size), whole)

    def test_examples_that_do_not_count_leave_no_trace(self):
        numbers = jnp.arange(40, dtype=jnp.int32)
        memory = buffer.init(jnp.int32(0), 5)
        odd = jax.jit(buffer.add)(memory, numbers, where=numbers % 2 == 1)
        same(odd, jax.jit(buffer.add)(memory, numbers[1::2]))

    def test_it_fills_and_stays_full(self):
        for number in (1, 4, 5, 6, 50):
            memory = stream(number, 5)
            assert int(buffer.filled(memory)) == min(number, 5)
            assert buffer.rows(memory).tolist() == [i < number for i in range(5)]
            kept = memory.items["n"][: min(number, 5)].tolist()
            assert len(set(kept)) == len(kept)
            assert set(kept) <= set(range(number))
        assert memory.capacity == 5

    def test_every_example_and_every_pair_is_equally_likely(self):
        seeds, number, capacity = 4000, 24, 6

        @jax.jit
        @jax.vmap
        def kept(seed):
            memory = buffer.init(jnp.int32(0), capacity, seed)
            for cut in (slice(0, 10), slice(10, 11), slice(11, number)):
                memory = buffer.add(memory, jnp.arange(number, dtype=jnp.int32)[cut])
            return memory.items

        there = np.zeros((seeds, number))
        np.put_along_axis(there, np.asarray(kept(jnp.arange(seeds))), 1, axis=1)
        assert (there.sum(1) == capacity).all()
        assert self.rarity(there, capacity) > LEVEL
        pairs = there.T @ there
        chance = capacity * (capacity - 1) / (number * (number - 1))
        off = pairs[np.triu_indices(number, 1)]
        scores = (off - seeds * chance) / np.sqrt(seeds * chance * (1 - chance))
        assert np.abs(scores).max() < 5

        # The same test finds a sampler out that keeps recent examples too often.
        rng = np.random.default_rng(0)
        biased = np.zeros((seeds, number))
        for row in biased:
            slots = list(range(capacity))
            for i in range(capacity, number):
                if rng.random() < 0.3:
                    slots[rng.integers(capacity)] = i
            row[slots] = 1
        assert self.rarity(biased, capacity) < LEVEL

    def rarity(self, there, capacity):
        """Of the counts, were all examples kept with the same probability."""
        seeds, number = there.shape
        chance = capacity / number
        counts = there.sum(0)
        square = ((counts - seeds * chance) ** 2).sum() / (seeds * chance * (1 - chance))
        return stats.chi2.sf(square * (number - 1) / number, number - 1)


def slow_balanced(labels, capacity, classes, seed):
    """The class-balancing reservoir, one example at a time, with the same lots."""
    key = jax.random.key(seed)
    slots, stream_seen, full = [], [0] * classes, set()
    whole = jnp.arange(len(labels), dtype=jnp.uint32)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(whole)
    draw = jax.jit(jax.random.randint, static_argnums=(1, 4))
    for i, label in enumerate(labels):
        accept, choose = keys[i]
        stream_seen[label] += 1
        if i < capacity:
            slots.append((i, label))
            continue
        stored = [sum(c == k for _, c in slots) for k in range(classes)]
        largest = {k for k in range(classes) if stored[k] == max(stored)}
        full |= largest
        if label in full:
            lot = draw(accept, (), 0, stream_seen[label], jnp.uint32)
            if int(lot) >= stored[label]:
                continue
            victims = [s for s, (_, c) in enumerate(slots) if c == label]
        else:
            victims = [s for s, (_, c) in enumerate(slots) if c in largest]
        place = int(draw(choose, (), 0, len(victims), jnp.int32))
        slots[victims[place]] = (i, label)
    return slots


class TestBalanced:
    def test_it_is_the_published_algorithm_however_the_stream_is_cut(self):
        rng = np.random.default_rng(0)
        labels = np.concatenate([np.zeros(12, int), rng.choice(3, 48, p=[0.6, 0.3, 0.1])])
        numbers = np.arange(60)
        expected = slow_balanced(labels, 7, 3, seed=5)
        memory = buffer.init({"n": jnp.int32(0), "x": jnp.zeros(2)}, 7, 5, classes=3)
        add = jax.jit(lambda m, x, c: buffer.add(m, x, labels=c))
        for parts in (1, 3):
            found = memory
            for part in np.split(numbers, parts):
                found = add(found, batch_of(part), jnp.asarray(labels[part]))
            assert found.items["n"].tolist() == [i for i, _ in expected]
            assert found.classes.labels.tolist() == [c for _, c in expected]
            assert found.classes.seen.tolist() == np.bincount(labels, minlength=3).tolist()

    @functools.cached_property
    def population(self):
        """Class and number of what 2000 memories hold of a stream of 30, 15, and 3 examples."""
        labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [30, 15, 3]))

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        def kept(seed, classes):
            memory = buffer.init(jnp.int32(0), 12, seed, classes=3)
            memory = buffer.add(memory, jnp.arange(48, dtype=jnp.int32), labels=classes)
            return memory.items, memory.classes.labels

        items, classes = kept(jnp.arange(2000), jnp.asarray(labels))
        np.testing.assert_array_equal(labels[np.asarray(items)], classes)
        return labels, np.asarray(items)

    def test_classes_come_as_equal_as_the_stream_allows(self):
        labels, items = self.population
        stored = np.stack([(labels[items] == c).sum(1) for c in range(3)])
        assert (stored[2] == 3).all()  # all there ever were
        assert (stored[:2].sum(0) == 9).all()
        assert np.abs(stored[0] - stored[1]).max() <= 1
        # The plain reservoir follows the stream instead.
        plain = jax.vmap(
            lambda seed: (
                buffer.add(
                    buffer.init(jnp.int32(0), 12, seed), jnp.arange(48, dtype=jnp.int32)
                ).items
            )
        )(jnp.arange(300))
        assert (labels[np.asarray(plain)] == 0).sum(1).mean() > 7

    def test_those_of_a_class_are_a_uniform_sample_of_it(self):
        labels, items = self.population
        for c in (0, 1):
            own = np.flatnonzero(labels == c)
            there = (items[:, :, None] == own).any(1)
            amounts = there.sum(1)
            chance = amounts.mean() / own.size
            variance = (amounts / own.size * (1 - amounts / own.size)).sum()
            square = ((there.sum(0) - 2000 * chance) ** 2).sum() / variance
            assert stats.chi2.sf(square * (own.size - 1) / own.size, own.size - 1) > LEVEL

    def test_labels_out_of_range_are_passed_over_where_they_are_traced(self):
        memory = buffer.init(jnp.int32(0), 4, classes=2)
        add = jax.jit(lambda m, x, c: buffer.add(m, x, labels=c))
        found = add(memory, jnp.arange(4), jnp.array([0, -1, 7, 1]))
        assert int(found.seen) == 2
        assert found.items[:2].tolist() == [0, 3]
        with pytest.raises(ValueError, match=r"labels= must be in \[0, 2\)"):
            buffer.add(memory, jnp.arange(2), labels=jnp.array([0, 2]))


class TestAsState:
    def test_scans_resumes_and_populations(self):
        batches = jnp.arange(48, dtype=jnp.int32).reshape(8, 6)

        def run(memory, batches):
            return jax.lax.scan(lambda m, b: (buffer.add(m, b), None), memory, batches)[0]

        run = jax.jit(run)
        whole = run(buffer.init(jnp.int32(0), 5, 2), batches)
        half = jax.device_get(run(buffer.init(jnp.int32(0), 5, 2), batches[:4]))
        same(run(jax.tree.map(jnp.asarray, half), batches[4:]), whole)

        several = jax.vmap(lambda seed: run(buffer.init(jnp.int32(0), 5, seed), batches))(
            jnp.arange(4)
        )
        same(jax.tree.map(lambda x: x[2], several), whole)
        assert len({tuple(row) for row in several.items.tolist()}) > 1


class TestDraw:
    def test_with_replacement_only_what_is_filled(self):
        memory = stream(3, 8)
        drawn = buffer.draw(memory, jax.random.key(0), 3000)
        counts = np.bincount(drawn.items["n"], minlength=3)
        assert counts.size == 3
        assert stats.chisquare(counts).pvalue > LEVEL
        np.testing.assert_array_equal(drawn.items["x"][:, 0], drawn.items["n"])
        assert drawn.where.all()

    def test_without_replacement_each_once(self):
        memory = stream(6, 8)
        drawn = buffer.draw(memory, jax.random.key(0), 8, replace=False)
        assert drawn.where.tolist() == [True] * 6 + [False] * 2
        assert sorted(drawn.items["n"][:6].tolist()) == list(range(6))
        firsts = jax.vmap(lambda k: buffer.draw(memory, k, 2, replace=False).items["n"])(
            jax.random.split(jax.random.key(1), 3000)
        )
        pairs = np.bincount(firsts[:, 0] * 6 + firsts[:, 1], minlength=36).reshape(6, 6)
        assert (np.diag(pairs) == 0).all()
        assert stats.chisquare(pairs[~np.eye(6, dtype=bool)]).pvalue > LEVEL

    @pytest.mark.parametrize("replace", [True, False])
    def test_from_an_empty_memory_nothing(self, replace):
        memory = buffer.init(jnp.float32(0), 4)
        drawn = buffer.draw(memory, jax.random.key(0), 3, replace=replace)
        assert not drawn.where.any()
        assert not drawn.items.any()


def test_errors():
    memory = buffer.init({"x": jnp.zeros(2)}, 3)
    for make, message in (
        (lambda: buffer.init((), 3), "the example has no arrays"),
        (lambda: buffer.init(jnp.zeros(2), 0), "capacity must be a positive integer, not 0"),
        (lambda: buffer.init(jnp.zeros(2), 3, classes=0), "classes must be a positive integer"),
        (lambda: buffer.add(memory, jnp.zeros((3, 2))), "the memory was made for examples"),
        (lambda: buffer.add(memory, {"x": jnp.zeros((3, 4))}), "leaf 'x' of the batch has the sha"),
        (lambda: buffer.add(memory, {"x": jnp.zeros((3, 2), int)}), "leaf 'x' of the batch is int"),
        (lambda: buffer.add(memory, {"x": jnp.zeros((0, 2))}), "one length above 0"),
        (
            lambda: buffer.add(memory, {"x": jnp.zeros((3, 2))}, where=jnp.ones(2, bool)),
            "where= has the shape",
        ),
        (
            lambda: buffer.add(memory, {"x": jnp.zeros((3, 2))}, labels=jnp.zeros(3, int)),
            "not balanced over classes",
        ),
        (
            lambda: buffer.add(buffer.init(jnp.int32(0), 3, classes=2), jnp.arange(2)),
            "give add",
        ),
        (
            lambda: buffer.add(
                buffer.init(jnp.int32(0), 3, classes=2), jnp.arange(2), labels=jnp.zeros(2)
            ),
            "labels= must be 2 integers",
        ),
        (lambda: buffer.draw(memory, jax.random.key(0), 4, replace=False), "exceeds the capacity"),
        (lambda: buffer.draw(memory, jax.random.key(0), 0), "batch_size must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
