"""Sleep replay is a slow loop over neurons and synapses, with the same noise."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet.consolidation.sleep import noise

SIZES = (6, 5, 4, 3)
OPTIONS = {
    "rate": 0.8,
    "increment": 0.03,
    "decrement": 0.01,
    "decay": 0.9,
    "scales": (2.0, 1.5, 1.0),
    "thresholds": (0.8, 0.5, 0.3),
}


def network(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(SIZES)
    return {
        f"dense{n}": {
            "kernel": jnp.asarray(rng.normal(size=s) * 0.6, dtype),
            "bias": jnp.ones(s[1], dtype),
        }
        for n, s in enumerate(shapes, start=1)
    }


def kernels_of(params):
    return [np.asarray(params[f"dense{n}"]["kernel"], np.float64) for n in (1, 2, 3)]


def slow_sleep(
    kernels,
    key,
    mean,
    *,
    steps,
    rate,
    scales,
    thresholds,
    increment,
    decrement,
    decay,
    inhibition=0.0,
    sharpness=1e-3,
    mask=None,
    view=None,
):
    kernels = [k.copy() for k in kernels]
    mean = np.asarray(mean, np.float64)
    potentials = [np.zeros(k.shape[1]) for k in kernels]
    counts = [np.zeros(len(mean)), *(np.zeros(k.shape[1]) for k in kernels)]
    for now in jax.random.split(key, steps):
        look, spike = jax.random.split(now)
        shown = mean if view is None else np.asarray(view(look, jnp.asarray(mean)))
        lots = np.asarray(jax.random.uniform(spike, mean.shape, jnp.float64))
        before = [bool(lots[i] < rate * shown[i]) for i in range(len(mean))]
        counts[0] += before
        for n, k in enumerate(kernels):
            drives = []
            for j in range(k.shape[1]):
                drives.append(scales[n] * sum(k[i, j] for i in range(len(k)) if before[i]))
            after = []
            for j in range(k.shape[1]):
                potentials[n][j] *= decay
                potentials[n][j] += drives[j] - inhibition * sum(drives) / len(drives)
                after.append(potentials[n][j] >= thresholds[n])
                if not after[j]:
                    continue
                potentials[n][j] = 0.0
                for i in range(len(k)):
                    if mask is not None and not mask[n][i, j]:
                        continue
                    bound = 1.0
                    if sharpness is not None:
                        bound = 2 / (1 + np.exp(np.clip(k[i, j] / sharpness, -500, 500)))
                    k[i, j] += bound * (increment if before[i] else -decrement)
            counts[n + 1] += after
            before = after
    return kernels, [c / steps for c in counts]


class TestAgainstTheLoop:
    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"sharpness": None, "inhibition": 0.5},
            {"sharpness": 0.2, "view": noise.windows((2, 3), 2)},
        ],
    )
    def test_kernels_and_rates(self, more):
        with jax.enable_x64(True):
            params, key = network(dtype=jnp.float64), jax.random.key(1)
            mean = jnp.asarray([0.9, 0.1, 0.5, 0.0, 1.0, 0.6])
            run = jax.jit(lambda p: noise.sleep_replay(p, key, mean, steps=40, **OPTIONS, **more))
            slept, report = run(params)
            expected, rates = slow_sleep(kernels_of(params), key, mean, steps=40, **OPTIONS, **more)
            for found, own, start in zip(
                kernels_of(slept), expected, kernels_of(params), strict=True
            ):
                np.testing.assert_allclose(found, own, rtol=1e-9, atol=1e-12)
                assert np.abs(own - start).max() > 1e-3  # there is something to compare
            for found, own in zip(report.rates, rates, strict=True):
                np.testing.assert_allclose(found, own)
            changes = [
                np.abs(a - b).mean() for a, b in zip(expected, kernels_of(params), strict=True)
            ]
            np.testing.assert_allclose(jnp.stack(report.change), changes, rtol=1e-9)
            for n in (1, 2, 3):
                assert slept[f"dense{n}"]["bias"].tolist() == [1.0] * SIZES[n]

    def test_pruned_synapses_stay_zero(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(3)
            params, key = network(dtype=jnp.float64), jax.random.key(2)
            mask = {}
            for name, layer in params.items():
                alive = rng.random(layer["kernel"].shape) < 0.5
                mask[name] = {"kernel": jnp.asarray(alive)}
                layer["kernel"] = jnp.where(alive, layer["kernel"], 0.0)
            mean = jnp.full(6, 0.7)
            slept, _ = noise.sleep_replay(params, key, mean, steps=30, mask=mask, **OPTIONS)
            alive = [np.asarray(mask[name]["kernel"]) for name in params]
            expected, _ = slow_sleep(kernels_of(params), key, mean, steps=30, mask=alive, **OPTIONS)
            for found, own, keep in zip(kernels_of(slept), expected, alive, strict=True):
                np.testing.assert_allclose(found, own, rtol=1e-9)
                assert (found[~keep] == 0).all()
            # Without the mask they wake.
            free, _ = noise.sleep_replay(params, key, mean, steps=30, **OPTIONS)
            assert any((f[~k] != 0).any() for f, k in zip(kernels_of(free), alive, strict=True))


sleep = functools.partial(
    noise.sleep_replay, steps=10, rate=1.0, scales=[1.0], decay=0.0, sharpness=None
)


class TestRule:
    def one(self, weights, mean, threshold, **options):
        params = {"kernel": jnp.asarray(weights, jnp.float32)}
        slept, report = sleep(
            params,
            jax.random.key(0),
            jnp.asarray(mean),
            thresholds=[threshold],
            increment=0.5,
            decrement=0.25,
            **options,
        )
        return slept["kernel"] - params["kernel"], report

    def test_the_right_synapses_move(self):
        """Of two inputs one always spikes; of two units one always does."""
        change, report = self.one([[1.0, -9.0], [1.0, 1.0]], [1.0, 0.0], 0.5)
        assert change.tolist() == [[5.0, 0.0], [-2.5, 0.0]]
        assert report.rates[0].tolist() == [1, 0]
        assert report.rates[1].tolist() == [1, 0]

    def test_what_does_not_spike_does_not_learn(self):
        change, report = self.one([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], 1e6)
        assert not change.any()
        assert not report.rates[1].any()
        change, _ = self.one([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], 0.5)
        assert not change.any()

    def test_the_potential_gathers_and_falls(self):
        """A drive of 1 a step reaches a threshold of 3 in every third step."""
        params = {"kernel": jnp.ones((1, 1))}
        _, report = noise.sleep_replay(
            params,
            jax.random.key(0),
            jnp.ones(1),
            steps=30,
            rate=1.0,
            scales=[1.0],
            thresholds=[3.0],
            decay=1.0,
            increment=0.0,
            decrement=0.0,
        )
        np.testing.assert_allclose(report.rates[1], 1 / 3)

    def test_noise_follows_the_mean(self):
        _, report = noise.sleep_replay(
            {"kernel": jnp.zeros((3, 1))},
            jax.random.key(0),
            jnp.array([0.2, 0.8, 3.0]),
            steps=4000,
            rate=0.5,
            scales=[1.0],
            thresholds=[1.0],
        )
        np.testing.assert_allclose(report.rates[0], [0.1, 0.4, 1.0], atol=0.03)


def test_one_key_is_one_sleep_and_populations_sweep():
    params, mean = network(), jnp.full(6, 0.6)

    @jax.jit
    def run(key, rate):
        options = OPTIONS | {"increment": rate}
        return noise.sleep_replay(params, key, mean, steps=20, **options)[0]["dense1"]["kernel"]

    keys = jax.random.split(jax.random.key(0), 2)
    rates = jnp.array([0.0, 0.03])
    together = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(keys, rates)
    np.testing.assert_array_equal(run(keys[0], rates[1]), run(keys[0], rates[1]))
    np.testing.assert_allclose(together[1, 1], run(keys[1], rates[1]), rtol=1e-4, atol=1e-5)
    assert (together[0] != together[1]).any()
    assert (together[:, 0] <= params["dense1"]["kernel"] + 1e-6).all()  # nothing grows


def test_half_precision_and_order_of_layers():
    """Paths are ordered by their numbers; other orders are told."""
    values = {"layer1": 1, "layer2": 1, "layer10": -1}  # the last is silent, and what follows it
    params = {name: jnp.full((2, 2), value, jnp.bfloat16) for name, value in values.items()}
    told = [r"layer1$", "layer2", "layer10"]
    run = functools.partial(
        noise.sleep_replay, steps=2, rate=1.0, scales=[1.0] * 3, thresholds=[0.5] * 3
    )
    for kernels, active in ((None, [1, 1, 1, 0]), (told, [1, 1, 1, 0]), (told[::-1], [1, 0, 0, 0])):
        slept, report = run(params, jax.random.key(0), jnp.ones(2), kernels=kernels)
        assert [float(r.mean()) for r in report.rates] == active
        assert slept["layer1"].dtype == jnp.bfloat16


class TestScales:
    def test_activities_are_at_most_one(self):
        rng = np.random.default_rng(0)
        params, inputs = network(5), jnp.asarray(rng.random((50, 6)), jnp.float32)
        exact = noise.layer_scales(params, inputs, form="exact")
        published = noise.layer_scales(params, inputs)
        found, sizes = inputs, []
        for scale, kernel in zip(exact, kernels_of(params), strict=True):
            found = jax.nn.relu(found @ jnp.asarray(kernel * float(scale), jnp.float32))
            assert found.max() <= 1 + 1e-5
        raw = inputs
        for kernel in kernels_of(params):
            raw = np.maximum(np.asarray(raw) @ kernel, 0)
            sizes.append(max(raw.max(), kernel.max()))
        expected = [1 / sizes[0], sizes[0] / sizes[1], sizes[1] / sizes[2]]
        np.testing.assert_allclose(exact, expected, rtol=1e-5)
        expected[2] = (sizes[1] / sizes[0]) / sizes[2]
        np.testing.assert_allclose(published, expected, rtol=1e-5)

    def test_windows_are_uniform(self):
        view = jax.vmap(noise.windows((3, 4), 2), (0, None))
        found = view(jax.random.split(jax.random.key(0), 3000), jnp.ones(12))
        assert (found.sum(1) == 4).all()
        places = np.unique(np.asarray(found), axis=0, return_counts=True)[1]
        assert places.size == 2 * 3
        assert places.min() > 400


def test_errors():
    params, key, mean = network(), jax.random.key(0), jnp.ones(6)

    def run(params=params, mean=mean, **options):
        return noise.sleep_replay(params, key, mean, **({"steps": 2} | OPTIONS | options))

    for make, message in (
        (
            lambda: run(mean=jnp.ones(5)),
            "'dense1/kernel' of shape .* does not follow on the inputs",
        ),
        (lambda: run(kernels=["dense2/k", "dense1/k"]), "'dense2/kernel' of shape"),
        (lambda: run(kernels=["kernel"]), "must match one leaf"),
        (lambda: run(params={"w": jnp.ones(3)}), r"no leaf is a kernel \[inputs, outputs\]"),
        (lambda: run(scales=(1.0,)), "scales= must be 3 numbers"),
        (lambda: run(thresholds=1.0), "thresholds= must be 3 numbers"),
        (lambda: run(steps=0), "steps must be a positive integer"),
        (lambda: run(increment=-1.0), "increment must be at least 0"),
        (lambda: run(decay=1.5), r"decay must be in \[0, 1\]"),
        (lambda: run(sharpness=0.0), "sharpness must be positive"),
        (lambda: noise.windows((3, 4), 4), r"size must be in \[1, 3\]"),
        (lambda: run(view=noise.windows((3, 3), 2)), "has not"),
        (lambda: noise.layer_scales(params, mean[None], form="new"), "form must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
