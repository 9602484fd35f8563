"""The group horseshoe: divergences against quadrature, moments against draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adaptivenet.posterior import gaussian, horseshoe
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.horseshoe import LogNormal

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def by_quadrature(mean, log_variance, prior):
    """E_q (log q - log p) in float64: x = exp(mean + deviation n) with n standard normal."""
    deviation = np.exp(0.5 * log_variance)
    x = np.exp(mean + deviation * NODES)
    log_q = stats.norm.logpdf(NODES) - np.log(deviation) - np.log(x)
    return WEIGHTS @ (log_q - prior.logpdf(x))


@given(
    mean=st.floats(-3, 3),
    log_variance=st.floats(-6, 0.5),
    shape=st.floats(0.3, 4),
    scale=st.floats(0.1, 5),
)
def test_divergences_are_their_integrals(mean, log_variance, shape, scale):
    q = LogNormal(jnp.float32(mean), jnp.float32(log_variance))
    for closed, prior in (
        (horseshoe.kl_gamma, stats.gamma(shape, scale=scale)),
        (horseshoe.kl_inverse_gamma, stats.invgamma(shape, scale=scale)),
    ):
        exact = by_quadrature(mean, log_variance, prior)
        assert closed(q, shape, scale).item() == pytest.approx(exact, rel=2e-5, abs=2e-4)
        assert exact > -1e-9


def test_the_four_factors_are_a_half_cauchy():
    """sqrt(gamma x inverse gamma) has the half-Cauchy law that the prior is named after."""
    rng = np.random.default_rng(0)
    gamma, inverse = stats.gamma(0.5, scale=0.3**2), stats.invgamma(0.5)
    draws = np.sqrt(gamma.rvs(20_000, random_state=rng) * inverse.rvs(20_000, random_state=rng))
    assert stats.kstest(draws, stats.halfcauchy(scale=0.3).cdf).pvalue > 0.01


def a_state(axis=-2, seed=0):
    """A state of 3 x 4 weights whose every number is its own."""
    state = horseshoe.init({"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, axis)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.15 * leaf + 0.3 * rng.normal(size=leaf.shape), jnp.float32),
        state,
    )


def test_the_divergence_is_the_sum_of_its_parts():
    state = a_state()
    factors = state.scales["w"]
    mean, log_variance = (np.asarray(t["w"], np.float64) for t in (state.mean, state.log_variance))
    total = np.sum(0.5 * (np.exp(log_variance) + mean**2 - 1 - log_variance))
    priors = {
        "s_a": stats.gamma(0.5, scale=0.01**2),
        "s_b": stats.invgamma(0.5),
        "alpha": stats.gamma(0.5),
        "beta": stats.invgamma(0.5),
    }
    for name, prior in priors.items():
        q = getattr(factors, name)
        pairs = zip(np.ravel(q.mean), np.ravel(q.log_variance), strict=True)
        total += sum(by_quadrature(float(m), float(v), prior) for m, v in pairs)
    assert horseshoe.kl(state, 0.01).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("axis", [-1, -2])
def test_marginals_are_the_moments_of_draws(axis):
    state = a_state(axis)
    keys = jax.random.split(jax.random.key(1), 20_000)
    draw = jax.jit(jax.vmap(lambda k: horseshoe.sample(k, state)["w"]))
    draws = np.asarray(draw(keys), np.float64)
    belief = gaussian.find(state, None)
    variance = 1 / np.asarray(belief.precision["w"])
    error = np.sqrt(variance / len(keys))
    assert np.max(np.abs(draws.mean(axis=0) - belief.mean["w"]) / error) < 5
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.2)
    # A unit's synapses share its scale: their squares are correlated, those of others are not.
    squares = np.log(np.square(draws[:20_000]))
    within = (squares[:, 0, 0], squares[:, 0, 1] if axis == -2 else squares[:, 1, 0])
    across = (squares[:, 0, 0], squares[:, 1, 0] if axis == -2 else squares[:, 0, 1])
    assert np.corrcoef(*within)[0, 1] > np.corrcoef(*across)[0, 1] + 0.03
    assert isinstance(belief.mean["b"], optax.MaskedNode)


def test_scales_and_their_modes():
    state = a_state()
    z = horseshoe.scales(state)["w"]
    factors = state.scales["w"]
    logs = [np.asarray(f.mean) for f in factors]
    spreads = [np.exp(np.asarray(f.log_variance)) for f in factors]
    np.testing.assert_allclose(z.mean, sum(logs) / 2, rtol=1e-5)
    np.testing.assert_allclose(np.exp(z.log_variance), sum(spreads) / 4, rtol=1e-5)
    law = stats.lognorm(np.exp(0.5 * z.log_variance[0, 0]), scale=np.exp(z.mean[0, 0]))
    grid = np.linspace(0.05, 3, 20_000)
    mode = grid[np.argmax(law.pdf(grid))]
    assert np.exp(horseshoe.log_modes(state)["w"][0, 0]) == pytest.approx(mode, abs=1e-3)


@pytest.mark.parametrize(("axis", "shape"), [(-2, (3, 1)), (-1, (1, 4)), ((0, 1), (3, 4))])
def test_it_starts_at_the_network(axis, shape):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 4)), "b": jnp.ones(4)}
    state = horseshoe.init(params, axis, log_variance=-4.0)
    assert state.scales["w"].alpha.mean.shape == shape
    np.testing.assert_allclose(horseshoe.weights(state)["w"], params["w"], rtol=1e-5)
    assert horseshoe.weights(state)["b"] is params["b"]


def test_units_below_the_threshold_go_whole():
    state = horseshoe.init({"w": jnp.ones((3, 4))})
    factors = state.scales["w"]
    low = factors.alpha._replace(mean=jnp.array([[0.0], [-20.0], [0.0]]))
    state = state._replace(scales={"w": factors._replace(alpha=low)})
    mask = horseshoe.mask(state, -5.0)["w"]
    assert mask.tolist() == [[True] * 4, [False] * 4, [True] * 4]
    np.testing.assert_array_equal(horseshoe.weights(state, -5.0)["w"] == 0, ~mask)
    np.testing.assert_array_equal(
        jax.jit(horseshoe.mask)(state, jnp.float32(-20.0))["w"], np.ones((3, 4), bool)
    )


def test_the_product_has_the_moments_of_sampled_networks():
    state = a_state()
    x = jnp.array([[1.0, -2.0, 0.5]])
    leaves = state.mean["w"], state.log_variance["w"], state.scales["w"]
    keys = jax.random.split(jax.random.key(2), 20_000)
    draw = jax.jit(jax.vmap(lambda k: horseshoe.product(k, x, *leaves)))
    draw_whole = jax.jit(jax.vmap(lambda k: x @ horseshoe.sample(k, state)["w"]))
    local, whole = np.asarray(draw(keys))[:, 0], np.asarray(draw_whole(keys))[:, 0]
    spread = np.sqrt((local.var(axis=0) + whole.var(axis=0)) / len(keys))
    assert np.max(np.abs(local.mean(axis=0) - whole.mean(axis=0)) / spread) < 5
    np.testing.assert_allclose(local.var(axis=0), whole.var(axis=0), rtol=0.2)


def test_training_removes_the_inputs_that_say_nothing():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 5)), jnp.float32)
    target = jnp.asarray(np.vstack([rng.normal(size=(2, 3)), np.zeros((3, 3))]), jnp.float32)
    y = x @ target + 0.3 * jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)
    state = horseshoe.init({"w": 0.3 * jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)})
    tx = optax.adam(0.03)

    def objective(state, key):
        leaves = state.mean["w"], state.log_variance["w"], state.scales["w"]
        out = horseshoe.product(key, x, *leaves)
        return jnp.sum(jnp.square(out - y)) / (2 * 0.09) + horseshoe.kl(state, 1e-3)

    @jax.jit
    def train(state):
        def step(carry, key):
            state, memory = carry
            updates, memory = tx.update(jax.grad(objective)(state, key), memory, state)
            return (optax.apply_updates(state, updates), memory), None

        keys = jax.random.split(jax.random.key(0), 1_500)
        return jax.lax.scan(step, (state, tx.init(state)), keys)[0][0]

    state = train(state)
    modes = horseshoe.log_modes(state)["w"][:, 0]
    assert modes[:2].min() > modes[2:].max() + 2
    middle = (modes[:2].min() + modes[2:].max()) / 2
    found = horseshoe.weights(state, middle)["w"]
    np.testing.assert_array_equal(found[2:], 0)
    np.testing.assert_allclose(found[:2], target[:2], atol=0.12)


@given(
    bits=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_bit_widths_round_within_the_uncertainty_and_no_wider(bits, seed):
    rng = np.random.default_rng(seed)
    mean = rng.uniform(-1, 1, 16).astype(np.float32)
    mean[0] = 1.0
    deviation = 1 / (2**bits - 1.5)  # 2^bits - 0.5 levels
    belief = Posterior({"w": jnp.asarray(mean)}, {"w": jnp.full(16, deviation**-2, jnp.float32)})
    got = horseshoe.bit_widths(belief)["w"].item()
    assert got == bits
    step = 2 / (2**got - 1)
    rounded = -1 + step * np.round((mean + 1) / step)
    assert np.max(np.abs(rounded - mean)) <= deviation * (1 + 1e-5)
    assert 1 / (2 ** (got - 1) - 1) > deviation  # one bit less would not do


def test_bit_widths_of_units_and_of_what_is_pruned():
    mean = jnp.array([[1.0, 0.0, 8.0], [0.5, 0.0, 0.0]])
    precision = jnp.array([[100.0, jnp.inf, 100.0], [100.0, jnp.inf, jnp.inf]])
    gone = optax.MaskedNode()
    belief = Posterior({"w": mean, "b": gone}, {"w": precision, "b": gone})
    by_unit = horseshoe.bit_widths(belief, axis=-1)
    assert by_unit["w"].tolist() == [[4, 0, 7]]  # 11 and 81 levels
    assert by_unit["b"] == gone
    certain = Posterior(jnp.ones(2), jnp.full(2, jnp.inf))
    assert horseshoe.bit_widths(certain).item() == 32


def test_a_population_over_scales():
    state = a_state()
    values = jax.jit(jax.vmap(lambda s: horseshoe.kl(state, s)))(jnp.array([1e-5, 1e-2, 1.0]))
    for value, scale in zip(values, (1e-5, 1e-2, 1.0), strict=True):
        assert value.item() == pytest.approx(horseshoe.kl(state, scale).item(), rel=1e-6)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="leaf 'b' of shape \\(4,\\) has no axis -2"):
        horseshoe.init({"b": jnp.ones(4)}, select="b")
    with pytest.raises(ValueError, match="scale must be positive"):
        horseshoe.kl(a_state(), 0.0)
    with pytest.raises(ValueError, match="leaf 'w' of shape \\(2,\\) has no axis -2"):
        horseshoe.bit_widths(Posterior({"w": jnp.ones(2)}, {"w": jnp.ones(2)}), axis=-2)
