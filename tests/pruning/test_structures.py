"""Structures: the unstructured one, and that `prune` relies on nothing but the protocol."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from adaptivenet import pruning, trees


def test_element_changes_nothing():
    tree = {"w": jnp.ones((2, 2)), "b": optax.MaskedNode()}
    element = pruning.Element()
    assert element.pool(tree) is tree
    assert element.pool_mask(tree) is tree
    assert element.spread(tree, None) is tree
    assert element == pruning.Element()


@dataclass(frozen=True)
class Column:
    """A column of a matrix is cut as one."""

    def pool(self, scores):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), scores)

    def pool_mask(self, mask):
        return jax.tree.map(lambda x: jnp.any(x, axis=0), mask)

    def spread(self, units, mask):
        return trees.map_synapses(lambda m, u: jnp.broadcast_to(u, m.shape), mask, units)


def test_a_structure_of_ones_own():
    params = {
        "w": jnp.array([[3.0, 0.1, 2.0, 0.0], [3.0, 0.1, 2.0, 5.0]]),
        "b": jnp.ones(4),
    }
    pruner = pruning.prune(0.5, structure=Column())
    updates, state = pruner.update(params, pruner.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["w"].tolist() == [[6.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 10.0]]
    assert int(pruning.record(state).kept) == 4
