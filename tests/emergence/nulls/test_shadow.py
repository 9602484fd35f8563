"""The shadow mask: dense training to the last bit, and the mask that looking at it gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning
from adaptivenet.emergence import nulls

STEPS = 9
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
}


def rule(every=2):
    schedule = pruning.cubic(final=0.8, start=0, end=7)
    return pruning.prune(schedule, regrow=pruning.at_random(0.3), every=every, ages=True)


def gradual(every=2):
    return pruning.prune(pruning.linear(0.8, 0, 7), every=every)


def start(key):
    keys = jax.random.split(key, 2)
    return {
        "dense1": {"kernel": jax.random.normal(keys[0], (7, 33)) * 0.4, "bias": jnp.zeros(33)},
        "dense2": {"kernel": jax.random.normal(keys[1], (33, 5)) * 0.2, "bias": jnp.zeros(5)},
    }


def loss(params, inputs):
    hidden = jnp.tanh(inputs @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    out = hidden @ params["dense2"]["kernel"] + params["dense2"]["bias"]
    return jnp.mean((out - jnp.sin(3.0 * inputs[:, :5])) ** 2)


def batches():
    return jax.random.normal(jax.random.key(7), (STEPS, 16, 7))


def step(tx, carry, inputs):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, inputs), state, params)
    return optax.apply_updates(params, updates), state


def scanned(tx, key, data):
    """The final state, and the parameters before every step."""
    params = start(key)
    carry = (params, tx.init(params))
    return jax.lax.scan(lambda c, x: (step(tx, c, x), c[0]), carry, data)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.usefixtures("real_compiler")
@pytest.mark.parametrize(
    ("optimizer", "mode", "make"),
    [
        ("adam", "scan", rule),
        ("adam", "jit", gradual),
        ("adam", "vmap", gradual),
        ("momentum", "scan", gradual),
    ],
)
def test_training_is_bit_identical(optimizer, mode, make):
    plain = OPTIMIZERS[optimizer]()
    watched = optax.chain(OPTIMIZERS[optimizer](), nulls.shadow(make()))
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 3)

    def loop(tx):
        advance = jax.jit(lambda c, x: step(tx, c, x))
        params = start(key)
        carry = (params, tx.init(params))
        for inputs in batches():
            carry = advance(carry, inputs)
        return carry

    runs = {
        "jit": loop,
        "scan": lambda tx: jax.jit(lambda k: scanned(tx, k, batches())[0])(key),
        "vmap": lambda tx: jax.jit(jax.vmap(lambda k: scanned(tx, k, batches())[0]))(keys),
    }
    params, state = runs[mode](plain)
    shadowed, shadow_state = runs[mode](watched)
    same(shadowed, params)
    same(shadow_state[0], state)
    record = pruning.record(shadow_state)
    assert np.all(np.asarray(record.alive) == 79)  # it did evolve: a fifth of 396
    assert int(record.deaths.min()) > 0


def test_the_state_is_what_looking_at_the_dense_parameters_gives():
    watched = optax.chain(optax.adam(1e-2), nulls.shadow(rule()))
    (_, state), history = jax.jit(lambda k: scanned(watched, k, batches()))(jax.random.key(0))
    pruner = rule()
    advance = jax.jit(lambda state, params: pruner.update(params, state, params)[1])
    # From the history: computed elsewhere, the start (which seeds the rule) may differ in a bit.
    expected = pruner.init(jax.tree.map(lambda x: x[0], history))
    for place in range(STEPS):
        expected = advance(expected, jax.tree.map(lambda x: x[place], history))  # noqa: B023
    same(state[1], expected)


def test_under_revise_too():
    """Events between chunks: nothing but the pruning state changes."""
    key = jax.random.key(0)
    watcher = nulls.shadow(rule(every=None))
    tx, plain = optax.chain(optax.adam(1e-2), watcher), optax.adam(1e-2)
    chunk = {
        name: jax.jit(lambda c, x, tx=t: jax.lax.scan(lambda c, x: (step(tx, c, x), None), c, x)[0])
        for name, t in (("shadow", tx), ("plain", plain))
    }
    event = jax.jit(lambda params, state: pruning.revise(watcher, params, state))
    params = start(key)
    carry, dense = (params, tx.init(params)), (params, plain.init(params))
    pruner, expected = rule(every=None), rule(every=None).init(params)
    look = jax.jit(lambda params, state: pruning.revise(pruner, params, state))
    for data in batches().reshape(3, 3, 16, 7):
        carry, dense = chunk["shadow"](carry, data), chunk["plain"](dense, data)
        same(carry[0], dense[0])
        params, state = event(*carry)
        same(params, carry[0])
        same(state[0], carry[1][0])
        expected = expected._replace(step=expected.step + 3, record=carry[1][1].record)
        _, expected = look(dense[0], expected)
        same(state[1], expected)
        carry = (params, state)
    assert int(pruning.record(carry[1]).alive) == 79


def test_what_is_no_pruner_is_refused():
    with pytest.raises(TypeError, match=r"shadow\(\) takes what an.pruning.prune"):
        nulls.shadow(optax.sgd(0.1))
    watcher, params = nulls.shadow(pruning.prune(0.5)), {"w": jnp.ones((2, 2))}
    state = watcher.init(params)
    with pytest.raises(ValueError, match=r"prune\(\) needs the parameters"):
        watcher.update(params, state)
