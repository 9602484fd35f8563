"""Elastic weight consolidation against lists of penalties, closed forms and Bayes' rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import (
    RootMeanSquare,
    elastic,
    merge,
    penalty,
    proximal,
)
from adaptivenet.posterior import Posterior
from tests.cells import every_cell
from tests.consolidation.elastic_cases import PARAMS, believed, close, gradient, like


class TestForms:
    """After any number of tasks, against a list of all of them."""

    @pytest.mark.parametrize("number", [1, 2, 5])
    @pytest.mark.parametrize("decay", [1.0, 0.6])
    def test_separate_is_a_penalty_for_every_task(self, number, decay):
        tasks = [believed(seed) for seed in range(number)]
        tx = elastic(3.0, form="separate", decay=decay)
        state = tx.init(PARAMS)
        for task in tasks:
            state = consolidate(state, PARAMS, task)
        for seed in (7, 8):
            where = like(PARAMS, seed, -2.0, 2.0)
            expected = {
                name: 3.0
                * sum(
                    decay ** (number - 1 - k)
                    * np.float64(t.precision[name])
                    * (np.float64(where[name]) - np.float64(t.mean[name]))
                    for k, t in enumerate(tasks)
                )
                for name in where
            }
            close(gradient(tx, state, where), expected)

    def test_and_the_penalties_differ_by_a_constant(self):
        tasks = [believed(seed) for seed in range(3)]
        state = elastic(1.0, form="separate").init(PARAMS)
        for task in tasks:
            state = consolidate(state, PARAMS, task)
        gaps = []
        for seed in range(4):
            where = like(PARAMS, seed, -2.0, 2.0)
            each = sum(float(penalty(where, task, 0.7)) for task in tasks)
            gaps.append(each - float(penalty(where, state, 0.7)))
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-3)
        assert gaps[0] > 0.01

    @pytest.mark.parametrize("decay", [1.0, 0.6, 0.0])
    def test_online_adds_precisions_at_the_latest_anchor(self, decay):
        tasks = [believed(seed) for seed in range(4)]
        tx = elastic(3.0, decay=decay)
        state = tx.init(PARAMS)
        for task in tasks:
            state = consolidate(state, PARAMS, task)
        where = like(PARAMS, 9, -2.0, 2.0)
        for name in where:
            precision = 0.0
            for task in tasks:
                precision = decay * precision + np.float64(task.precision[name])
            np.testing.assert_allclose(state.precision[name], precision, rtol=1e-6)
            apart = np.float64(where[name]) - np.float64(tasks[-1].mean[name])
            got = gradient(tx, state, where)[name]
            np.testing.assert_allclose(got, 3 * precision * apart, rtol=2e-5, atol=1e-5)

    def test_the_forms_differ_from_the_second_task_on(self):
        for number, same in ((1, True), (2, False)):
            found = []
            for form in ("online", "separate"):
                state = elastic(1.0, form=form).init(PARAMS)
                for seed in range(number):
                    state = consolidate(state, PARAMS, believed(seed))
                found.append(np.asarray(state.anchor["bias"]))
            assert np.allclose(*found, atol=1e-6) == same

    def test_the_prior_counts_once(self):
        prior, decay = 0.5, 0.8
        data = [like(PARAMS, seed) for seed in range(3)]
        state = elastic(1.0, prior=prior, decay=decay).init(PARAMS)
        for one in data:
            state = consolidate(
                state, PARAMS, Posterior(PARAMS, jax.tree.map(lambda h: h + prior, one))
            )
        for name, found in state.precision.items():
            parts = [decay ** (2 - k) * np.asarray(one[name]) for k, one in enumerate(data)]
            np.testing.assert_allclose(found, prior + sum(parts), rtol=1e-5)

    def test_gradient_is_that_of_the_penalty(self):
        tx = elastic(1.7)
        state = consolidate(tx.init(PARAMS), PARAMS, believed(3))
        where = like(PARAMS, 4)
        close(gradient(tx, state, where), jax.grad(penalty)(where, state, 1.7))

    def test_leaves_without_a_belief_keep_their_memory(self):
        state = consolidate(elastic(1.0).init(PARAMS), PARAMS, believed(0))
        half = believed(1)
        gone = optax.MaskedNode()
        half = Posterior({**half.mean, "bias": gone}, {**half.precision, "bias": gone})
        after = consolidate(state, PARAMS, half)
        np.testing.assert_array_equal(after.precision["bias"], state.precision["bias"])
        np.testing.assert_array_equal(after.anchor["bias"], state.anchor["bias"])
        assert not np.array_equal(after.precision["kernel"], state.precision["kernel"])


positive = st.floats(0.0078125, 100.0, width=32)
number = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(number, positive), min_size=3, max_size=3))
def test_merging_does_not_depend_on_the_order(tasks):
    beliefs = [Posterior({"w": jnp.array([m])}, {"w": jnp.array([h])}) for m, h in tasks]

    def folded(order):
        memory = beliefs[order[0]]
        for k in order[1:]:
            memory = merge(memory, beliefs[k], form="separate")
        return float(memory.mean["w"][0]), float(memory.precision["w"][0])

    means, precisions = (np.float64(x) for x in zip(*tasks, strict=True))
    expected = (means * precisions).sum() / precisions.sum(), precisions.sum()
    for order in ([0, 1, 2], [2, 0, 1]):
        np.testing.assert_allclose(folded(order), expected, rtol=1e-4, atol=1e-3)


class TestBeforeAndAfter:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("make", [lambda: elastic(1e6), lambda: proximal(1e6, 0.1)])
    def test_the_identity_before_the_first_boundary(self, make, dtype):
        params = {"w": jnp.array([1.0, -2.0, jnp.inf, 3.0], dtype), "ids": jnp.arange(2)}
        grads = {
            "w": jnp.array([-0.0, 1e-3, jnp.nan, 7.0], dtype),
            "ids": np.zeros(2, jax.dtypes.float0),
        }
        updates, _ = make().update(grads, make().init(params), params)
        assert updates["w"].dtype == dtype
        assert updates["w"].tobytes() == grads["w"].tobytes()
        assert updates["ids"] is grads["ids"]

    def test_memory_is_kept_in_float32(self):
        params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
        belief = Posterior(params, {"w": jnp.array([1.0, 0.001])})
        for tx in (elastic(1.0), proximal(1.0, 0.1)):
            state = consolidate(tx.init(params), params, belief)
            for leaf in jax.tree.leaves(getattr(state, "memory", state)):
                assert leaf.dtype in (jnp.float32, jnp.int32)
            moved = {"w": jnp.array([1.5, 3.0], jnp.bfloat16)}
            updates, _ = tx.update({"w": jnp.zeros(2, jnp.bfloat16)}, state, moved)
            assert updates["w"].dtype == jnp.bfloat16
            assert updates["w"][0] != 0

    def test_select(self):
        tx = elastic(1.0, select="kernel")
        state = tx.init(PARAMS)
        assert isinstance(state.precision["bias"], optax.MaskedNode)
        state = consolidate(state, PARAMS, believed(0))
        where = like(PARAMS, 1)
        got = gradient(tx, state, where)
        np.testing.assert_array_equal(got["bias"], np.zeros(2))
        assert np.any(got["kernel"] != 0)


class TestBayes:
    """A linear model of independent inputs: the belief is a diagonal Gaussian, and exact."""

    SIZES = (40, 70, 20)

    def tasks(self):
        rng = np.random.default_rng(0)
        truth = rng.normal(size=4)
        found = []
        for n in self.SIZES:
            places = rng.integers(0, 4, n)
            x = np.eye(4)[places] * rng.uniform(0.5, 1.5, (n, 1))
            found.append((x, x @ truth + 0.3 * rng.normal(size=n)))
        return found

    @staticmethod
    def apply(params, x):
        return x @ params["w"][:, None]

    def train(self, tx, state, params, x, y, steps=800):
        def step(carry, _):
            params, state = carry

            def loss(p):
                return jnp.mean(jnp.square(self.apply(p, x)[:, 0] - y)) / 2

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=steps)[0]

    @pytest.mark.parametrize("implicit", [False, True])
    def test_online_with_strength_one_over_n_is_the_batch_posterior(self, implicit):
        prior, rate = 0.7, 0.3
        params = {"w": jnp.zeros(4)}
        start = Posterior(params, {"w": jnp.full(4, prior)})
        seen_x, seen_y = np.zeros((0, 4)), np.zeros(0)

        def make(n):
            memory = {"prior": prior}
            if implicit:
                return optax.chain(optax.sgd(rate), proximal(1 / n, rate, **memory))
            return optax.chain(elastic(1 / n, **memory), optax.sgd(rate))

        state = consolidate(make(1).init(params), params, start)
        for x, y in self.tasks():
            x32, y32 = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
            params, state = self.train(make(len(y)), state, params, x32, y32)
            seen_x, seen_y = np.concatenate([seen_x, x]), np.concatenate([seen_y, y])
            precision = prior + (seen_x**2).sum(0)
            np.testing.assert_allclose(params["w"], seen_x.T @ seen_y / precision, atol=2e-4)
            fisher = an.posterior.fisher_diagonal(self.apply, params, x32, likelihood="gaussian")
            belief = an.posterior.calibrate(params, fisher, prior=prior)
            state = consolidate(state, params, belief)
            (memory,) = [
                node.precision
                for node in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "anchor"))
                if hasattr(node, "anchor")
            ]
            np.testing.assert_allclose(memory["w"], precision, rtol=1e-4)

    def test_another_strength_is_not(self):
        """The control: the scale matters."""
        (x, y), (x2, y2) = ((jnp.float32(x), jnp.float32(y)) for x, y in self.tasks()[:2])
        params = {"w": jnp.zeros(4)}
        found = {}
        for strength in (0.0, 1 / 70, 1.0):
            tx = optax.chain(elastic(strength), optax.sgd(0.3))
            p, state = self.train(tx, tx.init(params), params, x, y)
            fisher = an.posterior.fisher_diagonal(self.apply, p, x, likelihood="gaussian")
            p, _ = self.train(tx, consolidate(state, p, Posterior(p, fisher)), p, x2, y2, 2000)
            found[strength] = p["w"]
        both_x, both_y = jnp.concatenate([x, x2]), jnp.concatenate([y, y2])
        best = both_x.T @ both_y / (both_x**2).sum(0)
        gaps = {s: float(jnp.max(jnp.abs(w - best))) for s, w in found.items()}
        assert gaps[1 / 70] < 1e-3 < 1e-2 < min(gaps[0.0], gaps[1.0])


class TestEvery:
    def chain(self, **options):
        return an.with_posterior(
            an.posterior.squared_gradient(0.9), optax.chain(elastic(0.5, **options), optax.sgd(0.1))
        )

    def test_it_consolidates_by_itself(self):
        """As by hand, with the belief and the parameters of the update."""
        itself, by_hand = self.chain(every=3, decay=0.5), self.chain(decay=0.5)
        p = q = PARAMS
        s, t = itself.init(p), by_hand.init(q)
        for step in range(1, 8):
            grads = like(PARAMS, step, -1.0, 1.0)
            updates, s = itself.update(grads, s, p)
            others, t = by_hand.update(grads, t, q)
            if step % 3 == 0:
                t = consolidate(t, q)
            p, q = optax.apply_updates(p, updates), optax.apply_updates(q, others)
            close(p, q, rtol=1e-6)
            close(s.inner[0].precision, t.inner[0].precision, rtol=1e-6)
            assert bool(jnp.all(s.inner[0].precision["bias"] > 0)) == (step >= 3)

    def test_a_decay_bounds_the_sum(self):
        tx = self.chain(every=1, decay=0.75)
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        state = jax.lax.scan(
            lambda s, _: (tx.update(ones, s, PARAMS)[1], None), tx.init(PARAMS), None, length=60
        )[0]
        np.testing.assert_allclose(state.inner[0].precision["bias"], 4.0, rtol=1e-4)

    def test_the_number_of_updates_may_be_traced(self):
        def run(every):
            tx, ones = self.chain(every=every), jax.tree.map(jnp.ones_like, PARAMS)
            state = jax.lax.scan(
                lambda s, _: (tx.update(ones, s, PARAMS)[1], None), tx.init(PARAMS), None, length=4
            )[0]
            return state.inner[0].precision["bias"][0]

        found = jax.jit(jax.vmap(run))(jnp.array([1, 2, 4, 5]))
        np.testing.assert_allclose(found, [4.0, 2.0, 1.0, 0.0], rtol=1e-5)

    def test_without_a_belief(self):
        tx = elastic(1.0, every=2)
        with pytest.raises(ValueError, match=r"elastic\(\) with every=.*an\.with_posterior"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        tx = proximal(1.0, 0.1, every=2)
        with pytest.raises(ValueError, match=r"proximal\(\) with every="):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


class TestInChains:
    def test_with_a_belief_and_a_pruner(self):
        """Pruned synapses stay at zero, however hard the memory pulls."""
        rule = pruning.prune(0.5, every=2)
        pruner = [
            (elastic(50.0, every=2), optax.adam(1e-2), rule),
            (optax.adam(1e-2), proximal(50.0, 1e-2, every=2), rule),
        ]
        for members in pruner:
            tx = an.with_posterior(an.posterior.fisher(0.9), optax.chain(*members))
            params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
            for step in range(7):
                grads = like(PARAMS, step, -1.0, 1.0)
                squares = jax.tree.map(jnp.square, grads)
                updates, state = update(grads, state, params, squared_grads=squares)
                params = optax.apply_updates(params, updates)
                an.testing.check_landing(params, state)
            mask = pruning.mask(state)
            assert int(jnp.sum(~mask["kernel"])) == 3
            assert np.all(np.asarray(params["kernel"])[~np.asarray(mask["kernel"])] == 0)
            node = state.inner[0] if hasattr(state.inner[0], "anchor") else state.inner[1].memory
            cut = np.asarray(node.anchor["kernel"])[~np.asarray(mask["kernel"])]
            assert np.any(np.asarray(node.precision["kernel"]) > 0)
            assert np.all(np.isfinite(cut))

    def test_a_synapse_that_wakes_is_free(self):
        rule = pruning.prune(0.5, regrow=pruning.by_gradient(0.34), every=2)
        tx = an.with_posterior(
            an.posterior.squared_gradient(0.9), optax.chain(elastic(1.0), optax.sgd(0.0), rule)
        )
        update = jax.jit(tx.update)
        params = {"w": jnp.array([[3.0, 2.0, 1.0, 0.1]])}
        state = tx.init(params)
        grads = {"w": jnp.array([[0.0, 0.0, 0.1, 5.0]])}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        state = consolidate(state, params, Posterior(params, {"w": jnp.full((1, 4), 2.0)}))
        seen = []
        for _ in range(4):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            born = state.inner[-1].mask["w"] & ~state.inner[-1].survivors["w"]
            seen.append((np.asarray(born), np.asarray(state.inner[0].precision["w"])))
        woken = np.any([b for b, _ in seen], axis=0)
        assert woken.any()
        np.testing.assert_array_equal(seen[-1][1] == 0, woken)

    def test_beliefs_of_variational_optimizers(self):
        inner = optax.chain(elastic(1e-3, every=2), an.posterior.mesu(100, init_scale=0.1))
        tx = an.with_posterior(an.posterior.held(), inner)
        state = tx.init(PARAMS)
        for seed in range(2):
            told = {"noise": like(PARAMS, seed, -0.1, 0.1)}
            _, state = tx.update(like(PARAMS, seed), state, PARAMS, **told)
        np.testing.assert_allclose(state.inner[0].precision["bias"], 100.0, rtol=0.2)
        np.testing.assert_array_equal(state.inner[0].anchor["bias"], PARAMS["bias"])

    def test_injected_strengths(self):
        tx = optax.inject_hyperparams(elastic)(strength=2.0, every=None)
        state = consolidate(tx.init(PARAMS), PARAMS, believed(0))
        where = like(PARAMS, 5)
        once = gradient(tx, state, where)
        state.hyperparams["strength"] = jnp.float32(6.0)
        close(gradient(tx, state, where), jax.tree.map(lambda g: 3 * g, once))

    def test_masked_by_optax(self):
        tx = optax.masked(elastic(1.0), {"kernel": True, "bias": False})
        state = consolidate(tx.init(PARAMS), PARAMS, believed(0))
        got = gradient(tx, state, like(PARAMS, 1))
        np.testing.assert_array_equal(got["bias"], np.zeros(2))
        assert np.any(got["kernel"] != 0)

    def test_strengths_may_be_a_population(self):
        def run(strength):
            tx = elastic(strength)
            state = consolidate(tx.init(PARAMS), PARAMS, believed(0))
            return gradient(tx, state, like(PARAMS, 5))

        several = jax.vmap(run)(jnp.array([1.0, 4.0]))
        close(jax.tree.map(lambda x: x[1], several), run(4.0))

    def test_temper_turns_a_sum_over_examples_into_a_mean(self):
        belief = Posterior(PARAMS, like(PARAMS, 0, 1.0))
        where = like(PARAMS, 5)
        mean = penalty(where, an.posterior.temper(belief, 50.0), 2.0)
        np.testing.assert_allclose(mean, penalty(where, belief, 2.0 / 50), rtol=1e-5)


def elastic_and_proximal(strength):
    """Both, with boundaries of their own, in both forms."""
    chain = optax.chain(
        elastic(strength, every=2, decay=strength),
        optax.sgd(0.05),
        proximal(strength, 0.05, form="separate", every=2, metric=RootMeanSquare(0.9, 1e-4)),
    )
    return an.with_posterior(an.posterior.squared_gradient(0.9), chain, reset=False)


@every_cell
def test_the_contract(subject, mode):
    an.testing.check(elastic_and_proximal, subject=subject, mode=mode)


@pytest.mark.parametrize("subject", ["nnx_state", "list"])
def test_resumed_runs(subject):
    an.testing.check_resume(elastic_and_proximal, subject=subject)


def test_accumulated_gradients_and_refused_ones():
    def make(strength):
        steps = optax.MultiSteps(optax.apply_if_finite(elastic_and_proximal(strength), 3), 2)
        return steps.gradient_transformation()

    an.testing.check(make, subject="dict", mode="scan")


def test_what_the_contract_runs_protects_at_all():
    """A contract that holds because nothing happens would prove nothing."""
    tx = elastic_and_proximal(0.5)
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(5):
        updates, state = tx.update(like(PARAMS, step), state, params)
        params = optax.apply_updates(params, updates)
    found = jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "anchor"))
    memories = [node for node in found if hasattr(node, "anchor")]
    assert len(memories) == 2
    for memory in memories:
        assert float(jnp.max(memory.precision["kernel"])) > 0.1
        apart = params["kernel"] - memory.anchor["kernel"]
        assert float(jnp.max(jnp.abs(apart))) > 1e-3


class TestErrors:
    def test_numbers(self):
        for options, message in (
            ({"strength": -1.0}, "strength must be a number >= 0"),
            ({"strength": float("nan")}, "strength must be a number >= 0"),
            ({"strength": 1.0, "decay": 1.5}, r"decay must be in \[0, 1\]"),
            ({"strength": 1.0, "prior": -1.0}, "prior must be a number >= 0"),
            ({"strength": 1.0, "every": 0}, "every must be a number of updates >= 1"),
            ({"strength": 1.0, "every": 2.5}, "every must be a number of updates >= 1"),
            ({"strength": 1.0, "form": "both"}, 'form must be "online" or "separate"'),
        ):
            with pytest.raises(ValueError, match=message):
                elastic(**options)
            with pytest.raises(ValueError, match=message):
                proximal(learning_rate=0.1, **options)
        with pytest.raises(ValueError, match="learning_rate must be a number >= 0"):
            proximal(1.0, -0.1)
        with pytest.raises(TypeError, match="metric must be None or RootMeanSquare"):
            proximal(1.0, 0.1, metric="adam")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"metric.decay must be in \[0, 1\]"):
            proximal(1.0, 0.1, metric=RootMeanSquare(2.0))

    def test_no_parameters_and_no_gradients(self):
        for tx, name in ((elastic(1.0), "elastic"), (proximal(1.0, 0.1), "proximal")):
            with pytest.raises(ValueError, match=rf"{name}\(\) needs the parameters"):
                tx.update(PARAMS, tx.init(PARAMS))
        tx = proximal(1.0, 0.1, metric=RootMeanSquare())
        with pytest.raises(ValueError, match=r"no grads= reaches it.*with_signals"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    def test_paths(self):
        with pytest.raises(ValueError, match="Did you mean 'kernel'"):
            elastic(1.0, select="kernl").init(PARAMS)

    def test_beliefs(self):
        state, gone = elastic(1.0).init(PARAMS), optax.MaskedNode()
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        for belief, message in (
            (Posterior(PARAMS, {**ones, "bias": -jnp.ones(2)}), "precision of 'bias' is not fin"),
            (Posterior({**PARAMS, "bias": jnp.full(2, jnp.nan)}, ones), "mean of 'bias' is not"),
            (Posterior(PARAMS, {**ones, "bias": jnp.ones(3)}), r"'bias' has shape \(3,\)"),
            (Posterior({"a": jnp.ones(1)}, {"a": jnp.ones(1)}), "belongs to another tree"),
            (Posterior(PARAMS, {**ones, "bias": gone}), "'bias', but not both"),
            (Posterior({"kernel": gone, "bias": gone}, {"kernel": gone, "bias": gone}), "nothing"),
        ):
            with pytest.raises(ValueError, match=message):
                consolidate(state, PARAMS, belief)
