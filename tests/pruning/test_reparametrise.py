"""Reparametrisations: exact zeros forwards, closed-form gradients, gates as distributed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning, trees
from adaptivenet.pruning import reparametrise

MaskedNode = optax.MaskedNode()
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


def tree(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "dense": {
            "kernel": jax.random.normal(keys[0], (6, 5), dtype),
            "bias": jax.random.normal(keys[1], (5,), dtype),
        },
        "conv": jax.random.normal(keys[2], (2, 2, 3, 4), dtype),
    }


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return np.log(p) - np.log1p(-p)


def numbers(leaf):
    return np.asarray(leaf).astype(np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_straight_through_prunes_forwards_and_not_backwards(dtype):
    params = tree(0, dtype)
    draw = jax.random.bernoulli
    mask = {
        "dense": {"kernel": draw(jax.random.key(1), 0.5, (6, 5)), "bias": MaskedNode},
        "conv": draw(jax.random.key(2), 0.5, (2, 2, 3, 4)),
    }
    expected = pruning.apply_mask(params, mask)
    for function in (reparametrise.straight_through, jax.jit(reparametrise.straight_through)):
        for got, leaf in zip(
            *(map(jax.tree.leaves, (function(params, mask), expected))), strict=True
        ):
            assert got.dtype == dtype
            np.testing.assert_array_equal(numbers(got), numbers(leaf))

    # The gradient is that of the task at the pruned weights, also where they are pruned.
    def task(effective):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(effective))

    grads = jax.grad(lambda p: task(reparametrise.straight_through(p, mask)))(params)
    for got, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(numbers(got), numbers(jnp.cos(leaf)))


@pytest.mark.parametrize("per", ["leaf", "output"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_soft_threshold_follows_the_formula(per, dtype):
    params = tree(1, dtype)
    thresholds = reparametrise.str_init(params, -0.5, per=per)
    assert thresholds["dense"]["bias"] == MaskedNode
    assert thresholds["conv"].shape == (() if per == "leaf" else (1, 1, 1, 4))
    thresholds = jax.tree.map(
        lambda s: s + jnp.arange(s.size, dtype=s.dtype).reshape(s.shape), thresholds
    )
    for function in (reparametrise.soft_threshold, jax.jit(reparametrise.soft_threshold)):
        got = function(params, thresholds)
        np.testing.assert_array_equal(got["dense"]["bias"], params["dense"]["bias"])
        for new, old, s in (
            (got["dense"]["kernel"], params["dense"]["kernel"], thresholds["dense"]["kernel"]),
            (got["conv"], params["conv"], thresholds["conv"]),
        ):
            assert new.dtype == dtype
            w = numbers(old)
            expected = np.sign(w) * np.maximum(np.abs(w) - sigmoid(s), 0)
            np.testing.assert_allclose(
                numbers(new), expected, atol=1e-6 if dtype == jnp.float32 else 0.02
            )
            zero = numbers(new) == 0
            assert 0 < zero.sum() < zero.size
            if dtype == jnp.float32:
                np.testing.assert_array_equal(zero, np.abs(w) <= sigmoid(s))


@given(st.floats(-3, 3), st.floats(-4, 4))
def test_gradients_of_soft_threshold_in_closed_form(weight, s):
    def scaled(weight, s):
        return 3.0 * reparametrise.soft_threshold({"w": weight}, {"w": s})["w"]

    by_weight, by_s = jax.grad(scaled, argnums=(0, 1))(jnp.float32(weight), jnp.float32(s))
    alive = abs(np.float32(weight)) > sigmoid(np.float32(s))
    if abs(abs(weight) - sigmoid(s)) < 1e-6:
        return  # the corner
    slope = sigmoid(s) * (1 - sigmoid(s))
    assert float(by_weight) == 3.0 * alive
    assert float(by_s) == pytest.approx(-3 * np.sign(weight) * slope * alive, rel=1e-4, abs=1e-6)


def test_soft_thresholds_learn_to_prune():
    """Trained with the weights, thresholds rise until exactly what the theory says is cut.

    Where the loss is (f(w) - y)^2 + decay w^2 a weight lives if |y| > decay * threshold, and then
    f(w) = (|y| - decay * threshold) / (1 + decay).
    """
    decay = 0.3
    target = jnp.zeros((4, 5)).at[0, 1].set(3.0).at[2, 2].set(-2.0).at[3, 4].set(2.5)
    target = target + 0.05 * jax.random.normal(jax.random.key(0), (4, 5))
    tx = optax.sgd(0.05)

    def loss(both):
        effective = reparametrise.soft_threshold(*both)["w"]
        penalty = decay * jnp.sum(jnp.square(both[0]["w"])) - 0.5 * both[1]["w"]
        return jnp.sum(jnp.square(effective - target)) + penalty

    def step(carry, _):
        both, state = carry
        updates, state = tx.update(jax.grad(loss)(both), state, both)
        return (optax.apply_updates(both, updates), state), None

    both = {"w": target}, reparametrise.str_init({"w": target})
    (both, _), _ = jax.lax.scan(step, (both, tx.init(both)), None, length=1000)
    threshold = sigmoid(both[1]["w"])
    assert threshold > 10 * sigmoid(-5.0)
    effective = reparametrise.soft_threshold(*both)["w"]
    size = np.abs(numbers(target))
    expected = np.sign(target) * np.maximum(size - decay * threshold, 0) / (1 + decay)
    np.testing.assert_allclose(effective, expected, atol=1e-3)
    np.testing.assert_array_equal(numbers(effective) == 0, size <= decay * threshold)
    assert 3 <= int((effective != 0).sum()) < 20


@pytest.mark.parametrize(
    ("per", "kernel", "conv"),
    [
        ("synapse", (6, 5), (2, 2, 3, 4)),
        ("input", (6, 1), (1, 1, 3, 1)),
        ("output", (1, 5), (1, 1, 1, 4)),
    ],
)
def test_gates_are_shared_as_asked_for(per, kernel, conv):
    params = tree()
    gates = reparametrise.hard_concrete_init(params, jax.random.key(0), per=per)
    assert (gates["dense"]["kernel"].shape, gates["conv"].shape) == (kernel, conv)
    assert gates["dense"]["bias"] == MaskedNode
    # With few gates alive, whole slices vanish together.
    gates = jax.tree.map(lambda g: 5.0 * jax.random.normal(jax.random.key(3), g.shape), gates)
    for key in (None, jax.random.key(4)):
        got = reparametrise.hard_concrete(params, gates, key)
        for new, gate in (
            (got["dense"]["kernel"], gates["dense"]["kernel"]),
            (got["conv"], gates["conv"]),
        ):
            alive = numbers(new) != 0
            axes = tuple(axis for axis, size in enumerate(gate.shape) if size == 1)
            shared = np.broadcast_to(alive.all(axis=axes, keepdims=True), alive.shape)
            np.testing.assert_array_equal(alive, shared)
        assert got["dense"]["bias"] is params["dense"]["bias"]


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_gates_begin_around_the_log_odds_of_staying(rate):
    gates = reparametrise.hard_concrete_init(
        {"w": jnp.zeros((80, 50))}, jax.random.key(0), rate=rate
    )
    draws = np.asarray(gates["w"])
    assert draws.dtype == np.float32
    # Of 4,000 draws of standard deviation 0.01 the mean has 0.00016.
    assert abs(draws.mean() - np.log((1 - rate) / rate)) < 8e-4
    assert abs(draws.std() - 0.01) < 6e-4
    again = reparametrise.hard_concrete_init({"w": jnp.zeros((80, 50))}, jax.random.key(1))
    assert not np.array_equal(again["w"], draws)


def distribution(x, log_alpha, temperature=TEMPERATURE, low=LOW, high=HIGH):
    """Probability that the gate is at most x, for x in [0, 1)."""
    return sigmoid(temperature * logit((x - low) / (high - low)) - log_alpha)


DRAWS = 20_000


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.3}, {"low": -0.5, "high": 1.2, "temperature": 1.0}]
)
def test_gates_are_distributed_as_the_hard_concrete(log_alpha, shape):
    ones, gates = {"w": jnp.ones(DRAWS)}, {"w": jnp.full(DRAWS, log_alpha)}
    draws = np.asarray(reparametrise.hard_concrete(ones, gates, jax.random.key(0), **shape)["w"])
    assert draws.min() == 0
    assert draws.max() == 1
    # Kolmogorov-Smirnov: with 20,000 draws 1.95 / sqrt(n) is exceeded once in a thousand times.
    grid = np.linspace(0, 0.999, 400)
    empirical = np.searchsorted(np.sort(draws), grid, side="right") / DRAWS
    assert np.max(np.abs(empirical - distribution(grid, log_alpha, **shape))) < 1.95 / DRAWS**0.5
    full = {"temperature": TEMPERATURE, "low": LOW, "high": HIGH} | shape
    ratio = (1 - full["low"]) / (full["high"] - 1)
    ones_expected = 1 - sigmoid(full["temperature"] * np.log(ratio) - log_alpha)
    assert abs(np.mean(draws == 1) - ones_expected) < 5 * 0.5 / DRAWS**0.5
    # The penalty is the expected number of gates that are open, at all.
    penalty = float(reparametrise.l0_penalty(gates, ones, **shape)) / DRAWS
    assert penalty == pytest.approx(1 - distribution(0.0, log_alpha, **shape), rel=1e-5)
    assert abs(np.mean(draws > 0) - penalty) < 5 * 0.5 / DRAWS**0.5


def test_leaves_and_steps_draw_different_gates_and_members_of_a_population_too():
    ones = {"a": jnp.ones(100), "b": jnp.ones(100)}
    gates = jax.tree.map(jnp.zeros_like, ones)

    def draw(key):
        return reparametrise.hard_concrete(ones, gates, key)

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(draw))(keys)
    for place in range(3):
        alone = draw(keys[place])
        np.testing.assert_allclose(together["a"][place], alone["a"], atol=1e-6)
        assert not np.allclose(alone["a"], alone["b"])
    assert not np.allclose(together["a"][0], together["a"][1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gates_for_tests_are_exactly_zero_and_one(dtype):
    # sigmoid(a) below 1/12 closes the gate, above 11/12 opens it: |a| beyond log(11).
    gates = {"w": jnp.array([-9.0, -2.4, -2.39, 0.0, 2.39, 2.4, 9.0])}
    weights = {"w": jnp.full(7, 3.0, dtype)}
    got = numbers(jax.jit(reparametrise.hard_concrete)(weights, gates)["w"])
    expected = 3 * np.clip(1.2 * sigmoid(gates["w"]) - 0.1, 0, 1)
    np.testing.assert_allclose(got, expected, atol=1e-6 if dtype == jnp.float32 else 0.02)
    assert got[[0, 1]].tolist() == [0.0, 0.0]
    assert got[2] > 0
    assert got[[5, 6]].tolist() == [3.0, 3.0]
    bad = reparametrise.hard_concrete(
        {"w": jnp.array([jnp.inf, jnp.nan])}, {"w": jnp.full(2, -9.0)}
    )
    assert bad["w"].tolist() == [0.0, 0.0]


@given(st.integers(0, 2**16))
@settings(max_examples=20)
def test_gradients_of_the_gates_in_closed_form(seed):
    key, other = jax.random.split(jax.random.key(seed))
    weights = jax.random.normal(key, (50,))
    gates = 2 * jax.random.normal(other, (50,))

    def total(weights, gates, key):
        return jnp.sum(reparametrise.hard_concrete({"w": weights}, {"w": gates}, key)["w"])

    gradient = jax.grad(total, argnums=(0, 1))
    by_weight, by_gate = gradient(weights, gates, key)
    noise = jax.random.logistic(jax.random.fold_in(key, 0), (50,), jnp.float32)
    s = sigmoid((numbers(noise) + numbers(gates)) / TEMPERATURE)
    z = LOW + (HIGH - LOW) * s
    inside = (z > 0) & (z < 1)
    clear = (np.abs(z) > 1e-5) & (np.abs(z - 1) > 1e-5)
    slope = (HIGH - LOW) * s * (1 - s) / TEMPERATURE * inside
    np.testing.assert_allclose(by_weight, np.clip(z, 0, 1), atol=2e-6)
    np.testing.assert_allclose(
        np.asarray(by_gate)[clear], (numbers(weights) * slope)[clear], rtol=1e-3, atol=1e-5
    )
    by_weight, by_gate = gradient(weights, gates, None)
    s = sigmoid(gates)
    z = LOW + (HIGH - LOW) * s
    slope = (HIGH - LOW) * s * (1 - s) * ((z > 0) & (z < 1))
    np.testing.assert_allclose(by_weight, np.clip(z, 0, 1), atol=2e-6)
    np.testing.assert_allclose(by_gate, numbers(weights) * slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per", ["synapse", "input", "output"])
def test_the_penalty_counts_synapses_and_has_the_gradient_of_its_formula(per):
    params = tree()
    gates = reparametrise.hard_concrete_init(params, jax.random.key(0), per=per)
    gates = jax.tree.map(lambda g: jax.random.normal(jax.random.key(1), g.shape), gates)
    shift = TEMPERATURE * np.log(-LOW / HIGH)
    expected, by_gate = 0.0, []
    for name, shared in (("conv", 48), ("dense", 30)):
        leaf = gates[name] if name == "conv" else gates[name]["kernel"]
        p = sigmoid(numbers(leaf) - shift)
        expected += shared / leaf.size * p.sum()
        by_gate.append(shared / leaf.size * p * (1 - p))
    penalty = jax.jit(reparametrise.l0_penalty)(gates, params)
    assert penalty.dtype == jnp.float32
    assert float(penalty) == pytest.approx(expected, rel=1e-5)
    grads = jax.tree.leaves(jax.grad(reparametrise.l0_penalty)(gates, params))
    for got, leaf in zip(grads, by_gate, strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-4)
    shapes = jax.eval_shape(lambda: params)
    assert float(reparametrise.l0_penalty(gates, shapes)) == pytest.approx(expected, rel=1e-5)


def test_l0_finds_the_inputs_that_matter():
    """Least squares on two of six inputs: the gates of the others close, exactly."""
    x = jax.random.normal(jax.random.key(0), (200, 6))
    y = x[:, 1:2] * 2.0 - x[:, 4:5]
    params = {"w": 0.5 * jnp.ones((6, 1))}
    gates = reparametrise.hard_concrete_init(params, jax.random.key(1), per="input")
    tx = optax.adam(0.05)

    def loss(both, key):
        effective = reparametrise.hard_concrete(*both, key)["w"]
        task = jnp.mean(jnp.square(x @ effective - y))
        return task + 0.05 * reparametrise.l0_penalty(both[1], both[0])

    def step(carry, key):
        both, state = carry
        updates, state = tx.update(jax.grad(loss)(both, key), state, both)
        return (optax.apply_updates(both, updates), state), None

    start = (params, gates), tx.init((params, gates))
    keys = jax.random.split(jax.random.key(2), 600)
    (both, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)
    effective = reparametrise.hard_concrete(*both)
    alive = reparametrise.support(effective)["w"][:, 0].tolist()
    assert alive == [False, True, False, False, True, False]
    np.testing.assert_allclose(effective["w"][jnp.array([1, 4]), 0], [2, -1], atol=0.15)


def test_support_is_the_mask_with_which_pruning_goes_on():
    params = tree()
    thresholds = reparametrise.str_init(params, 0.0)
    effective = reparametrise.soft_threshold(params, thresholds)
    mask = reparametrise.support(effective)
    assert trees.paths(mask) == ("conv", "dense/kernel")
    kept = pruning.apply_mask(effective, mask)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(effective), strict=True):
        np.testing.assert_array_equal(a, b)
    assert reparametrise.support(params, "bias")["dense"]["kernel"] == MaskedNode


PARAMS = {"w": jnp.ones((3, 2))}
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reparametrise.straight_through(PARAMS, {"v": jnp.ones(2, bool)}), "another tree"),
        (lambda: reparametrise.soft_threshold(PARAMS, {"v": jnp.zeros(())}), "another tree"),
        (
            lambda: reparametrise.soft_threshold(PARAMS, {"w": jnp.zeros((4, 3, 2))}),
            r"threshold 'w' of shape \(4, 3, 2\) does not broadcast .* shape \(3, 2\)",
        ),
        (lambda: reparametrise.str_init(PARAMS, per="input"), "choose one of 'leaf', 'output'"),
        (lambda: reparametrise.str_init(PARAMS, select="v"), "select='v' matches no leaf"),
        (
            lambda: reparametrise.hard_concrete_init(PARAMS, KEY, per="unit"),
            "per='unit'; choose one of 'synapse', 'input', 'output'",
        ),
        (
            lambda: reparametrise.hard_concrete_init(
                {"b": jnp.ones(3)}, KEY, per="input", select="b"
            ),
            r"per='input' needs an axis of inputs .* shape \(3,\) lacks",
        ),
        (
            lambda: reparametrise.hard_concrete_init(PARAMS, KEY, rate=1.0),
            r"rate must be in \(0, 1\), not 1.0",
        ),
        (
            lambda: reparametrise.hard_concrete(PARAMS, {"w": jnp.zeros((3, 1, 2))}),
            r"gate 'w' of shape \(3, 1, 2\) does not broadcast",
        ),
        (
            lambda: reparametrise.l0_penalty({"w": jnp.zeros((2, 2))}, PARAMS),
            r"gate 'w' of shape \(2, 2\) does not broadcast",
        ),
        (lambda: reparametrise.hard_concrete(PARAMS, PARAMS, temperature=0.0), "temperature must"),
        (lambda: reparametrise.hard_concrete(PARAMS, PARAMS, low=0.0), "low must be < 0"),
        (lambda: reparametrise.l0_penalty(PARAMS, PARAMS, high=1.0), "high must be > 1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
