"""Detectors are their formulas, alarm when something changes and not before; alarms consolidate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import testing, trees
from adaptivenet.consolidation.drift import Detector, cusum, novelty, on_drift, page_hinkley
from adaptivenet.consolidation.elastic import elastic
from adaptivenet.posterior.gaussian import Posterior, isotropic
from tests.cells import every_cell


def alarms(detector, values):
    """Positions of the alarms in a stream."""
    run = jax.jit(lambda v: jax.lax.scan(detector.update, detector.init(), v)[1])
    return np.flatnonzero(np.asarray(run(jnp.asarray(values, jnp.float32)))).tolist()


STREAMS = st.lists(st.floats(-2, 2, width=32), min_size=5, max_size=30)


class TestPageHinkley:
    @settings(max_examples=20)
    @given(values=STREAMS, delta=st.sampled_from([0.0, 0.1]), warmup=st.integers(0, 6))
    def test_the_first_alarm_is_that_of_the_definition(self, values, delta, warmup):
        sums = []
        for t in range(1, len(values) + 1):
            means = [np.mean(values[:i]) for i in range(1, t + 1)]
            sums.append(sum(values[i] - means[i] - delta for i in range(t)))
        excess = np.array([s - min(sums[: t + 1]) for t, s in enumerate(sums)])
        threshold = 1.7321
        if np.min(np.abs(excess - threshold)) < 1e-3:
            return
        expected = [t for t, e in enumerate(excess) if e > threshold and t + 1 > warmup]
        got = alarms(page_hinkley(threshold, delta=delta, warmup=warmup), values)
        assert got[:1] == expected[:1]

    def test_it_begins_anew_after_an_alarm(self):
        values = [0.0] * 10 + [5.0] * 30 + [12.0] * 10
        assert alarms(page_hinkley(8.0, warmup=3), values) == [11, 41]


class TestCusum:
    @settings(max_examples=20)
    @given(values=STREAMS, slack=st.sampled_from([0.0, 0.5]), two_sided=st.booleans())
    def test_a_known_reference(self, values, slack, two_sided):
        """The first alarm, where some stretch up to now sums to more than the threshold."""
        z = (np.asarray(values) - 0.3) / 0.5
        first, threshold = [], 2.345
        for t in range(1, len(z) + 1):
            rises = [np.sum(z[s:t] - slack) for s in range(t)]
            falls = [np.sum(-z[s:t] - slack) for s in range(t)] if two_sided else [0.0]
            worst = max(0.0, *rises, *falls)
            if abs(worst - threshold) < 1e-3:
                return
            if worst > threshold:
                first = [t - 1]
                break
        detector = cusum(threshold, slack=slack, reference=(0.3, 0.5), two_sided=two_sided)
        assert alarms(detector, values)[:1] == first

    def test_the_reference_is_that_of_the_first_values(self):
        values = np.random.default_rng(0).normal(3.0, 0.2, 40)
        detector = cusum(1e6, warmup=25)
        state = jax.lax.scan(detector.update, detector.init(), jnp.asarray(values, jnp.float32))[0]
        np.testing.assert_allclose(state.mean, values[:25].mean(), rtol=1e-5)
        np.testing.assert_allclose(state.squares / 24, values[:25].var(ddof=1), rtol=1e-3)
        z = (values[25:] - values[:25].mean()) / values[:25].std(ddof=1)
        high = 0.0
        for x in z:
            high = max(0.0, high + x - 0.5)
        np.testing.assert_allclose(state.high, high, rtol=1e-2, atol=1e-3)

    def test_only_the_two_sided_test_sees_a_fall(self):
        values = np.random.default_rng(0).normal(size=400)
        values[200:] -= 3.0
        assert alarms(cusum(), values) == []
        found = alarms(cusum(two_sided=True), values)
        assert 200 <= found[0] < 210

    def test_a_reference_without_variance(self):
        """No change is no alarm, any rise is one; nothing is nan."""
        assert alarms(cusum(warmup=5), [1.0] * 20) == []
        assert alarms(cusum(warmup=5), [1.0] * 10 + [1.5] + [1.5] * 8) == [10]


class TestNovelty:
    def test_the_score_is_against_the_values_before(self):
        values = np.random.default_rng(0).normal(2.0, 0.5, 30)
        detector = novelty(100.0, decay=1.0, warmup=5)
        state, _ = jax.lax.scan(detector.update, detector.init(), jnp.asarray(values, jnp.float32))
        expected = (values[-1] - values[:-1].mean()) / values[:-1].std()
        np.testing.assert_allclose(state.score, expected, rtol=1e-3)
        np.testing.assert_allclose(state.mean, values.mean(), rtol=1e-5)
        np.testing.assert_allclose(state.variance, values.var(), rtol=1e-4)

    def test_exponential_averages(self):
        values, decay = np.random.default_rng(1).normal(size=60), 0.9
        detector = novelty(100.0, decay=decay, warmup=5)
        state, _ = jax.lax.scan(detector.update, detector.init(), jnp.asarray(values, jnp.float32))
        mean, variance = 0.0, 0.0
        for t, x in enumerate(values, start=1):
            rate = max(1 - decay, 1 / t)
            variance = (1 - rate) * (variance + rate * (x - mean) ** 2)
            mean += rate * (x - mean)
        np.testing.assert_allclose(state.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.variance, variance, rtol=1e-4)


MAKERS = {
    "page_hinkley": lambda: page_hinkley(15.0, delta=0.5, warmup=50),
    "cusum": lambda: cusum(12.0, warmup=150),
    "novelty": lambda: novelty(6.0, warmup=100),
}


@pytest.mark.parametrize("name", MAKERS)
class TestStreams:
    """Twenty streams of normal losses, a rise in the middle of them; seeds are fixed."""

    LENGTH, CHANGE = 1000, 500

    def streams(self, rise):
        values = np.random.default_rng(0).normal(1.0, 0.1, (20, self.LENGTH)).astype(np.float32)
        values[:, self.CHANGE :] += 0.1 * rise
        return (values - 1.0) / 0.1  # standardised: the thresholds have this unit

    def found(self, name, rise):
        detector = MAKERS[name]()
        run = jax.vmap(lambda v: jax.lax.scan(detector.update, detector.init(), v)[1])
        return np.asarray(jax.jit(run)(jnp.asarray(self.streams(rise))))

    def test_without_a_change_there_is_no_alarm(self, name):
        assert self.found(name, 0.0).sum() <= 1

    def test_a_change_is_found_soon(self, name):
        rise = 12.0 if name == "novelty" else 2.0
        found = self.found(name, rise)
        assert found[:, : self.CHANGE].sum() <= 1
        delays = [np.flatnonzero(row[self.CHANGE :]) for row in found]
        assert all(len(d) for d in delays)
        assert max(d[0] for d in delays) < 40
        # One change is one alarm, or nearly.
        assert found[:, self.CHANGE :].sum() <= 24

    def test_values_that_are_not_finite_leave_no_trace(self, name):
        detector = MAKERS[name]()
        values = self.streams(2.0)[0]
        broken = np.insert(values, [100, 300, 505], [np.nan, np.inf, -np.inf])
        shifted = [p + (p >= 100) + (p >= 300) + (p >= 505) for p in alarms(detector, values)]
        assert alarms(detector, broken) == shifted


# --- boundaries by themselves --------------------------------------------------------------------


class ToyState(NamedTuple):
    anchor: Any
    precision: Any
    losses: jax.Array

    def consolidated(self, params, posterior, *, value, **signals):
        copy = trees.map_synapses(lambda a, p: jnp.array(p, a.dtype), self.anchor, params)
        precision = trees.map_synapses(lambda _, s: s, self.anchor, posterior.precision)
        return ToyState(copy, precision, self.losses + value)


def toy():
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ToyState(zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros(()))

    return optax.GradientTransformationExtraArgs(init, lambda u, s, p=None, **extra: (u, s))


def every(period):
    """A detector that alarms by the clock, whatever the losses are."""

    def update(state, value):
        return state + 1, state % period == period - 1

    return Detector(lambda: jnp.zeros((), jnp.int32), update)


PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}
BELIEF = isotropic(PARAMS, 3.0)
ONES = jax.tree.map(jnp.ones_like, PARAMS)


class TestOnDrift:
    def run(self, tx, steps, **told):
        """Updates of -1, so that the parameters tell the step: they are -t after t steps."""
        params, state = jax.tree.map(jnp.zeros_like, PARAMS), None
        state, states = tx.init(params), []
        for step in range(steps):
            updates, state = tx.update(ONES, state, params, value=jnp.float32(step), **told)
            params = optax.apply_updates(params, updates)
            states.append(state)
        return states

    def test_alarms_consolidate_the_parameters_before_the_update(self):
        tx = on_drift(optax.chain(toy(), optax.sgd(1.0)), every(4))
        states = self.run(tx, 10, posterior=BELIEF)
        assert [bool(s.alarm) for s in states] == [t % 4 == 3 for t in range(10)]
        assert [int(s.alarms) for s in states] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
        for step, state in enumerate(states):
            last = 4 * ((step + 1) // 4) - 1  # the step of the last alarm
            expected = -float(last) if last > 0 else 0.0
            assert float(state.inner[0].anchor["bias"][0]) == expected
            assert float(state.inner[0].precision["bias"][0]) == (3.0 if last > 0 else 0.0)
        assert float(states[-1].inner[0].losses) == 3.0 + 7.0  # value= reaches the rule

    @pytest.mark.parametrize("delay", [1, 3])
    def test_a_delay_remembers_what_was_before(self, delay):
        tx = on_drift(optax.chain(toy(), optax.sgd(1.0)), every(12), delay=delay)
        anchor = float(self.run(tx, 12, posterior=BELIEF)[-1].inner[0].anchor["bias"][0])
        age = 11 - (-anchor)  # updates since the parameters that were remembered
        assert delay <= age <= 2 * delay

    def test_with_a_delay_the_belief_moves_to_what_is_remembered(self):
        seen = []

        def act(state, params, posterior, **signals):
            seen.append((params, posterior))
            return state

        tx = on_drift(optax.sgd(1.0), every(1), act=act, delay=2)
        self.run(tx, 1, posterior=BELIEF)
        params, belief = seen[-1]
        assert params["bias"] is not None
        assert isinstance(belief, Posterior)
        assert jax.tree.structure(belief.mean) == jax.tree.structure(params)

    def test_without_alarms_it_is_the_chain(self):
        """Negative control, to the bit."""
        plain = optax.chain(elastic(1.0), optax.sgd(0.1, momentum=0.9))
        tx, state = on_drift(plain, every(100)), None
        params = other = PARAMS
        state, reference = tx.init(params), plain.init(other)
        for _ in range(3):
            grads = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(grads, state, params, value=1.0, posterior=BELIEF)
            params = optax.apply_updates(params, updates)
            updates, reference = plain.update(jax.tree.map(jnp.sin, other), reference, other)
            other = optax.apply_updates(other, updates)
        for a, b in zip(
            jax.tree.leaves((params, state.inner)), jax.tree.leaves((other, reference)), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_the_belief_of_the_chain_serves_where_none_is_handed_on(self):
        estimator = an.posterior.squared_gradient(0.5, prior=1.0)
        inner = an.with_posterior(estimator, optax.chain(elastic(1.0), optax.sgd(1.0)))
        states = self.run(on_drift(inner, every(3)), 3)
        precision = states[-1].inner.inner[0].precision["bias"]
        assert np.all(np.asarray(precision) > 0)
        with pytest.raises(ValueError, match="needs a belief"):
            self.run(on_drift(optax.chain(elastic(1.0), optax.sgd(1.0)), every(3)), 1)

    def test_signals_that_are_no_arrays_go_through(self):
        seen = []

        def act(state, params, posterior, *, value, helper, **signals):
            seen.append(helper(2.0))
            return state

        tx = on_drift(optax.sgd(1.0), every(1), act=act)
        self.run(tx, 1, helper=lambda x: 3.0 * x)
        assert seen[-1] == 6.0

    def test_a_stream_of_two_tasks_is_consolidated_once(self):
        """Regression to one vector, then to another; nobody says when."""
        data = jax.random.normal(jax.random.key(0), (400, 8, 4))
        noise = 0.1 * jax.random.normal(jax.random.key(1), (400, 8))
        truth = jnp.where(jnp.arange(400)[:, None] < 200, 1.0, -1.0) * jnp.ones(4)

        def train(detector, strength):
            chain = optax.chain(elastic(strength), optax.sgd(0.05))
            tx = an.with_posterior(
                an.posterior.squared_gradient(0.95, prior=1.0),
                on_drift(chain, detector, delay=30),
            )
            params = {"w": jnp.zeros(4)}

            def step(carry, now):
                params, state = carry
                inputs, offset, vector = now

                def loss(params):
                    return jnp.mean((inputs @ (params["w"] - vector) - offset) ** 2)

                value, grads = jax.value_and_grad(loss)(params)
                updates, state = tx.update(grads, state, params, value=value)
                return (optax.apply_updates(params, updates), state), state.inner.alarm

            start = (params, tx.init(params))
            (params, state), rung = jax.lax.scan(step, start, (data, noise, truth))
            return params["w"], state.inner.inner[0].anchor["w"], rung

        run = jax.jit(lambda strength: train(cusum(20.0, warmup=100), strength))
        w, anchor, rung = run(10.0)
        places = np.flatnonzero(rung)
        assert len(places) == 1
        assert 200 <= places[0] <= 204
        np.testing.assert_allclose(anchor, 1.0, atol=0.1)  # what the first task taught
        assert np.all(np.asarray(w) > 0)  # and it is protected
        free = run(0.0)[0]
        np.testing.assert_allclose(free, -1.0, atol=0.1)  # negative control: no protection


def by_the_clock(strength):
    """An alarm in the third and in the sixth step, with a belief around and a delay."""
    estimator = an.posterior.squared_gradient(0.9, prior=1.0)
    chain = on_drift(optax.chain(elastic(strength), optax.sgd(0.05)), every(3), delay=1)
    inner = an.with_posterior(estimator, chain)

    def update(updates, state, params=None, **signals):
        loss = optax.tree_utils.tree_norm(updates, squared=True)
        return inner.update(updates, state, params, value=loss, **signals)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@every_cell
def test_contract(subject, mode):
    testing.check(by_the_clock, subject=subject, mode=mode)


def test_checkpoints_and_resumes():
    def losing(strength):
        chain = optax.chain(elastic(strength), optax.sgd(0.1))
        detectors = (page_hinkley(0.5, warmup=1), cusum(1.0, warmup=2), novelty(1.0, warmup=2))
        for detector in detectors:
            chain = on_drift(chain, detector)
        inner = an.with_posterior(an.posterior.squared_gradient(0.9, prior=1.0), chain)

        def update(updates, state, params=None, **signals):
            loss = optax.tree_utils.tree_norm(updates, squared=True)
            return inner.update(updates, state, params, value=loss, **signals)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    testing.check_resume(losing, subject="dict")
    testing.check_checkpoint(by_the_clock, subject="nnx_optimizer")


class TestErrors:
    def test_numbers_out_of_range(self):
        for make, message in (
            (lambda: page_hinkley(0.0), "threshold must be positive"),
            (lambda: page_hinkley(1.0, delta=-1.0), "delta must be a number >= 0"),
            (lambda: cusum(-1.0), "threshold must be positive"),
            (lambda: cusum(slack=-1.0), "slack must be a number >= 0"),
            (lambda: cusum(warmup=1), "warmup must be at least 2, not 1"),
            (lambda: cusum(reference=(0.0, 0.0)), "standard deviation of reference must be"),
            (lambda: novelty(decay=1.5), r"decay must be in \[0, 1\]"),
            (lambda: novelty(warmup=1), "warmup must be at least 2"),
            (lambda: on_drift(optax.sgd(0.1), cusum(), delay=-1), "delay must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                make()

    def test_what_is_wrapped(self):
        with pytest.raises(TypeError, match="wraps an optax transformation"):
            on_drift(None, cusum())  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="is no detector: give one"):
            on_drift(optax.sgd(0.1), cusum)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="finds nothing in the chain that consolidates"):
            on_drift(optax.sgd(0.1), cusum()).init(PARAMS)

    def test_what_an_update_needs(self):
        tx = on_drift(optax.chain(toy(), optax.sgd(0.1)), cusum())
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"on_drift\(\) needs the parameters"):
            tx.update(ONES, state, value=1.0)
        for value in (None, jnp.ones(3)):
            with pytest.raises(ValueError, match=r"on_drift\(\) needs the loss, a scalar"):
                tx.update(ONES, state, PARAMS, value=value)
