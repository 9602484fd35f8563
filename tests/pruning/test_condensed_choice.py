"""The choice of a format, under clocks that are told what to say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet.pruning.condensed import choice
from adaptivenet.pruning.condensed.choice import choose, interleaved, propose
from adaptivenet.pruning.condensed.layers import apply, stored_bytes, unpack

BLOCKS = ((8, 8), (1, 16), (5, 5))


def fan_in_kernel(inputs=64, outputs=32, fan_in=8, seed=0):
    """A kernel of constant fan-in."""
    random = np.random.default_rng(seed)
    kernel = np.zeros((inputs, outputs), np.float32)
    for output in range(outputs):
        kernel[random.permutation(inputs)[:fan_in], output] = random.normal(size=fan_in)
    return kernel


class Clock:
    """A measurement that runs nothing, and gives the seconds it is told: one dict a call."""

    def __init__(self, *rounds):
        self.rounds, self.calls = list(rounds), []

    def __call__(self, functions, repeats):
        seconds = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        self.calls.append((list(functions), repeats))
        out = {}
        for name in functions:
            times = seconds.get(name, 2.0)
            out[name] = list(times) if isinstance(times, list) else [times] * repeats
        return out


def test_formats_that_are_exact_and_smaller():
    kernel = fan_in_kernel()
    layers = propose(kernel, blocks=BLOCKS)
    assert next(iter(layers)) == "dense"
    assert {"fan-in", "bcsr"} <= layers.keys()
    assert "blocks 5x5" not in layers
    for layer in layers.values():
        np.testing.assert_array_equal(unpack(layer), kernel)
    dense = stored_bytes(layers["dense"])
    assert all(stored_bytes(layer) < dense for name, layer in layers.items() if name != "dense")
    # Nothing is smaller than a kernel without zeros.
    assert list(propose(np.ones((32, 32), np.float32))) == ["dense"]


def test_the_smallest_group_is_proposed():
    mask = np.zeros((64, 8), bool)
    mask[::8] = mask[1::8] = True
    layers = propose(np.ones((64, 8), np.float32), mask)
    assert "2:8" in layers
    assert not {"2:4", "2:16", "4:16"} & layers.keys()


def test_blocks_are_proposed_where_they_hold():
    kernel = np.kron(np.eye(4), np.ones((8, 8))).astype(np.float32)
    assert "blocks 8x8" in propose(kernel, blocks=BLOCKS)
    assert "blocks 8x8" not in propose(fan_in_kernel(), blocks=BLOCKS)


def test_the_fastest_is_chosen():
    clock = Clock({"dense": 1.0, "bcsr": 0.8, "fan-in": 0.5})
    choice = choose(fan_in_kernel(), 4, blocks=(), repeats=7, measure=clock)
    assert choice.format == "fan-in"
    assert type(choice.layer).__name__ == "FanInLayer"
    assert clock.calls[0][1] == 7
    assert clock.calls[1][0] == ["dense", "fan-in"]
    assert [line.format for line in choice.report][:3] == ["fan-in", "bcsr", "dense"]
    fastest = choice.report[0]
    assert (fastest.seconds, fastest.ratio) == (0.5, 0.5)
    assert fastest.bytes == stored_bytes(choice.layer)


@pytest.mark.parametrize(
    "rounds",
    [
        [{"dense": 1.0, "fan-in": 1.2, "bcsr": 1.1}],
        [{"dense": 1.0, "fan-in": 0.97}],  # not clearly
        [{"dense": [1.0, 2.0, 1.0], "fan-in": [0.9, 2.0, 1.0]}],  # in the fastest call alone
        [{"dense": [1.0, 2.0, 2.0], "fan-in": [1.0, 1.0, 1.0]}],  # in the median alone
        [{"dense": 1.0, "fan-in": 0.5}, {"dense": 1.0, "fan-in": 1.0}],  # by luck
    ],
)
def test_dense_unless_another_wins_clearly(rounds):
    choice = choose(fan_in_kernel(), 1, blocks=(), repeats=3, measure=Clock(*rounds))
    assert choice.format == "dense"
    np.testing.assert_array_equal(choice.layer.values, fan_in_kernel())


def test_the_second_where_the_first_was_lucky():
    first = {"dense": 1.0, "fan-in": 0.5, "bcsr": 0.7}
    clock = Clock(first, {"dense": 1.0, "fan-in": 1.1}, {"dense": 1.0, "bcsr": 0.7})
    assert choose(fan_in_kernel(), 1, blocks=(), measure=clock).format == "bcsr"


def test_never_slower_than_dense_by_more_than_the_margin():
    random = np.random.default_rng(1)
    for _ in range(20):
        names = ("dense", "fan-in", "bcsr")
        true = dict(zip(names, random.uniform(0.7, 1.4, 3), strict=True))

        def noisy(functions, repeats, true=true):
            return {
                name: list(true.get(name, 2.0) * random.uniform(1.0, 1.3, repeats))
                for name in functions
            }

        choice = choose(fan_in_kernel(), 1, blocks=(), repeats=30, measure=noisy)
        assert true[choice.format] <= 1.05 * true["dense"]


def test_margin():
    clock = Clock({"dense": 1.0, "fan-in": 0.97})
    assert choose(fan_in_kernel(), 1, blocks=(), margin=0.0, measure=clock).format == "fan-in"


def test_what_is_measured_is_the_product():
    kernel, mask = fan_in_kernel(), fan_in_kernel(seed=2) != 0
    products = {}

    def run(functions, repeats):
        del repeats
        products.update({name: function() for name, function in functions.items()})
        return {name: [1.0] for name in functions}

    choice = choose(kernel, 6, mask=mask, blocks=((1, 16),), repeats=1, measure=run)
    assert products.keys() == {line.format for line in choice.report}
    expected = np.asarray(products["dense"])
    assert expected.shape == (6, 32)
    for product in products.values():
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(choice.layer.values, np.where(mask, kernel, 0.0))


def test_the_kernels_dtype_is_that_of_the_inputs():
    kernel = jnp.asarray(fan_in_kernel(), jnp.bfloat16)
    seen = {}

    def run(functions, repeats):
        seen.update({name: function().dtype for name, function in functions.items()})
        return {name: [1.0] * repeats for name in functions}

    choose(kernel, 1, blocks=(), repeats=1, measure=run)
    assert set(seen.values()) == {jnp.dtype(jnp.bfloat16)}


def test_functions_take_turns(monkeypatch):
    order = []
    ticks = iter(range(1000))
    monkeypatch.setattr(choice.time, "perf_counter", lambda: float(next(ticks)))
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(functions, 3)
    assert "".join(order) == "abcabc" + "abc" + "bca" + "cab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}


def test_the_real_clock():
    choice = choose(fan_in_kernel(), 2, blocks=(), repeats=2)
    assert all(line.seconds > 0 for line in choice.report)
    x = jnp.ones((2, 64))
    np.testing.assert_allclose(
        jax.jit(apply)(choice.layer, x), x @ fan_in_kernel(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch, repeats and calls must be at least 1, not 0"),
        ({"batch": 1, "calls": 0}, "calls must be at least 1, not 1, 30 and 0"),
        ({"batch": 1, "repeats": 0}, "not 1, 0 and 1"),
        ({"batch": 1, "margin": 1.0}, r"margin is a share in \[0, 1\), not 1.0"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(fan_in_kernel(), **arguments)
    with pytest.raises(ValueError, match="reshape"):
        choose(np.ones((3, 3, 2, 2), np.float32), 1)


def test_many_products_are_timed_in_one_program():
    kernel, seen = fan_in_kernel(), {}

    def clock(functions, repeats):
        seen.update({name: function() for name, function in functions.items()})
        return {name: [1.0] * repeats for name in functions}

    choose(kernel, 3, blocks=[], calls=4, measure=clock)
    assert {name: out.shape for name, out in seen.items()}["dense"] == (4, 3, 32)
    for out in seen.values():
        np.testing.assert_allclose(out, seen["dense"], atol=1e-4)
