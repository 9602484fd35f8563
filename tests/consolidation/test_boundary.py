"""A boundary finds every rule in an optimizer state, and what it makes fits a compiled step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivenet.consolidation.boundary import as_posterior, consolidate, copied, nothing_yet
from adaptivenet.consolidation.elastic import elastic, proximal
from adaptivenet.consolidation.path_integral import path_integral
from adaptivenet.posterior import (
    Posterior,
    fisher_diagonal,
    laplace,
    squared_gradient,
    with_posterior,
)

PARAMS = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}
BELIEF = Posterior(PARAMS, jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS))


class Noting(NamedTuple):
    """Writes down when it was called, and with what."""

    number: jax.Array
    inner: Any = ()

    def consolidated(self, params, posterior, *, log=None, **signals):
        del params
        if log is not None:
            log.append((int(self.number), posterior, signals))
        return self._replace(number=self.number + 1)


def noting(number, inner=()):
    return Noting(jnp.asarray(number, jnp.int32), inner)


def precisions(opt_state):
    found = jax.tree.leaves(opt_state, is_leaf=lambda n: hasattr(n, "precision"))
    return [n.precision for n in found if hasattr(n, "precision")]


class TestFinding:
    def test_at_any_depth_and_inner_ones_first(self):
        log = []
        state = {"a": [noting(1), noting(2, (noting(3), {"b": noting(4)}))], "c": jnp.ones(2)}
        after = consolidate(state, PARAMS, BELIEF, log=log, other=5)
        assert [number for number, _, _ in log] == [1, 3, 4, 2]
        assert all(belief is BELIEF and rest == {"other": 5} for _, belief, rest in log)
        assert [int(x) for x in jax.tree.leaves(after)[:-1]] == [2, 3, 4, 5]
        assert jax.tree.structure(after) == jax.tree.structure(state)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx, optax.adam(1e-3))),
            lambda tx: optax.inject_hyperparams(lambda r: optax.chain(tx, optax.sgd(r)))(r=0.1),
            lambda tx: optax.masked(tx, {"kernel": True, "bias": True}),
            lambda tx: optax.apply_if_finite(tx, 3),
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            lambda tx: optax.partition({"x": tx}, {"kernel": "x", "bias": "x"}),
            lambda tx: with_posterior(squared_gradient(), optax.chain(tx, optax.sgd(0.1))),
            lambda tx: path_integral(optax.chain(tx, optax.sgd(0.1)), 1.0),
        ],
    )
    def test_in_every_wrapper(self, wrap):
        state = wrap(elastic(1.0)).init(PARAMS)
        after = consolidate(state, PARAMS, BELIEF)
        (precision,) = [p for p in precisions(after) if not callable(p)]
        np.testing.assert_array_equal(precision["kernel"], np.full((3, 2), 3.0))

    def test_several_at_once(self):
        tx = optax.chain(elastic(1.0), optax.sgd(0.1), proximal(1.0, 0.1))
        found = precisions(consolidate(tx.init(PARAMS), PARAMS, BELIEF))
        assert len(found) == 2
        assert all(float(p["bias"][0]) == 3.0 for p in found)

    def test_nothing_to_consolidate(self):
        with pytest.raises(ValueError, match=r"finds nothing.*elastic\(1\.0\)"):
            consolidate(optax.adam(1e-3).init(PARAMS), PARAMS, BELIEF)

    def test_a_rule_that_changes_its_form_is_refused(self):
        class Bad(NamedTuple):
            x: jax.Array

            def consolidated(self, params, posterior, **signals):
                return Bad(jnp.zeros(3))

        with pytest.raises(ValueError, match=r"Bad\.consolidated\(\) must return.*float32\[3\]"):
            consolidate(Bad(jnp.zeros(2)), PARAMS, BELIEF)


class TestBeliefs:
    def test_the_one_in_the_state_is_taken_by_default(self):
        tx = with_posterior(squared_gradient(0.9), optax.chain(elastic(1.0), optax.sgd(0.1)))
        grads = jax.tree.map(lambda p: 2.0 * jnp.ones_like(p), PARAMS)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        memory = consolidate(state, PARAMS).inner[0]
        np.testing.assert_allclose(memory.precision["kernel"], 4.0, rtol=1e-6)
        np.testing.assert_array_equal(memory.anchor["kernel"], PARAMS["kernel"])
        given = consolidate(state, PARAMS, BELIEF).inner[0]
        np.testing.assert_array_equal(given.precision["kernel"], np.full((3, 2), 3.0))

    def test_none_is_needed_where_none_is_asked_for(self):
        tx = path_integral(optax.sgd(0.1), 1.0)
        consolidate(tx.init(PARAMS), PARAMS)

    def test_none_where_one_is_needed(self):
        with pytest.raises(ValueError, match=r"elastic\(\), which needs a belief.*with_posterior"):
            consolidate(elastic(1.0).init(PARAMS), PARAMS)

    def test_a_laplace_approximation_and_its_gaussian(self):
        x, y = jnp.array([[1.0, 2.0, 0.0]]), jnp.zeros((1, 2))

        def apply(p, x):
            return x @ p["kernel"] + p["bias"]

        fit = laplace(apply, PARAMS, x, y, likelihood="gaussian", prior_precision=0.5)
        expected = fisher_diagonal(apply, PARAMS, x, likelihood="gaussian")["kernel"] + 0.5
        for belief in (fit, fit.gaussian, fit.gaussian.diagonal()):
            state = consolidate(elastic(1.0).init(PARAMS), PARAMS, belief)
            np.testing.assert_allclose(state.precision["kernel"], expected, rtol=1e-6)

    def test_something_else(self):
        with pytest.raises(TypeError, match=r"me\(\) takes a belief.*not dict"):
            as_posterior({}, PARAMS, "me()")


class TestRunning:
    def test_within_jit_vmap_and_scan(self):
        tx = elastic(2.0)

        def learn(scale):
            belief = Posterior(PARAMS, jax.tree.map(lambda p: scale * jnp.ones_like(p), PARAMS))

            def body(state, _):
                return consolidate(state, PARAMS, belief), None

            return jax.lax.scan(body, tx.init(PARAMS), None, length=3)[0]

        states = jax.jit(jax.vmap(learn))(jnp.array([1.0, 5.0]))
        np.testing.assert_allclose(states.precision["bias"], [[3.0, 3.0], [15.0, 15.0]])

    @pytest.mark.parametrize(
        "tx", [elastic(1.0), proximal(1.0, 0.1), path_integral(optax.sgd(0.1), 1.0)]
    )
    def test_parameters_and_state_may_be_donated_together(self, tx):
        """Memory that shared buffers with the parameters could not be."""

        @jax.jit
        def fresh():
            return jax.tree.map(lambda p: p + 1.0, PARAMS)

        step = jax.jit(lambda p, s: (p, tx.update(p, s, p)[1]), donate_argnums=(0, 1))
        params = fresh()
        params, state = step(params, tx.init(params))
        precision = jax.tree.map(jnp.ones_like, params)
        state = consolidate(state, params, Posterior(params, precision))
        params, state = step(params, state)
        jax.block_until_ready(params)

    def test_nnx_optimizer(self):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.chain(elastic(2.0), optax.sgd(1.0)), wrt=nnx.Param)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        belief = Posterior(params, jax.tree.map(lambda p: 3.0 * jnp.ones_like(p), params))
        new = consolidate(nnx.as_pure(optimizer.opt_state), params, belief)
        nnx.update(optimizer.opt_state, nnx.state(new))
        before = model.kernel[...]
        model.kernel[...] = before + 0.1
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
        np.testing.assert_allclose(model.kernel[...], before + 0.1 - 0.6, atol=1e-5)


def test_helpers():
    like = nothing_yet(
        {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.arange(2), "c": jnp.ones(1)}, "a|c"
    )
    assert like["a"].dtype == jnp.float32
    assert isinstance(like["b"], optax.MaskedNode)
    tree = {"a": jnp.array([1.5, 2.0], jnp.bfloat16), "b": jnp.arange(2), "c": optax.MaskedNode()}
    found = copied(like, tree)
    assert found["a"].tolist() == [1.5, 2.0]
    assert found["c"].tolist() == [0.0]
