"""Events that cut and wake: counts stay exact and structures stay whole, whatever happens."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import Count, as_count, as_share
from adaptivenet.pruning import competition
from adaptivenet.pruning.allocations import Contest, Field, Fixed, Leaf, PerPath
from adaptivenet.pruning.budgets import Budget
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from adaptivenet.pruning.rowwise import FanIn, NofM
from adaptivenet.pruning.structures import Block, ByPath, Unit


@dataclass(frozen=True)
class Noise:
    """Wakes at random, or where a signal says."""

    fraction: Any = 0.0
    redistribute: bool = False

    def priority(self, params, *, key, wanted=None, **signals):
        return pruning.random(params, key=key) if wanted is None else wanted


STATIC = ("structure", "allocation", "regrow", "may_grow")


@functools.partial(jax.jit, static_argnames=STATIC)
def _cut(params, mask, sparsity, fraction, seed, structure, allocation, regrow, may_grow, signals):
    return pruning.cut_and_wake(
        jax.tree.map(lambda p, m: jnp.where(m, p, 0.0), params, mask),
        mask,
        pruning.Sparsity(as_share(sparsity)),
        score=pruning.magnitude,
        structure=structure,
        allocation=allocation,
        regrow=regrow if fraction is None else replace(regrow, fraction=fraction),
        may_grow=may_grow,
        key=jax.random.key(seed),
        signals=signals,
    )


def cut(params, mask, sparsity, structure, allocation, regrow, seed=0, may_grow=False, **signals):
    """An event; rules that differ in their fraction alone are one program."""
    fraction = None
    if isinstance(regrow, Noise) and not callable(regrow.fraction):
        fraction, regrow = jnp.float32(regrow.fraction), replace(regrow, fraction=0.0)
    fixed = (structure, allocation, regrow, may_grow)
    return _cut(params, mask, sparsity, fraction, seed, *fixed, signals)


ELEMENT, GLOBAL = pruning.Element(), pruning.Global()
SHAPES = {"conv": (3, 3, 4, 2), "dense": (8, 12), "last": (12, 4)}
SIZE = 72 + 96 + 48


def draw(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}


def full():
    return {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}


def rounded(share, number):
    return int(Fraction(float(share)) * number + Fraction(1, 2))


def numbers(mask):
    return {name: int(np.asarray(leaf).sum()) for name, leaf in mask.items()}


def rows_of(structure, leaf):
    return np.asarray(structure.fold(jnp.asarray(leaf))).sum(axis=-1)


def fits(structure, name, mask, sparsity):
    """Whether a mask of a leaf is one that the structure allows, at this sparsity."""
    size = mask.size
    if isinstance(structure, Unit | Block):
        folded = np.asarray(structure.fold(jnp.asarray(mask)))
        units = folded.any(axis=-1)
        return (folded.all(axis=-1) == units).all()
    if isinstance(structure, FanIn):
        rows, length = structure.fold(jnp.asarray(mask)).shape
        k = max(1, int((size - rounded(sparsity, size)) / rows + 0.5))
        return (rows_of(structure, mask) == min(k, length)).all()
    if isinstance(structure, NofM):
        n = structure.n or max(1, -(-(size - rounded(sparsity, size)) * structure.m // size))
        return (rows_of(structure, mask) == n).all()
    return True


STRUCTURES = {
    "element": ELEMENT,
    "2:4": NofM(2, 4),
    "n:4": NofM(m=4),
    "fan-in": FanIn(),
    "block": Block(2, 2),
    "unit": Unit(),
    "mixed": ByPath({"conv": Unit(), "dense": NofM(2, 4)}, FanIn()),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_stay_whole_through_events(name):
    """Down and up again, with a third woken at random at every event."""
    structure, mask, rule = STRUCTURES[name], full(), Noise(0.3)
    params = draw(0)
    for turn, sparsity in enumerate([0.2, 0.5, 0.5, 0.8, 0.6, 0.75]):
        share = jnp.float32(sparsity)
        out = cut(params, mask, share, structure, GLOBAL, rule, turn)
        found = structure.at(list(SHAPES)) if name == "mixed" else [structure] * 3
        for (leaf, was), one in zip(mask.items(), found, strict=True):
            kept, new = np.asarray(out.kept[leaf]), np.asarray(out.mask[leaf])
            assert not np.any(kept & ~np.asarray(was))
            assert not np.any(kept & ~new)
            assert fits(one, leaf, new, share), (leaf, sparsity)
        mask = out.mask
        # Some wake in the units of each structure, once there are dead ones.
        whole = sum(numbers(mask).values()) == SIZE
        assert whole == (sum(numbers(out.kept).values()) == sum(numbers(mask).values()))
        if name == "element":
            assert sum(numbers(mask).values()) == SIZE - rounded(share, SIZE)
        if name == "block":
            assert sum(numbers(mask).values()) == 4 * (54 - rounded(share, 54))


@settings(max_examples=12)
@given(
    targets=st.lists(st.floats(0, 0.9375, width=32), min_size=1, max_size=4),
    fraction=st.sampled_from([0.0, 0.25]),
    rule=st.sampled_from([(GLOBAL, False), (pruning.Uniform(), False), (ErdosRenyiKernel(), True)]),
)
def test_counts_stay_exact_through_events(targets, fraction, rule):
    allocation, redistribute = rule
    mask, params = full(), draw(1)
    regrow = Noise(fraction, redistribute)
    for turn, target in enumerate(targets):
        share = jnp.float32(target)
        out = cut(params, mask, share, ELEMENT, allocation, regrow, turn)
        living, kept = sum(numbers(mask).values()), sum(numbers(out.kept).values())
        wanted = SIZE - rounded(share, SIZE)
        if isinstance(allocation, pruning.Uniform):
            wanted = sum(leaf.size - rounded(share, leaf.size) for leaf in mask.values())
            for name, leaf in out.mask.items():
                assert numbers(out.mask)[name] == leaf.size - rounded(share, leaf.size)
        else:
            number = min(wanted, living)
            if not redistribute:
                assert kept == number - rounded(fraction, number)
        assert sum(numbers(out.mask).values()) == wanted
        mask = out.mask


def test_a_row_wise_leaf_drops_its_worst_and_every_row_fills_up():
    rng = np.random.default_rng(2)
    params = {"w": np.concatenate([rng.uniform(1, 2, (6, 2)), rng.uniform(5, 9, (6, 2))], axis=1)}
    params = jax.tree.map(jnp.float32, params)
    mask = {"w": jnp.asarray(np.tril(np.ones((6, 4), bool), -2))}
    mask["w"] = mask["w"].at[:3].set(True).at[3:].set(False)
    wish = {"w": jnp.asarray(rng.random((6, 4)), jnp.float32)}
    out = cut(params, mask, 0.5, FanIn(), GLOBAL, Noise(0.5), wanted=wish)
    # 6 of 12 give way: all of the two outputs of small weights, as in SRigL, not half of each.
    assert np.asarray(out.kept["w"]).sum(axis=0).tolist() == [0, 0, 3, 3]
    assert np.asarray(out.mask["w"]).sum(axis=0).tolist() == [3, 3, 3, 3]
    for output in (0, 1):
        best = np.argsort(-np.asarray(wish["w"])[:, output], kind="stable")[:3]
        assert sorted(np.flatnonzero(out.mask["w"][:, output])) == sorted(best)


def test_woken_synapses_of_all_leaves_compete_where_the_rule_redistributes():
    params = draw(3)
    first = cut(params, full(), 0.5, ELEMENT, pruning.Uniform(), None)
    wish = {"conv": 0.1, "dense": 0.2, "last": 0.9}
    wish = {n: jnp.full(SHAPES[n], value) for n, value in wish.items()}
    apart = cut(params, first.mask, 0.5, ELEMENT, pruning.Uniform(), Noise(0.25), wanted=wish)
    assert numbers(apart.mask) == {"conv": 36, "dense": 48, "last": 24}
    rule = Noise(0.25, redistribute=True)
    together = cut(params, first.mask, 0.5, ELEMENT, pruning.Uniform(), rule, wanted=wish)
    assert numbers(together.kept) == {"conv": 27, "dense": 36, "last": 18}
    # 27 wake: all 30 dead of the last leaf want it most.
    assert numbers(together.mask) == {"conv": 27, "dense": 36, "last": 45}
    # What has moved stays, and moves on.
    again = cut(params, together.mask, 0.5, ELEMENT, pruning.Uniform(), Noise(0, True), wanted=wish)
    assert numbers(again.mask) == numbers(together.mask)
    # As the target falls, leaves give up in proportion to what they have beyond their own count.
    fallen = cut(
        params, together.mask, 0.75, ELEMENT, pruning.Uniform(), Noise(0, True), wanted=wish
    )
    assert sum(numbers(fallen.mask).values()) == 54
    assert numbers(fallen.mask)["last"] == 12
    lower = cut(params, together.mask, 0.6, ELEMENT, pruning.Uniform(), Noise(0, True), wanted=wish)
    wanted = 216 - 130 + 0  # 29, 38 and 19 of the leaves
    assert sum(numbers(lower.mask).values()) == wanted
    assert numbers(lower.mask)["last"] > 19


@jax.jit
def exchanged(living, asked):
    leaves = tuple(Leaf(str(place), (1,), jnp.float32, 2**32 - 1) for place in range(3))
    contests = [Contest((place,), as_count(asked[place])) for place in range(3)]
    return [keep.limbs for keep in competition.exchanged(contests, Field(leaves, living))]


@settings(max_examples=200)
@given(
    living=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    asked=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    close=st.booleans(),
)
def test_what_is_exchanged_never_exceeds_the_total(living, asked, close):
    """At sizes that float32 cannot count, and where nearly all or nearly nothing is given up."""
    if close:
        asked = [max(number - place, 0) for place, number in enumerate(living)]
    limbs = exchanged(jnp.asarray(living, jnp.uint32), jnp.asarray(asked, jnp.uint32))
    cuts = [int(Count(row)) for row in limbs]
    excess = sum(living) - sum(asked)
    assert all(cut <= alive for cut, alive in zip(cuts, living, strict=True))
    if excess <= 0:
        assert cuts == living
        return
    assert sum(cuts) <= sum(asked)
    over = [max(alive - own, 0) for alive, own in zip(living, asked, strict=True)]
    for cut, alive, beyond in zip(cuts, living, over, strict=True):
        given_up = beyond * excess / sum(over)
        assert alive - cut == pytest.approx(given_up, rel=1e-5, abs=2)
        assert cut >= alive - beyond


def test_the_first_event_of_a_rule_that_redistributes_follows_the_allocation():
    params = draw(4)
    rule = Noise(0.0, redistribute=True)
    for allocation in (pruning.Uniform(), ErdosRenyiKernel()):
        out = cut(params, full(), 0.7, ELEMENT, allocation, rule)
        plain = cut(params, full(), 0.7, ELEMENT, allocation, None)
        for name in SHAPES:
            np.testing.assert_array_equal(out.mask[name], plain.mask[name])


def test_redistribution_spares_rules_of_their_own_and_structures():
    params = draw(5)
    wish = {n: jnp.full(shape, 1.0) for n, shape in SHAPES.items()}
    rules = PerPath({"last": Fixed(0.5)}, default=pruning.Uniform())
    first = cut(params, full(), 0.75, ELEMENT, rules, None)
    out = cut(params, first.mask, 0.75, ELEMENT, rules, Noise(0.5, True), wanted=wish)
    assert numbers(out.mask)["last"] == 24
    assert numbers(out.mask)["conv"] + numbers(out.mask)["dense"] == 18 + 24
    assert numbers(out.mask) != numbers(first.mask)
    # Leaves of unlike structures have no common unit to exchange.
    mixed = ByPath({"conv": Unit(), "dense": NofM(2, 4)})
    first = cut(params, full(), 0.5, mixed, pruning.Uniform(), None)
    out = cut(params, first.mask, 0.5, mixed, pruning.Uniform(), Noise(0.5, True), wanted=wish)
    assert numbers(out.mask) == numbers(first.mask) == {"conv": 36, "dense": 48, "last": 24}


def test_redistribution_never_exceeds_a_budget():
    params, costs = draw(6), {"conv": 5, "dense": 5, "last": 2}
    allocation = Budget(costs)
    first = cut(params, full(), 0.5, ELEMENT, allocation, None)
    wish = {"conv": 0.9, "dense": 0.1, "last": 0.5}
    wish = {n: jnp.full(SHAPES[n], value) for n, value in wish.items()}
    out = cut(params, first.mask, 0.5, ELEMENT, allocation, Noise(0.3, True), wanted=wish)
    before, after = numbers(first.mask), numbers(out.mask)
    # Those of one cost exchange; what the first event left unspent is spent.
    assert after["conv"] > before["conv"]
    assert after["conv"] + after["dense"] == before["conv"] + before["dense"]
    whole = 5 * (72 + 96) + 2 * 48
    assert whole / 2 - 2 < sum(costs[n] * after[n] for n in costs) <= whole / 2


def test_floors_hold_while_synapses_wake():
    params = draw(7)
    params["last"] = params["last"] * np.float32(1e-3)
    allocation = pruning.Global(floor=5)
    mask = full()
    for turn in range(3):
        out = cut(params, mask, 0.8, ELEMENT, allocation, Noise(0.3), turn)
        assert numbers(out.kept)["last"] >= 5
        assert sum(numbers(out.mask).values()) == SIZE - rounded(0.8, SIZE)
        mask = out.mask


def test_a_fraction_may_be_a_function_of_the_step():
    params = draw(8)

    def cosine(step):
        return 0.25 * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / 4))

    for step, fraction in ((0, 0.5), (2, 0.25), (4, 0.0)):
        out = cut(params, full(), 0.5, ELEMENT, GLOBAL, Noise(cosine), step=jnp.int32(step))
        assert sum(numbers(out.kept).values()) == 108 - rounded(fraction, 108)
        assert sum(numbers(out.mask).values()) == 108
    with pytest.raises(ValueError, match="function of the step: give signals step="):
        cut(params, full(), 0.5, ELEMENT, GLOBAL, Noise(cosine))


@dataclass(frozen=True)
class JustCut:
    """Wakes again what this event has cut."""

    fraction: Any = 0.25

    def priority(self, params, *, mask, kept, **signals):
        return jax.tree.map(lambda m, k: (m & ~k).astype(jnp.float32), mask, kept)


@pytest.mark.parametrize("structure", [ELEMENT, FanIn(), NofM(2, 4), Unit()], ids=str)
def test_a_rule_sees_what_the_cut_has_left(structure):
    params = draw(12)
    first = cut(params, full(), 0.5, structure, GLOBAL, None)
    out = cut(params, first.mask, 0.5, structure, GLOBAL, JustCut())
    assert sum(numbers(out.kept).values()) < sum(numbers(first.mask).values())
    for name in SHAPES:
        np.testing.assert_array_equal(out.mask[name], first.mask[name])


@pytest.mark.parametrize("structure", [NofM(2, 4), FanIn(), Unit(), ELEMENT], ids=str)
def test_a_target_that_rises_wakes_within_the_structure(structure):
    params = draw(9)
    low = cut(params, full(), 0.9, structure, GLOBAL, None)
    out = cut(params, low.mask, 0.5, structure, GLOBAL, None, may_grow=True)
    for name in SHAPES:
        np.testing.assert_array_equal(out.kept[name], low.mask[name])
        assert fits(structure, name, np.asarray(out.mask[name]), 0.5)
    if structure is ELEMENT:
        assert sum(numbers(out.mask).values()) == 108


@pytest.mark.parametrize("structure", [NofM(2, 4), Unit(), Block(2, 2)], ids=str)
def test_everything_wakes_whatever_the_structure(structure):
    out = cut(draw(10), full(), 0.5, structure, pruning.Uniform(), pruning.everything())
    assert sum(numbers(out.kept).values()) == 108
    assert all(leaf.all() for leaf in out.mask.values())


def test_members_of_a_population_as_single_runs():
    params = draw(11)
    structure = STRUCTURES["mixed"]
    shares, seeds = jnp.array([0.25, 0.5, 0.75], jnp.float32), jnp.arange(3)
    rule = Noise(0.3, redistribute=True)

    def member(share, seed):
        first = cut(params, full(), share, structure, GLOBAL, rule, seed)
        return cut(params, first.mask, share, structure, GLOBAL, rule, seed + 10)

    together = jax.jit(jax.vmap(member))(shares, seeds)
    for place in range(3):
        alone = member(shares[place], seeds[place])
        for name in SHAPES:
            np.testing.assert_array_equal(together.kept[name][place], alone.kept[name])
            np.testing.assert_array_equal(together.mask[name][place], alone.mask[name])


def test_none_gives_way_while_all_live_and_no_more_than_there_are_others():
    params, mask = draw(3), full()
    whole = cut(params, mask, 0.0, pruning.Element(), pruning.Global(), Noise(0.5))
    assert all(np.all(leaf) for leaf in jax.tree.leaves(whole.kept))
    few = cut(params, mask, 0.1, pruning.Element(), pruning.Global(), Noise(0.5))
    size = sum(leaf.size for leaf in jax.tree.leaves(mask))
    dead = rounded(0.1, size)
    kept, awake = (sum(int(np.sum(x)) for x in jax.tree.leaves(m)) for m in (few.kept, few.mask))
    assert awake == size - dead
    assert kept == size - 2 * dead
