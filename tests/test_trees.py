"""Paths, selection of leaves, and maps beside a mask."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from adaptivenet import trees

PARAMS = {
    "dense1": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
    "dense2": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)},
}
PATHS = ("dense1/bias", "dense1/kernel", "dense2/bias", "dense2/kernel")


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense1 = nnx.Linear(3, 4, rngs=rngs)
        self.dense2 = nnx.Linear(4, 2, rngs=rngs)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return linen.Dense(2, name="dense2")(linen.Dense(4, name="dense1")(inputs))


def spellings() -> dict:
    net = NnxNet()
    return {
        "dict": PARAMS,
        "linen": LinenNet().init(jax.random.key(0), jnp.ones((1, 3)))["params"],
        "nnx_module": net,
        "nnx_state": nnx.state(net, nnx.Param),
        "nnx_pure": nnx.as_pure(nnx.state(net, nnx.Param)),
        "nnx_dict": nnx.to_pure_dict(nnx.state(net, nnx.Param)),
    }


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


@pytest.mark.parametrize("kind", spellings())
def test_paths_are_alike_in_every_library(kind):
    tree = spellings()[kind]
    assert trees.paths(tree) == PATHS
    assert trees.paths(trees.synapses(tree)) == ("dense1/kernel", "dense2/kernel")
    assert trees.paths(trees.synapses(tree, "dense1")) == ("dense1/bias", "dense1/kernel")
    assert trees.size(tree) == 3 * 4 + 4 + 4 * 2 + 2


def test_paths_of_lists_tuples_and_scalars():
    assert trees.paths([1.0, (2.0, {"a": 3.0})]) == ("0", "1/0", "1/1/a")
    assert trees.paths(1.0) == ("",)
    assert trees.paths({}) == ()
    assert trees.paths({"a": optax.MaskedNode(), "b": None, "c": 1.0}) == ("c",)


def test_a_leaf_that_is_really_called_value_keeps_its_name():
    matrix = jnp.zeros((2, 2))
    assert trees.paths({"attention": {"value": matrix}}) == ("attention/value",)
    named = {"attention": Attention(matrix, matrix)}
    assert trees.paths(named) == ("attention/query", "attention/value")

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Param(matrix)
            self.inner = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))

    assert trees.paths(Net()) == ("inner/kernel", "value")
    assert trees.paths(nnx.state(Net())) == ("inner/kernel", "value")


def test_paths_of_equinox_modules():
    eqx = pytest.importorskip("equinox")

    class Head(eqx.Module):
        query: jax.Array
        value: jax.Array

    class Net(eqx.Module):
        head: Head
        out: eqx.nn.Linear

    matrix = jnp.ones((2, 2))
    net = Net(Head(matrix, matrix), eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    assert trees.paths(net) == ("head/query", "head/value", "out/weight", "out/bias")
    kept = trees.synapses(net, ["value", "weight"])
    assert trees.paths(kept) == ("head/value", "out/weight")
    assert isinstance(kept, Net)
    assert trees.is_masked(kept.head.query)


def test_paths_follow_the_order_of_leaves():
    tree = {"b": [jnp.zeros(1), jnp.ones(1)], "a": Attention(jnp.full(1, 2.0), jnp.full(1, 3.0))}
    by_name = dict(zip(trees.paths(tree), jax.tree.leaves(tree), strict=True))
    assert {name: leaf.item() for name, leaf in by_name.items()} == {
        "a/query": 2.0,
        "a/value": 3.0,
        "b/0": 0.0,
        "b/1": 1.0,
    }


def test_select_by_default_takes_floating_leaves_of_two_or_more_dimensions():
    tree = {
        "scalar": jnp.zeros(()),
        "vector": jnp.zeros(3),
        "matrix": jnp.zeros((2, 2), jnp.bfloat16),
        "filters": np.zeros((3, 3, 1, 2), np.float16),
        "table": jnp.zeros((2, 2), jnp.int32),
        "flags": jnp.zeros((2, 2), bool),
        "empty": jnp.zeros((0, 3)),
    }
    chosen = trees.select_leaves(tree)
    assert {name for name, is_chosen in chosen.items() if is_chosen} == {
        "matrix",
        "filters",
        "empty",
    }


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("kernel", ("dense1/kernel", "dense2/kernel")),
        ("^dense1/", ("dense1/bias", "dense1/kernel")),
        (["dense2/bias$", r"dense[1]/k"], ("dense1/kernel", "dense2/bias")),
        (("bias", "bias"), ("dense1/bias", "dense2/bias")),
        (".", PATHS),
    ],
)
def test_select_by_regular_expressions(select, expected):
    assert trees.paths(trees.synapses(PARAMS, select)) == expected


def test_a_pattern_that_matches_nothing_names_the_nearest_leaf():
    with pytest.raises(ValueError, match=r"select='dense1/kernl' matches no leaf") as caught:
        trees.select_leaves(PARAMS, ["kernel", "dense1/kernl"])
    assert "Did you mean 'dense1/kernel'?" in str(caught.value)
    assert "dense2/bias" in str(caught.value)
    with pytest.raises(ValueError, match="matches no leaf") as caught:
        trees.select_leaves(PARAMS, "#####")
    assert "Did you mean" not in str(caught.value)


def test_a_long_listing_is_cut():
    tree = {f"layer{place:02d}": jnp.zeros(2) for place in range(20)}
    with pytest.raises(ValueError, match=r"layer11, \.\.\. \(20 in all\)") as caught:
        trees.select_leaves(tree)
    assert "layer12" not in str(caught.value)


def test_without_a_matrix_the_message_asks_for_select():
    with pytest.raises(ValueError, match=r"name the leaves to prune with select=.*'?bias"):
        trees.select_leaves({"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"The leaves are: \(none\)"):
        trees.select_leaves({})


@pytest.mark.parametrize("leaf", [jnp.zeros((2, 2), jnp.int32), jnp.zeros(3, bool), 3, 2.0])
def test_a_chosen_leaf_that_is_no_floating_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"leaf 'embed/table' has dtype .*Narrow select="):
        trees.select_leaves({"embed": {"table": leaf}}, "table")


@pytest.mark.parametrize("select", ["(", ["kernel", "*"], [3]])
def test_what_is_no_regular_expression_is_refused(select):
    with pytest.raises(ValueError, match="is not a regular expression"):
        trees.select_leaves(PARAMS, select)


def test_an_empty_list_of_patterns_is_refused():
    with pytest.raises(ValueError, match=r"select=\[\] chooses nothing; leave it out"):
        trees.select_leaves(PARAMS, [])


def test_a_leaf_beyond_32_bit_positions_is_refused_without_allocating_it():
    largest = jax.ShapeDtypeStruct((trees.LARGEST_LEAF, 1), jnp.bfloat16)
    too_large = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    assert trees.select_leaves({"table": largest}) == {"table": True}
    with pytest.raises(ValueError, match=r"leaf 'table' has 4294967296 elements.*Split it"):
        trees.select_leaves({"table": too_large})
    # Leaves that are not chosen, and trees as a whole, may be of any size.
    tree = {"table": too_large, "head": [largest] * 3}
    assert trees.paths(trees.synapses(tree, "head")) == ("head/0", "head/1", "head/2")
    assert trees.size(tree) == 2**32 + 3 * (2**32 - 1)


def test_size_counts_shapes_scalars_and_nothing():
    assert trees.size({"a": 1.0, "b": jnp.zeros((0, 5)), "c": optax.MaskedNode()}) == 1


def test_synapses_is_idempotent_and_keeps_masked_nodes():
    once = trees.synapses(PARAMS)
    assert jax.tree.structure(trees.synapses(once)) == jax.tree.structure(once)
    assert trees.is_masked(once["dense1"]["bias"])
    assert once["dense1"]["kernel"] is PARAMS["dense1"]["kernel"]


def test_map_and_merge_treat_other_leaves_as_promised():
    mask = {"bias": optax.MaskedNode(), "kernel": jnp.array([True, False])}
    tree = {"bias": jnp.ones(3), "kernel": jnp.array([2.0, 3.0])}
    mapped = trees.map_synapses(lambda m, a, b: jnp.where(m, a, -b), mask, tree, tree)
    assert trees.is_masked(mapped["bias"])
    assert mapped["kernel"].tolist() == [2.0, -3.0]
    merged = trees.merge_synapses(lambda m, a, b: jnp.where(m, a, -b), mask, tree, tree)
    assert merged["bias"] is tree["bias"]
    assert merged["kernel"].tolist() == [2.0, -3.0]


@pytest.mark.parametrize("function", [trees.map_synapses, trees.merge_synapses])
def test_a_mask_of_another_tree_is_refused(function):
    mask = {"kernel": jnp.ones(2, bool)}
    with pytest.raises(ValueError, match=r"belongs to another tree.*kernel.*other.*Call init"):
        function(lambda m, x: x, mask, {"other": jnp.ones(2)})


def test_an_nnx_mask_beside_other_variables_says_what_to_do():
    net = NnxNet()
    mask = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    with pytest.raises(ValueError, match=r"nnx\.as_pure"):
        trees.map_synapses(lambda m, x: x, mask, nnx.to_pure_dict(nnx.state(net)) | {"a": 1.0})


def test_check_finite_names_the_leaf_and_passes_over_what_is_unknown():
    bad = {"a": jnp.ones(2), "b": {"kernel": jnp.array([jnp.nan, 1.0, jnp.nan])}}
    with pytest.raises(ValueError, match="score 'b/kernel' holds 2 nan of 3 elements"):
        trees.check_finite(bad, "score")
    with pytest.raises(ValueError, match="parameter 'w' holds 1 nan"):
        trees.check_finite({"w": np.array([np.nan], np.float16)})
    trees.check_finite({"w": jnp.array([jnp.inf]), "table": jnp.zeros(2, jnp.int32)})
    jax.jit(trees.check_finite)(bad)


def test_check_finite_knows_within_a_jit_what_is_known_outside():
    good, bad = {"w": jnp.ones(2)}, {"w": jnp.array([jnp.nan])}

    @jax.jit
    def within(x):
        trees.check_finite(good)
        with pytest.raises(ValueError, match="parameter 'w' holds 1 nan"):
            trees.check_finite(bad)
        return x

    assert within(1.0) == 1.0
    assert jax.vmap(within)(jnp.ones(2)).tolist() == [1.0, 1.0]


def node(name, *, fields=("value",), static=(), register=trees.register_dataclass):
    declared = [(field, object) for field in fields]
    declared += [
        (field, object, dataclasses.field(metadata={"static": True}, kw_only=True))
        for field in static
    ]
    return register(dataclasses.make_dataclass(name, declared, frozen=True))


def test_nodes_of_two_classes_never_have_equal_structures():
    # Of JAX's own, of which they have, 3 in 400 pairs ran the program of the wrong class.
    one, other, third = node("One"), node("Other"), node("Third", fields=("amount",))
    assert jax.tree.structure(one(1)) == jax.tree.structure(one(2))
    assert len({jax.tree.structure(kind(1)) for kind in (one, other, third)}) == 3
    assert jax.tree.structure(one(1)) != jax.tree.structure(other(1))
    assert jax.tree.structure(one(1)) != jax.tree.structure(third(1))
    assert jax.tree.structure(one(third(1))) != jax.tree.structure(other(third(1)))


def test_a_node_is_as_jax_would_register_it():
    layouts = {"fields": ("values", "scale"), "static": ("shape",)}
    ours = node("Ours", **layouts)
    theirs = node("Theirs", **layouts, register=jax.tree_util.register_dataclass)  # noqa: TID251
    mine, plain = (kind({"a": 1.0, "b": 2.0}, 3.0, shape=(2,)) for kind in (ours, theirs))
    with_paths = jax.tree.leaves_with_path
    assert with_paths(mine) == with_paths(plain)
    assert trees.paths(mine) == ("values/a", "values/b", "scale")
    doubled = jax.tree.map(lambda x: 2 * x, mine)
    assert doubled == ours({"a": 2.0, "b": 4.0}, 6.0, shape=(2,))
    # What is static is part of the structure.
    reshaped = dataclasses.replace(mine, shape=(3,))
    assert jax.tree.structure(reshaped) != jax.tree.structure(mine)
    with pytest.raises(TypeError):
        trees.register_dataclass(int)
