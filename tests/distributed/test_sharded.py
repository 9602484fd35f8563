"""Eight host devices: the same bits as on one, and nothing is gathered.

Runs in a process of its own (`make test` starts it)::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/distributed
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adaptivenet import pruning, selection, testing

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 in a fresh process",
)

GATHERS = ("all-gather", "all-to-all", "collective-permute")
AXES = ("rows", "columns")
SHAPES = {"a": (16, 12), "b": (8, 4, 6), "c": (24,)}
SPECS = {"a": ("rows", "columns"), "b": ("rows", None, "columns"), "c": ("rows",)}


def mesh_of(kind):
    return jax.make_mesh((4, 2), AXES, axis_types=(kind, kind))


def scores(decimals=1):
    """Rounded, so that there are many ties, across leaves and across devices."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).round(decimals).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def spread(tree, mesh):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*SPECS[name])))
        for name, leaf in tree.items()
    }


def test_eight_devices_are_there():
    assert jax.device_count() >= 8


# A scatter, which the histogram is, has no sharding rule on Explicit axes: there "auto" bisects.
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (AxisType.Auto, "auto"),
        (AxisType.Auto, "bisection"),
        (AxisType.Explicit, "auto"),
        (AxisType.Explicit, "bisection"),
    ],
)
def test_selection_on_a_mesh_is_selection_on_one_device(kind, method):
    mesh = mesh_of(kind)
    values = scores()
    size = sum(leaf.size for leaf in values.values())
    find = jax.jit(lambda s, k: selection.select(s, k, method=method))
    with jax.set_mesh(mesh):
        sharded = spread(values, mesh)
        compiled = find.lower(sharded, jnp.int32(0)).compile().as_text()
        results = [jax.device_get(find(sharded, k)) for k in (0, 1, 77, 200, size - 1, size)]
    for k, found in zip((0, 1, 77, 200, size - 1, size), results, strict=True):
        alone = jax.device_get(find(values, k))
        assert found.threshold.tobytes() == alone.threshold.tobytes()
        for name in SHAPES:
            np.testing.assert_array_equal(found.mask[name], alone.mask[name])
        assert sum(int(m.sum()) for m in found.mask.values()) == k
    assert "all-reduce" in compiled
    for gather in GATHERS:
        assert gather not in compiled


def test_selection_with_where_and_nan_on_a_mesh():
    mesh = mesh_of(AxisType.Auto)
    values = scores()
    values["a"][::3, 1] = np.nan
    rng = np.random.default_rng(1)
    where = {name: rng.random(shape) < 0.7 for name, shape in SHAPES.items()}
    alone = selection.top_mask(values, 250, where=where)
    both = selection.top_mask(spread(values, mesh), 250, where=spread(where, mesh))
    for name in SHAPES:
        np.testing.assert_array_equal(both[name], alone[name])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_an_event_on_a_mesh_is_an_event_on_one_device(kind):
    params = scores(2)
    pruner = pruning.prune(0.8, every=None)

    @jax.jit
    def event(params):
        params, state = pruning.revise(pruner, params, pruner.init(params))
        return params, pruning.mask(state), pruning.record(state)

    alone = jax.device_get(event(params))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = spread(params, mesh)
        together = event(sharded)
        compiled = event.lower(sharded).compile().as_text()
    for name in ("a", "b"):
        # Neither parameters nor masks lose their sharding on the way.
        for tree in together[:2]:
            assert tree[name].sharding.is_equivalent_to(sharded[name].sharding, tree[name].ndim)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for gather in GATHERS:
        assert gather not in compiled


RULES = {
    "magnitude": lambda s: optax.chain(optax.sgd(0.1), pruning.prune(s)),
    "cubic": lambda s: optax.chain(
        optax.adam(1e-2), pruning.prune(pruning.cubic(s, 0, 5), every=2)
    ),
    "uniform": lambda s: optax.chain(
        optax.sgd(0.1), pruning.prune(pruning.percentile(20.0), allocation=pruning.Uniform())
    ),
    "random": lambda s: optax.chain(optax.sgd(0.1), pruning.prune(s, score=pruning.random)),
    "evolving": lambda s: optax.chain(
        optax.sgd(0.1), pruning.prune(s, regrow=pruning.at_random(0.3), ages=True)
    ),
    "founding note": lambda s: optax.chain(
        optax.sgd(0.1), pruning.prune(pruning.threshold(0.3), regrow=pruning.everything())
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_contract_on_eight_devices(name):
    testing.check_sharded(RULES[name], steps=4)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_contract_on_fewer_devices(number):
    testing.check_sharded(RULES["magnitude"], steps=2, devices=jax.devices()[:number])


def test_a_leaf_that_is_gathered_is_caught(monkeypatch):
    whole = NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    apply = optax.apply_updates

    def gathering(params, updates):
        new = apply(params, updates)
        return jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, whole), new)

    monkeypatch.setattr(optax, "apply_updates", gathering)
    with pytest.raises(testing.ContractError, match=r"sharded: leaf '.*' was gathered"):
        testing.check_sharded(RULES["magnitude"], steps=1)


def test_a_rule_that_depends_on_the_layout_is_caught():
    traces = iter((0.0, 1e-3))

    def uneven(strength):
        # jit traces once for the one device and once for the mesh.
        def update(updates, state, params=None):
            shift = jnp.float32(next(traces))
            return jax.tree.map(lambda u: u + shift, updates), state

        return optax.GradientTransformation(lambda params: (), update)

    with pytest.raises(testing.ContractError, match=r"8 devices: leaf '.*' is not identical"):
        testing.check_sharded(uneven, steps=1)
