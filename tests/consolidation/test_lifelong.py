"""Release, claim, protect: against closed forms of quadratic tasks, and exact counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.consolidation import ownership
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import elastic, penalty
from adaptivenet.consolidation.lifelong import landed, lifelong, release, state_of
from adaptivenet.posterior import Posterior, calibrate, squared_gradient, with_posterior
from tests.cells import every_cell
from tests.consolidation.lifelong_cases import precise, tree

PROTECTIONS = ("soft", "proximal", "hard", "metaplastic", "none")


def make(inner=None, strength=1.0, **options):
    options = {"fraction": 0.5, "learning_rate": 0.1, **options}
    return lifelong(optax.sgd(0.1) if inner is None else inner, strength, **options)


# Eager calls compile the loops of a selection anew; these are compiled once a structure.
boundary = jax.jit(consolidate)
quick_release = jax.jit(release, static_argnames=("score", "by_leaf", "select"))


def descend(tx, params, state, h, c, steps=300):
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: h * (p - c), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), None, steps)[0]


class TestClosedForms:
    h1 = np.array([[2.0, 1.0, 0.5, 0.0]])
    c1 = np.array([[1.0, -2.0, 0.1, 0.7]])
    h2 = np.array([[1.0, 3.0, 1.0, 2.0]])
    c2 = np.array([[-1.0, 1.0, 2.0, -3.0]])
    prior = 0.25

    def both(self, protect, strength, **options):
        """Parameters after two tasks, in float64."""
        with jax.enable_x64(True):
            h1, c1, h2, c2 = map(jnp.asarray, (self.h1, self.c1, self.h2, self.c2))
            tx = make(
                strength=strength,
                protect=protect,
                prior_precision=self.prior,
                fraction=0.5,
                **options,
            )
            params = {"w": jnp.zeros((1, 4))}
            params, state = descend(tx, params, tx.init(params), h1, c1)
            belief = calibrate(params, {"w": h1}, prior=self.prior)
            state = boundary(state, params, belief)
            return *descend(tx, params, state, h2, c2), params

    @pytest.mark.parametrize("protect", ["soft", "proximal"])
    @pytest.mark.parametrize("strength", [0.3, 1.0])
    def test_the_minimum_of_loss_and_penalty(self, protect, strength):
        params, state, before = self.both(protect, strength)
        # The first task: c1 where it has curvature; SNR 1 sqrt(2.25), 2 sqrt(1.25), 0.1 sqrt(0.75)
        # and 0: the last two are released.
        np.testing.assert_allclose(before["w"], self.c1 * (self.h1 > 0), atol=1e-6)
        freed = np.array([[False, False, True, True]])
        np.testing.assert_array_equal(state.owner["w"], np.where(freed, -1, 0))
        precision = np.where(freed, self.prior, self.prior + self.h1)
        anchor = np.where(freed, 0.0, self.c1)
        np.testing.assert_array_equal(state.precision["w"], precision)
        np.testing.assert_allclose(state.anchor["w"], anchor, atol=1e-6)
        k = strength * precision
        expected = (self.h2 * self.c2 + k * anchor) / (self.h2 + k)
        np.testing.assert_allclose(params["w"], expected, atol=1e-6)

    def test_the_penalty_is_the_one_of_elastic(self):
        params, state, _ = self.both("soft", 1.0)
        k = np.asarray(state.precision["w"])
        gap = np.asarray(params["w"]) - np.asarray(state.anchor["w"])
        with jax.enable_x64(True):
            found = float(penalty(params, state, 0.5))
        assert found == pytest.approx(0.25 * (k * gap**2).sum(), 1e-6)

    def test_a_stiff_penalty(self):
        """Explicit steps diverge where implicit ones hold."""
        params, _, before = self.both("proximal", 1e6)
        np.testing.assert_allclose(params["w"][0, :2], before["w"][0, :2], atol=1e-4)
        params, *_ = self.both("soft", 1e6)
        assert not np.isfinite(params["w"]).all() or np.abs(params["w"]).max() > 1e3

    def test_hard(self):
        params, _, before = self.both("hard", 1.0, quantile=0.0)
        np.testing.assert_array_equal(params["w"][0, :2], before["w"][0, :2])
        np.testing.assert_allclose(params["w"][0, 2:], self.c2[0, 2:], atol=1e-6)
        # Half of the two that are claimed: the more precise one.
        params, _, before = self.both("hard", 1.0, quantile=0.5)
        assert params["w"][0, 0] == before["w"][0, 0]
        np.testing.assert_allclose(params["w"][0, 1:], self.c2[0, 1:], atol=1e-6)

    def test_off(self):
        params, *_ = self.both("none", 1.0)
        np.testing.assert_allclose(params["w"], self.c2, atol=1e-6)
        params, *_ = self.both("soft", 0.0)
        np.testing.assert_allclose(params["w"], self.c2, atol=1e-6)

    @pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
    def test_metaplastic_steps(self, strength):
        tx = make(strength=strength, protect="metaplastic", prior_precision=0.5, fraction=0.25)
        params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
        belief = Posterior(params, {"w": jnp.array([[0.5, 1.0, 2.0, 4.0]])})
        state = tx.init(params).consolidated(params, belief)
        grads = {"w": jnp.ones((1, 4))}
        updates, _ = tx.update(grads, state, params)
        ratio = np.array([2.0, 4.0, 8.0])
        np.testing.assert_allclose(
            updates["w"][0, 1:], -0.1 / (1 + strength * (ratio - 1)), rtol=1e-6
        )

    def test_beliefs_add_up_and_fade(self):
        """precision = decay (old - prior) + new, the prior counted once and never undercut."""
        tx = make(fraction=0.0, prior_precision=0.5, decay=0.25)
        params = {"w": jnp.array([[1.0, 2.0]])}
        state = tx.init(params)
        for belief in ([[4.5, 0.5]], [[2.5, 0.1]]):
            state = boundary(state, params, Posterior(params, {"w": jnp.array(belief)}))
        np.testing.assert_allclose(state.precision["w"], [[0.25 * 4.0 + 2.5, 0.5]])
        assert int(state.task) == 2


class TestSequences:
    """Four tasks, each on four of twenty coordinates; each pulls all others a little to zero."""

    tasks, size, weak = 4, 20, 0.02

    def task(self, t):
        own = np.zeros((1, self.size))
        own[0, 4 * t : 4 * t + 4] = 1.0
        target = own * np.random.default_rng(t).uniform(1.0, 2.0, size=own.shape)
        return jnp.asarray(own, jnp.float32), jnp.asarray(target, jnp.float32)

    def run(self, strength, protect="soft", fraction=0.2):
        tx = make(strength=strength, protect=protect, fraction=fraction, prior_precision=1e-4)
        params = {"w": jnp.zeros((1, self.size))}
        state, losses = tx.init(params), np.full((self.tasks, self.tasks), np.nan)
        for t in range(self.tasks):
            own, target = self.task(t)
            params, state = descend(tx, params, state, own + self.weak * (1 - own), target, 400)
            state = boundary(state, params, calibrate(params, {"w": own}, prior=1e-4))
            params = landed(state, params)
            for k in range(t + 1):
                own, target = self.task(k)
                losses[t, k] = float(jnp.sum(own * (params["w"] - target) ** 2))
        return losses, params, state

    def test_learnt_without_forgetting(self):
        losses, params, state = self.run(15.0)
        assert np.nanmax(losses) < 1e-3
        targets = sum(np.asarray(self.task(t)[1]) for t in range(self.tasks))
        np.testing.assert_allclose(params["w"], targets, atol=0.02)
        # The last four coordinates are of no task; they are what is free.
        np.testing.assert_array_equal(np.asarray(state.owner["w"]) < 0, targets == 0)

    def test_with_the_rule_off_it_forgets(self):
        losses, *_ = self.run(0.0)
        assert np.diag(losses).max() < 1e-3  # every task is learnt
        assert losses[-1, :-1].min() > 1.0  # and all but the last forgotten

    def test_too_little_room_forgets_the_least_certain(self):
        """Where the free share asks for more than is unused, exactly so many are given up."""
        losses, params, state = self.run(15.0, fraction=0.5)
        assert int(jnp.sum(params["w"] == 0)) == 10
        assert losses[-1].max() > 1.0
        assert int(jnp.sum(state.owner["w"] < 0)) == 10

    def test_the_view_of_a_task(self):
        """With task ids: a task's own synapses and earlier ones; later ones are zero."""
        tx = make()
        params = {"w": jnp.zeros((1, self.size))}
        state, snaps = tx.init(params), ownership.snapshots(params, 2)
        for t, fraction in enumerate((0.8, 0.6)):
            tx = make(strength=15.0, fraction=fraction, prior_precision=1e-4)
            own, target = self.task(t)
            params, state = descend(tx, params, state, own + self.weak * (1 - own), target, 400)
            state = boundary(state, params, calibrate(params, {"w": own}, prior=1e-4))
            params = landed(state, params)
            free = ownership.free(state.owner)
            claimed = jax.tree.map(lambda f: ~f, free)
            snaps = snaps.take(t, claimed).released(free)
        one = ownership.view(params, state.owner, 0)["w"]
        np.testing.assert_array_equal(one[0, :4], params["w"][0, :4])
        assert float(jnp.abs(one[0, 4:]).max()) == 0
        assert float(jnp.abs(params["w"][0, 4:8]).min()) > 0.9
        for t in range(2):
            np.testing.assert_array_equal(
                snaps.view(params, t)["w"], ownership.view(params, state.owner, t)["w"]
            )
        np.testing.assert_array_equal(ownership.view(params, state.owner, 1)["w"], params["w"])


class TestLanding:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_the_next_update_lands(self, dtype):
        params = tree(dtype=dtype)
        tx = make(optax.sgd(0.1, momentum=0.9))
        belief = Posterior(params, precise(params))
        state = boundary(tx.init(params), params, belief)
        grads = jax.tree.map(lambda p: jnp.full_like(p, 0.3), params)
        for start in (params, landed(state, params)):
            updates, after = tx.update(grads, state, start)
            moved = optax.apply_updates(start, updates)
            for k in ("a", "c"):
                free = np.asarray(state.owner[k]) < 0
                assert np.all(np.asarray(moved[k], np.float32)[free] == 0)
                assert np.all(np.asarray(moved[k], np.float32)[~free] != 0)
            assert moved["a"].dtype == dtype
            # From then on they learn.
            assert not bool(after.pending)
            updates, _ = tx.update(grads, after, moved)
            again = optax.apply_updates(moved, updates)
            assert np.all(np.asarray(again["a"], np.float32)[np.asarray(state.owner["a"]) < 0] != 0)
        assert landed(after, params) is not params
        for one, other in zip(
            jax.tree.leaves(landed(after, params)), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_array_equal(one, other)

    def test_restarts_are_the_same_in_both_ways(self):
        params = tree()
        tx = make(restart=1.0, wake=0.5)
        state = boundary(tx.init(params), params, Posterior(params, precise(params)))
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(grads, state, params)
        moved, there = optax.apply_updates(params, updates), landed(state, params)
        for k in ("a", "c"):
            free, awake = np.asarray(state.owner[k]) < 0, np.asarray(state.mask[k])
            np.testing.assert_allclose(
                np.asarray(moved[k])[free], np.asarray(there[k])[free], atol=1e-6
            )
            assert np.all((np.asarray(there[k])[free] != 0) == awake[free])

    def test_two_boundaries_in_a_row(self):
        """What has still to land counts as landed."""
        params = tree()
        tx = make(fraction=0.5)
        belief = Posterior(params, precise(params))
        one = boundary(tx.init(params), params, belief)
        two = boundary(one, params, belief)
        three = boundary(one, landed(one, params), belief)
        for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(three), strict=True):
            np.testing.assert_array_equal(a, b)
        for k in ("a", "c"):  # they have a mean of zero: the same ones go again
            np.testing.assert_array_equal(two.owner[k] < 0, one.owner[k] < 0)
            np.testing.assert_array_equal(two.anchor[k], np.where(one.owner[k] < 0, 0, params[k]))

    @pytest.mark.parametrize("protect", PROTECTIONS)
    def test_before_the_first_boundary_it_is_the_optimizer(self, protect):
        params = tree()
        inner, tx = optax.adam(1e-2), make(optax.adam(1e-2), 1e3, protect=protect)
        plain, state = inner.init(params), tx.init(params)
        for step in range(3):
            grads = jax.tree.map(lambda p: jnp.sin(p + step), params)  # noqa: B023 (used at once)
            expected, plain = inner.update(grads, plain, params)
            updates, state = tx.update(grads, state, params)
            for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a, b)


class TestCapacity:
    def test_sleepers_stay_zero_and_the_number_is_exact(self):
        params = tree()
        tx = make(optax.adam(1e-2), fraction=0.5, wake=0.4)
        state = boundary(tx.init(params), params, Posterior(params, precise(params)))
        free, asleep = (
            sum(int(leaf.sum()) for leaf in jax.tree.leaves(part))
            for part in (ownership.free(state.owner), jax.tree.map(lambda m: ~m, state.mask))
        )
        assert (free, asleep) == (13, 13 - 5)  # 5.2 wake
        for step in range(4):
            grads = jax.tree.map(lambda p: jnp.cos(p + step), params)  # noqa: B023 (used at once)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            zeros = sum(int((params[k] == 0).sum()) for k in ("a", "c"))
            assert zeros == (13 if step == 0 else 8)
        before = state
        state = boundary(state, params, Posterior(params, precise(params)))
        for k in ("a", "c"):  # those that slept are free still
            assert np.all(np.asarray(state.owner[k])[~np.asarray(before.mask[k])] == -1)

    def test_the_largest_gradients_wake(self):
        params = tree()
        tx = make(fraction=0.5, wake=0.4, regrow=pruning.by_gradient())
        grads = precise(params, seed=7)
        belief = Posterior(params, precise(params))
        state = boundary(tx.init(params), params, belief, grads=grads)
        sizes = np.concatenate([np.asarray(grads[k]).ravel() for k in ("a", "c")])
        free = np.concatenate([np.asarray(state.owner[k]).ravel() < 0 for k in ("a", "c")])
        awake = np.concatenate([np.asarray(state.mask[k]).ravel() for k in ("a", "c")])
        assert awake[~free].all()
        assert sizes[free & awake].min() > sizes[free & ~awake].max()
        with pytest.raises(ValueError, match="asks for the signal 'grads'"):
            consolidate(tx.init(params), params, belief)

    def test_owners_ages_and_counts(self):
        """Against loops over what was released."""
        params, tx, tasks = tree(), make(fraction=0.4), 5
        state = tx.init(params)
        expected = {k: np.full(params[k].shape, -1) for k in ("a", "c")}
        for t in range(tasks):
            params = tree(t)
            belief = Posterior(params, precise(params, seed=t))
            # As if steps were made since the last boundary: what has to land would not be new.
            state = boundary(state._replace(pending=jnp.zeros((), bool)), params, belief)
            total = 0
            for k, owner in expected.items():
                free = np.asarray(landed(state, params)[k]) == 0
                total += free.sum()
                owner[~free & (owner < 0)] = t
                owner[free] = -1
                np.testing.assert_array_equal(state.owner[k], owner)
            assert total == 10
            params = landed(state, params)
        every = np.concatenate([o.ravel() for o in expected.values()])
        count = ownership.capacity(state.owner, tasks).astype(jnp.int32)
        assert count.tolist() == [(every == t).sum() for t in range(-1, tasks)]
        assert count.sum() == 26
        assert (count > 0).sum() >= 3  # several tasks have a part
        age = ownership.ages(state.owner, tasks - 1)["a"]
        np.testing.assert_array_equal(
            age, np.where(expected["a"] < 0, -1, tasks - 1 - expected["a"])
        )

    def test_counts_within_a_scan(self):
        params, tx = tree(), make(fraction=0.4)

        def task(state, t):
            moved = jax.tree.map(lambda p: p + jnp.sin(7 * p + t), params)
            state = consolidate(state, moved, Posterior(moved, precise(moved)))
            return state, ownership.capacity(state.owner, 3)

        _, count = jax.lax.scan(task, tx.init(params), jnp.arange(3.0))
        count = count.astype(jnp.int32)
        assert count.shape == (3, 4)
        assert count[:, 0].tolist() == [10, 10, 10]
        assert count.sum(1).tolist() == [26, 26, 26]

    def test_hard_freezes_an_exact_number(self):
        params = tree()
        for quantile, number in ((0.0, 13 + 5), (0.5, 9), (0.9, 2)):
            tx = make(fraction=0.5, protect="hard", quantile=quantile)
            belief = Posterior(params, precise(params, low=1.5))
            state = boundary(tx.init(params), params, belief)
            frozen = state.frozen
            assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(frozen)) == number
            values, kept = [], []
            for k, h in state.precision.items():
                claimed = np.ones(h.shape, bool) if k == "bias" else np.asarray(state.owner[k]) >= 0
                assert not np.any(np.asarray(frozen[k]) & ~claimed)
                values += np.asarray(h)[claimed].tolist()
                kept += np.asarray(frozen[k])[claimed].tolist()
            values, kept = np.array(values), np.array(kept)
            assert number == len(values) or values[kept].min() > values[~kept].max()


class TestInside:
    def test_the_optimizer_forgets_what_was_released(self):
        params = tree()
        tx = make(optax.adam(1e-2), protect="none")
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = tx.update(grads, tx.init(params), params)
        state = boundary(state, params, Posterior(params, precise(params)))
        _, after = tx.update(grads, state, params)
        plain = optax.adam(1e-2)
        _, other = plain.update(grads, state.inner, params)
        for name in ("mu", "nu"):
            mine, theirs = (optax.tree_utils.tree_get(s, name) for s in (after.inner, other))
            for k in ("a", "c"):
                free = state.owner[k] < 0
                np.testing.assert_array_equal(mine[k], np.where(free, 0, theirs[k]))
            np.testing.assert_array_equal(mine["bias"], theirs["bias"])

    def test_a_rule_inside_forgets_too(self):
        """Protection by another rule: what is released is not held."""
        params = tree()
        tx = make(optax.chain(elastic(1.0), optax.sgd(0.1)), protect="none")
        belief = Posterior(params, precise(params))
        state = boundary(tx.init(params), params, belief)
        assert float(state.inner[0].precision["a"].min()) > 0  # the rule inside took part
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        for k in ("a", "c"):
            free = np.asarray(state.owner[k]) < 0
            np.testing.assert_array_equal(
                state.inner[0].precision[k], np.where(free, 0, belief.precision[k])
            )

    def test_the_belief_of_the_chain(self):
        """Without posterior= the belief around the chain is taken."""
        params = tree()
        tx = with_posterior(squared_gradient(0.9, prior=1.0), make(fraction=0.5))
        grads = precise(params)
        _, state = tx.update(grads, tx.init(params), params)
        state = boundary(state, params)
        found = state_of(state)
        assert found is state.inner
        kept = np.asarray(found.owner["a"]) >= 0
        expected = np.asarray(state.estimate.posterior(params).precision["a"])
        np.testing.assert_allclose(np.asarray(found.precision["a"])[kept], expected[kept])

    def test_populations(self):
        """Members of other seeds and fractions, each as alone; random scores differ."""
        keys = jax.random.split(jax.random.key(0), 3)
        fractions = jnp.array([0.2, 0.5, 0.5])

        def member(key, fraction):
            params = {"w": jax.random.normal(key, (6, 5))}
            tx = make(fraction=fraction, score=pruning.random)
            state = boundary(tx.init(params), params, Posterior(params, params))
            return state.owner["w"]

        together = jax.jit(jax.vmap(member))(keys, fractions)
        assert (together < 0).sum((1, 2)).tolist() == [6, 15, 15]
        assert (together[1] != together[2]).any()
        for place in range(3):
            np.testing.assert_array_equal(together[place], member(keys[place], fractions[place]))

    def test_leaves_that_are_not_believed_of_or_not_floating(self):
        params = {**tree(), "ids": jnp.arange(2)}
        masked = optax.MaskedNode()
        belief = Posterior(
            {**params, "bias": masked, "ids": masked},
            {**precise(tree()), "bias": masked, "ids": masked},
        )
        tx = make()
        state = boundary(tx.init(params), params, belief)
        assert float(jnp.abs(state.precision["bias"]).max()) == 0
        grads = {**jax.tree.map(jnp.ones_like, tree()), "ids": np.zeros(2, jax.dtypes.float0)}
        tx = make(optax.identity())
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["ids"].dtype == jax.dtypes.float0


class Counted(NamedTuple):
    step: jax.Array
    inner: Any


def unchanged(state, params, belief):
    del params, belief
    return state


def with_boundaries(tx, every=2):
    """Boundaries within the step, with squared gradients as the belief."""

    def init(params):
        return Counted(jnp.zeros((), jnp.int32), tx.init(params))

    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state.inner, params, **extra)
        belief = Posterior(params, jax.tree.map(lambda g: 1.0 + 100.0 * g * g, grads))
        step = state.step + 1
        inner = jax.lax.cond(step % every == 0, consolidate, unchanged, inner, params, belief)
        return updates, Counted(step, inner)

    return optax.GradientTransformationExtraArgs(init, update)


FIRST = r"(dense1/kernel|^0/0)$"


def after_a_boundary(strength, **options):
    """A state as a boundary leaves it, which the first update lands on."""
    options = {"learning_rate": 0.05, "fraction": strength, **options}
    tx = lifelong(optax.sgd(0.05, 0.9), strength, **options)

    def init(params):
        state = tx.init(params)
        return state._replace(
            owner=jax.tree.map(lambda o: o.at[::2].set(0), state.owner),
            precision=jax.tree.map(lambda h: h + 2.0, state.precision),
            pending=jnp.ones((), bool),
        )

    return optax.GradientTransformationExtraArgs(init, tx.update)


@every_cell
def test_contract(subject, mode):
    an.testing.check(after_a_boundary, subject=subject, mode=mode, steps=3)


@pytest.mark.parametrize("protect", ["proximal", "metaplastic"])
def test_contract_of_other_protections(protect):
    def build(strength):
        return after_a_boundary(strength, protect=protect)

    an.testing.check(build, subject="dict", mode="scan", steps=3)


@pytest.mark.parametrize(
    ("subject", "mode"), [("list", "scan"), ("nnx_optimizer", "jit"), ("dict", "vmap_strengths")]
)
def test_contract_with_boundaries(subject, mode):
    def build(strength):
        return with_boundaries(
            lifelong(optax.sgd(0.05), strength, fraction=strength * 0.5, select=FIRST)
        )

    an.testing.check(build, subject=subject, mode=mode, steps=3)


def restarting(strength):
    tx = lifelong(
        optax.sgd(0.05, momentum=0.9),
        strength,
        fraction=0.5,
        protect="hard",
        quantile=strength,
        wake=0.5,
        restart=0.5,
        by_leaf=True,
        score=pruning.magnitude,
        select=FIRST,
    )
    return with_boundaries(tx)


def test_checkpoints():
    """With all options; the run is compared with itself, cut in the middle."""
    an.testing.check_resume(restarting, subject="list", steps=4)


class TestErrors:
    def test_when_built(self):
        for options, message in (
            ({"fraction": 1.0}, r"fraction must be in \[0, 1\)"),
            ({"wake": 1.5}, r"wake must be in \[0, 1\)"),
            ({"protect": "firm"}, "protect='firm'; choose 'soft'"),
            ({"protect": "hard", "quantile": 1.0}, r"quantile must be in \[0, 1\)"),
            ({"protect": "proximal", "learning_rate": None}, "give learning_rate="),
            ({"prior_precision": 0.0}, "prior_precision must be positive"),
            ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
            ({"strength": -1.0}, "strength must be a number >= 0"),
            ({"restart": -1.0}, "restart must be a number >= 0"),
        ):
            with pytest.raises(ValueError, match=message):
                make(**options)
        with pytest.raises(TypeError, match="wraps an optax transformation"):
            lifelong(1.0, fraction=0.5)
        with pytest.raises(TypeError, match="must be hashable"):
            make(regrow=pruning.at_random(jnp.float32(0.5)))

    def test_later(self):
        params = tree()
        tx = make()
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"lifelong\(\) needs the parameters"):
            tx.update(params, state)
        with pytest.raises(ValueError, match=r"lifelong\(\), which needs a belief"):
            consolidate(state, params)
        some = {**params, "c": optax.MaskedNode()}
        with pytest.raises(ValueError, match="says nothing of 'c'"):
            consolidate(state, params, Posterior(some, precise(some)))
        with pytest.raises(ValueError, match="matches no leaf"):
            make(select="conv").init(params)
        for opt_state in (optax.EmptyState(), (state, state)):
            with pytest.raises(ValueError, match=r"states of lifelong\(\), not one"):
                landed(opt_state, params)
