"""One event as a pure function."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import pruning
from adaptivenet.counts import as_share


@functools.partial(jax.jit, static_argnames=("regrow", "may_grow"))
def cut(params, mask, demand, regrow=None, may_grow=False, seed=0):
    return pruning.cut_and_wake(
        params,
        mask,
        demand,
        score=pruning.magnitude,
        structure=pruning.Element(),
        allocation=pruning.Global(),
        regrow=regrow,
        may_grow=may_grow,
        key=jax.random.key(seed),
        signals={},
    )


def sparsity(value):
    return pruning.Sparsity(as_share(value))


PARAMS = {"w": jnp.array([[5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 6.0, 0.1]])}
HALF = {"w": jnp.array([[True, False, False, True, True, True, False, False]])}


def test_the_dead_are_never_kept_for_their_score():
    out = cut(PARAMS, HALF, sparsity(0.75))
    # 5 and 3 of the living; 6 and 4 are dead.
    assert np.flatnonzero(out.kept["w"]).tolist() == [0, 4]
    assert float(out.threshold) == 3.0


def test_a_target_above_what_lives_keeps_all_that_lives():
    out = cut(PARAMS, HALF, sparsity(0.25))
    np.testing.assert_array_equal(out.kept["w"], HALF["w"])
    np.testing.assert_array_equal(out.mask["w"], HALF["w"])


def test_where_the_demand_may_grow_the_rest_wakes():
    out = cut(PARAMS, HALF, sparsity(0.25), may_grow=True)
    np.testing.assert_array_equal(out.kept["w"], HALF["w"])
    assert int(out.mask["w"].sum()) == 6
    assert np.all(~np.asarray(HALF["w"]) | np.asarray(out.mask["w"]))
    same = cut(PARAMS, HALF, sparsity(0.25), may_grow=True)
    np.testing.assert_array_equal(same.mask["w"], out.mask["w"])
    others = [cut(PARAMS, HALF, sparsity(0.25), may_grow=True, seed=s) for s in range(8)]
    assert len({other.mask["w"].tobytes() for other in map(jax.device_get, others)}) > 1


def test_nothing_is_cut_and_all_is_cut():
    full = {"w": jnp.ones((1, 8), bool)}
    assert cut(PARAMS, full, sparsity(0.0)).mask["w"].all()
    out = cut(PARAMS, full, sparsity(0.99))
    assert not out.mask["w"].any()
    assert np.isinf(out.threshold)


def test_everything_wakes_whatever_is_asked_for():
    out = cut(PARAMS, HALF, sparsity(0.75), regrow=pruning.everything())
    assert np.flatnonzero(out.kept["w"]).tolist() == [0, 4]
    assert out.mask["w"].all()


def test_a_threshold_cuts_what_is_below():
    out = cut(PARAMS, HALF, pruning.AtLeast(jnp.float32(2.0)))
    assert np.flatnonzero(out.kept["w"]).tolist() == [0, 3, 4]
    assert float(out.threshold) == 2.0


def test_scores_in_half_precision_meet_a_threshold_exactly():
    params = {"w": jnp.array([[0.0498, 0.05, 0.0502]], jnp.bfloat16)}
    mask = {"w": jnp.ones((1, 3), bool)}
    limit = float(params["w"][0, 1])
    out = cut(params, mask, pruning.AtLeast(jnp.float32(limit)))
    expected = np.asarray(params["w"]).astype(np.float64) >= limit
    np.testing.assert_array_equal(out.mask["w"], expected)


def test_a_population_of_demands():
    full = {"w": jnp.ones((1, 8), bool)}
    shares = as_share(jnp.array([0.0, 0.5, 0.875], jnp.float32))
    out = jax.jit(jax.vmap(lambda share: cut(PARAMS, full, pruning.Sparsity(share))))(shares)
    assert out.mask["w"].sum(axis=(1, 2)).tolist() == [8, 4, 1]
    assert out.threshold.tolist() == [np.float32(0.1), 3.0, 6.0]


def test_leaves_without_elements():
    params = {"w": jnp.zeros((0, 3)), "v": jnp.array([[1.0, 2.0]])}
    mask = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    out = cut(params, mask, sparsity(0.5))
    assert out.mask["w"].shape == (0, 3)
    assert out.mask["v"].tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_threshold_is_float32_whatever_the_scores_are(dtype):
    params = {"w": PARAMS["w"].astype(dtype)}
    out = cut(params, HALF, sparsity(0.75))
    assert out.threshold.dtype == jnp.float32
    assert float(out.threshold) == 3.0
