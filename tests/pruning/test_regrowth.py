"""Which synapses wake, and that they start from zero."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning

ZERO = {"w": jnp.zeros((4, 5))}
WEIGHTS = {"w": jnp.arange(1.0, 21.0).reshape(4, 5)}


def run(pruner, params, events, update=0.0, **signals):
    """Events one by one: parameters, masks and records."""
    state, rows = pruner.init(params), []
    for _ in range(events):
        updates, state = pruner.update(
            jax.tree.map(lambda p: jnp.full_like(p, update), params), state, params, **signals
        )
        params = optax.apply_updates(params, updates)
        rows.append((params["w"], np.asarray(pruning.mask(state)["w"]), pruning.record(state)))
    return rows


def test_everything_forgets_and_loses_nothing():
    """The founding note's rule: small weights are zeroed, and go on learning."""
    pruner = pruning.prune(pruning.threshold(5.0), regrow=pruning.everything())
    rows = run(pruner, WEIGHTS, 2, update=1.0)
    params, mask, record = rows[0]
    assert mask.all()
    # 1 to 4 are below the threshold: zero, without the update that the others get.
    assert params[0].tolist() == [0.0, 0.0, 0.0, 0.0, 6.0]
    assert (int(record.kept), int(record.alive)) == (16, 20)
    assert (int(record.births), int(record.deaths)) == (4, 4)
    # At the next event they are still below it.
    params, mask, record = rows[1]
    assert params[0].tolist() == [0.0, 0.0, 0.0, 0.0, 7.0]
    assert mask.all()


def test_between_events_what_everything_woke_learns():
    pruner = pruning.prune(pruning.threshold(5.0), regrow=pruning.everything(), every=2)
    rows = run(pruner, WEIGHTS, 3, update=0.5)
    assert rows[0][0][0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert rows[1][0][0].tolist() == [0.0, 0.0, 0.0, 0.0, 6.0]
    assert rows[2][0][0].tolist() == [0.5, 0.5, 0.5, 0.5, 6.5]


def test_everything_with_a_sparsity_zeroes_the_exact_number():
    pruner = pruning.prune(0.35, regrow=pruning.everything())
    params, mask, record = run(pruner, WEIGHTS, 1)[0]
    assert int((params == 0).sum()) == 7
    assert int(record.kept) == 13
    assert mask.all()


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_a_fraction_gives_way_and_the_total_stays(fraction):
    pruner = pruning.prune(0.6, regrow=pruning.at_random(fraction))
    before = np.ones((4, 5), bool)
    for params, mask, record in run(pruner, WEIGHTS, 4):
        kept = 8 - round(8 * fraction)
        assert mask.sum() == 8
        assert int(record.kept) == kept
        assert int(record.births) == 8 - kept
        assert int(record.deaths) == before.sum() - kept
        # Survivors are the largest of those alive; those woken are zero.
        assert int((params != 0).sum()) <= kept
        assert not np.any(np.asarray(params)[~mask])
        before = mask


def test_the_largest_survive_and_others_wake():
    pruner = pruning.prune(0.5, regrow=pruning.at_random(0.4))
    params, mask, _ = run(pruner, WEIGHTS, 1)[0]
    flat = np.ravel(params)
    assert flat[14:].tolist() == [15.0, 16.0, 17.0, 18.0, 19.0, 20.0]
    assert not flat[:14].any()
    assert np.ravel(mask)[:14].sum() == 4


def test_at_random_chooses_evenly():
    """Each of 14 dead synapses should wake in 4/14 of the runs."""

    def woken(seed):
        pruner = pruning.prune(0.5, regrow=pruning.at_random(0.4), seed=seed)
        _, state = pruning.revise(pruner, WEIGHTS, pruner.init(WEIGHTS))
        return pruning.mask(state)["w"]

    masks = jax.jit(jax.vmap(woken))(jnp.arange(500))
    share = np.ravel(masks.mean(axis=0, dtype=jnp.float32))
    np.testing.assert_array_equal(share[14:], 1)
    # Standard error 0.02.
    np.testing.assert_allclose(share[:14], 4 / 14, atol=0.08)


def test_a_fraction_of_those_above_a_threshold_gives_way():
    pruner = pruning.prune(pruning.threshold(11.0), regrow=pruning.at_random(0.3))
    params, mask, record = run(pruner, WEIGHTS, 1)[0]
    # Ten reach 11; the three lowest of them give way to three others.
    assert np.flatnonzero(np.ravel(params)).tolist() == list(range(13, 20))
    assert int(record.kept) == 7
    assert int(record.births) == 3
    assert mask.sum() == 10


def test_a_rule_of_ones_own_wakes_by_its_signals():
    @dataclass(frozen=True)
    class ByGradient:
        fraction: float = 0.5

        def priority(self, params, *, grads, **signals):
            return jax.tree.map(jnp.abs, grads)

    pruner = pruning.prune(0.8, regrow=ByGradient())
    grads = {"w": ZERO["w"].at[0, 1].set(-9.0).at[3, 4].set(99.0).at[1, 1].set(3.0)}
    _, mask, _ = run(pruner, WEIGHTS, 1, grads=grads)[0]
    # 19 and 20 survive, where the gradient is largest of all; the next largest two wake.
    assert np.flatnonzero(np.ravel(mask)).tolist() == [1, 6, 18, 19]
    with pytest.raises(ValueError, match=r"priority\(\) asks for the signal 'grads'"):
        pruner.update(ZERO, pruner.init(WEIGHTS), WEIGHTS)


def test_a_schedule_that_steps_back_wakes_at_random():
    steps_back = pruning.as_schedule(lambda step: jnp.where(step == 1, 0.9, 0.4))
    rows = run(pruning.prune(steps_back), WEIGHTS, 2, update=1.0)
    assert int(rows[0][2].alive) == 2
    params, mask, record = rows[1]
    assert mask.sum() == 12
    assert (int(record.kept), int(record.births), int(record.deaths)) == (2, 10, 0)
    assert int((params != 0).sum()) == 2  # the ten start from zero


def test_regrowth_goes_on_after_the_end_of_the_schedule():
    pruner = pruning.prune(pruning.cubic(0.5, 0, 2), regrow=pruning.at_random(0.2))
    records = [record for *_, record in run(pruner, WEIGHTS, 5)]
    assert [bool(record.event) for record in records] == [True] * 5
    assert [int(record.births) for record in records[1:]] == [2] * 4
    without = run(pruning.prune(pruning.cubic(0.5, 0, 2)), WEIGHTS, 5)
    assert [bool(record.event) for *_, record in without] == [True, True, False, False, False]


def test_a_population_over_fractions():
    def births(fraction):
        pruner = pruning.prune(0.5, regrow=pruning.at_random(fraction))
        _, state = pruning.revise(pruner, WEIGHTS, pruner.init(WEIGHTS))
        return pruning.record(state).births

    assert jax.jit(jax.vmap(births))(jnp.array([0.0, 0.25, 0.5])).tolist() == [0, 3, 5]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2])
def test_what_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), not"):
        pruning.at_random(fraction)


def test_rules_are_plain_values():
    assert pruning.everything() == pruning.Everything()
    assert pruning.at_random(0.3) == pruning.AtRandom(0.3)
    scores = pruning.Everything().priority({"w": jnp.array([-2.0])}, key=None)
    assert scores["w"].tolist() == [2.0]
