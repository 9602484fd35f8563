"""Uniform decay, soft threshold, and the factor that matches them to a rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.emergence import nulls

# Far from the subnormal numbers, which a device may take for zero.
rates = st.integers(0, 512).map(lambda number: number / 256)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
PURE = {
    "uniform_decay": lambda w, rate: w * (1.0 - rate),
    "soft_threshold": lambda w, rate: np.sign(w) * np.maximum(np.abs(w) - rate, 0.0),
}


def numbers(seed, scale=1.0, shape=(9, 7)):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def after(make, rate, params, updates, **kwargs):
    tx = getattr(nulls, make)(rate, **kwargs)
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


jitted = jax.jit(after, static_argnums=0)


@pytest.mark.parametrize("make", PURE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_the_step(make, dtype):
    """The map of params + update, in float64; to within the rounding of the format."""
    params = {"w": jnp.asarray(numbers(0), dtype), "bias": jnp.ones(7, dtype)}
    updates = {"w": jnp.asarray(numbers(1, 0.3), dtype), "bias": jnp.ones(7, dtype)}
    got = jitted(make, jnp.float32(0.25), params, updates)
    p, u, new = (np.asarray(tree["w"], np.float64) for tree in (params, updates, got))
    rounding = float(jnp.finfo(dtype).eps) * (np.abs(p) + np.abs(u) + 0.25)
    assert np.all(np.abs(new - PURE[make](p + u, 0.25)) <= 2 * rounding)
    assert got["w"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(got["bias"], np.float32), 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 2**32 - 1), rates)
def test_the_soft_threshold_lands_on_exact_zeros(dtype, seed, rate):
    params = {"w": jnp.asarray(numbers(seed), dtype)}
    updates = {"w": jnp.asarray(numbers(seed + 1, 0.3), dtype)}
    got = np.asarray(jitted("soft_threshold", jnp.float32(rate), params, updates)["w"])
    reached = np.asarray(params["w"]) + np.asarray(updates["w"])
    below = np.abs(reached) <= np.asarray(rate, reached.dtype)
    assert not np.any(got[below])
    # Nothing else is lost but by the rounding of a last bit.
    clear = np.abs(reached.astype(np.float64)) > rate + 4 * float(jnp.finfo(dtype).eps)
    assert np.all(got[clear] != 0)
    assert np.all(np.sign(got[clear]) == np.sign(reached[clear]))


@pytest.mark.parametrize("make", PURE)
def test_updates_of_fewer_bits_than_the_parameters(make):
    params = {"w": jnp.asarray(numbers(0) * 0.1)}
    off = {"w": jnp.zeros((9, 7), jnp.bfloat16)}
    got = jitted(make, jnp.float32(0.05), params, off)["w"]
    np.testing.assert_allclose(got, PURE[make](np.asarray(params["w"]), 0.05), atol=1e-7)


@pytest.mark.parametrize("make", PURE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_pruner_has_cut_stays_zero(make, dtype):
    rules = pruning.prune(0.5), getattr(nulls, make)(0.3)
    tx = optax.chain(optax.sgd(0.1), *rules)

    @jax.jit
    def run(params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params, pruning.mask(state)

    params, mask = run({"w": jnp.asarray(numbers(0), dtype)})
    assert int(mask["w"].sum()) == 31
    assert not np.any(np.asarray(params["w"])[~np.asarray(mask["w"])])


@pytest.mark.parametrize("make", PURE)
def test_populations_over_rates(make):
    params, updates = {"w": jnp.asarray(numbers(0))}, {"w": jnp.asarray(numbers(1))}
    rates = jnp.array([0.0, 0.1, 0.5])
    together = jax.vmap(lambda rate: after(make, rate, params, updates)["w"])(rates)
    for place, rate in enumerate(rates):
        alone = jitted(make, rate, params, updates)["w"]
        np.testing.assert_allclose(together[place], alone, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(together[0], params["w"] + updates["w"])


def test_only_what_is_selected_forgets():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones(2)}
    off = jax.tree.map(jnp.zeros_like, params)
    for make in PURE:
        got = after(make, 0.25, params, off, select=["a", "c"])
        assert [float(got[name].mean()) for name in "abc"] == [0.75, 1.0, 0.75]
    scaled = nulls.scale(params, 0.5, select="b")
    assert [float(scaled[name].mean()) for name in "abc"] == [1.0, 0.5, 1.0]
    soft = nulls.soft_thresholded(params, 0.25)
    assert [float(soft[name].mean()) for name in "abc"] == [0.75, 0.75, 1.0]


@given(st.integers(0, 2**32 - 1), rates)
def test_the_maps_between_chunks(seed, rate):
    w = numbers(seed)
    np.testing.assert_array_equal(
        nulls.scale({"w": jnp.asarray(w)}, rate)["w"], w * np.float32(rate)
    )
    got = np.asarray(nulls.soft_thresholded({"w": jnp.asarray(w)}, rate)["w"])
    np.testing.assert_allclose(got, PURE["soft_threshold"](w, rate), atol=1e-6)
    assert not np.any(got[np.abs(w) <= np.float32(rate)])


def test_a_matched_decay_has_the_norm_of_the_other():
    params = {"a": jnp.asarray(numbers(0)), "b": jnp.asarray(numbers(1)), "bias": jnp.ones(3)}
    other = nulls.soft_thresholded(params, 0.4)
    other["bias"] = jnp.zeros(3)  # does not count
    factor = jax.jit(nulls.matched_decay)(params, other)
    assert (factor.shape, factor.dtype) == ((), jnp.float32)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.asarray(tree[k], np.float64) ** 2) for k in "ab"))

    assert norm(nulls.scale(params, factor)) == pytest.approx(norm(other), rel=1e-6)
    assert 0 < float(factor) < 1
    only = nulls.matched_decay(params, other, select="^a$")
    assert float(only) == pytest.approx(
        float(jnp.linalg.norm(other["a"]) / jnp.linalg.norm(params["a"])), rel=1e-6
    )
    assert float(nulls.matched_decay({"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))})) == 1.0


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        ("uniform_decay", 1.0),
        ("uniform_decay", -0.1),
        ("uniform_decay", float("nan")),
        ("soft_threshold", -0.1),
        ("soft_threshold", float("inf")),
    ],
)
def test_rates_out_of_range_are_refused(make, rate):
    with pytest.raises(ValueError, match=rf"rate of {make}\(\) must be"):
        getattr(nulls, make)(rate)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"rate of soft_thresholded\(\)"):
        nulls.soft_thresholded({"w": jnp.ones((2, 2))}, -1.0)
    tx = nulls.uniform_decay(0.1, select="kernal")
    with pytest.raises(ValueError, match="Did you mean 'kernel'"):
        tx.init({"kernel": jnp.ones((2, 2))})
    tx = nulls.uniform_decay(0.1)
    with pytest.raises(ValueError, match=r"uniform_decay\(\) needs the parameters"):
        tx.update({"w": jnp.ones((2, 2))}, optax.EmptyState())
