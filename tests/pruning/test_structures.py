"""Structures: what is pooled and spread, against loops; and that `prune` relies on the protocol."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning, trees
from adaptivenet.counts import as_share
from adaptivenet.pruning.structures import Block, ByPath, Unit
from tests.pruning import events
from tests.pruning.events import draw, ones

GLOBAL = pruning.Global()


def cut(params, mask, sparsity, *options, **more):
    return events.cut(params, mask, pruning.Sparsity(as_share(sparsity)), *options, **more)


def units_of(structure, shape):
    """The unit of every synapse, by a loop over their indices."""
    table = np.zeros(shape, int)
    for index in itertools.product(*map(range, shape)):
        if isinstance(structure, Block):
            columns = shape[-1] // structure.columns
            front = np.ravel_multi_index(index[:-2], shape[:-2]) if shape[:-2] else 0
            blocks = shape[-2] // structure.rows * columns
            table[index] = (
                front * blocks
                + index[-2] // structure.rows * columns
                + index[-1] // structure.columns
            )
        else:
            stretch = shape[structure.axis] // structure.gates
            table[index] = index[structure.axis] % stretch // structure.size
    return table


def pooled(structure, scores):
    """The score of every unit, by a loop over units."""
    table = units_of(structure, scores.shape)
    worth = [scores[table == unit].astype(np.float64) for unit in range(table.max() + 1)]
    return np.array([getattr(np, structure.pooling)(score) for score in worth])


CASES = [
    (Block(2, 3), (4, 9)),
    (Block(1, 2, "mean"), (3, 2, 5, 4)),
    (Block(4, 1), (2, 4, 3)),
    (Unit(), (5, 7)),
    (Unit(-2), (5, 7)),
    (Unit(0, pooling="mean"), (3, 3, 2, 4)),
    (Unit(), (3, 3, 2, 4)),
    (Unit(1), (6, 2, 3)),
    (Unit(size=3), (4, 12)),
    (Unit(gates=4), (5, 12)),
    (Unit(gates=2, size=2), (3, 12)),
    (Unit(), (6,)),
]
IDS = [f"{structure}-{shape}".replace(" ", "") for structure, shape in CASES]


def test_element_changes_nothing():
    tree = {"w": jnp.ones((2, 2)), "b": optax.MaskedNode()}
    element = pruning.Element()
    assert element.pool(tree) is tree
    assert element.pool_mask(tree) is tree
    assert element.spread(tree, None) is tree
    assert element == pruning.Element()


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=IDS)
def test_units_are_those_of_a_loop(structure, shape):
    scores = np.abs(draw(0, w=shape)["w"])
    tree = {"w": jnp.asarray(scores), "b": optax.MaskedNode()}
    worth = structure.pool(tree)
    assert isinstance(worth["b"], optax.MaskedNode)
    np.testing.assert_allclose(np.ravel(worth["w"]), pooled(structure, scores), rtol=1e-6)
    table = units_of(structure, shape)
    alive = np.random.default_rng(1).random(shape) < 0.2
    units = structure.pool_mask({"w": jnp.asarray(alive)})["w"]
    expected = [alive[table == unit].any() for unit in range(table.max() + 1)]
    np.testing.assert_array_equal(np.ravel(units), expected)
    spread = structure.spread({"w": units}, {"w": jnp.asarray(alive)})["w"]
    np.testing.assert_array_equal(spread, np.ravel(units)[table])


@settings(max_examples=15)
@given(
    front=st.lists(st.integers(1, 3), max_size=2),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_blocks_of_any_shape(front, blocks, block):
    structure = Block(*block)
    shape = (*front, blocks[0] * block[0], blocks[1] * block[1])
    scores = np.arange(1.0, 1.0 + np.prod(shape), dtype=np.float32).reshape(shape)
    worth = structure.pool(scores)
    assert worth.shape == (*front, *blocks)
    np.testing.assert_allclose(np.ravel(worth), pooled(structure, scores), rtol=1e-6)


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    parts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
)
def test_units_of_any_shape(shape, axis, parts):
    gates, units, size = parts
    axis %= len(shape)
    shape[axis] = gates * units * size
    structure = Unit(axis - len(shape), size, gates)
    scores = np.arange(1.0, 1.0 + np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_allclose(structure.pool(scores), pooled(structure, scores), rtol=1e-6)


def test_many_small_scores_in_half_precision_add_up():
    scores = {"w": jnp.ones((4096, 2), jnp.bfloat16)}
    assert Unit().pool(scores)["w"].tolist() == [4096.0, 4096.0]


def test_signed_scores_give_the_taylor_estimate_of_a_unit():
    scores = {"w": jnp.array([[1.0, -2.0], [-3.0, -1.0]])}
    assert Unit().pool(scores)["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=IDS)
def test_the_exact_number_of_units_is_kept(structure, shape):
    params = draw(2, w=shape)
    mask, shares = ones(params), jnp.array([0.0, 0.4, 0.75], jnp.float32)
    masks = jax.vmap(lambda s: cut(params, mask, s, structure).mask["w"])(shares)
    worth = pooled(structure, np.abs(params["w"]))
    table = units_of(structure, shape)
    for share, found in zip((0.0, 0.4, 0.75), np.asarray(masks), strict=True):
        kept = np.array([found[table == unit].all() for unit in range(worth.size)])
        assert kept.sum() == worth.size - int(share * worth.size + 0.5)
        np.testing.assert_array_equal(found, kept[table])
        if kept.any() and not kept.all():
            assert worth[kept].min() >= worth[~kept].max() - 1e-5


def test_what_was_dead_in_a_unit_that_survives_stays_dead():
    params = draw(3, w=(6, 8))
    mask = {"w": jnp.asarray(np.random.default_rng(4).random((6, 8)) < 0.5)}
    out = cut(params, mask, 0.5, Unit())
    np.testing.assert_array_equal(out.mask["w"] & ~mask["w"], np.zeros((6, 8), bool))
    kept = np.asarray(out.mask["w"]).any(axis=0)
    assert kept.sum() == 4
    np.testing.assert_array_equal(out.mask["w"], np.asarray(mask["w"]) & kept)


def test_sparsities_of_a_population_and_eager_runs_agree():
    params = draw(5, w=(4, 6), v=(2, 4))
    mask = ones(params)
    structure = ByPath({"v": Unit(0)}, Block(2, 2))
    shares = jnp.array([0.25, 0.5, 0.75], jnp.float32)
    together = jax.vmap(lambda s: cut(params, mask, s, structure).mask)(shares)
    for place, share in enumerate(shares):
        alone = cut(params, mask, share, structure).mask
        for name in params:
            np.testing.assert_array_equal(together[name][place], alone[name])
    params, mask = {"v": params["v"]}, {"v": mask["v"]}
    demand = pruning.Sparsity(as_share(shares[1]))
    eager = events.cut.__wrapped__(params, mask, demand, Unit(0)).mask
    np.testing.assert_array_equal(eager["v"], together["v"][1])


def test_half_precision():
    params = draw(6, w=(4, 8))
    out = cut(params, ones(params), 0.5, Unit(), dtype=jnp.bfloat16)
    assert np.asarray(out.mask["w"]).all(axis=0).sum() == 4


MIXED = {"conv1/kernel": (3, 3, 2, 4), "dense1/kernel": (8, 6), "dense2/kernel": (6, 4)}


def test_a_structure_for_every_path():
    structure = ByPath([("conv", Unit()), ("dense1|conv", Block(2, 2))])
    found = structure.at(list(MIXED))
    assert found == [Unit(), Block(2, 2), pruning.Element()]
    params = draw(7, **MIXED)
    out = cut(params, ones(params), 0.5, structure)
    # Each structure by itself: a unit of a convolution does not compete with a single synapse.
    alone = {name: {name: leaf} for name, leaf in params.items()}
    for (name, tree), one in zip(alone.items(), found, strict=True):
        np.testing.assert_array_equal(out.mask[name], cut(tree, ones(tree), 0.5, one).mask[name])
    assert np.asarray(out.mask["conv1/kernel"]).all(axis=(0, 1, 2)).sum() == 2


def test_leaves_of_one_structure_compete():
    params = {"a": np.full((4, 4), 9.0, np.float32), "b": np.full((4, 4), 1.0, np.float32)}
    params["c"] = np.full((4, 4), 5.0, np.float32)
    out = cut(params, ones(params), 0.5, ByPath({"c": Unit()}))
    assert out.mask["a"].all()
    assert not out.mask["b"].any()
    assert np.asarray(out.mask["c"]).all(axis=0).sum() == 2


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Block(2, 3), r"leaf 'conv1/kernel' of shape \(3, 3, 2, 4\).*by Block\(rows=2"),
        (Unit(-3), r"leaf 'dense1/kernel' of shape \(8, 6\): it has no axis -3"),
        (Unit(gates=4), r"leaf 'dense1/kernel'.* whole units by Unit\("),
        (ByPath({"dense": Unit(size=4)}), r"leaf 'dense1/kernel' of shape"),
        (ByPath({"dens3": Unit()}), r"'dens3' matches no prunable leaf\. .*conv1/kernel, dense1"),
    ],
    ids=["block", "axis", "gates", "by-path", "no-match"],
)
def test_what_does_not_fit_is_named(structure, message):
    params = draw(8, **MIXED)
    with pytest.raises(ValueError, match=message):
        cut(params, ones(params), 0.5, structure)
    with pytest.raises(ValueError, match=message):
        pruning.event.check(params, structure=structure, allocation=pruning.Global())


def test_a_pattern_close_to_a_path_is_suggested():
    with pytest.raises(ValueError, match="Did you mean 'dense1/kernel'"):
        ByPath({"dense1/kernal": Unit()}).at(["dense1/kernel"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Block(0, 2), ValueError, "rows must be an integer >= 1, not 0"),
        (lambda: Block(2, 2.0), ValueError, "columns must be an integer"),
        (lambda: Block(2, 2, "max"), ValueError, "'sum' or 'mean', not 'max'"),
        (lambda: Unit(size=0), ValueError, "size must be an integer"),
        (lambda: Unit(gates=True), ValueError, "gates must be an integer"),
        (lambda: Unit(axis=0.5), TypeError, "axis must be an integer"),
        (lambda: ByPath({"(": Unit()}), ValueError, r"'\(' is not a regular expression"),
        (lambda: ByPath({"a": ByPath({})}), TypeError, "gives a leaf one structure"),
        (lambda: ByPath({"a": 3}), TypeError, "not 3"),
    ],
)
def test_bad_structures_are_refused_when_built(make, error, message):
    with pytest.raises(error, match=message):
        make()


@dataclass(frozen=True)
class Column:
    """A column of a matrix is cut as one."""

    def pool(self, scores):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), scores)

    def pool_mask(self, mask):
        return jax.tree.map(lambda x: jnp.any(x, axis=0), mask)

    def spread(self, units, mask):
        return trees.map_synapses(lambda m, u: jnp.broadcast_to(u, m.shape), mask, units)


WEIGHTS = {
    "w": jnp.array([[3.0, 0.1, 2.0, 0.0], [3.0, 0.1, 2.0, 5.0]]),
    "b": jnp.ones(4),
}


@pytest.mark.parametrize("structure", [Column(), Unit(), ByPath({"w": Column()})])
def test_a_structure_of_ones_own(structure):
    pruner = pruning.prune(0.5, structure=structure)
    updates, state = pruner.update(WEIGHTS, pruner.init(WEIGHTS), WEIGHTS)
    new = optax.apply_updates(WEIGHTS, updates)
    assert new["w"].tolist() == [[6.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 10.0]]
    assert int(pruning.record(state).kept) == 4
