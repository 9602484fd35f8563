"""Which synapses wake, and that they start from zero."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning
from adaptivenet.pruning import regrowth
from adaptivenet.pruning.regrowth import by_gradient, by_momentum, cosine_fraction, homeostatic
from tests.pruning.events import sainte_lague

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


# --- rules beyond SET ----------------------------------------------------------------------------

TREE = {
    "a": {"kernel": jnp.arange(1.0, 25.0).reshape(6, 4), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.arange(0.5, 12.5).reshape(4, 3), "bias": jnp.ones(3)},
}


def leaves_of(tree):
    return [np.asarray(tree[layer]["kernel"]) for layer in ("a", "b")]


class TestByGradient:
    @pytest.mark.parametrize("allocation", [pruning.Global(), pruning.Uniform()])
    def test_against_sorting(self, allocation):
        """Several events in a net with biases, by a slow version on flat lists."""
        pruner = pruning.prune(0.5, regrow=by_gradient(0.3), allocation=allocation)
        params, state = TREE, pruner.init(TREE)
        masks = [np.ones_like(leaf, bool) for leaf in leaves_of(TREE)]
        rng = np.random.default_rng(0)
        step = jax.jit(
            lambda g, s, p: pruner.update(jax.tree.map(lambda x: x * 0.1, g), s, p, grads=g)
        )
        for _ in range(4):
            grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
            groups = [[0, 1]] if isinstance(allocation, pruning.Global) else [[0], [1]]
            values, slopes = leaves_of(params), leaves_of(grads)
            for group in groups:
                places = [(k, i) for k in group for i in np.ndindex(masks[k].shape)]
                total = len(places) - int(0.5 * len(places))
                living = [p for p in places if masks[p[0]][p[1]]]
                living.sort(key=lambda p: -abs(values[p[0]][p[1]]))
                kept = living[: total - int(0.3 * total + 0.5)]
                dead = [p for p in places if p not in kept]
                dead.sort(key=lambda p: -abs(slopes[p[0]][p[1]]))
                for p in places:
                    masks[p[0]][p[1]] = p in kept or p in dead[: total - len(kept)]
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            for got, expected in zip(leaves_of(pruning.mask(state)), masks, strict=True):
                np.testing.assert_array_equal(got, expected)

    def test_missing_gradients_are_named(self):
        pruner = pruning.prune(0.5, regrow=by_gradient())
        with pytest.raises(
            ValueError, match=r"signal 'grads', which nobody supplies: wrap the chain"
        ):
            pruner.update(TREE, pruner.init(TREE), TREE)

    def test_bfloat16(self):
        params = {"w": jnp.arange(8.0, dtype=jnp.bfloat16).reshape(2, 4)}
        pruner = pruning.prune(0.5, regrow=by_gradient(0.5))
        grads = {"w": jnp.zeros((2, 4), jnp.bfloat16).at[0, 1].set(-2.0).at[0, 3].set(1.0)}
        _, state = pruner.update(grads, pruner.init(params), params, grads=grads)
        assert np.flatnonzero(np.ravel(pruning.mask(state)["w"])).tolist() == [1, 3, 6, 7]


class TestByMomentum:
    def test_the_momentum_wakes_and_its_mean_shares_out(self):
        momentum = {"a": jnp.array([-2.0, 4.0, 6.0]), "b": jnp.array([9.0, -1.0])}
        mask = {"a": jnp.array([True, False, True]), "b": jnp.zeros(2, bool)}
        rule = by_momentum(0.3)
        assert rule.priority(momentum, momentum=momentum)["a"].tolist() == [2.0, 4.0, 6.0]
        shares = rule.shares(momentum, momentum=momentum, mask=mask)
        assert [float(v) for v in shares.values()] == [4.0, 0.0]  # nothing lives in b

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    def test_leaves_receive_their_share_and_the_largest_momentum_wakes(self, scale):
        rng = np.random.default_rng(1)
        momentum = {
            k: jnp.asarray(rng.normal(size=s) * f, jnp.float32)
            for k, s, f in (("a", (6, 8), 1.0), ("b", (5, 4), scale), ("c", (3, 2), 0.5))
        }
        params = jax.tree.map(jnp.ones_like, momentum)
        pruner = pruning.prune(0.5, score=pruning.random, regrow=by_momentum(0.4))
        _, state = pruner.update(params, pruner.init(params), params, momentum=momentum)
        kept = {k: np.asarray(v) for k, v in state.survivors.items()}
        woken = {k: np.asarray(v) & ~kept[k] for k, v in pruning.mask(state).items()}
        means = [np.abs(v).mean() for v in momentum.values()]  # all lived
        dead = [int((~v).sum()) for v in kept.values()]
        expected = sainte_lague(means, 15, dead)
        assert [int(v.sum()) for v in woken.values()] == expected
        assert sum(expected) == 15  # 0.4 of 37
        for k, number in zip(momentum, expected, strict=True):
            size = np.where(~kept[k], np.abs(momentum[k]), -1.0).ravel()
            assert set(np.flatnonzero(woken[k])) == set(np.argsort(-size)[:number])

    def test_without_redistribution_leaves_keep_their_counts(self):
        rule = by_momentum(0.5, redistribute=False)
        pruner = pruning.prune(0.5, regrow=rule, allocation=pruning.Uniform())
        momentum = jax.tree.map(jnp.ones_like, TREE)
        _, state = pruner.update(TREE, pruner.init(TREE), TREE, momentum=momentum)
        assert [int(m.sum()) for m in leaves_of(pruning.mask(state))] == [12, 6]

    def test_in_a_pruner(self):
        pruner = pruning.prune(0.5, regrow=by_momentum(0.25), allocation=pruning.Uniform())
        momentum = jax.tree.map(jnp.zeros_like, TREE)
        momentum["b"]["kernel"] = jnp.ones((4, 3)).at[0, 0].set(9.0)
        momentum["a"]["kernel"] = jnp.full((6, 4), 1e-3)
        _, state = pruner.update(TREE, pruner.init(TREE), TREE, momentum=momentum)
        record = pruning.record(state)
        # 12 and 6 are kept, of which 3 and 2 (1.5, half up) give way: all five wake in the second.
        assert int(record.alive) == 18
        assert record.layers.tolist() == [9, 4]
        assert [int(m.sum()) for m in leaves_of(pruning.mask(state))] == [9, 9]
        assert bool(pruning.mask(state)["b"]["kernel"][0, 0])


def _top(order, dead, room):
    flat = [(-float(v), k, i) for k in order for i, v in np.ndenumerate(order[k]) if dead[k][i]]
    chosen = {(k, i) for _, k, i in sorted(flat, key=lambda row: row[0])[:room]}
    return {k: np.array([(k, i) in chosen for i in np.ndindex(order[k].shape)]) for k in order}


class TestFractions:
    def test_the_cosine(self):
        fraction = cosine_fraction(0.3, 200)
        steps = np.arange(0, 260, 10)
        got = [float(fraction(step)) for step in steps]
        expected = np.where(steps < 200, 0.15 * (1 + np.cos(np.pi * steps / 200)), 0.0)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert fraction(jnp.int32(200)).item() == 0.0
        many = jax.vmap(lambda a, end: cosine_fraction(a, end)(100))
        np.testing.assert_allclose(
            many(jnp.array([0.2, 0.4]), jnp.array([200, 100])), [0.1, 0.0], atol=1e-7
        )

    def test_births_fall_along_it_to_none(self):
        pruner = pruning.prune(0.5, regrow=pruning.at_random(cosine_fraction(0.8, 5)))
        births = [int(record.births) for *_, record in run(pruner, WEIGHTS, 6)]
        expected = [10 * 0.4 * (1 + np.cos(np.pi * step / 5)) for step in range(1, 6)]
        assert births == [*(int(value + 0.5) for value in expected[:4]), 0, 0]

    def test_a_fraction_of_zero_is_plain_pruning(self):
        plain = run(pruning.prune(pruning.linear(0.6, 0, 3)), WEIGHTS, 4)
        for rule in (by_gradient(0.0), pruning.at_random(0.0), homeostatic(0.0, fan_in=3)):
            rows = run(
                pruning.prune(pruning.linear(0.6, 0, 3), regrow=rule), WEIGHTS, 4, grads=ZERO
            )
            for (params, mask, record), (p, m, r) in zip(rows, plain, strict=True):
                np.testing.assert_array_equal(params, p)
                np.testing.assert_array_equal(mask, m)
                assert int(record.births) == 0
                assert int(record.kept) == int(r.kept)

    @pytest.mark.parametrize("rule", [by_gradient, by_momentum, pruning.at_random])
    def test_what_is_refused(self, rule):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), not 1"):
            rule(1)
        with pytest.raises(ValueError, match=r"initial must be in \[0, 1\), not -0.1"):
            cosine_fraction(-0.1, 10)
        with pytest.raises(ValueError, match="end must be a step >= 1, not 0"):
            cosine_fraction(0.1, 0)


class TestHomeostatic:
    MASK = np.array(
        [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool
    )

    def wake(self, rule, room, seed=0, mask=None, **signals):
        mask = self.MASK if mask is None else mask
        order = rule.priority(
            {"w": jnp.zeros(mask.shape)},
            mask={"w": jnp.asarray(mask)},
            kept={"w": jnp.asarray(mask)},
            key=jax.random.key(seed),
            **signals,
        )
        woken = _top(order, {"w": ~mask}, room)["w"].reshape(mask.shape)
        return mask | woken

    def test_fan_in_is_filled_lowest_first(self):
        """Living inputs 5, 3, 0, 1: the poorest receive first, and none beyond what it lacks."""
        for room, expected in ((1, [5, 3, 1, 1]), (3, [5, 3, 2, 2]), (5, [5, 3, 3, 3])):
            got = self.wake(homeostatic(0.1, fan_in=3), room)
            assert got.sum(axis=0).tolist() == expected
        got = self.wake(homeostatic(0.1, fan_in=3), 8)
        assert got.sum(axis=0).min() >= 3
        assert got.sum() == self.MASK.sum() + 8

    def test_fan_out_likewise(self):
        """Living outputs 2, 1, 3, 1, 2."""
        got = self.wake(homeostatic(0.1, fan_out=3), 4)
        assert sorted(got.sum(axis=1).tolist()) == [2, 2, 3, 3, 3]
        got = self.wake(homeostatic(0.1, fan_out=3), 6)
        assert got.sum(axis=1).tolist() == [3, 3, 3, 3, 3]

    def test_ties_are_broken_at_random(self):
        """One input for the output that has none: each of five equally often."""
        rows = [
            int(np.flatnonzero(self.wake(homeostatic(0.1, fan_in=1), 1, seed)[:, 2])[0])
            for seed in range(100)
        ]
        assert np.bincount(rows, minlength=5).min() >= 8

    def test_towards_the_mean(self):
        got = self.wake(homeostatic(0.1, fan_in="mean"), 3)  # 9 / 4 on average
        assert got.sum(axis=0).tolist() == [5, 3, 2, 2]

    def test_activity_shares_in_proportion_to_what_is_lacking(self):
        mask = np.zeros((20, 3), bool)
        rule = homeostatic(0.1, activity=0.5)
        activity = {"w": jnp.array([0.1, 0.3, 0.9])}
        got = self.wake(rule, 9, mask=mask, activity=activity)
        assert got.sum(axis=0).tolist() == [6, 3, 0]
        with pytest.raises(
            ValueError, match=r"asks for the signal 'activity', which nobody supplies"
        ):
            self.wake(rule, 1)
        with pytest.raises(
            ValueError, match=r"activity= has a leaf of shape \(2,\).*one number an o"
        ):
            self.wake(rule, 1, activity={"w": jnp.ones(2)})

    def test_in_a_pruner_with_biases(self):
        """The fan-in of every output ends within one of the mean."""
        pruner = pruning.prune(
            0.5, regrow=homeostatic(0.5, fan_in="mean"), allocation=pruning.Uniform()
        )
        params, state = TREE, pruner.init(TREE)
        step = jax.jit(pruner.update)
        for _ in range(4):
            updates, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
            params = optax.apply_updates(params, updates)
        for mask, mean in zip(leaves_of(pruning.mask(state)), (3, 2), strict=True):
            assert np.abs(mask.sum(axis=0) - mean).max() <= 1
        activity = {"a": {"kernel": jnp.ones(4), "bias": jnp.ones(1)},
                    "b": {"kernel": jnp.zeros(3), "bias": jnp.ones(1)}}  # fmt: skip
        pruner = pruning.prune(0.5, regrow=homeostatic(0.5, activity=0.5))
        _, state = pruner.update(TREE, pruner.init(TREE), TREE, activity=activity)
        survivors = [int(leaf.sum()) for leaf in leaves_of(state.survivors)]
        assert survivors == [9, 0]
        assert [int(m.sum()) for m in leaves_of(pruning.mask(state))] == [9, 9]

    def test_a_convolution(self):
        mask = np.zeros((2, 2, 3, 4), bool)
        mask[..., 0] = True
        got = self.wake(homeostatic(0.1, fan_in=2), 6, mask=mask)
        assert got.sum(axis=(0, 1, 2)).tolist() == [12, 2, 2, 2]

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match=r"needs a target: fan_in=, fan_out= or activity="):
            homeostatic(0.3)
        for bad in ({"fan_in": 0}, {"fan_out": -1.0}, {"activity": "mean"}, {"fan_in": "most"}):
            with pytest.raises(ValueError, match="must be positive, not"):
                homeostatic(0.3, **bad)
        with pytest.raises(ValueError, match="fraction must be"):
            homeostatic(2.0, fan_in=3)


def test_all_rules_are_plain_values():
    assert by_gradient(0.3) == regrowth.ByGradient(0.3)
    assert by_momentum(0.3) == regrowth.ByMomentum(0.3)
    assert homeostatic(0.3, fan_in=2) == regrowth.Homeostatic(0.3, 2)
    assert cosine_fraction(0.3, 10) == cosine_fraction(0.3, 10)


class TestQueue:
    LINKS = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_the_dead_of_a_unit_are_numbered_each_once(self, axis):
        queue = np.asarray(regrowth._queue(jnp.asarray(self.LINKS), jax.random.key(0), axis))
        for links, numbers in zip(
            np.moveaxis(self.LINKS, axis, 1), np.moveaxis(queue, axis, 1), strict=True
        ):
            assert sorted(numbers[~links]) == list(range(int((~links).sum())))

    def test_pairs_come_first_equally_often(self):
        """Ten pairs of five dead synapses of one unit; independent of another unit's."""
        links, keys = jnp.zeros((5, 2), bool), jax.random.split(jax.random.key(1), 4000)
        queue = np.asarray(jax.vmap(regrowth._queue, (None, 0, None))(links, keys, 0))
        first = queue < 2
        pairs = [tuple(np.flatnonzero(row)) for row in first[:, :, 0]]
        counts = np.unique(pairs, axis=0, return_counts=True)[1]
        assert len(counts) == 10
        assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)
        same = (first[:, :, 0] == first[:, :, 1]).all(axis=1).mean()
        assert same < 0.25  # 0.1 if units were independent, 1 if they shared their order
