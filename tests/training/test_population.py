"""Populations: each method gives every member its own single result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.training import default_method, make_epoch, make_evaluate, over_population
from tests.training.problems import loss, per_example, population, single

TX = optax.adam(1e-2)


@pytest.mark.parametrize("method", ["vmap", "map", "auto"])
def test_each_member_trains_as_if_alone(method):
    problem = population(3, TX, method=method)
    states, metrics = problem.epoch(problem.state, *problem.data[:2])
    scores = problem.evaluate(states.params, *problem.data[2:])
    alone = single(TX)
    for member in range(3):
        own = jax.tree.map(lambda leaf, i=member: leaf[i], problem.state)
        state, expected = alone.epoch(own, *problem.data[:2])
        got = jax.tree.map(lambda leaf, i=member: leaf[i], (states, metrics, scores))
        want = (state, expected, alone.evaluate(state.params, *problem.data[2:]))
        # Documented: equal up to the rounding of batched matrix products, some 1e-6 a step.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
        np.testing.assert_array_equal(states.key[member], state.key)
    assert len(np.unique(np.asarray(metrics["loss"]))) == 3


def test_none_does_not_map():
    assert over_population(jnp.sum, method="none")(jnp.ones((2, 3))) == 6


def test_shared_and_mapped_arguments():
    def join(a, b, c):
        return {"sum": a["x"] + b + c}

    a, b, c = {"x": jnp.arange(3.0)}, jnp.float32(10), jnp.arange(3.0) * 100
    for method in ("vmap", "map"):
        out = over_population(join, (0, None, 0), method=method)(a, b, c)
        np.testing.assert_array_equal(out["sum"], [10, 111, 212])
        out = over_population(lambda a, b: a * b, method=method)(c, c)
        np.testing.assert_array_equal(out, np.asarray(c) ** 2)


def test_donated_states_are_reused():
    tx = optax.sgd(0.1)
    problem = population(2, tx)
    epoch = over_population(
        make_epoch(loss, tx, batch_size=16), (0, None, None), method="vmap", donate_argnums=0
    )
    state = jax.tree.map(jnp.copy, problem.state)
    epoch(state, *problem.data[:2])
    assert jax.tree.leaves(state)[0].is_deleted()
    assert not jax.tree.leaves(problem.state)[0].is_deleted()


def test_results_do_not_depend_on_the_other_members_under_map():
    evaluate = over_population(
        make_evaluate(per_example, batch_size=32), (0, None, None), method="map"
    )
    problem = population(3, TX)
    all_of_them = evaluate(problem.state.params, *problem.data[2:])
    one = jax.tree.map(lambda leaf: leaf[1:2], problem.state.params)
    np.testing.assert_array_equal(
        all_of_them["loss"][1:2], evaluate(one, *problem.data[2:])["loss"]
    )


def test_default_is_named_for_every_backend():
    assert {default_method(backend) for backend in ("cpu", "gpu", "tpu")} <= {"vmap", "map"}
    assert default_method() == default_method(jax.default_backend())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: over_population(jnp.sum, method="loop"),
            "auto, vmap, map, none; got 'loop'",
        ),
        (lambda: over_population(jnp.sum, (1,)), r"got \(1,\)"),
        (lambda: over_population(jnp.sum, (None, None)), "and a 0"),
        (lambda: over_population(jnp.add, (0,))(jnp.ones(2), jnp.ones(2)), "1 arguments, the call"),
        (lambda: over_population(jnp.add)(jnp.ones(2), jnp.ones(3)), r"population size: \[2, 3\]"),
        (
            lambda: over_population(lambda a: a)({"w": jnp.ones(2), "step": jnp.float32(1)}),
            r"argument 0\['step'\] is mapped over the population but has no axis",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
