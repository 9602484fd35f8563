"""The closed loop on problems whose answer is planted."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning

SLOPE = 10.0
NEEDED = 0.12  # density below which the planted loss rises


def planted(density):
    """Flat while the density suffices, then rising."""
    return 1.0 + SLOPE * jnp.maximum(NEEDED - density, 0.0)


def follow(controller, events=80, noise=0.0, seed=0, loss=planted):
    """Closes the loop; returns the densities asked for and the states, event by event."""
    draws = noise * jax.random.normal(jax.random.key(seed), (events,))

    def event(state, item):
        step, draw = item
        state = controller.step(step, state, loss(state.density) + draw)
        return state, state

    steps = jnp.arange(1, events + 1)
    return jax.lax.scan(event, controller.init(), (steps, draws))[1]


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("patience", [1, 3])
def test_it_settles_within_one_step_of_what_the_tolerance_allows(rate, tolerance, patience):
    controller = pruning.auto(tolerance, rate=rate, patience=patience)
    densities = np.asarray(follow(controller).density)
    allowed = NEEDED - tolerance / SLOPE
    settled = densities[40:]
    assert np.all(settled >= allowed * (1 - rate) * 0.999)
    assert np.all(settled <= allowed / (1 - rate) * 1.001)


def test_what_it_holds_to_be_good_is_good():
    states = follow(pruning.auto(0.05))
    assert np.all(planted(states.good) <= 1.05 + 1e-5)


def test_noise_within_the_tolerance_does_not_stop_it():
    for seed in range(3):
        densities = np.asarray(follow(pruning.auto(0.3), 120, noise=0.03, seed=seed).density)
        # The best value seen lies up to about three deviations low.
        assert np.all(densities[60:] > (NEEDED - 0.4 / SLOPE) * 0.8)
        assert np.all(densities[60:] < NEEDED / 0.8)


def test_it_steps_back_when_the_problem_hardens():
    controller = pruning.auto(0.1)
    state = controller.init()
    for _ in range(30):
        state = controller.step(1, state, planted(state.density))
    sparse = float(state.density)
    for _ in range(80):
        harder = 1.0 + SLOPE * jnp.maximum(0.5 - state.density, 0.0)
        state = controller.step(1, state, harder)
    assert sparse < 0.15
    assert float(state.density) == pytest.approx(0.49, rel=0.25)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_it_waits_for_the_network_to_recover(patience):
    controller = pruning.auto(0.1, patience=patience)
    state = controller.step(1, controller.init(), jnp.float32(1.0))
    for _ in range(patience - 1):
        state = controller.step(2, state, jnp.float32(1.5))
        assert float(state.density) == pytest.approx(0.8)
    # A value within the tolerance starts the wait anew ...
    recovered = controller.step(2, state, jnp.float32(1.0))
    assert float(recovered.density) < 0.8
    assert int(recovered.misses) == 0
    # ... and one more beyond it ends the wait.
    assert float(controller.step(2, state, jnp.float32(1.5)).density) == 1.0


def test_a_relative_tolerance_is_a_share_of_the_best_value():
    scaled = follow(
        pruning.auto(0.05, relative=True), loss=lambda density: 1000.0 * planted(density)
    )
    absolute = follow(pruning.auto(0.05))
    np.testing.assert_allclose(scaled.density, absolute.density, rtol=1e-5)


def test_it_never_exceeds_most():
    states = follow(pruning.auto(0.1, most=0.6), loss=lambda density: jnp.ones(()))
    densities = np.asarray(states.density)
    assert densities.min() == pytest.approx(0.4)
    assert densities[-1] == pytest.approx(0.4)


def test_before_start_only_the_best_value_is_recorded():
    states = follow(pruning.auto(0.1, start=10), events=12, loss=lambda density: density)
    assert np.all(states.density[:9] == 1.0)
    assert np.all(states.density[9:] < 1.0)
    controller = pruning.auto(0.1, start=10)
    state = controller.step(1, controller.init(), jnp.float32(3.0))
    state = controller.step(2, state, jnp.float32(5.0))
    assert float(state.reference) == 3.0


def test_after_end_the_sparsity_is_never_raised():
    for tolerance in (0.05, 5.0):
        densities = np.asarray(follow(pruning.auto(tolerance, end=15), noise=0.02).density)
        assert np.all(np.diff(densities[14:]) >= 0)
        assert densities[14] < 1
    # ... but a cut that did not hold is undone.
    controller = pruning.auto(0.1, end=15, patience=1)
    state = controller.init()
    for step in range(1, 16):
        state = controller.step(step, state, jnp.float32(1.0))
    worse = controller.step(16, state, jnp.float32(9.0))
    assert float(state.density) < float(worse.density) == float(state.good)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged_is_never_within_the_tolerance(value):
    controller = pruning.auto(0.1, relative=True, patience=1)
    first = controller.step(1, controller.init(), jnp.float32(value))
    assert float(first.density) == 1.0
    state = controller.step(2, controller.step(1, controller.init(), jnp.float32(1.0)), 1.0)
    diverged = controller.step(3, state, jnp.float32(value))
    assert float(diverged.density) > float(state.density)
    assert float(diverged.reference) == 1.0


def test_a_population_over_tolerances_and_rates():
    tolerances, rates = jnp.array([0.0, 0.1, 0.6]), jnp.array([0.1, 0.2, 0.3])
    together = jax.vmap(lambda tolerance, rate: follow(pruning.auto(tolerance, rate=rate)).density)(
        tolerances, rates
    )
    for place in range(3):
        alone = follow(pruning.auto(float(tolerances[place]), rate=float(rates[place]))).density
        np.testing.assert_allclose(together[place], alone, rtol=1e-4)
    assert np.all(np.diff(together[:, -1]) < 0)


def test_within_prune_it_finds_the_density_that_the_network_needs():
    pruner = pruning.prune(pruning.auto(0.05, rate=0.2))
    tx = optax.chain(optax.sgd(0.0), pruner)
    weights = {"w": jax.random.normal(jax.random.key(0), (20, 50))}

    @jax.jit
    def step(params, state):
        found = jnp.mean(pruning.mask(state)["w"], dtype=jnp.float32)
        updates, state = tx.update(params, state, params, validation_loss=planted(found))
        return optax.apply_updates(params, updates), state

    params, state = weights, tx.init(weights)
    alive, targets = [], []
    for _ in range(80):
        params, state = step(params, state)
        alive.append(int(pruning.record(state).alive))
        targets.append(float(pruning.record(state).target))
    assert alive[:2] == [800, 640]
    # The mask follows what the controller asks for, to the synapse, downwards and back.
    assert alive == [1000 - int(1000 * target + 0.5) for target in targets]
    assert any(later > earlier for earlier, later in itertools.pairwise(alive))
    allowed = 1000 * (NEEDED - 0.05 / SLOPE)
    assert all(allowed * 0.8 - 1 <= count <= allowed / 0.8 + 1 for count in alive[40:])


def test_a_missing_signal_says_what_to_pass():
    pruner = pruning.prune(pruning.auto(0.1, monitor="error_rate"))
    params = {"w": jnp.ones((2, 2))}
    state = pruner.init(params)
    message = r"auto\(\) follows the signal 'error_rate'.*pass error_rate= to tx.update"
    with pytest.raises(ValueError, match=message):
        pruner.update(params, state, params)
    with pytest.raises(ValueError, match=message):
        pruning.revise(pruner, params, state, validation_loss=1.0)
    _, state = pruning.revise(pruner, params, state, error_rate=0.5)
    assert pruning.record(state).target == pytest.approx(0.2)


def test_it_has_no_value_that_depends_on_the_step_alone():
    with pytest.raises(TypeError, match="it follows the signal 'validation_loss'"):
        pruning.auto(0.1)(3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": -0.1}, "tolerance must be >= 0, not -0.1"),
        ({"tolerance": 0.1, "rate": 0.0}, r"rate must be in \(0, 1\), not 0.0"),
        ({"tolerance": 0.1, "rate": 1.0}, r"rate must be in \(0, 1\)"),
        ({"tolerance": 0.1, "patience": 0}, "patience must be a number of events >= 1, not 0"),
        ({"tolerance": 0.1, "patience": 1.5}, "patience must be a number of events >= 1"),
        ({"tolerance": 0.1, "most": 1.0}, r"most must be a sparsity in \[0, 1\)"),
        ({"tolerance": 0.1, "start": 9, "end": 3}, "end=3 comes before start=9"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, not nan"),
    ],
)
def test_what_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pruning.auto(**kwargs)
