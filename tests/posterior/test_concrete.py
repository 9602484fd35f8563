"""Hard-concrete gates: their law against Monte Carlo, their groups against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.posterior import concrete
from adaptivenet.posterior.concrete import HardConcrete

DRAWS = 40_000
LOCATIONS = jnp.linspace(-5, 5, 11)


@jax.jit
def drawn(key, temperature, low, high):
    law = HardConcrete(temperature, low, high)
    keys = jax.random.split(key, DRAWS)
    return jax.vmap(lambda k: law.sample(k, LOCATIONS))(keys)


@given(
    temperature=st.floats(0.2, 2),
    low=st.floats(-0.5, -0.05),
    high=st.floats(1.05, 1.5),
    seed=st.integers(0, 99),
)
@settings(max_examples=10)
def test_probabilities_are_frequencies(temperature, low, high, seed):
    law = HardConcrete(temperature, low, high)
    gates = np.asarray(drawn(jax.random.key(seed), temperature, low, high))
    assert gates.min() >= 0
    assert gates.max() <= 1
    for chance, seen in (
        (law.kept(LOCATIONS), np.mean(gates > 0, axis=0)),
        (law.whole(LOCATIONS), np.mean(gates == 1, axis=0)),
    ):
        chance = np.asarray(chance, np.float64)
        deviation = np.sqrt(chance * (1 - chance) / DRAWS) + 1e-4
        assert np.max(np.abs(seen - chance) / deviation) < 5.5


def test_draws_between_the_ends_follow_the_stretched_logistic():
    """The distribution function of Louizos et al., equation 25, at points within (0, 1)."""
    gates = np.asarray(drawn(jax.random.key(0), 2 / 3, -0.1, 1.1))
    for x in (0.1, 0.5, 0.9):
        s = (x + 0.1) / 1.2
        logit = np.log(s / (1 - s)) * 2 / 3 - np.asarray(LOCATIONS, np.float64)
        chance = 1 / (1 + np.exp(-logit))
        error = 5 * np.sqrt(chance * (1 - chance) / DRAWS) + 1e-4
        assert np.all(np.abs(np.mean(gates <= x, axis=0) - chance) < error)


@pytest.mark.parametrize(
    ("axis", "shape", "each"), [(None, (3, 4), 1), (-1, (1, 4), 3), (-2, (3, 1), 4)]
)
def test_the_expected_norm_counts_a_gates_synapses(axis, shape, each):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    law = HardConcrete()
    gates = concrete.init(params, axis)
    assert gates["w"].shape == shape
    assert isinstance(gates["b"], optax.MaskedNode)
    gates["w"] = jnp.linspace(-3, 3, gates["w"].size).reshape(shape)
    by_hand = each * np.sum(np.asarray(law.kept(gates)["w"], np.float64))
    assert law.expected_l0(gates, params).item() == pytest.approx(by_hand, rel=1e-6)

    def count(key):
        net = concrete.apply(law.sample(key, gates), params)
        return jnp.sum(net["w"] != 0)

    counts = jax.vmap(count)(jax.random.split(jax.random.key(0), 20_000))
    error = float(jnp.std(counts.astype(jnp.float32))) / np.sqrt(20_000)
    assert np.mean(counts) == pytest.approx(by_hand, abs=5 * error)


def test_gates_for_testing_and_their_mask():
    params = {"w": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}
    law = HardConcrete()
    gates = {"w": jnp.array([[-4.0, 0.0, 4.0]]), "b": optax.MaskedNode()}
    np.testing.assert_allclose(law.gate(gates)["w"], [[0.0, 0.5, 1.0]], atol=1e-6)
    assert law.mask(gates, params)["w"].tolist() == [[False, True, True]] * 2
    net = concrete.apply(law.gate(gates), params)
    np.testing.assert_allclose(net["w"], [[0.0, 1.0, 2.0]] * 2, atol=1e-6)
    assert net["b"] is params["b"]


def test_a_gate_starts_at_its_dropout_rate():
    gates = concrete.init({"w": jnp.ones((2, 2), jnp.bfloat16)}, drop=0.2)
    assert gates["w"].dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.sigmoid(gates["w"]), 0.8, rtol=1e-6)
    noise = HardConcrete().sample(jax.random.key(0), gates)
    assert concrete.apply(noise, {"w": jnp.ones((2, 2), jnp.bfloat16)})["w"].dtype == jnp.bfloat16


def test_leaves_draw_different_numbers():
    gates = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
    drawn = HardConcrete().sample(jax.random.key(0), gates)
    assert not np.array_equal(drawn["a"], drawn["b"])


def test_the_norm_is_minimised_by_gradients_and_the_loss_holds_on():
    """Two of four inputs matter: their gates stay, the others close."""
    x = jax.random.normal(jax.random.key(0), (100, 4))
    target = jnp.array([[1.5], [-1.0], [0.0], [0.0]])
    law = HardConcrete()
    tx = optax.adam(0.05)
    start = ({"w": target + 0.05}, concrete.init({"w": target}, axis=-2))

    def objective(pair, key):
        params, gates = pair
        net = concrete.apply(law.sample(key, gates), params)
        return jnp.mean(jnp.square(x @ (net["w"] - target))) + 0.02 * law.expected_l0(gates, params)

    @jax.jit
    def train(pair):
        def step(carry, key):
            pair, memory = carry
            updates, memory = tx.update(jax.grad(objective)(pair, key), memory, pair)
            return (optax.apply_updates(pair, updates), memory), None

        keys = jax.random.split(jax.random.key(1), 600)
        return jax.lax.scan(step, (pair, tx.init(pair)), keys)[0][0]

    params, gates = train(start)
    assert law.mask(gates, params)["w"][:, 0].tolist() == [True, True, False, False]


def test_errors_name_what_is_wrong():
    for options, words in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"low": 0.0}, "no gate would ever be zero"),
        ({"high": 1.0}, "no gate would ever be one"),
    ):
        with pytest.raises(ValueError, match=words):
            HardConcrete(**options)
    with pytest.raises(ValueError, match=r"drop must be a rate in \(0, 1\), not 1"):
        concrete.init({"w": jnp.ones((2, 2))}, drop=1.0)
    with pytest.raises(ValueError, match=r"leaf 'b' of shape \(2,\) has no axis -2"):
        concrete.init({"b": jnp.ones(2)}, axis=-2, select="b")
    with pytest.raises(ValueError, match=r"leaf 'w' has gates of shape \(3,\)"):
        concrete.apply({"w": jnp.ones(3)}, {"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="leaf 'w' has gates"):
        HardConcrete().expected_l0({"w": jnp.ones((2, 2))}, {"w": jnp.ones((3, 2))})
