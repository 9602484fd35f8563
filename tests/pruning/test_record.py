"""The record of an event against counts made by hand."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning, trees
from adaptivenet.counts import Count, as_count
from adaptivenet.pruning.record import PruneState, blank, layered, narrow, score_quantiles

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
    assert np.isnan(got.pop("effective"))
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
        "distance": 0.0,
        "unit_deaths": [0, 0],
        "quantiles": [],
    }


def test_an_event_by_hand():
    pruner = pruning.prune(0.5)
    _, state = pruner.update(PARAMS, pruner.init(PARAMS), PARAMS)
    got = as_numbers(pruning.record(state))
    assert np.isnan(got.pop("age"))
    assert np.isnan(got.pop("effective"))
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
        "distance": pytest.approx(4 / 7),
        "unit_deaths": [0, 2],
        "quantiles": [],
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


def events(pruner, params, steps, grads=jnp.zeros_like):
    """Masks before and after, survivors and records of events that follow each other."""
    state, rows = pruner.init(params), []
    for _ in range(steps):
        before = jax.tree.map(np.asarray, pruning.mask(state))
        updates, state = pruner.update(jax.tree.map(grads, params), state, params)
        params = optax.apply_updates(params, updates)
        rows.append((before, jax.tree.map(np.asarray, pruning.mask(state)), state))
    return rows


def test_distance_and_unit_deaths_against_the_masks():
    pruner = pruning.prune(
        pruning.linear(0.8, 0, 4), regrow=pruning.at_random(0.5), score=pruning.random
    )
    params = {"a": jnp.ones((2, 6)), "b": {"deep": jnp.ones((2, 2, 5)), "bias": jnp.ones(5)}}
    died = 0
    for before, after, state in events(pruner, params, 6):
        row, pairs = state.record, list(zip(*map(jax.tree.leaves, (before, after)), strict=True))
        moved = sum(int((old != new).sum()) for old, new in pairs)
        assert float(row.distance) == pytest.approx(moved / 32)
        assert row.distance <= row.turnover
        expected = []
        for old, new in pairs:
            units = range(old.shape[-1])
            expected.append(sum(old[..., k].any() and not new[..., k].any() for k in units))
        assert row.unit_deaths.tolist() == expected
        died += sum(expected)
        # Born and cut are counted apart; what was cut and woken at once did not move.
        survivors = jax.tree.leaves(state.survivors)
        again = [old & new & ~np.asarray(kept)
                 for (old, new), kept in zip(pairs, survivors, strict=True)]  # fmt: skip
        back = sum(int(leaf.sum()) for leaf in again)
        assert int(row.births) + int(row.deaths) == moved + 2 * back
    assert died > 0


RANKS = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0)
found_quantiles = jax.jit(lambda scores, alive: score_quantiles(scores, alive, RANKS))


@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_quantiles_against_sorting(seed, share):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 5, (2, 3)).astype(np.float32), rng.random((4,)).astype(np.float32)]
    alive = [rng.random(leaf.shape) < share for leaf in scores]
    living = np.sort(np.concatenate([s[m] for s, m in zip(scores, alive, strict=True)]))
    got = found_quantiles(scores, alive)
    assert got.dtype == jnp.float32
    for value, found in zip(RANKS, got.tolist(), strict=True):
        if not len(living):
            assert np.isnan(found)
            continue
        rank = int(Fraction(value) * (len(living) - 1) + Fraction(1, 2))
        assert found == living[rank]


def test_quantiles_are_of_the_scores_of_the_event():
    """Random scores, drawn once: half is cut, so the threshold lies right above the median."""
    params = {"w": jnp.ones((5, 9)), "bias": jnp.ones(9)}
    pruner = pruning.prune(0.5, score=pruning.random, quantiles=(0.0, 0.5, 1.0), every=2)
    state = pruner.init(params)
    assert np.isnan(state.record.quantiles).all()
    step = jax.jit(pruner.update)
    for number in range(1, 5):
        _, state = step(params, state, params)
        if number < 2:
            assert np.isnan(state.record.quantiles).all()
        low, middle, high = state.record.quantiles.tolist()
        if number in (2, 3):
            # 45 living, of which round(22.5) = 23 are cut: the median is the highest of those cut.
            assert low < middle < float(state.record.threshold) < high
            assert int(state.record.alive) == 22
        elif number == 4:
            assert float(state.record.threshold) == low  # nothing more to cut


@pytest.mark.parametrize("layers", [("a", "b/kernel"), lambda mask: layered("a", "b/kernel")(mask)])
def test_effective_density_by_hand(layers):
    params = {
        "a": jnp.array([[5.0, 4.0, 0.1], [0.2, 0.3, 0.4]]),
        "b": {"kernel": jnp.array([[3.0], [0.05], [6.0]]), "bias": jnp.ones(1)},
        "other": jnp.array([[7.0, 0.01]]),
    }
    pruner = pruning.prune(0.5, effective=layers)
    state = pruner.init(params)
    assert np.isnan(state.record.effective)
    _, state = pruner.update(params, state, params)
    # Of 11, round(5.5) = 6 are cut: 7, 6, 5, 4 and 3 live, and 0.4 does not. The second hidden
    # unit feeds nothing, the third is fed by nothing: 5 and 3 are on a path, 7 is not asked about.
    assert int(state.record.kept) == 5
    assert float(state.record.effective) == pytest.approx(3 / 11)


def test_survivors_and_woken_make_the_mask():
    pruner = pruning.prune(0.5, regrow=pruning.at_random(0.5))
    for _, after, state in events(pruner, {"w": jnp.arange(16.0).reshape(4, 4) + 1}, 3):
        kept = np.asarray(state.survivors["w"])
        assert kept.sum() == int(state.record.kept)
        assert not np.any(kept & ~after["w"])
        assert (after["w"] & ~kept).sum() == int(state.record.births)
    assert pruning.prune(0.5).init(PARAMS).survivors == ()
    assert isinstance(state, PruneState)


def test_what_is_refused():
    for bad in ((0.5, 1.5), (-0.1,), (float("nan"),)):
        with pytest.raises(ValueError, match=r"quantiles must be in \[0, 1\], not"):
            pruning.prune(0.5, quantiles=bad)
    with pytest.raises(TypeError, match=r"effective= takes the paths of the layers.*not 'a'"):
        pruning.prune(0.5, effective="a")
    pruner = pruning.prune(0.5, effective=["a", "c/kernel"])
    with pytest.raises(
        ValueError, match=r"'c/kernel', which is no prunable leaf; these are: a, b/k"
    ):
        pruner.update(PARAMS, pruner.init(PARAMS), PARAMS)
