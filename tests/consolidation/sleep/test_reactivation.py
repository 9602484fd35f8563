"""Use is what flows through a synapse; what is not used is cut, to the synapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivenet import trees
from adaptivenet.consolidation.sleep import prune_unused, pruning_of_unused, reactivation
from adaptivenet.consolidation.sleep import reactivations as many

RNG = np.random.default_rng(0)
PARAMS = {
    name: {
        "kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=shape[1]), jnp.float32),
    }
    for name, shape in {"one": (3, 4), "two": (4, 2)}.items()
}
INPUTS = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)


def apply(params, inputs):
    hidden = jax.nn.relu(inputs @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"] + params["two"]["bias"]


def slow(kind, weights):
    """Synapse by synapse and example by example."""
    (w, b), (v, c) = ((np.asarray(p["kernel"]), np.asarray(p["bias"])) for p in PARAMS.values())
    one, two = np.zeros_like(w), np.zeros_like(v)
    for x, share in zip(np.asarray(INPUTS), weights / weights.sum(), strict=True):
        h = x @ w + b
        y = np.maximum(h, 0)
        o = y @ v + c
        ends = {
            "flow": (np.ones(4), np.ones(2)),
            "coactivation": (y, np.maximum(o, 0)),
            "contribution": (v @ o * (h > 0), o),
        }[kind]
        for found, kernel, into, end in ((one, w, x, ends[0]), (two, v, y, ends[1])):
            for i in range(kernel.shape[0]):
                for j in range(kernel.shape[1]):
                    found[i, j] += share * abs(into[i] * kernel[i, j] * end[j])
    return one, two


class TestUse:
    @pytest.mark.parametrize("kind", ["flow", "coactivation", "contribution"])
    def test_it_is_what_it_says(self, kind):
        for weights in (np.ones(5), np.array([1.0, 0.0, 2.0, 0.0, 1.0])):
            found = reactivation(apply, PARAMS, INPUTS, kind=kind, weights=jnp.asarray(weights))
            for name, expected in zip(PARAMS, slow(kind, weights), strict=True):
                np.testing.assert_allclose(found[name]["kernel"], expected, rtol=1e-4, atol=1e-6)
                assert trees.is_masked(found[name]["bias"])
        plain = reactivation(apply, PARAMS, INPUTS, kind=kind)
        np.testing.assert_allclose(plain["one"]["kernel"], slow(kind, np.ones(5))[0], rtol=1e-4)

    def test_convolutions_add_up_their_positions(self):
        kernel = jnp.asarray(RNG.normal(size=(2, 2, 1, 3)), jnp.float32)
        images = jnp.asarray(RNG.normal(size=(2, 4, 4, 1)), jnp.float32)

        def convolve(params, x):
            return jax.lax.conv_general_dilated(
                x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        found = reactivation(convolve, {"kernel": kernel}, images, kind="flow")["kernel"]
        expected = np.zeros(kernel.shape)
        for image in np.asarray(images)[..., 0]:
            for i in range(2):
                for j in range(2):
                    window = np.abs(image[i : i + 3, j : j + 3]).sum() / 2
                    expected[i, j, 0] += window * np.abs(np.asarray(kernel)[i, j, 0])
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_modules_and_selections(self):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model, nnx.Param)
        params = nnx.as_pure(params)
        use = reactivation(lambda p, x: nnx.merge(graph, p)(x), params, INPUTS, kind="flow")
        assert trees.paths(use) == ("kernel",)
        only = reactivation(apply, PARAMS, INPUTS, select="two/kernel")
        assert trees.paths(only) == ("two/kernel",)

    def test_means_over_replays(self):
        keys = jax.random.split(jax.random.key(0), 3)

        def draw(key):
            return jax.random.normal(key, (4, 3))

        found = many(apply, PARAMS, draw, jax.random.key(0), batches=3, kind="flow")
        singles = [reactivation(apply, PARAMS, draw(k), kind="flow") for k in keys]
        expected = np.mean([np.asarray(s["one"]["kernel"]) for s in singles], axis=0)
        np.testing.assert_allclose(found["one"]["kernel"], expected, rtol=1e-5)

    def test_errors(self):
        for make, message in (
            (lambda: reactivation(apply, PARAMS, INPUTS, kind="hebb"), "kind must be"),
            (lambda: reactivation(apply, PARAMS, INPUTS, select="bias"), "'one/bias' is no kernel"),
            (
                lambda: reactivation(apply, PARAMS, INPUTS, weights=jnp.ones(3)),
                "weights= must be 5 numbers",
            ),
            (
                lambda: many(apply, PARAMS, lambda k: INPUTS, jax.random.key(0), batches=0),
                "batches must be a positive integer",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                make()


class TestPruning:
    score = reactivation(apply, PARAMS, INPUTS)

    def test_the_least_used_go_and_no_more(self):
        params, mask = prune_unused(PARAMS, self.score, fraction=0.25)
        scores = np.concatenate([np.ravel(s) for s in jax.tree.leaves(self.score)])
        kept = np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)])
        assert kept.sum() == 15
        assert scores[kept].min() >= scores[~kept].max()
        for name in PARAMS:
            np.testing.assert_array_equal(params[name]["bias"], PARAMS[name]["bias"])
            expected = jnp.where(mask[name]["kernel"], PARAMS[name]["kernel"], 0)
            np.testing.assert_array_equal(params[name]["kernel"], expected)
        # A share of the living: 15 - round(15 / 5) = 12, and the dead stay dead.
        _, after = prune_unused(params, self.score, fraction=0.2, mask=mask)
        again = np.concatenate([np.ravel(m) for m in jax.tree.leaves(after)])
        assert again.sum() == 12
        assert not (again & ~kept).any()

    def test_a_threshold(self):
        limit = float(np.median(np.ravel(self.score["one"]["kernel"])))
        cut = jax.jit(lambda p, t: prune_unused(p, self.score, threshold=t))
        _, mask = cut(PARAMS, limit)
        for name in PARAMS:
            expected = self.score[name]["kernel"] >= limit
            np.testing.assert_array_equal(mask[name]["kernel"], expected)

    def test_populations_of_fractions(self):
        fractions = jnp.array([0.0, 0.5])
        masks = jax.vmap(lambda f: prune_unused(PARAMS, self.score, fraction=f)[1])(fractions)
        counts = sum(np.asarray(m).sum((1, 2)) for m in jax.tree.leaves(masks))
        assert counts.tolist() == [20, 10]

    def test_silent_inputs_lose_their_synapses_and_nothing_is_forgotten(self):
        """What a replay never uses can go without a change of what it says."""

        def draw(key):
            return jax.random.normal(key, (8, 3)) * jnp.array([1.0, 0.0, 1.0])

        part = pruning_of_unused(apply, draw, batches=4, threshold=1e-9, kind="flow")
        params, report = jax.jit(part)(PARAMS, jax.random.key(1))
        assert not report["mask"]["one"]["kernel"][1].any()
        assert report["mask"]["one"]["kernel"][0].all()
        for use, mask in zip(*map(jax.tree.leaves, (report["use"], report["mask"])), strict=True):
            np.testing.assert_array_equal(use > 0, mask)
        inputs = draw(jax.random.split(jax.random.key(1), 4)[2])
        np.testing.assert_allclose(apply(params, inputs), apply(PARAMS, inputs), rtol=1e-6)
        # Cutting as many at random does change it.
        noise = jax.tree.map(lambda s: jnp.asarray(RNG.random(s.shape), jnp.float32), self.score)
        blind, _ = prune_unused(PARAMS, noise, fraction=0.2)
        assert jnp.abs(apply(blind, inputs) - apply(PARAMS, inputs)).max() > 0.01

    def test_errors(self):
        for options, message in (
            ({}, "one of fraction= and threshold="),
            ({"fraction": 0.1, "threshold": 0.1}, "one of fraction= and threshold="),
            ({"fraction": 1.0}, r"fraction must be in \[0, 1\)"),
            ({"threshold": -1.0}, "threshold must be at least 0"),
        ):
            with pytest.raises(ValueError, match=message):
                prune_unused(PARAMS, self.score, **options)
        with pytest.raises(ValueError, match="another tree"):
            prune_unused({"w": jnp.ones((2, 2))}, self.score, fraction=0.1)
