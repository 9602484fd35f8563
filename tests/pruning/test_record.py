"""The record of an event against counts made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning, trees
from adaptivenet.counts import Count, as_count
from adaptivenet.pruning.record import blank, narrow

PARAMS = {
    "a": jnp.array([[4.0, -3.0], [0.1, 2.0]]),
    "b": {"kernel": jnp.array([[0.2, 5.0, -0.3]]), "bias": jnp.ones(3)},
}


def as_numbers(record):
    return {name: np.asarray(value).tolist() for name, value in record._asdict().items()}


def test_before_any_event():
    state = pruning.prune(0.5).init(PARAMS)
    got = as_numbers(pruning.record(state))
    assert np.isnan(got.pop("age"))
    assert got == {
        "event": False,
        "step": 0,
        "target": 0.0,
        "threshold": 0.0,
        "alive": 7,
        "kept": 7,
        "births": 0,
        "deaths": 0,
        "density": 1.0,
        "turnover": 0.0,
        "nonfinite": 0,
        "layers": [4, 3],
    }


def test_an_event_by_hand():
    pruner = pruning.prune(0.5)
    _, state = pruner.update(PARAMS, pruner.init(PARAMS), PARAMS)
    got = as_numbers(pruning.record(state))
    assert np.isnan(got.pop("age"))
    # round(7 / 2) = 4 are cut, so that 5, 4 and -3 are left.
    assert got == {
        "event": True,
        "step": 1,
        "target": 0.5,
        "threshold": 3.0,
        "alive": 3,
        "kept": 3,
        "births": 0,
        "deaths": 4,
        "density": pytest.approx(3 / 7),
        "turnover": pytest.approx(4 / 7),
        "nonfinite": 0,
        "layers": [2, 1],
    }
    assert trees.paths(pruning.mask(state)) == ("a", "b/kernel")


def test_the_flag_marks_events_only_and_the_rest_stays():
    pruner = pruning.prune(pruning.constant(0.5), every=3)
    state = pruner.init(PARAMS)
    rows = []
    for _ in range(7):
        _, state = pruner.update(PARAMS, state, PARAMS)
        rows.append(pruning.record(state))
    assert [bool(row.event) for row in rows] == [False, False, True, False, False, True, False]
    assert [int(row.step) for row in rows] == [0, 0, 3, 3, 3, 6, 6]
    assert [int(row.kept) for row in rows] == [7, 7, 3, 3, 3, 3, 3]
    assert [int(row.deaths) for row in rows] == [0, 0, 4, 4, 4, 0, 0]


def test_a_scan_stacks_records():
    pruner = pruning.prune(pruning.linear(0.6, 0, 4, initial=0.0))
    params = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}

    def step(carry, _):
        params, state = carry
        updates, state = pruner.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return (optax.apply_updates(params, updates), state), pruning.record(state)

    _, rows = jax.lax.scan(step, (params, pruner.init(params)), None, length=5)
    # 0.15, 0.3, 0.45 and 0.6 of ten; 1.5 and 4.5 are rounded as float32 has them.
    assert rows.kept.tolist() in ([8, 7, 5, 4, 4], [9, 7, 6, 4, 4], [8, 7, 6, 4, 4])
    assert rows.layers.shape == (5, 1)
    kept = np.asarray([10, *rows.kept.tolist()])
    assert rows.deaths[:4].tolist() == (kept[:-1] - kept[1:])[:4].tolist()
    assert rows.event.tolist() == [True] * 4 + [False]


def test_births_and_deaths_of_regrowth():
    pruner = pruning.prune(0.5, regrow=pruning.at_random(0.5))
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    state = pruner.init(params)
    before = np.asarray(pruning.mask(state)["w"])
    for _ in range(3):
        updates, state = pruner.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        after = np.asarray(pruning.mask(state)["w"])
        row = pruning.record(state)
        # Half of the eight give way; those woken begin at zero, and the update was zero too.
        assert (int(row.kept), int(row.births), int(row.alive)) == (4, 4, 8)
        assert int(row.deaths) == before.sum() - 4
        assert after.sum() == 8
        assert float(row.turnover) == pytest.approx((int(row.births) + int(row.deaths)) / 16)
        assert float(row.density) == 4 / 16
        assert int((params["w"] != 0).sum()) == 4
        before = after


def test_ages_by_hand():
    pruner = pruning.prune(0.5, regrow=pruning.at_random(0.5), ages=True, every=2)
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state = pruner.init(params)
    born = np.zeros((2, 4), int)
    before = np.ones((2, 4), bool)
    for step in range(1, 9):
        updates, state = pruner.update(jax.tree.map(jnp.zeros_like, params), state, params)
        landed = optax.apply_updates(params, updates)
        after = np.asarray(pruning.mask(state)["w"])
        if step % 2 == 0:
            survivors = before & (np.asarray(landed["w"]) != 0)
            born[after & ~survivors] = step
            assert float(pruning.record(state).age) == pytest.approx((step - born)[after].mean())
            np.testing.assert_array_equal(np.asarray(state.born["w"])[after], born[after])
        before = after
        # What is woken learns at once.
        params = {"w": jnp.where(after & (landed["w"] == 0), 0.5 + step, landed["w"])}
    assert (step - born)[after].mean() > 0


def test_without_ages_none_are_kept():
    state = pruning.prune(0.5).init(PARAMS)
    assert state.born == ()


def test_parameters_that_cannot_land_are_counted():
    pruner = pruning.prune(0.75, score=lambda params, **_: {"w": jnp.array([[4.0, 3, 2, 1]])})
    good = {"w": jnp.ones((1, 4))}
    bad = {"w": jnp.array([[1.0, jnp.inf, jnp.nan, 2.0]])}
    state = pruner.init(good)
    updates, state = pruner.update(good, state, bad)
    assert int(pruning.record(state).nonfinite) == 2
    landed = optax.apply_updates(bad, updates)["w"]
    assert landed[0, 3] == 0
    assert np.isnan(landed[0, 1:3]).all()
    repaired = pruning.apply_mask({"w": landed}, pruning.mask(state))["w"]
    assert repaired.tolist() == [[2.0, 0.0, 0.0, 0.0]]


def test_nan_is_cut_first():
    pruner = pruning.prune(0.5)
    params = {"w": jnp.array([[0.1, jnp.nan, 0.2, jnp.nan]])}
    _, state = pruner.update(params, pruner.init({"w": jnp.ones((1, 4))}), params)
    assert pruning.mask(state)["w"].tolist() == [[True, False, True, False]]
    assert int(pruning.record(state).nonfinite) == 2


def test_counts_beyond_int32_are_exact_without_allocating_them():
    leaf = jax.ShapeDtypeStruct((2**16, 2**15), bool)
    before = blank({"a": leaf, "b": leaf, "c": leaf})
    assert isinstance(before.alive, Count)
    assert int(before.alive) == int(before.kept) == 3 * 2**31
    assert int(before.births) == 0
    assert before.layers.tolist() == [2**31] * 3
    assert isinstance(blank({"a": leaf}).alive, Count)
    small = blank({"a": jax.ShapeDtypeStruct((2**16, 2**15 - 1), bool)})
    assert small.alive.dtype == jnp.int32
    assert int(small.alive) == 2**31 - 2**16
    assert int(narrow(as_count(2**31 - 1), 2**31 - 1)) == 2**31 - 1


def test_an_event_on_a_tree_beyond_int32_traces_with_exact_counts():
    leaf = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)
    pruner = pruning.prune(0.9)

    def event(params):
        return pruning.revise(pruner, params, pruner.init(params))[1].record

    row = jax.eval_shape(event, {"a": leaf, "b": leaf})
    for count in (row.alive, row.kept, row.births, row.deaths, row.nonfinite):
        assert isinstance(count, Count)
        assert count.limbs.shape == (4,)
