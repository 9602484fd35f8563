"""Piggyback: masks over a fixed backbone, with the straight-through gradient of the paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import trees
from adaptivenet.consolidation import piggyback
from adaptivenet.pruning import reparametrise

RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 3)).astype(np.float32)
S = RNG.uniform(0, 0.01, size=(5, 3)).astype(np.float32)
PARAMS = {"dense": {"kernel": jnp.asarray(W), "bias": jnp.ones(3)}}
SCORES = {"dense": {"kernel": jnp.asarray(S), "bias": optax.MaskedNode()}}
X = RNG.normal(size=(7, 5)).astype(np.float32)
G = RNG.normal(size=(7, 3)).astype(np.float32)


def test_start_is_the_backbone_itself():
    scores = piggyback.init(PARAMS)
    assert trees.is_masked(scores["dense"]["bias"])
    used = piggyback.apply_mask(PARAMS, scores)
    for one, other in zip(jax.tree.leaves(used), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(one, other)
    drawn = piggyback.init(PARAMS, key=jax.random.key(0))["dense"]["kernel"]
    assert 0 <= float(drawn.min()) < 0.005 < float(drawn.max()) < 0.02


def test_forward_and_gradients_are_those_of_the_paper():
    """y = x (W m): dL/dm_r = W * x^T g everywhere, dL/dW = m * x^T g where it is trained."""

    def loss(params, scores, fixed):
        used = piggyback.apply_mask(params, scores, fixed=fixed)["dense"]
        return jnp.sum((jnp.asarray(X) @ used["kernel"] + used["bias"]) * jnp.asarray(G))

    m = S > 5e-3
    used = piggyback.apply_mask(PARAMS, SCORES)
    np.testing.assert_array_equal(used["dense"]["kernel"], np.where(m, W, 0))
    assert 0 < m.sum() < m.size
    np.testing.assert_array_equal(
        reparametrise.support(used)["dense"]["kernel"], piggyback.masks(SCORES)["dense"]["kernel"]
    )
    through = X.T.astype(np.float64) @ G
    for fixed in (True, False):
        grads, of_scores = jax.grad(loss, (0, 1))(PARAMS, SCORES, fixed)
        np.testing.assert_allclose(of_scores["dense"]["kernel"], W * through, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            grads["dense"]["kernel"], 0 * W if fixed else m * through, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(grads["dense"]["bias"], G.sum(0), rtol=1e-4)


@given(weight=st.floats(-(2.0**99), 2.0**99, width=32), score=st.floats(-1024, 1024, width=32))
def test_values_are_exact(weight, score):
    params, scores = {"w": jnp.full(1, weight)}, {"w": jnp.full(1, score)}
    used = float(piggyback.apply_mask(params, scores)["w"][0])
    assert used == (weight if np.float32(score) > np.float32(5e-3) else 0.0)


def test_half_precision():
    params = {"w": jnp.array([[0.3, -0.7]], jnp.bfloat16)}
    scores = {"w": jnp.array([[1.0, 0.0]])}
    used = piggyback.apply_mask(params, scores)["w"]
    assert used.dtype == jnp.bfloat16
    assert used[0, 0] == params["w"][0, 0]
    assert used[0, 1] == 0


def test_two_tasks_over_one_backbone():
    """A task is learnt by masking alone; the backbone and the first task are as they were.

    Each output of a task is the sum of some of the inputs; the backbone holds the sum of all.
    """
    backbone = {"w": jnp.ones((6, 2))}
    wanted = [RNG.integers(0, 2, size=(6, 2)).astype(bool) for _ in range(2)]
    inputs = jnp.asarray(RNG.normal(size=(64, 6)), jnp.float32)

    def loss(scores, target):
        used = piggyback.apply_mask(backbone, scores)["w"]
        return jnp.mean(jnp.square(inputs @ used - inputs @ target))

    stored = []
    for truth in wanted:
        target = jnp.asarray(truth, jnp.float32)
        tx, scores = optax.sgd(2e-3), piggyback.init(backbone)
        before = float(loss(scores, target))

        def step(carry, _, tx=tx, target=target):
            scores, state = carry
            updates, state = tx.update(jax.grad(loss)(scores, target), state, scores)
            return (optax.apply_updates(scores, updates), state), None

        (scores, _), _ = jax.lax.scan(step, (scores, tx.init(scores)), None, 100)
        assert before > 0.5
        assert float(loss(scores, target)) == 0.0
        stored.append(piggyback.pack(piggyback.masks(scores)))
    for bits, truth in zip(stored, wanted, strict=True):
        np.testing.assert_array_equal(piggyback.unpack(bits, backbone)["w"], truth)


@settings(max_examples=10)  # every shape compiles anew
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_bits_come_back(shape, seed):
    mask = {"w": np.random.default_rng(seed).integers(0, 2, size=shape).astype(bool)}
    packed = piggyback.pack(mask)
    assert packed["w"].dtype == jnp.uint8
    assert packed["w"].size == -(-mask["w"].size // 8)
    np.testing.assert_array_equal(piggyback.unpack(packed, mask)["w"], mask["w"])


def test_bits():
    assert piggyback.bits(SCORES) == 15
    assert piggyback.bits(SCORES, tasks=10**12) == 15 * 10**12
    big = jax.eval_shape(
        lambda: piggyback.init({"w": jnp.zeros((2**16, 2**15)), "v": jnp.zeros((2**16, 2**15))})
    )
    assert piggyback.bits(big) == 2**32  # of two leaves


def test_under_jit_and_vmap():
    thresholds = jnp.array([0.0, 5e-3, 1.0])
    used = jax.jit(jax.vmap(lambda t: piggyback.apply_mask(PARAMS, SCORES, t)))(thresholds)
    for place, threshold in enumerate(np.asarray(thresholds)):
        np.testing.assert_array_equal(used["dense"]["kernel"][place], np.where(threshold < S, W, 0))


class TestErrors:
    def test_shapes(self):
        with pytest.raises(ValueError, match=r"scores of 'w' have shape \(2,\)"):
            piggyback.apply_mask({"w": jnp.ones(3)}, {"w": jnp.ones(2)})
        with pytest.raises(ValueError, match="belongs to another tree"):
            piggyback.apply_mask({"v": jnp.ones(3)}, {"w": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"bits of 'w' have shape \(1,\)"):
            piggyback.unpack({"w": jnp.zeros(1, jnp.uint8)}, {"w": jnp.ones((3, 3))})

    def test_others(self):
        with pytest.raises(TypeError, match="mask 'w' has dtype float32"):
            piggyback.pack({"w": jnp.ones(3)})
        with pytest.raises(ValueError, match="tasks must be a number"):
            piggyback.bits(SCORES, tasks=-1)
        with pytest.raises(ValueError, match="matches no leaf"):
            piggyback.init(PARAMS, select="conv")
