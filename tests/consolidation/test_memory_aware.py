"""Memory aware synapses against gradients of single examples, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivenet.consolidation import memory_aware
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import elastic
from adaptivenet.consolidation.memory_aware import hebbian, importance


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(4, 5, seed=1), "bias": normal(5, seed=2)},
    "b": {"kernel": normal(5, 3, seed=3), "bias": normal(3, seed=4)},
    "scale": normal(5, seed=5),
}
X = normal(7, 4, seed=6)


def mlp(p, x):
    hidden = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
    return hidden @ p["b"]["kernel"] + p["b"]["bias"]


def convolution(p, x):
    """A kernel that an example uses at many positions, and one for all of them."""
    found = jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(found + p["bias"]) @ p["head"]


CONV = {"kernel": normal(3, 2, 4, seed=7), "bias": normal(4, seed=8), "head": normal(4, 2, seed=9)}


def slowly(apply, params, inputs):
    """A gradient for each example, the mean of their absolute values."""

    def length(p, x):
        return jnp.sum(jnp.square(apply(p, x[None])))

    grads = [jax.jit(jax.grad(length))(params, x) for x in inputs]
    return jax.tree.map(lambda *g: np.mean(np.abs(np.stack(g)), axis=0), *grads)


def compare(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


class TestImportance:
    @pytest.mark.parametrize(
        ("apply", "params", "inputs"),
        [(mlp, PARAMS, X), (convolution, CONV, normal(5, 6, 2))],
    )
    @pytest.mark.parametrize("batch_size", [None, 3, 1, 100])
    def test_against_single_examples(self, apply, params, inputs, batch_size):
        belief = importance(apply, params, inputs, batch_size=batch_size)
        compare(belief.precision, slowly(apply, params, inputs))
        compare(belief.mean, params)

    def test_a_batch_taken_as_one_is_something_else(self):
        """What the paper's code does; examples of opposite sign cancel."""

        def length(p):
            return jnp.mean(jnp.sum(jnp.square(mlp(p, X)), axis=-1))

        together = jnp.abs(jax.grad(length)(PARAMS)["a"]["kernel"])
        single = importance(mlp, PARAMS, X).precision["a"]["kernel"]
        assert bool(jnp.all(together <= single + 1e-5))
        assert float(jnp.max(single - together)) > 0.5

    def test_outputs_of_any_shape(self):
        def apply(p, x):
            return mlp(p, x).reshape(-1, 3, 1)

        compare(importance(apply, PARAMS, X).precision, slowly(mlp, PARAMS, X))

    def test_a_head_of_zeros_matters_not_at_all(self):
        params = {**PARAMS, "b": jax.tree.map(jnp.zeros_like, PARAMS["b"])}
        for leaf in jax.tree.leaves(importance(mlp, params, X).precision):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))

    def test_leaves_left_out(self):
        params = {**PARAMS, "ids": jnp.arange(2)}
        belief = importance(mlp, params, X)
        assert isinstance(belief.precision["ids"], optax.MaskedNode)
        belief = importance(mlp, params, X, select="b/")
        assert isinstance(belief.precision["scale"], optax.MaskedNode)
        assert isinstance(belief.mean["a"]["bias"], optax.MaskedNode)
        compare(belief.precision["b"], slowly(mlp, PARAMS, X)["b"])

    def test_half_precision(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        belief = importance(mlp, params, X.astype(jnp.bfloat16))
        for got, expected in zip(
            jax.tree.leaves(belief), jax.tree.leaves(importance(mlp, PARAMS, X)), strict=True
        ):
            assert got.dtype == jnp.float32
            assert float(jnp.max(jnp.abs(got - expected))) < 0.1 * float(jnp.max(expected)) + 0.05

    def test_within_jit(self):
        found = jax.jit(lambda p, x: importance(mlp, p, x, batch_size=4))(PARAMS, X)
        compare(found.precision, slowly(mlp, PARAMS, X))

    def test_nnx(self):
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        belief = importance(lambda p, x: nnx.merge(graph, p)(x), state, X)
        params = {"kernel": model.kernel[...], "bias": model.bias[...]}
        expected = slowly(lambda p, x: x @ p["kernel"] + p["bias"], params, X)
        np.testing.assert_allclose(
            jax.tree.leaves(belief.precision["kernel"])[0], expected["kernel"], rtol=1e-5
        )

    def test_elastic_takes_it_and_adds_tasks(self):
        """The paper's penalty, lambda * sum(importance * (w - anchor)^2), over two tasks."""
        tx, other = elastic(2 * 0.3), normal(4, 4, seed=11)
        state = tx.init(PARAMS)
        for inputs in (X, other):
            state = consolidate(state, PARAMS, importance(mlp, PARAMS, inputs))
        where = jax.tree.map(lambda p: p + 0.1, PARAMS)
        got, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, where)
        both = jax.tree.map(np.add, slowly(mlp, PARAMS, X), slowly(mlp, PARAMS, other))
        compare(got, jax.tree.map(lambda o: 2 * 0.3 * o * 0.1, both))


class TestHebbian:
    def local(self, activation):
        """Layer by layer, by gradients of the layer's own output."""
        total = jax.tree.map(np.zeros_like, {"a": PARAMS["a"], "b": PARAMS["b"]})
        for x in X:
            hidden = activation(x @ PARAMS["a"]["kernel"] + PARAMS["a"]["bias"]) * PARAMS["scale"]
            for name, row, act in (("a", x, activation), ("b", hidden, lambda z: z)):

                def length(p, row=row, act=act):
                    return jnp.sum(jnp.square(act(row @ p["kernel"] + p["bias"])))

                grads = jax.grad(length)(PARAMS[name])
                total[name] = jax.tree.map(lambda t, g: t + np.abs(g), total[name], grads)
        return jax.tree.map(lambda t: t / len(X), total)

    @pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
    def test_it_is_the_gradient_of_each_layer_by_itself(self, activation):
        def apply(p, x):
            hidden = activation(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
            return hidden @ p["b"]["kernel"] + p["b"]["bias"]

        belief = hebbian(apply, PARAMS, X, activation=activation, batch_size=2)
        expected = self.local(activation)
        for name, found in expected.items():
            compare(belief.precision[name], found)
        assert isinstance(belief.precision["scale"], optax.MaskedNode)

    def test_it_is_hebbs_rule_for_rectified_units(self):
        kernel = normal(4, 5, seed=1)
        belief = hebbian(lambda p, x: jax.nn.relu(x @ p["w"]), {"w": kernel}, X)
        y = np.maximum(np.asarray(X) @ np.asarray(kernel), 0)
        expected = 2 * np.einsum("ni,nj->ij", np.abs(X), y) / len(X)
        np.testing.assert_allclose(belief.precision["w"], expected, rtol=1e-5)

    def test_the_last_layer_of_one_layer_is_the_global_rule(self):
        head = {"w": normal(4, 3)}

        def apply(p, x):
            return x @ p["w"]

        compare(hebbian(apply, head, X).precision, importance(apply, head, X).precision)

    def test_no_kernel(self):
        with pytest.raises(ValueError, match=r"finds no kernel.*importance\(\)"):
            hebbian(lambda p, x: x * p["w"], {"w": jnp.ones(4)}, X)


@pytest.mark.parametrize("rule", [memory_aware.importance, memory_aware.hebbian])
def test_errors(rule):
    with pytest.raises(ValueError, match="there are no examples"):
        rule(mlp, PARAMS, X[:0])
    with pytest.raises(ValueError, match="batch_size must be"):
        rule(mlp, PARAMS, X, batch_size=0)
    with pytest.raises(ValueError, match="matches no leaf"):
        rule(mlp, PARAMS, X, select="c/")
    with pytest.raises(ValueError, match="must map a batch"):
        rule(lambda p, x: mlp(p, x).sum(), PARAMS, X)
