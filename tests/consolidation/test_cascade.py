"""The cascade is its linear system; it loses nothing, and forgets as a power law."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning, testing, trees
from adaptivenet.consolidation.cascade import CascadeState, cascade, diffuse, memory_trace
from tests.cells import every_cell

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


def system(levels, base, rate, leak):
    """Capacities, and the matrix A of ``C du/dt = A u``, entry by entry from the equation."""
    capacities = np.array([base ** (k - 1) for k in range(1, levels + 1)])
    tubes = {k: rate * base ** (-(k - 1)) for k in range(1, levels + 1)}
    matrix = np.zeros((levels, levels))
    for k in range(1, levels + 1):
        row = k - 1
        if k > 1:
            matrix[row, row - 1] += tubes[k - 1]
            matrix[row, row] -= tubes[k - 1]
        if k < levels:
            matrix[row, row + 1] += tubes[k]
            matrix[row, row] -= tubes[k]
        else:
            matrix[row, row] -= leak * tubes[k]
    return capacities, matrix


def dense_step(u, push, levels, base, rate, leak, step):
    capacities, matrix = system(levels, base, rate, leak)
    flow = matrix / capacities[:, None]
    first = np.eye(levels)[:, :1] * push
    if step == "explicit":
        return u + flow @ u + first
    return np.linalg.solve(np.eye(levels) - flow, u + first)


@settings(max_examples=15)
@given(
    levels=st.integers(2, 6),
    base=st.floats(1.2, 4.0),
    rate=st.floats(0.0, 0.5),
    leak=st.sampled_from([0.0, 1.0, 0.3]),
    step=st.sampled_from(["implicit", "explicit"]),
    seed=st.integers(0, 99),
)
def test_a_step_is_that_of_the_dense_system(levels, base, rate, leak, step, seed):
    rng = np.random.default_rng(seed)
    u, push = rng.normal(size=(levels, 3)), rng.normal(size=3)
    expected = dense_step(u, push, levels, base, rate, leak, step)
    with jax.enable_x64(True):
        got = diffuse(jnp.asarray(u), jnp.asarray(push), base=base, rate=rate, leak=leak, step=step)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", ["implicit", "explicit"])
def test_the_transformation_is_the_system_for_every_weight(step):
    """Ten updates of a tree, against the dense system in numpy."""
    levels, options = 4, {"base": 2.0, "rate": 0.3, "leak": 1.0}
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 3))
    with jax.enable_x64(True):
        tx, params = cascade(levels, step=step, **options), {"w": jnp.asarray(start)}
        state = tx.init(params)
        u = np.repeat(start.reshape(1, -1), levels, 0)
        for _ in range(10):
            push = rng.normal(size=(2, 3))
            updates, state = tx.update({"w": jnp.asarray(push)}, state, params)
            params = optax.apply_updates(params, updates)
            u = dense_step(u, push.reshape(-1), levels, step=step, **options)
            np.testing.assert_allclose(params["w"].reshape(-1), u[0], rtol=1e-11)
            for k, hidden in enumerate(state.hidden):
                np.testing.assert_allclose(hidden["w"].reshape(-1), u[k + 1], rtol=1e-11)


@pytest.mark.parametrize("step", ["implicit", "explicit"])
def test_small_steps_tend_to_the_differential_equation(step):
    """Against the matrix exponential; halving the step halves the error, as of first order."""
    levels, base, time = 4, 2.0, 3.0
    capacities, matrix = system(levels, base, 1.0, 0.0)
    values, vectors = np.linalg.eig(matrix / capacities[:, None])
    exact = (vectors @ np.diag(np.exp(values * time)) @ np.linalg.inv(vectors))[:, 0].real
    errors = []
    with jax.enable_x64(True):
        for steps in (64, 128, 256):
            options = {"base": base, "rate": time / steps, "step": step}
            u = jax.lax.fori_loop(
                0,
                steps,
                lambda _, u, options=options: diffuse(u, **options),
                jnp.eye(levels)[0],
            )
            errors.append(np.max(np.abs(np.asarray(u) - exact)))
    assert errors[0] < 0.01
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=0.1)
    np.testing.assert_allclose(errors[1] / errors[2], 2.0, rtol=0.1)


@pytest.mark.parametrize("step", ["implicit", "explicit"])
@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_what_is_poured_in_stays_in_unless_it_leaks(step, leak):
    levels, base = 5, 2.0
    rng = np.random.default_rng(1)
    pushes = rng.normal(size=50)
    with jax.enable_x64(True):
        u = jnp.zeros(levels)
        for push in pushes:
            u = diffuse(u, push, base=base, rate=0.4, leak=leak, step=step)
        total = float(np.sum(base ** np.arange(levels) * np.asarray(u)))
    if leak:
        assert abs(total - pushes.sum()) > 1e-3  # the test can fail
    else:
        np.testing.assert_allclose(total, pushes.sum(), rtol=1e-12)


class TestForgetting:
    """What remains of a change is 1/sqrt(t) between the time scales, and no exponential."""

    LEVELS, RATE = 8, 0.25

    def slopes(self, trace, times):
        """Of log(trace) in log(time), between neighbouring times."""
        steps = np.diff(np.log(times))
        return np.diff(np.log(np.asarray(trace, np.float64)[np.asarray(times) - 1])) / steps

    def test_a_power_law(self):
        with jax.enable_x64(True):
            trace = memory_trace(self.LEVELS, 4096, base=2.0, rate=self.RATE)
        # 1 / rate = 4 steps, base^(2 * 7) / rate = 65536 steps
        slopes = self.slopes(trace, [32, 64, 128, 256, 512, 1024, 2048])
        assert np.all(np.abs(slopes + 0.5) < 0.1), slopes
        assert abs(slopes.mean() + 0.5) < 0.04

    def test_after_the_slowest_time_scale_it_is_exponential_or_stays(self):
        with jax.enable_x64(True):
            leaking = memory_trace(3, 2048, base=2.0, rate=self.RATE, leak=1.0)
            closed = memory_trace(3, 2048, base=2.0, rate=self.RATE)
        assert self.slopes(leaking, [512, 1024])[0] < -2
        np.testing.assert_allclose(closed[-1], 1 / (1 + 2 + 4), rtol=1e-3)  # equilibrium

    def test_one_time_scale_is_no_power_law(self):
        """Negative control: a weight that decays by itself, to the same trace after 32 steps."""
        with jax.enable_x64(True):
            trace = memory_trace(self.LEVELS, 4096, base=2.0, rate=self.RATE)
        decay = float(trace[31]) ** (1 / 31)
        slopes = self.slopes(decay ** np.arange(2048), [32, 64, 128, 256])
        assert np.all(slopes < -1.4), slopes
        assert np.all(np.diff(slopes) < -1)  # ever steeper

    def test_old_values_come_back_after_a_short_disturbance(self):
        """A weight is held at 1 for long, taken to 0 for a while, then left alone."""

        def left(levels, rate):
            u = jnp.zeros(levels)
            for target, push, steps in ((1.0, 0.5, 3000), (0.0, 0.5, 100), (0.0, 0.0, 300)):

                def advance(_, u, target=target, push=push):
                    return diffuse(u, push * (target - u[0]), rate=rate)

                u = jax.lax.fori_loop(0, steps, advance, u)
            return float(u[0])

        few, many, none = left(2, 0.1), left(7, 0.1), left(7, 0.0)
        assert none < 1e-6  # negative control: a weight without hidden levels
        assert 0.0 < few < 0.1
        assert many > 3 * few


def test_a_rate_of_zero_leaves_updates_alone():
    """Negative control, to the bit; the levels rest."""
    tx = cascade(3, rate=0.0)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda p: jnp.sin(p) / 3, PARAMS)
    updates, after = tx.update(grads, state, PARAMS)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_implicit_step_is_stable_where_the_explicit_is_refused():
    with pytest.raises(ValueError, match=r"unstable for rate=1\.5: its fastest mode is multiplied"):
        cascade(4, rate=1.5, step="explicit")
    capacities, matrix = system(4, 2.0, 1.5, 0.0)
    fastest = np.max(np.abs(np.linalg.eigvals(np.eye(4) + matrix / capacities[:, None])))
    assert fastest > 1  # it would have been
    for rate in (1.5, 1e6):
        trace = np.asarray(memory_trace(4, 60, rate=rate))
        assert np.all(np.isfinite(trace))
        assert np.all(np.diff(trace) <= 1e-7)
        assert trace[-1] > 0
    # The bound is sharp: just below, the explicit step is allowed and decays.
    critical = 2 * 1.5 / (1 + fastest)
    cascade(4, rate=0.99 * critical, step="explicit")
    with pytest.raises(ValueError, match="unstable"):
        cascade(4, rate=1.01 * critical, step="explicit")


def test_leaves_that_are_chosen_and_dtypes():
    params = {
        "kernel": jnp.ones((2, 2), jnp.bfloat16),
        "bias": jnp.ones(2),
        "ids": jnp.arange(3),
    }
    grads = {**params, "ids": np.zeros(3, jax.dtypes.float0)}
    state = cascade(3).init(params)
    assert len(state.hidden) == 2
    assert trees.is_masked(state.hidden[0]["ids"])
    assert state.hidden[1]["kernel"].dtype == jnp.float32
    updates, _ = cascade(3).update(grads, state, params)
    assert updates["kernel"].dtype == jnp.bfloat16
    narrow = cascade(3, select="kernel").init(params)
    assert trees.paths(narrow.hidden[0]) == ("kernel",)


def test_no_two_levels_share_a_buffer():
    """Else a step that donates its state would be refused."""
    tx = cascade(4)
    params = {"w": jnp.arange(6.0)}
    state = tx.init(params)
    leaves = [*jax.tree.leaves(state), params["w"]]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    step = jax.jit(lambda s, p: tx.update(p, s, p)[1], donate_argnums=0)
    assert isinstance(step(state, params), CascadeState)


def test_all_levels_of_a_synapse_that_wakes_begin_again():
    rule = pruning.prune(0.5, regrow=pruning.by_gradient(0.5), every=1)
    tx = pruning.with_signals(optax.chain(cascade(3, rate=0.1), rule))
    params = {"w": jnp.array([[1.0, -2.0, 3.0, -4.0], [0.1, 0.2, 0.3, 0.4]])}
    state = tx.init(params)
    grads = {"w": jnp.linspace(1.0, 0.1, 8).reshape(2, 4)}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    inner, pruned = state.inner[0], state.inner[1]
    woken = np.asarray(pruned.mask["w"] & ~pruned.survivors["w"])
    assert woken.any()
    for level in inner.hidden:
        np.testing.assert_array_equal(np.asarray(level["w"])[woken], 0.0)
        assert np.all(np.asarray(level["w"])[np.asarray(pruned.survivors["w"])] != 0)


def make(strength):
    return optax.chain(optax.sgd(0.1), cascade(3, rate=strength, leak=strength))


@every_cell
def test_contract(subject, mode):
    testing.check(make, subject=subject, mode=mode)


def test_checkpoints_and_resumes():
    testing.check_checkpoint(make, subject="nnx_optimizer")
    testing.check_resume(make, subject="dict")


def test_before_a_pruner_it_lands():
    def both(sparsity):
        return optax.chain(optax.adam(1e-2), cascade(3, rate=0.1), pruning.prune(sparsity))

    testing.check(both, subject="dict", mode="scan")


class TestErrors:
    def test_numbers_out_of_range(self):
        for options, message in (
            ({"levels": 1}, "levels must be an integer of at least 2, not 1"),
            ({"levels": 2.0}, "levels must be an integer"),
            ({"levels": 3, "base": 1.0}, r"base must be above 1, not 1\.0"),
            ({"levels": 3, "rate": -0.1}, "rate must be a number >= 0"),
            ({"levels": 3, "leak": -0.1}, "leak must be a number >= 0"),
            ({"levels": 3, "step": "euler"}, 'step must be "implicit" or "explicit"'),
        ):
            with pytest.raises(ValueError, match=message):
                cascade(**options)

    def test_levels_that_would_stand_still(self):
        with pytest.raises(ValueError, match="the last level of 'bias' moves by"):
            cascade(14, rate=0.1).init(PARAMS)
        with jax.enable_x64(True):
            cascade(14, rate=0.1).init({"w": jnp.ones(2, jnp.float64)})

    def test_no_parameters_and_other_levels(self):
        tx = cascade(3)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"cascade\(\) needs the parameters"):
            tx.update(PARAMS, state)
        with pytest.raises(ValueError, match="this state has 3 levels, but"):
            cascade(4).update(PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match="matches no leaf"):
            cascade(3, select="dense").init(PARAMS)
