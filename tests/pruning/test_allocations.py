"""Allocations against a numpy oracle: exact counts for every leaf."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import pruning
from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import Fixed, PerPath
from adaptivenet.pruning.demands import AtLeast, OfAlive, Sparsity
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from tests.pruning import events

SHAPES = {"a": (7, 9), "b": (5, 5), "c": (31, 4)}
SIZES = [63, 25, 124]


def leaves(seed=0):
    rng = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    return {n: rng.normal(size=s).round(1).astype(np.float32) for n, s in SHAPES.items()}


def cut(params, mask, demand, allocation):
    return events.cut(params, mask, demand, allocation=allocation)


def oracle(params, mask, keep):
    """Keeps the largest living ones by a stable sort, ties by position."""
    flat = np.concatenate([np.abs(x).ravel() for x in params.values()])
    alive = np.concatenate([np.asarray(mask[name]).ravel() for name in params])
    order = np.argsort(np.where(alive, -flat, np.inf), kind="stable")
    kept = np.zeros(flat.size, bool)
    kept[order[: min(keep, alive.sum())]] = True
    parts = np.split(kept, np.cumsum([x.size for x in params.values()])[:-1])
    return {n: p.reshape(x.shape) for (n, x), p in zip(params.items(), parts, strict=True)}


def rounded(share, number):
    return int(Fraction(share) * number + Fraction(1, 2))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.95, 0.999])
def test_global_keeps_the_exact_count_of_the_tree(sparsity):
    params = leaves()
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(sparsity)), pruning.Global())
    keep = sum(SIZES) - rounded(sparsity, sum(SIZES))
    expected = oracle(params, mask, keep)
    for name, want in expected.items():
        np.testing.assert_array_equal(out.mask[name], want)
        np.testing.assert_array_equal(out.kept[name], want)
    assert sum(int(m.sum()) for m in out.mask.values()) == keep
    if keep:
        lowest = min(np.abs(params[n])[expected[n]].min() for n in params if expected[n].any())
        assert float(out.threshold) == lowest
    else:
        assert np.isinf(out.threshold)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.95, 0.999])
def test_uniform_keeps_the_exact_count_of_every_leaf(sparsity):
    params = leaves(1)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(sparsity)), pruning.Uniform())
    for (name, leaf), size in zip(params.items(), SIZES, strict=True):
        keep = size - rounded(sparsity, size)
        want = oracle({name: leaf}, mask, keep)[name]
        assert want.sum() == keep
        np.testing.assert_array_equal(out.mask[name], want)


@pytest.mark.parametrize("allocation", [pruning.Global(), pruning.Uniform()])
def test_a_share_of_the_living_is_cut_where_they_compete(allocation):
    params = leaves(2)
    rng = np.random.default_rng(3)
    mask = {name: jnp.asarray(rng.random(shape) < 0.6) for name, shape in SHAPES.items()}
    out = cut(params, mask, OfAlive(as_share(0.2)), allocation)
    groups = [list(SHAPES)] if isinstance(allocation, pruning.Global) else [[n] for n in SHAPES]
    for names in groups:
        alive = sum(int(mask[name].sum()) for name in names)
        want = oracle({n: params[n] for n in names}, mask, alive - rounded(0.2, alive))
        for name in names:
            np.testing.assert_array_equal(out.mask[name], want[name])


@pytest.mark.parametrize("allocation", [pruning.Global(), pruning.Uniform()])
def test_a_threshold_means_the_same_everywhere(allocation):
    params = leaves(4)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, AtLeast(jnp.float32(0.5)), allocation)
    for name, leaf in params.items():
        np.testing.assert_array_equal(out.mask[name], np.abs(leaf) >= np.float32(0.5))


def test_a_threshold_of_zero_keeps_the_living_even_if_they_are_nan():
    params = {"a": np.array([[0.0, np.nan, 1.0]], np.float32)}
    mask = {"a": jnp.array([[True, True, False]])}
    out = cut(params, mask, AtLeast(jnp.float32(0.0)), pruning.Global())
    assert out.mask["a"].tolist() == [[True, True, False]]


def test_an_allocation_of_ones_own():
    @dataclass(frozen=True)
    class FirstAlone:
        def groups(self, sizes):
            return ((0,), tuple(range(1, len(sizes))))

    params = leaves(5)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(0.5)), FirstAlone())
    assert int(out.mask["a"].sum()) == 63 - rounded(0.5, 63)
    assert int(out.mask["b"].sum() + out.mask["c"].sum()) == 149 - rounded(0.5, 149)


def test_every_leaf_is_in_exactly_one_group():
    for sizes in ([], [3], [3, 0, 5]):
        for allocation in (pruning.Global(), pruning.Uniform()):
            members = [place for group in allocation.groups(sizes) for place in group]
            assert sorted(members) == list(range(len(sizes)))


def full():
    return {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}


def with_floors(params, mask, keep, floors):
    """The best of each leaf up to its floor, then the best of all others."""
    forced = {n: oracle({n: params[n]}, mask, floors[n])[n] for n in params}
    others = {n: np.asarray(mask[n]) & ~forced[n] for n in params}
    rest = max(keep - sum(int(leaf.sum()) for leaf in forced.values()), 0)
    best = oracle(params, others, rest)
    return {n: forced[n] | best[n] for n in params}


FLOORS = [
    (pruning.Global(floor=3), {"a": 3, "b": 3, "c": 3}),
    (pruning.Global(floor_share=0.1), {"a": 6, "b": 3, "c": 12}),
    (pruning.Global(floor=4, floor_share=0.1), {"a": 6, "b": 4, "c": 12}),
    (pruning.Global(floor=30), {"a": 30, "b": 25, "c": 30}),
]


@pytest.mark.parametrize(("allocation", "floors"), FLOORS, ids=str)
def test_floors_are_met_first(allocation, floors):
    params = leaves(6)
    params["b"] = params["b"] * np.float32(0.01)  # a leaf that would be emptied
    shares = [0.0, 0.5, 0.9, 0.99]
    out = jax.vmap(lambda s: cut(params, full(), Sparsity(as_share(s)), allocation))(
        jnp.asarray(shares, jnp.float32)
    )
    for place, share in enumerate(shares):
        keep = sum(SIZES) - rounded(np.float32(share).item(), sum(SIZES))
        expected = with_floors(params, full(), keep, floors)
        kept = np.concatenate([np.abs(params[n])[expected[n]] for n in SHAPES])
        for name, floor in floors.items():
            np.testing.assert_array_equal(out.mask[name][place], expected[name])
            assert int(out.mask[name][place].sum()) >= floor
        assert kept.size == max(keep, sum(floors.values()))
        assert float(out.threshold[place]) == kept.min()


def test_floors_that_are_met_anyway_change_nothing():
    params = leaves(7)
    plain = cut(params, full(), Sparsity(as_share(0.5)), pruning.Global())
    assert min(int(leaf.sum()) for leaf in plain.mask.values()) >= 5
    floored = cut(params, full(), Sparsity(as_share(0.5)), pruning.Global(floor=5))
    for name in SHAPES:
        np.testing.assert_array_equal(floored.mask[name], plain.mask[name])
    assert float(floored.threshold) == float(plain.threshold)


def test_floors_count_the_living_only():
    params = leaves(8)
    rng = np.random.default_rng(9)
    mask = {name: jnp.asarray(rng.random(shape) < 0.2) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(0.95)), pruning.Global(floor=10))
    expected = with_floors(
        params, mask, sum(SIZES) - rounded(0.95, sum(SIZES)), dict.fromkeys(SHAPES, 10)
    )
    for name in SHAPES:
        np.testing.assert_array_equal(out.mask[name], expected[name])


def test_floors_of_every_leaf_by_itself_and_under_a_threshold():
    params = leaves(10)
    out = cut(params, full(), Sparsity(as_share(0.99)), pruning.Uniform(floor=4))
    assert [int(out.mask[name].sum()) for name in SHAPES] == [4, 4, 4]
    out = cut(params, full(), AtLeast(jnp.float32(2.0)), pruning.Global(floor=4))
    for name, leaf in params.items():
        best = oracle({name: leaf}, full(), 4)[name]
        np.testing.assert_array_equal(out.mask[name], best | (np.abs(leaf) >= 2))


def test_a_population_of_floors():
    params = leaves(11)
    shares = jnp.array([0.0, 0.1, 0.4], jnp.float32)

    def member(share):
        allocation = pruning.Global(floor_share=share)
        demand = Sparsity(as_share(0.9))
        out = events.cut.__wrapped__(params, full(), demand, allocation=allocation)
        return out.mask["b"].sum()

    plain = int(cut(params, full(), Sparsity(as_share(0.9)), pruning.Global()).mask["b"].sum())
    assert plain < 10
    found = jax.jit(jax.vmap(member))(shares).tolist()
    assert found == [max(plain, least) for least in (0, 3, 10)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pruning.Global(floor=-1), "floor must be a number of units >= 0, not -1"),
        (lambda: pruning.Uniform(floor=0.5), "floor must be a number of units"),
        (lambda: pruning.Global(floor_share=1.0), r"floor_share must be in \[0, 1\), not 1.0"),
        (lambda: Fixed(1.0), "sparsity must be a sparsity in"),
        (lambda: PerPath({"a": 1.5}), r"rule of 'a' must be a multiplier in \[0, 1\]"),
        (lambda: PerPath({"a": "dense"}), "rule of 'a'"),
        (lambda: PerPath({"a": True}), "rule of 'a'"),
        (lambda: PerPath({"[": 0.5}), r"'\[' is not a regular expression"),
    ],
)
def test_bad_allocations_are_refused_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_of_their_own_for_some_leaves():
    params = leaves(12)
    rules = PerPath([("a", 0.5), ("[ac]", Fixed(0.75))], default=pruning.Uniform())
    out = cut(params, full(), Sparsity(as_share(0.6)), rules)
    for name, sparsity in (("a", 0.3), ("c", 0.75), ("b", 0.6)):
        size = params[name].size
        want = oracle({name: params[name]}, full(), size - rounded(sparsity, size))[name]
        np.testing.assert_array_equal(out.mask[name], want)


def test_leaves_without_a_rule_compete_by_the_default():
    params = leaves(13)
    out = cut(params, full(), Sparsity(as_share(0.6)), PerPath({"b": 0}))
    assert out.mask["b"].all()
    rest = {name: params[name] for name in ("a", "c")}
    want = oracle(rest, full(), 187 - rounded(0.6, 187))
    for name, leaf in want.items():
        np.testing.assert_array_equal(out.mask[name], leaf)
    # With a rule for every leaf nothing is left to the default.
    alone = cut(params, full(), Sparsity(as_share(0.6)), PerPath({".": 1.0}))
    uniform = cut(params, full(), Sparsity(as_share(0.6)), pruning.Uniform())
    for name in SHAPES:
        np.testing.assert_array_equal(alone.mask[name], uniform.mask[name])


def test_rules_of_a_share_of_the_living_and_of_a_threshold():
    params, rules = leaves(14), PerPath({"a": 0.5, "b": Fixed(0.8)})
    out = cut(params, full(), OfAlive(as_share(0.4)), rules)
    assert [int(out.mask[n].sum()) for n in SHAPES] == [63 - 13, 5, 124 - 50]
    out = cut(params, full(), AtLeast(jnp.float32(1.0)), rules)
    np.testing.assert_array_equal(out.mask["a"], np.abs(params["a"]) >= 0.5)
    np.testing.assert_array_equal(out.mask["c"], np.abs(params["c"]) >= 1.0)
    assert int(out.mask["b"].sum()) == 5
    # A schedule that asks for nothing yet leaves fixed leaves as they are, too.
    assert cut(params, full(), Sparsity(as_share(0.0)), rules).mask["b"].all()


def test_a_population_of_multipliers():
    params = leaves(15)

    def member(rule):
        demand = Sparsity(as_share(0.8))
        allocation = PerPath({"a": rule})
        out = events.cut.__wrapped__(params, full(), demand, allocation=allocation)
        return out.mask["a"].sum()

    found = jax.jit(jax.vmap(member))(jnp.array([0.0, 0.5, 1.0], jnp.float32))
    assert found.tolist() == [63, 63 - 25, 63 - 50]


def test_patterns_that_match_nothing_are_named():
    params = leaves(16)
    for allocation in (PerPath({"a": 0.5, "decoder": 0.1}), PerPath({"z": Fixed(0.5)})):
        with pytest.raises(ValueError, match=r"PerPath: '(decoder|z)' matches no prunable leaf"):
            cut(params, full(), Sparsity(as_share(0.5)), allocation)
        with pytest.raises(ValueError, match="matches no prunable leaf"):
            pruning.event.check(params, structure=pruning.Element(), allocation=allocation)


@pytest.mark.parametrize(
    "allocation",
    [
        pruning.Uniform(),
        ErdosRenyiKernel(),
        PerPath({"thin": 1.0}),
        PerPath({"w": 0.0}, default=pruning.Uniform()),
    ],
    ids=str,
)
def test_a_target_that_would_empty_a_leaf_is_refused(allocation):
    params = {"wide": jnp.ones((50, 50)), "thin": jnp.ones((1, 4))}
    if isinstance(allocation, ErdosRenyiKernel):
        params = {"wide": jnp.ones((50, 50)), "thin": jnp.ones((1, 1))}
        target = 0.9999
    else:
        target = 0.9
    element = pruning.Element()
    with pytest.raises(
        ValueError, match=rf"{target:g} leaves none of the \d+ units of leaf 'thin'"
    ):
        pruning.event.check(params, structure=element, allocation=allocation, target=target)
    pruning.event.check(params, structure=element, allocation=allocation, target=0.5)
    pruning.event.check(params, structure=element, allocation=allocation)


def test_what_cannot_be_known_before_is_not_refused():
    params = {"wide": jnp.ones((50, 50)), "thin": jnp.ones((1, 4))}
    check = functools.partial(pruning.event.check, params, structure=pruning.Element())
    check(allocation=pruning.Global(), target=0.99)
    check(allocation=pruning.Uniform(floor=1), target=0.99)
    with pytest.raises(ValueError, match="leaves none of the 2504 units of leaf 'thin', 'wide'"):
        check(allocation=pruning.Global(), target=0.9999)
    # A target that is traced cannot be judged; neither can a population within jit.
    jax.jit(lambda s: check(allocation=pruning.Uniform(), target=s))(0.99)
    with pytest.raises(ValueError, match="leaves none"):
        jax.jit(
            lambda p: pruning.event.check(
                p, structure=pruning.Element(), allocation=pruning.Uniform(), target=0.99
            )
        )(params)
