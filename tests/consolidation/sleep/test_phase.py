"""A phase runs its parts in order, with keys of their own, and says whose fault it was."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivenet.consolidation.sleep import (
    buffer,
    cross_entropy,
    downscale,
    keyless,
    mixtures,
    pruning_of_unused,
    replay,
    sleep,
)
from adaptivenet.posterior.gaussian import Posterior

KEY = jax.random.key(0)


def shift(params, key, by=1.0):
    return jax.tree.map(lambda p: p + by, params)


def noisy(params, key):
    return params, jax.random.normal(key)


class TestPhase:
    def test_order_names_and_reports(self):
        double = keyless(lambda params: jax.tree.map(lambda p: 2 * p, params))
        params, report = sleep({"w": jnp.ones(2)}, {"a": shift, "b": double, "c": noisy}, KEY)
        assert params["w"].tolist() == [4, 4]
        assert list(report) == ["a", "b", "c"]
        assert report["a"] is None
        params, _ = sleep({"w": jnp.ones(2)}, {"b": double, "a": shift}, KEY)
        assert params["w"].tolist() == [3, 3]

    def test_sequences_name_their_parts(self):
        parts = [shift, functools.partial(shift, by=2.0), keyless(downscale, factor=0.5), shift]
        params, report = sleep({"w": jnp.ones((1, 1))}, parts, KEY)
        assert list(report) == ["shift", "shift_2", "downscale", "shift_3"]
        assert params["w"].tolist() == [[3.0]]

    def test_every_part_has_a_key_of_its_own(self):
        run = jax.jit(lambda p, key: sleep(p, [noisy, noisy], key))
        _, report = run(jnp.ones(2), KEY)
        again = run(jnp.ones(2), KEY)[1]
        other = run(jnp.ones(2), jax.random.key(1))[1]
        assert report["noisy"] != report["noisy_2"]
        assert report["noisy"] == again["noisy"]
        assert report["noisy"] != other["noisy"]
        together = jax.vmap(lambda k: sleep(jnp.ones(2), [noisy], k)[1]["noisy"])(
            jax.random.split(KEY, 4)
        )
        assert len(set(together.tolist())) == 4

    def test_parameters_that_are_pairs_themselves(self):
        pair = (jnp.ones(1), jnp.zeros(2))
        params, report = sleep(pair, [shift, noisy], KEY)
        assert [p.tolist() for p in params] == [[2.0], [1.0, 1.0]]
        assert report["noisy"].shape == ()
        state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
        slept, _ = sleep(state, [keyless(downscale, 0.5)], KEY)
        np.testing.assert_allclose(slept["kernel"][...], state["kernel"][...] / 2)

    def test_errors_name_the_part(self):
        params = {"w": jnp.ones(2)}

        def fails(params, key):
            raise KeyError("no such thing")

        with pytest.raises(KeyError) as caught:
            sleep(params, {"first": shift, "dreams": fails}, KEY)
        assert "part 'dreams'" in caught.value.__notes__[0]
        for part, message in (
            (lambda p, k: None, "part 'x' of the phase must return the parameters"),
            (lambda p, k: ({"v": p["w"]}, 1), "part 'x' of the phase changed the parameters"),
            (lambda p, k: {"w": jnp.ones(3)}, r"leaf 'w' from float32\(2,\) to float32\(3,\)"),
            (lambda p, k: {"w": jnp.ones(2, jnp.bfloat16)}, "leaf 'w' from float32.* to bfloat16"),
        ):
            with pytest.raises(ValueError, match=message):
                sleep(params, {"x": part}, KEY)
        with pytest.raises(TypeError, match="part 'x' of the phase is 3, not a function"):
            sleep(params, {"x": 3}, KEY)


class TestReplay:
    def loss(self, params, batch):
        return jnp.mean(jnp.square(params["w"] - batch))

    def draw(self, key):
        return jax.random.normal(key, (4, 3))

    def test_it_is_the_loop(self):
        start, tx = {"w": jnp.ones(3)}, optax.sgd(0.1, momentum=0.9)
        params, report = replay(self.loss, tx, self.draw, steps=5)(start, KEY)
        own, state = start, tx.init(start)
        for turn, key in enumerate(jax.random.split(KEY, 5)):
            value, grads = jax.value_and_grad(self.loss)(own, self.draw(key))
            updates, state = tx.update(grads, state, own)
            own = optax.apply_updates(own, updates)
            np.testing.assert_allclose(report.losses[turn], value, rtol=1e-5)
        np.testing.assert_allclose(params["w"], own["w"], rtol=1e-5)
        # A phase may go on where another stopped.
        first, told = replay(self.loss, tx, lambda key: jnp.zeros(3), steps=2)(start, KEY)
        onward = replay(self.loss, tx, lambda key: jnp.zeros(3), steps=3, opt_state=told.opt_state)
        whole, _ = replay(self.loss, tx, lambda key: jnp.zeros(3), steps=5)(start, KEY)
        np.testing.assert_allclose(onward(first, KEY)[0]["w"], whole["w"], rtol=1e-6)

    @pytest.mark.parametrize("held", [True, False])
    def test_pruned_synapses_stay_zero(self, held):
        start, mask = {"w": jnp.array([0.0, 1.0, 2.0])}, {"w": jnp.array([False, True, True])}
        part = replay(self.loss, optax.adam(0.1), self.draw, steps=5, mask=mask if held else None)
        params, _ = part(start, KEY)
        assert (params["w"][0] == 0) == held
        assert (params["w"][1:] != start["w"][1:]).all()

    def test_errors(self):
        with pytest.raises(ValueError, match="steps must be a positive integer"):
            replay(self.loss, optax.sgd(0.1), self.draw, steps=0)


class TestNight:
    """Two tasks of two classes each, one after the other; sleep brings the first one back."""

    centres = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])

    def task(self, classes, seed, number=200):
        rng = np.random.default_rng(seed)
        labels = rng.choice(classes, number)
        inputs = self.centres[labels] + rng.normal(size=(number, 2))
        return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)

    @staticmethod
    def apply(params, inputs):
        hidden = jax.nn.relu(inputs @ params["one"] + params["shift"])
        return hidden @ params["two"]

    def loss(self, params, batch):
        return cross_entropy(self.apply(params, batch[0]), batch[1])

    def accuracy(self, params, seed=9):
        inputs, labels = self.task([0, 1, 2, 3], seed)
        return float(jnp.mean(jnp.argmax(self.apply(params, inputs), 1) == labels))

    def days(self):
        rng = np.random.default_rng(1)
        params = {
            "one": jnp.asarray(rng.normal(size=(2, 16)) * 0.7, jnp.float32),
            "shift": jnp.zeros(16),
            "two": jnp.asarray(rng.normal(size=(16, 4)) * 0.2, jnp.float32),
        }
        memory = mixtures.init(2, 4)
        kept = buffer.init((jnp.zeros(2), jnp.int32(0)), 40, classes=4)
        for classes in ([0, 1], [2, 3]):
            batch = self.task(classes, seed=classes[0])
            day = replay(self.loss, optax.adam(0.02), lambda key, b=batch: b, steps=150)
            params, _ = jax.jit(day)(params, KEY)
            memory = mixtures.observe(memory, *batch)
            kept = buffer.add(kept, batch, labels=batch[1])
        return params, memory, kept

    def test_sleep_restores_what_the_day_overwrote(self):
        params, memory, kept = self.days()
        assert self.accuracy(params) < 0.6  # the first task is forgotten

        def dreams(key):
            return mixtures.dream(memory, key, 64)

        def examples(key):
            return buffer.draw(kept, key, 32).items

        def inputs(key):
            return dreams(key)[0]

        flat = jax.tree.map(jnp.ones_like, params)
        for draw in (dreams, examples):
            night = {
                "replay": replay(self.loss, optax.adam(0.02), draw, steps=150),
                "downscaling": keyless(downscale, 0.9, sparing=Posterior(params, flat)),
                "pruning": pruning_of_unused(self.apply, inputs, batches=5, fraction=0.2),
            }
            slept, report = jax.jit(lambda p, n=night: sleep(p, n, KEY))(params)
            assert self.accuracy(slept) > 0.9
            mask = report["pruning"]["mask"]
            assert sum(int((~m).sum()) for m in jax.tree.leaves(mask)) == round(0.2 * 96)
            assert report["replay"].losses[-1] < report["replay"].losses[0]
        # A night without replay does not.
        night = {k: part for k, part in night.items() if k != "replay"}
        assert self.accuracy(sleep(params, night, KEY)[0]) < 0.6
