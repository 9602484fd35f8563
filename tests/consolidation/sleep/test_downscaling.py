"""Totals fall to where they are asked to, and precise synapses keep more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.consolidation.sleep import downscale, homeostatic, norms
from adaptivenet.posterior.gaussian import Posterior


def net(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return {
        "a": {"kernel": draw(5, 4), "bias": draw(4)},
        "b": {"kernel": draw(4, 3), "bias": draw(3)},
        "ids": jnp.arange(2),
    }


def belief(params, seed=1):
    rng = np.random.default_rng(seed)
    precision = {
        name: {
            "kernel": jnp.asarray(np.exp(3 * rng.normal(size=layer["kernel"].shape)), jnp.float32)
        }
        for name, layer in params.items()
        if name != "ids"
    }
    none = optax.MaskedNode()
    precision = {n: p | {"bias": none} for n, p in precision.items()} | {"ids": none}
    mean = jax.tree.map(lambda s: jnp.zeros_like(s), precision)
    return Posterior(mean, precision)


def kernels(params):
    return [np.asarray(params[n]["kernel"], np.float64) for n in ("a", "b")]


def total(params):
    return sum(np.abs(k).sum() for k in kernels(params))


def others_stay(before, after):
    for name in ("a", "b"):
        np.testing.assert_array_equal(before[name]["bias"], after[name]["bias"])
    np.testing.assert_array_equal(before["ids"], after["ids"])


jitted = jax.jit(downscale)


class TestDownscale:
    def test_one_factor(self):
        params = net()
        after = downscale(params, 0.8)
        for a, b in zip(kernels(params), kernels(after), strict=True):
            np.testing.assert_allclose(b, np.float32(0.8) * a.astype(np.float32), rtol=1e-7)
        others_stay(params, after)
        only = downscale(params, 0.8, select="a/")
        np.testing.assert_array_equal(only["b"]["kernel"], params["b"]["kernel"])
        np.testing.assert_allclose(only["a"]["bias"], 0.8 * params["a"]["bias"], rtol=1e-6)

    @settings(max_examples=30)
    @given(factor=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
    def test_spared_synapses_and_the_same_total(self, factor, seed):
        params = net(seed)
        known = belief(params, seed + 1)
        factor = np.float32(factor)
        after = jitted(params, jnp.asarray(factor), sparing=known)
        np.testing.assert_allclose(total(after), float(factor) * total(params), rtol=1e-4)
        others_stay(params, after)
        # Each is s / (s + t) for one t: the odds over the precision are the same everywhere.
        pulls, sharpest = [], []
        for w, v, s in zip(kernels(params), kernels(after), ("a", "b"), strict=True):
            s = np.asarray(known.precision[s]["kernel"], np.float64)
            share = v / w
            assert (share <= 1).all()
            assert (share >= 0).all()
            clear = (share < 0.999) & (share > 1e-3)
            pulls.append((s * (1 - share) / share)[clear])
            sharpest.append((s.ravel(), share.ravel()))
        pulls = np.concatenate(pulls)
        if pulls.size:
            np.testing.assert_allclose(pulls, np.median(pulls), rtol=1e-3)
        s, share = map(np.concatenate, zip(*sharpest, strict=True))
        assert (np.diff(share[np.argsort(s)]) > -1e-5).all()

    def test_equal_precisions_are_one_factor(self):
        params = net()
        flat = jax.tree.map(lambda s: jnp.full_like(s, 7.0), belief(params).precision)
        known = Posterior(belief(params).mean, flat)
        for a, b in zip(
            kernels(downscale(params, 0.3)),
            kernels(jitted(params, 0.3, sparing=known)),
            strict=True,
        ):
            np.testing.assert_allclose(b, a, rtol=1e-5)

    def test_populations_and_half_precision(self):
        params = net()
        known = belief(params)
        factors = jnp.array([0.2, 0.9, 1.0])
        together = jax.vmap(lambda f: jitted(params, f, sparing=known)["a"]["kernel"])(factors)
        np.testing.assert_array_equal(together[2], params["a"]["kernel"])
        one = jitted(params, factors[1], sparing=known)["a"]["kernel"]
        np.testing.assert_allclose(together[1], one, rtol=1e-5)
        half = {"w": jnp.ones((2, 2), jnp.bfloat16)}
        assert downscale(half, 0.5)["w"].dtype == jnp.bfloat16

    def test_a_network_without_biases_decides_as_before(self):
        rng = np.random.default_rng(0)
        params = {"a": net()["a"]["kernel"], "b": net()["b"]["kernel"]}
        inputs = jnp.asarray(rng.normal(size=(50, 5)), jnp.float32)

        def logits(params):
            return jax.nn.relu(inputs @ params["a"]) @ params["b"]

        before, after = logits(params), logits(downscale(params, 0.5))
        np.testing.assert_allclose(after, 0.25 * before, rtol=1e-5)

    def test_errors(self):
        params = net()
        for factor in (0.0, 1.1, -1.0):
            with pytest.raises(ValueError, match=r"factor must be in \(0, 1\]"):
                downscale(params, factor)
        with pytest.raises(ValueError, match="believes nothing of leaf 'a/bias'"):
            downscale(params, 0.5, select="a/", sparing=belief(params))
        bad = belief(params)
        bad.precision["a"]["kernel"] = jnp.zeros((5, 4))
        with pytest.raises(ValueError, match="not finite and positive"):
            downscale(params, 0.5, sparing=bad)


class TestHomeostatic:
    @pytest.mark.parametrize("norm", ["l1", "l2"])
    @pytest.mark.parametrize("spared", [False, True])
    @pytest.mark.parametrize("upscale", [False, True])
    def test_units_come_to_their_set_point(self, norm, spared, upscale):
        params = net()
        order = 1 if norm == "l1" else 2
        known = belief(params) if spared else None
        before = [np.linalg.norm(k, order, axis=0) for k in kernels(params)]
        goal = float(np.median(np.concatenate(before)))
        after = homeostatic(params, goal, norm=norm, upscale=upscale, sparing=known)
        for name, old, new, size in zip(
            ("a", "b"), kernels(params), kernels(after), before, strict=True
        ):
            expected = np.full_like(size, goal) if upscale else np.minimum(size, goal)
            np.testing.assert_allclose(np.linalg.norm(new, order, axis=0), expected, rtol=1e-4)
            share = new / old
            falls = size > goal
            if spared:
                s = np.asarray(known.precision[name]["kernel"], np.float64)
                odds = (s * (1 - share) / share)[:, falls]
                ok = (share[:, falls] < 0.999) & (share[:, falls] > 1e-3)
                middle = np.array([np.median(c[o]) for c, o in zip(odds.T, ok.T, strict=True)])
                np.testing.assert_allclose(np.where(ok, odds / middle, 1.0), 1.0, rtol=2e-3)
            else:
                np.testing.assert_allclose(share, share[:1].repeat(len(share), 0), rtol=1e-5)
            np.testing.assert_allclose(
                share[:, ~falls],
                np.broadcast_to(expected / size, share.shape)[:, ~falls],
                rtol=1e-5,
            )
        others_stay(params, after)

    def test_back_to_the_morning(self):
        morning = net()
        evening = jax.tree.map(lambda p: p * 2 if p.ndim == 2 else p, morning)
        found = homeostatic(evening, norms(morning))
        for a, b in zip(kernels(morning), kernels(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        # Another axis is another notion of a unit.
        found = homeostatic(evening, norms(morning, axis=0), axis=0)
        for a, b in zip(kernels(morning), kernels(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        filters = {"k": jnp.ones((3, 3, 2, 4))}
        assert norms(filters)["k"].shape == (1, 1, 1, 4)
        np.testing.assert_allclose(norms(homeostatic(filters, 6.0))["k"], 6.0, rtol=1e-6)

    def test_silent_units_and_targets_of_zero(self):
        params = {"w": jnp.array([[0.0, 3.0], [0.0, -4.0]])}
        found = homeostatic(params, 1.0, norm="l2", upscale=True)["w"]
        np.testing.assert_allclose(found, [[0, 0.6], [0, -0.8]], rtol=1e-6)
        assert not homeostatic(params, 0.0)["w"].any()
        known = Posterior(params, {"w": jnp.full((2, 2), 2.0)})
        assert not homeostatic(params, 0.0, sparing=known)["w"].any()
        huge = {"w": jnp.full((2, 1), 3e30)}
        np.testing.assert_allclose(norms(huge, norm="l2")["w"], 3e30 * np.sqrt(2), rtol=1e-6)

    def test_errors(self):
        params = net()
        for make, message in (
            (lambda: homeostatic(params, 1.0, norm="max"), "norm must be"),
            (lambda: homeostatic(params, -1.0), "target= of leaf 'a/kernel' must not be negative"),
            (lambda: homeostatic(params, jnp.ones(7)), r"target= has the shape \(7,\) for leaf 'a"),
            (lambda: homeostatic(params, 1.0, axis=2), "has no axis 2"),
            (
                lambda: homeostatic(params, norms(params, select="a/kernel")),
                "target= has nothing for leaf 'b/kernel'",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                make()
