"""Diagonals of the Fisher information against a loop over examples, and Monte Carlo."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adaptivenet import trees
from adaptivenet.models.lenet import lenet5, lenet5_init
from adaptivenet.models.mlp import mlp, mlp_init
from adaptivenet.posterior import fisher_exact
from adaptivenet.posterior.fisher_exact import Plan, fisher_diagonal


def inputs_of(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def network(hidden=(5,), outputs=3, features=6):
    """An MLP whose biases are not zero."""
    params = mlp_init(jax.random.key(0), (features, *hidden, outputs))
    return jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)).astype(p.dtype), params
    )


def log_likelihood(out, y, likelihood):
    if likelihood == "categorical":
        return jax.nn.log_softmax(out)[y]
    if likelihood == "bernoulli":
        return jnp.sum(y * jax.nn.log_sigmoid(out) + (1 - y) * jax.nn.log_sigmoid(-out))
    return -0.5 * jnp.sum(jnp.square(y - out))


def loop(apply, params, xs, ys=None, likelihood="categorical"):
    """One example after another, one label after another; float64, gradients by jax.grad."""
    total = [np.zeros(p.shape) for p in jax.tree.leaves(params)]

    def value(p, x, y):
        return log_likelihood(apply(p, x[None])[0], y, likelihood)

    gradient = jax.jit(jax.grad(value))
    forward = jax.jit(apply)

    for place, x in enumerate(xs):
        out = np.asarray(forward(params, x[None])[0])
        if ys is not None:
            labels = [(1.0, ys[place])]
        elif likelihood == "categorical":
            odds = np.exp(out - np.max(out))
            labels = [(p, y) for y, p in enumerate(odds / np.sum(odds))]
        else:
            labels = []
            for y in itertools.product((0.0, 1.0), repeat=out.size):
                y = np.array(y).reshape(out.shape)
                on = 1 / (1 + np.exp(-out))
                labels.append((np.prod(np.where(y == 1, on, 1 - on)), y))
        for p, y in labels:
            for t, g in zip(total, jax.tree.leaves(gradient(params, x, y)), strict=True):
                t += p * np.asarray(g, np.float64) ** 2
    return total


def gauss(apply, params, xs):
    """Of a Gaussian head: the sum of squares of the Jacobian."""
    jacobian = jax.jacobian(apply)(params, xs)
    return [
        np.sum(np.square(j), axis=tuple(range(j.ndim - p.ndim)))
        for j, p in zip(jax.tree.leaves(jacobian), jax.tree.leaves(params), strict=True)
    ]


def double(tree):
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), tree)


def close(got, expected, rtol=1e-6):
    for g, e in zip(jax.tree.leaves(got), expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * np.max(np.abs(e)))


class TestAgainstALoop:
    @pytest.mark.parametrize("kind", ["exact", "empirical"])
    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    def test_a_perceptron(self, likelihood, kind):
        with jax.enable_x64(True):
            params, xs = double(network((5, 4))), jnp.asarray(inputs_of(7, 6))
            ys = None
            if kind == "empirical":
                ys = {
                    "categorical": jnp.arange(7) % 3,
                    "bernoulli": jnp.asarray(inputs_of(7, 3, seed=1) > 0, jnp.float64),
                    "gaussian": jnp.asarray(inputs_of(7, 3, seed=1)),
                }[likelihood]
            got = fisher_diagonal(mlp, params, xs, ys, likelihood=likelihood, kind=kind, batch=3)
            if likelihood == "gaussian" and kind == "exact":
                expected = gauss(mlp, params, xs)
            else:
                expected = loop(mlp, params, xs, ys, likelihood)
            assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float64")}
            close(got, expected)

    def test_a_convolutional_network(self):
        """Its convolutions share weights over positions, and take the long way."""

        def apply(params, x):
            h = jax.lax.conv_general_dilated(
                x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            h = jnp.mean(jnp.tanh(h + params["bias"]) * params["scale"], axis=(1, 2))
            return h @ params["dense"]

        with jax.enable_x64(True):
            sizes = {"conv": (3, 3, 2, 4), "bias": (4,), "scale": (4,), "dense": (4, 3)}
            params = {
                k: jnp.asarray(inputs_of(*s, seed=n)) for n, (k, s) in enumerate(sizes.items())
            }
            xs = jnp.asarray(inputs_of(5, 6, 6, 2))
            plan = Plan(
                lambda p, x: apply(p, x[None])[0], params, jax.ShapeDtypeStruct((6, 6, 2), xs.dtype)
            )
            assert [trees.paths(params)[n] for n in plan.dense] == ["dense"]
            close(fisher_diagonal(apply, params, xs, batch=2), loop(apply, params, xs))

    def test_single_precision(self):
        params, xs = network(), jnp.asarray(inputs_of(300, 6), jnp.float32)
        got = fisher_diagonal(mlp, params, xs)  # 256 and a rest that reaches back
        with jax.enable_x64(True):
            expected = fisher_diagonal(
                mlp, double(params), jnp.asarray(inputs_of(300, 6)), batch=300
            )
        close(got, jax.tree.leaves(expected), 2e-5)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}


class TestDrawnLabels:
    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    def test_many_draws_give_the_exact_diagonal(self, likelihood):
        params, xs = network(), jnp.asarray(inputs_of(3, 6), jnp.float32)
        exact = fisher_diagonal(mlp, params, xs, likelihood=likelihood)
        options = {"likelihood": likelihood, "kind": "sampled", "samples": 4}
        draw = lambda key: fisher_diagonal(mlp, params, xs, key=key, **options)  # noqa: E731
        draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 1_000))
        for d, e in zip(jax.tree.leaves(draws), jax.tree.leaves(exact), strict=True):
            error = np.abs(d.mean(0) - e) / np.maximum(d.std(0) / np.sqrt(1_000), 1e-6)
            assert np.max(error) < 5

    def test_draws_do_not_depend_on_the_batch(self):
        params, xs = network(), jnp.asarray(inputs_of(5, 6), jnp.float32)
        results = [
            fisher_diagonal(mlp, params, xs, kind="sampled", key=jax.random.key(1), batch=b)
            for b in (2, 5)
        ]
        close(results[0], jax.tree.leaves(results[1]), 1e-5)
        other = fisher_diagonal(mlp, params, xs, kind="sampled", key=jax.random.key(2), batch=5)
        assert np.any(other["dense1"]["kernel"] != results[1]["dense1"]["kernel"])


class TestFindingDenseLayers:
    """Whatever the model was written with; and never where the product is not all there is."""

    def plan(self, function, params, shape):
        found = Plan(function, params, jax.ShapeDtypeStruct(shape, jnp.float32))
        return {trees.paths(params)[n] for n in found.dense}

    def test_frameworks(self):
        kernels = {"dense1/kernel", "dense2/kernel"}
        assert self.plan(lambda p, x: mlp(p, x[None])[0], network(), (6,)) == kernels

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                return linen.Dense(2)(linen.relu(linen.Dense(4)(x)))

        net = Net()
        params = net.init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
        function = lambda p, x: net.apply({"params": p}, x[None])[0]  # noqa: E731
        assert self.plan(function, params, (6,)) == {"Dense_0/kernel", "Dense_1/kernel"}

        graph, state = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        function = lambda p, x: nnx.merge(graph, p)(x[None])[0]  # noqa: E731
        assert self.plan(function, state, (6,)) == {"kernel"}

    def test_ways_of_writing_a_layer(self):
        """Transposed, reshaped, cast, by einsum, in jit and in checkpoint: with the same result."""
        w, x = jnp.asarray(inputs_of(6, 4), jnp.float32), jnp.asarray(inputs_of(5, 6), jnp.float32)
        [expected] = loop(lambda p, x: x @ p, w, x)
        cases = {
            "transposed": (w.T, lambda p, x: x @ p.T),
            "left": (w.T, lambda p, x: (p @ x.T).T),
            "einsum": (w, lambda p, x: jnp.einsum("io,bi->bo", p, x)),
            "jit": (w, jax.jit(lambda p, x: x @ p)),
            "checkpoint": (w, jax.checkpoint(lambda p, x: x @ p)),
            "reshaped": (w.reshape(2, 3, 4), lambda p, x: x @ p.reshape(6, 4)),
            "axes": (
                w.reshape(2, 3, 4),
                lambda p, x: jnp.tensordot(x.reshape(-1, 2, 3), p, ((1, 2), (0, 1))),
            ),
        }
        for name, (params, apply) in cases.items():
            found = self.plan(
                lambda p, x, apply=apply: apply(p["w"], x[None])[0], {"w": params}, (6,)
            )
            assert found == {"w"}, name
            got = fisher_diagonal(apply, params, x)
            if name in ("transposed", "left"):
                got = got.T
            close(got.reshape(6, 4), [expected], 1e-5)

    def test_where_the_product_is_not_all(self):
        """Shared, masked, normalised or penalised weights; several positions: still exact."""
        mask = inputs_of(4, 4) > 0
        cases = {
            "twice": lambda p, x: jnp.tanh(x @ p) @ p,
            "also outside": lambda p, x: x @ p + jnp.sum(jnp.square(p)) * jnp.arange(4.0),
            "masked": lambda p, x: x @ (p * jnp.asarray(mask, p.dtype)),
            "positions": lambda p, x: jnp.tanh(x.reshape(-1, 2, 4) @ p).mean(1),
            "with itself": lambda p, x: x @ (p @ p),
            "scanned": lambda p, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ p), None), x, None, 2)[
                0
            ],
            "stopped": lambda p, x: x @ p + x @ jax.lax.stop_gradient(p),
        }
        with jax.enable_x64(True):
            for name, apply in cases.items():
                w = {"w": jnp.asarray(inputs_of(4, 4))}
                width = 8 if name == "positions" else 4
                x = jnp.asarray(inputs_of(3, width, seed=2))
                whole = lambda p, x, apply=apply: apply(p["w"], x)  # noqa: E731
                first = jax.ShapeDtypeStruct((width,), x.dtype)
                plan = Plan(lambda p, x, whole=whole: whole(p, x[None])[0], w, first)
                assert not plan.dense, name
                got = fisher_diagonal(whole, w, x)
                expected = loop(whole, w, x)
                close(got, expected)

    def test_the_derivative_of_a_rectifier_at_zero_is_kept(self):
        """An input of zero: custom derivatives must not be taken apart."""
        params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
        apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] * jnp.array([1.0, 2.0])  # noqa: E731
        x = jnp.array([[1.0, -1.0]])
        got = fisher_diagonal(apply, params, x)
        assert not np.any(got["a"])

    def test_layers_that_share_a_compiled_function(self):
        """Two calls of one jitted function are two places."""
        layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
        apply = lambda p, x: layer(p["b"], layer(p["a"], x))  # noqa: E731
        params = {"a": jnp.asarray(inputs_of(4, 4), jnp.float32), "b": jnp.eye(4) * 0.5}
        assert self.plan(lambda p, x: apply(p, x[None])[0], params, (4,)) == {"a", "b"}
        x = jnp.asarray(inputs_of(3, 4, seed=3), jnp.float32)
        close(fisher_diagonal(apply, params, x), loop(apply, params, x), 1e-5)

    def test_a_network_of_the_house(self):
        params = lenet5_init(jax.random.key(0), channels=(2, 3), hidden=5)
        found = self.plan(lambda p, x: lenet5(p, x[None])[0], params, (784,))
        assert found == {"dense1/kernel", "dense2/kernel"}


class TestTrees:
    def test_leaves_that_are_not_floating_and_trees_of_inputs(self):
        params = {"w": jnp.ones((2, 3)), "steps": jnp.arange(2), "unused": jnp.ones(2)}
        apply = lambda p, x: (x["a"] + x["b"]) @ p["w"]  # noqa: E731
        got = fisher_diagonal(apply, params, {"a": np.ones((4, 2)), "b": np.zeros((4, 2))})
        assert trees.is_masked(got["steps"])
        assert got["unused"].tolist() == [0.0, 0.0]
        np.testing.assert_allclose(got["w"], np.full((2, 3), 4 * 2 / 9), rtol=1e-5)

    def test_low_precision_parameters(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), network())
        xs = jnp.asarray(inputs_of(4, 6), jnp.float32)
        got = fisher_diagonal(mlp, params, xs)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        close(got, jax.tree.leaves(fisher_diagonal(mlp, wide, xs)), 0.05)

    def test_in_jit_and_vmap_over_members(self):
        xs = jnp.asarray(inputs_of(4, 6), jnp.float32)
        members = jax.vmap(lambda k: mlp_init(k, (6, 3)))(jax.random.split(jax.random.key(0), 2))
        together = jax.jit(jax.vmap(lambda p: fisher_diagonal(mlp, p, xs)))(members)
        for n in range(2):
            one = jax.tree.map(lambda p: p[n], members)  # noqa: B023
            alone = jax.tree.leaves(fisher_diagonal(mlp, one, xs))
            close(jax.tree.map(lambda p: p[n], together), alone, 1e-5)  # noqa: B023

    def test_callable_objects_that_hold_arrays(self):
        class Model:
            __hash__ = None
            offset = 1.0

            def __call__(self, params, x):
                return x @ params["w"] + self.offset

        got = fisher_diagonal(Model(), {"w": jnp.zeros((1, 2))}, np.ones((3, 1)))
        np.testing.assert_allclose(got["w"], [[0.75, 0.75]], rtol=1e-6)

    def test_memory_of_what_is_not_dense_bounds_the_batch(self, monkeypatch):
        monkeypatch.setattr(fisher_exact, "_ELEMENTS", 24)
        seen = []
        chunks = fisher_exact.in_chunks
        monkeypatch.setattr(
            fisher_exact, "in_chunks", lambda *args: (seen.append(args[-1]), chunks(*args))[1]
        )
        params = {"w": jnp.ones((4, 2)), "v": jnp.ones((4, 2))}
        apply = lambda p, x: x @ (p["w"] * p["v"])  # noqa: E731 (16 elements of loose leaves)
        fisher_diagonal(apply, params, np.ones((5, 4)))
        assert seen == [1]


class TestRefusals:
    def expect(self, match, apply, params, *args, **options):
        with pytest.raises(ValueError, match=match):
            fisher_diagonal(apply, params, *args, **options)

    def test_a_likelihood_that_does_not_match_the_head(self):
        xs, w = np.ones((4, 2)), {"w": jnp.ones((2, 1))}
        apply = lambda p, x: x @ p["w"]  # noqa: E731
        self.expect("two or more classes.*likelihood='bernoulli' for a single", apply, w, xs)
        flat = lambda p, x: (x @ p["w"])[:, 0]  # noqa: E731
        self.expect(r"takes a head of outputs \[examples, classes\].*shape \(\)", flat, w, xs)
        pictures = lambda p, x: jnp.ones((len(x), 3, 5)) * p["w"].sum()  # noqa: E731
        self.expect(r"an example has outputs of shape \(3, 5\)", pictures, w, xs)
        # The others take any shape.
        for likelihood in ("gaussian", "bernoulli"):
            fisher_diagonal(flat, w, xs, likelihood=likelihood)
            fisher_diagonal(pictures, w, xs, likelihood=likelihood)

    def test_targets(self):
        xs, w = np.ones((4, 2)), {"w": jnp.ones((2, 3))}
        apply = lambda p, x: x @ p["w"]  # noqa: E731
        options = {"kind": "empirical"}
        self.expect("give targets", apply, w, xs, **options)
        for bad in (np.ones(4), np.ones((4, 3), int), np.ones(3, int)):
            self.expect(r"integer classes of shape \(4,\), not", apply, w, xs, bad, **options)
        self.expect("from 0 to 2 for this head; these go from 0 to 3", apply, w, xs,
                    np.array([0, 1, 2, 3]), **options)  # fmt: skip
        self.expect(r"targets like the outputs, of shape \(4, 3\)", apply, w, xs, np.ones(4),
                    likelihood="gaussian", **options)  # fmt: skip
        self.expect("targets from 0 to 1", apply, w, xs, np.full((4, 3), 2.0),
                    likelihood="bernoulli", **options)  # fmt: skip
        self.expect("labels are the model's own", apply, w, xs, np.zeros(4, int))

    def test_words_and_numbers(self):
        xs, w = np.ones((4, 2)), {"w": jnp.ones((2, 3))}
        apply = lambda p, x: x @ p["w"]  # noqa: E731
        self.expect("likelihood='poisson'; choose one of", apply, w, xs, likelihood="poisson")
        self.expect("kind='batched'; choose one of", apply, w, xs, kind="batched")
        self.expect("give key=", apply, w, xs, kind="sampled")
        self.expect("must be positive", apply, w, xs, batch=0)
        self.expect("at least one, along the first axis", apply, w, np.ones((0, 2)))
        self.expect("same number of examples", apply, w, [np.ones((3, 2)), np.ones((2, 2))])

    def test_functions(self):
        xs, w = np.ones((4, 2)), {"w": jnp.ones((2, 3))}
        self.expect("must return one array", lambda p, x: (x @ p["w"], x), w, xs)
        self.expect("examples along the first axis", lambda p, x: p["w"], w, xs)
        self.expect("must return floating outputs", lambda p, x: x.astype(int), w, xs)
