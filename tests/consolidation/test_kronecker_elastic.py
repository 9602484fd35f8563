"""Consolidation with correlations against dense matrices, and against Bayes' rule."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import elastic
from adaptivenet.consolidation.kronecker_elastic import (
    structured_conditional,
    structured_elastic,
    structured_penalty,
    structured_proximal,
)
from adaptivenet.posterior import Posterior, laplace

STRUCTURES = ("kronecker", "ekfac", "full", "diagonal")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(3, 4, seed=1), "bias": normal(4, seed=2)},
    "b": {"kernel": normal(4, 2, seed=3), "bias": normal(2, seed=4)},
    "scale": normal(4, seed=5),
}
SIZE = 30


def mlp(p, x):
    hidden = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
    return hidden @ p["b"]["kernel"] + p["b"]["bias"]


def fit(params, seed=0, structure="kronecker", prior=0.5, size=12, **options):
    """A belief of a task of its own: other inputs, and other directions of them."""
    x = normal(size, 3, seed=10 + seed) @ normal(3, 3, seed=20 + seed)
    x, y = x.astype(params["scale"].dtype), jnp.zeros((size, 2))
    return laplace(
        mlp, params, x, y, likelihood="gaussian", structure=structure, prior_precision=prior,
        **options,
    ).gaussian  # fmt: skip


@functools.cache
def tasks(structure, number, **options):
    """Beliefs around other parameters each."""
    moved = [jax.tree.map(lambda p, k=k: p + 0.3 * normal(*p.shape, seed=30 + k), PARAMS)
             for k in range(number)]  # fmt: skip
    return [fit(p, k, structure, **options) for k, p in enumerate(moved)]


def flat(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


def tree(vector):
    leaves, treedef = jax.tree.flatten(PARAMS)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = jnp.split(vector, ends)
    return treedef.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])


@jax.jit
def columns(belief):
    def times(vector):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(belief.times(tree(vector)))])

    return jax.vmap(times)(jnp.eye(SIZE))


def dense(belief):
    """The curvature of the data as a matrix, and the diagonal of the prior."""
    prior = flat(belief.prior)
    return np.float64(columns(belief)) - np.diag(prior), prior


@jax.jit
def boundary(state, belief):
    return consolidate(state, PARAMS, belief)


def remembered(tx, beliefs):
    state = tx.init(PARAMS)
    for belief in beliefs:
        state = boundary(state, belief)
    return state


def force(tx, state, where):
    return flat(tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, where)[0])


def expected_force(beliefs, where, form, decay=1.0):
    """``sum_k H_k (w - a_k)``, the prior once at the first anchor (separate) or the last."""
    total, last = 0.0, len(beliefs) - 1
    for k, belief in enumerate(beliefs):
        matrix, prior = dense(belief)
        anchor = flat(beliefs[k if form == "separate" else last].params)
        total = total + decay ** (last - k) * matrix @ (flat(where) - anchor)
        if k == 0:
            total = total + prior * (flat(where) - anchor)
    return total


WHERE = jax.tree.map(lambda p: p + 0.5 * normal(*p.shape, seed=99), PARAMS)


class TestForces:
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_the_first_belief_whole(self, structure):
        (belief,) = tasks(structure, 1)
        for form in ("online", "separate"):
            tx = structured_elastic(2.0, belief, form=form)
            apart = jax.tree.map(jnp.subtract, WHERE, belief.params)
            got = force(tx, remembered(tx, [belief]), WHERE)
            np.testing.assert_allclose(got, 2 * flat(belief.times(apart)), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("form", ["online", "separate"])
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_three_tasks_in_slots(self, structure, form):
        beliefs, decay = tasks(structure, 3), 0.8
        tx = structured_elastic(1.0, beliefs[0], tasks=3, form=form, decay=decay)
        got = force(tx, remembered(tx, beliefs), WHERE)
        expected = expected_force(beliefs, WHERE, form, decay)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3 * np.abs(expected).max())

    def test_force_is_the_gradient_of_the_penalty(self):
        beliefs = tasks("kronecker", 3)
        tx = structured_elastic(0.7, fit, tasks=3, form="separate")
        state = remembered(tx, beliefs)
        slope = jax.grad(structured_penalty)(WHERE, state, fit, 0.7)
        np.testing.assert_allclose(force(tx, state, WHERE), flat(slope), rtol=1e-4, atol=1e-3)
        assert float(structured_penalty(WHERE, tx.init(PARAMS), fit)) == 0.0

    def test_priors_by_unit(self):
        """Of a form that stands outside of the basis of the curvature."""
        prior = jax.tree.map(lambda p: 0.5 + jnp.arange(p.shape[-1], dtype=p.dtype), PARAMS)
        belief = fit(PARAMS, 0, prior=prior)
        tx = structured_elastic(1.0, belief)
        apart = jax.tree.map(jnp.subtract, WHERE, PARAMS)
        got = force(tx, remembered(tx, [belief]), WHERE)
        np.testing.assert_allclose(got, flat(belief.times(apart)), rtol=1e-4, atol=1e-3)

    def test_diagonal_ones_are_elastic_weight_consolidation(self):
        beliefs = tasks("diagonal", 3)
        tx, plain = structured_elastic(1.0, beliefs[0]), elastic(1.0, prior=0.5)
        got = force(tx, remembered(tx, beliefs), WHERE)
        expected = force(plain, remembered(plain, beliefs), WHERE)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("make", [structured_elastic, structured_proximal])
    def test_the_identity_before_the_first_boundary(self, make):
        tx = make(1e6, **({"learning_rate": 0.1} if make is structured_proximal else {}), like=fit)
        grads = jax.tree.map(lambda p: -0.0 * p, WHERE)
        updates, _ = tx.update(grads, tx.init(PARAMS), WHERE)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert a.tobytes() == b.tobytes()

    def test_leaves_of_which_nothing_is_believed(self):
        def head(params):
            return fit(params, 0, select="b/")

        for tx in (structured_elastic(1.0, head), structured_proximal(1.0, 0.1, head)):
            state = remembered(tx, [head(PARAMS)])
            nothing = jax.tree.map(jnp.zeros_like, PARAMS)
            updates, _ = tx.update(nothing, state, WHERE)
            assert not np.any(updates["a"]["kernel"])
            assert not np.any(updates["scale"])
            assert np.all(updates["b"]["kernel"] != 0)


@jax.jit
def hessian(state, belief):
    """Of the penalty that is kept, prior included."""
    return jax.hessian(lambda v: structured_penalty(tree(v), state, belief))(jnp.zeros(SIZE))


class TestMerging:
    """What happens when the slots are full."""

    @pytest.mark.parametrize("structure", ["full", "diagonal"])
    @pytest.mark.parametrize("form", ["online", "separate"])
    def test_nothing_is_lost_where_sums_have_the_structure(self, structure, form):
        beliefs = tasks(structure, 3)
        tx = structured_elastic(1.0, beliefs[0], tasks=1, form=form)
        got = force(tx, remembered(tx, beliefs), WHERE)
        expected = expected_force(beliefs, WHERE, form)
        np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())

    @pytest.mark.parametrize("structure", ["kronecker", "ekfac"])
    def test_a_task_seen_twice_counts_twice(self, structure):
        (belief,) = tasks(structure, 1)
        tx = structured_elastic(1.0, belief)
        got = force(tx, remembered(tx, [belief] * 3), WHERE)
        matrix, prior = dense(belief)
        expected = (3 * matrix + np.diag(prior)) @ (flat(WHERE) - flat(belief.params))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())

    def matrix(self, state, belief):
        """The curvature of the data that is kept."""
        return np.asarray(hessian(state, belief)) - np.diag(dense(belief)[1])

    def merged(self, beliefs, **options):
        state = remembered(structured_elastic(1.0, beliefs[0], **options), beliefs)
        return self.matrix(state, beliefs[0])

    @pytest.mark.parametrize("structure", ["kronecker", "ekfac"])
    def test_one_slot_is_near_the_sum(self, structure):
        """It keeps the trace, stays positive, and is nearer than factors that are added up."""
        beliefs = tasks(structure, 2)
        exact = sum(dense(b)[0] for b in beliefs)
        np.testing.assert_allclose(
            self.merged(beliefs, tasks=2), exact, atol=2e-3 * np.abs(exact).max()
        )
        one = self.merged(beliefs)
        np.testing.assert_allclose(np.trace(one), np.trace(exact), rtol=1e-3)
        assert np.linalg.eigvalsh(one).min() > -1e-3 * np.abs(exact).max()
        gap = np.linalg.norm(one - exact)
        assert gap < 0.6 * np.linalg.norm(exact)
        assert gap > 1e-3 * np.linalg.norm(exact)
        if structure == "kronecker":
            added = self.added_factors(beliefs)
            places = np.ix_(*[np.flatnonzero(np.abs(added).sum(0))] * 2)
            assert gap < np.linalg.norm((added - exact)[places])

    @staticmethod
    def added_factors(beliefs):
        """(A_1 + A_2) (x) (G_1 + G_2), with the means A and the sums G averaged and added."""
        first, second = beliefs
        factors = first.factors._replace(
            inputs=tuple(
                (a + b) / 2
                for a, b in zip(first.factors.inputs, second.factors.inputs, strict=True)
            ),
            outputs=tuple(
                a + b for a, b in zip(first.factors.outputs, second.factors.outputs, strict=True)
            ),
            rest=tuple(a + b for a, b in zip(first.factors.rest, second.factors.rest, strict=True)),
        )
        bases = tuple(
            (jnp.linalg.eigh(a), jnp.linalg.eigh(g))
            for a, g in zip(factors.inputs, factors.outputs, strict=True)
        )
        bases = tuple(tuple((e[0], e[1]) for e in pair) for pair in bases)
        both = replace(first, factors=factors, bases=bases).with_prior(0.5)
        return dense(both)[0]

    def test_no_other_diagonal_in_the_basis_is_nearer(self):
        beliefs = tasks("kronecker", 2)
        exact = sum(dense(b)[0] for b in beliefs)
        tx = structured_elastic(1.0, beliefs[0])
        state = remembered(tx, beliefs)

        def gap(state):
            return np.linalg.norm(self.matrix(state, beliefs[0]) - exact)

        best = gap(state)
        values = state.curvature.values
        for sign in (0.1, -0.1):
            moved = tuple(v * (1 + sign * normal(*v.shape, seed=3)) for v in values)
            other = state._replace(curvature=state.curvature._replace(values=moved))
            assert gap(other) > best

    def test_separate_anchors_are_merged_by_their_curvature(self):
        """Two of three tasks share a slot: their quadratics' sum has its minimum there."""
        beliefs = tasks("kronecker", 3)
        tx = structured_elastic(1.0, beliefs[0], tasks=2, form="separate")
        state = remembered(tx, beliefs)
        (first, prior), (second, _) = (dense(b) for b in beliefs[:2])
        a, b = (flat(x.params) for x in beliefs[:2])
        best = np.linalg.solve(
            first + np.diag(prior) + second, (first + np.diag(prior)) @ a + second @ b
        )
        np.testing.assert_allclose(flat([x[0] for x in state.anchors]), best, atol=5e-3)
        np.testing.assert_allclose(
            flat([x[1] for x in state.anchors]), flat(beliefs[2].params), atol=1e-6
        )


class TestProximal:
    def exact(self, beliefs, there, c, form="online"):
        system = np.eye(SIZE)
        for k, belief in enumerate(beliefs):
            matrix, prior = dense(belief)
            system = system + c * (matrix + (np.diag(prior) if k == 0 else 0.0))
        return flat(there) - np.linalg.solve(system, c * expected_force(beliefs, there, form))

    def landed(self, tx, state, steps):
        updates, _ = tx.update(steps, state, PARAMS)
        return flat(optax.apply_updates(PARAMS, updates))

    @pytest.mark.parametrize("structure", STRUCTURES)
    @pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
    def test_one_belief_takes_one_step(self, structure, strength):
        (belief,) = tasks(structure, 1)
        steps = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=7), PARAMS)
        tx = structured_proximal(strength, 0.1, belief, steps=1)
        got = self.landed(tx, remembered(tx, [belief]), steps)
        there = jax.tree.map(jnp.add, PARAMS, steps)
        np.testing.assert_allclose(got, self.exact([belief], there, 0.1 * strength), atol=2e-3)

    @pytest.mark.parametrize("form", ["online", "separate"])
    def test_several_by_conjugate_gradients(self, form):
        beliefs = tasks("kronecker", 3)
        steps = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=7), PARAMS)
        there = jax.tree.map(jnp.add, PARAMS, steps)
        exact = self.exact(beliefs, there, 0.5, form)
        gaps = []
        for number in (1, 8, 40):
            tx = structured_proximal(5.0, 0.1, fit, tasks=3, form=form, steps=number)
            got = self.landed(tx, remembered(tx, beliefs), steps)
            gaps.append(np.linalg.norm(got - exact) / np.linalg.norm(flat(there) - exact))
        assert gaps[0] < 0.5
        assert gaps[1] < 0.1
        assert gaps[2] < 2e-3

    def test_one_step_for_several_updates(self):
        (belief,) = tasks("kronecker", 1)
        move = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=7), PARAMS)
        tx = structured_proximal(2.0, 0.1, belief, steps=1, every=3)
        state, rows = remembered(tx, [belief]), []
        for _ in range(6):
            updates, state = tx.update(move, state, PARAMS)
            rows.append(flat(updates))
        once = structured_proximal(6.0, 0.1, belief, steps=1)
        due = flat(once.update(move, remembered(once, [belief]), PARAMS)[0])
        assert not np.allclose(due, flat(move), atol=0.01)
        for row, wanted in zip(rows, [flat(move), flat(move), due] * 2, strict=True):
            np.testing.assert_allclose(row, wanted, atol=1e-5)

    def test_a_prior_that_is_not_one_number(self):
        prior = jax.tree.map(lambda p: 0.5 + jnp.arange(p.shape[-1], dtype=p.dtype), PARAMS)
        belief = fit(PARAMS, 0, prior=prior)
        steps = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=7), PARAMS)
        tx = structured_proximal(5.0, 0.1, belief, steps=30)
        got = self.landed(tx, remembered(tx, [belief]), steps)
        there = jax.tree.map(jnp.add, PARAMS, steps)
        np.testing.assert_allclose(got, self.exact([belief], there, 0.5), atol=2e-3)

    @pytest.mark.parametrize("steps", [1, 3])
    def test_the_penalty_never_rises(self, steps):
        beliefs, penalty_of = tasks("kronecker", 3), jax.jit(structured_penalty)
        move = jax.tree.map(jnp.subtract, WHERE, PARAMS)
        options = {"like": beliefs[0], "tasks": 3, "form": "separate", "steps": steps}
        state = remembered(structured_proximal(1.0, 0.1, **options), beliefs)

        @jax.jit
        def update(strength):
            return structured_proximal(strength, 0.1, **options).update(move, state, PARAMS)[0]

        for strength in (1e-2, 1.0, 1e2, 1e4, 1e6):
            updates = update(strength)
            after = optax.apply_updates(PARAMS, updates)
            before, then = (penalty_of(p, state.memory, beliefs[0]) for p in (WHERE, after))
            assert then <= 1.001 * before

    @pytest.mark.parametrize("strength", [1e1, 1e2, 1e3, 1e4])
    def test_stable_where_the_gradient_is_not(self, strength):
        (belief,) = tasks("kronecker", 1)

        def train(tx):
            state = remembered(tx, [belief])

            def step(carry, _):
                params, state = carry
                grads = jax.tree.map(lambda p: p - 3.0, params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return flat(jax.lax.scan(step, (PARAMS, state), None, length=60)[0][0])

        matrix, prior = dense(belief)
        system = strength * (matrix + np.diag(prior))
        best = np.linalg.solve(np.eye(SIZE) + system, 3.0 + system @ flat(belief.params))
        implicit = train(optax.chain(optax.sgd(0.3), structured_proximal(strength, 0.3, belief)))
        np.testing.assert_allclose(implicit, best, atol=0.02)
        explicit = train(optax.chain(structured_elastic(strength, belief), optax.sgd(0.3)))
        assert not np.all(np.abs(explicit) < 1e3)


class TestConditional:
    def mask(self):
        keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(PARAMS)))
        leaves, treedef = jax.tree.flatten(PARAMS)
        rows = [jax.random.bernoulli(k, 0.6, p.shape) for k, p in zip(keys, leaves, strict=True)]
        return treedef.unflatten(rows)

    @pytest.mark.parametrize(
        ("structure", "slots", "form"),
        [("kronecker", 1, "online"), ("kronecker", 3, "online"), ("full", 1, "separate")],
    )
    def test_it_is_the_mean_of_the_conditional_gaussian(self, structure, slots, form):
        beliefs = tasks(structure, slots)
        state = remembered(structured_elastic(1.0, fit if structure == "kronecker" else beliefs[0],
                                              tasks=slots, form=form), beliefs)  # fmt: skip
        mask = self.mask()
        got = structured_conditional(WHERE, state, beliefs[0], mask, steps=200)
        system = sum(dense(b)[0] for b in beliefs) + np.diag(dense(beliefs[0])[1])
        free = flat(mask).astype(bool)
        zeroed = jax.tree.map(lambda m, p: jnp.where(m, p, 0.0), mask, WHERE)
        force = expected_force(beliefs, zeroed, form)
        expected = flat(zeroed).copy()
        expected[free] -= np.linalg.solve(system[np.ix_(free, free)], force[free])
        np.testing.assert_allclose(flat(got), expected, atol=5e-3)
        cost = jax.jit(structured_penalty)
        assert cost(got, state, beliefs[0]) < 0.9 * cost(zeroed, state, beliefs[0])

    def test_before_the_first_boundary_it_only_cuts(self):
        state = structured_elastic(1.0, fit).init(PARAMS)
        mask = self.mask()
        got = structured_conditional(WHERE, state, fit, mask)
        np.testing.assert_array_equal(flat(got), np.where(flat(mask), flat(WHERE), 0.0))
        with pytest.raises(ValueError, match="steps must be a number of steps >= 1"):
            structured_conditional(WHERE, state, fit, mask, steps=0)


class TestBayes:
    """A linear model: Laplace approximations in sequence are the posterior of all data."""

    @staticmethod
    def linear(p, x):
        return x @ p["w"]

    def learn(self, structure):
        rng = np.random.default_rng(0)
        truth = rng.normal(size=(4, 1))
        params, prior = {"w": jnp.zeros((4, 1))}, 0.3
        all_x, all_y = np.zeros((0, 4)), np.zeros((0, 1))

        def belief(params, x, y):
            return laplace(
                self.linear, params, x, y, likelihood="gaussian", structure=structure,
                prior_precision=prior,
            )  # fmt: skip

        def like(params):
            return belief(params, jnp.zeros((1, 4)), jnp.zeros((1, 1)))

        tx = structured_elastic(1.0, like)
        start = belief(params, jnp.zeros((1, 4)), jnp.zeros((1, 1)))
        state = consolidate(tx.init(params), params, start)
        for n in (5, 3, 6):
            x = rng.normal(size=(n, 4)) @ rng.normal(size=(4, 4))
            y = x @ truth + 0.5 * rng.normal(size=(n, 1))
            x32, y32 = jnp.float32(x), jnp.float32(y)

            def objective(w, x=x32, y=y32, state=state):
                loss = jnp.sum(jnp.square(x @ w.reshape(4, 1) - y)) / 2
                return loss + structured_penalty({"w": w.reshape(4, 1)}, state, like)

            w = params["w"].ravel()
            slope, hessian = jax.grad(objective)(w), jax.hessian(objective)(w)
            params = {"w": (w - jnp.linalg.solve(hessian, slope)).reshape(4, 1)}
            all_x, all_y = np.concatenate([all_x, x]), np.concatenate([all_y, y])
            state = consolidate(state, params, belief(params, x32, y32))
        precision = all_x.T @ all_x + prior * np.eye(4)
        return np.asarray(params["w"]), np.linalg.solve(precision, all_x.T @ all_y)

    @pytest.mark.parametrize("structure", ["full", "kronecker"])
    def test_in_sequence_as_at_once(self, structure):
        got, expected = self.learn(structure)
        np.testing.assert_allclose(got, expected, atol=5e-3)

    def test_independent_gaussians_are_not_enough(self):
        """The control: inputs are correlated."""
        got, expected = self.learn("diagonal")
        assert np.max(np.abs(got - expected)) > 0.05


class TestRunning:
    def test_boundaries_within_a_scan(self):
        """Slots fill, then merge, with a count that is traced."""
        tx = structured_elastic(1.0, fit, tasks=2, form="separate")
        beliefs = tasks("kronecker", 3)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *beliefs)

        def body(state, belief):
            return consolidate(state, PARAMS, belief), None

        got = jax.jit(lambda s: jax.lax.scan(body, s, stacked)[0])(tx.init(PARAMS))
        expected = tx.init(PARAMS)
        for belief in beliefs:
            expected = consolidate(expected, PARAMS, belief)
        np.testing.assert_allclose(
            force(tx, got, WHERE), force(tx, expected, WHERE), rtol=1e-2, atol=5e-2
        )
        assert int(got.count) == 3

    def test_populations_merge_as_their_members_do(self):
        tx = structured_elastic(1.0, fit)
        beliefs = tasks("kronecker", 3)
        orders = ([0, 1], [1, 2])

        def run(first, second):
            state = consolidate(tx.init(PARAMS), PARAMS, first)
            state = consolidate(state, PARAMS, second)
            return tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, WHERE)[0]

        stacks = [
            jax.tree.map(lambda *x: jnp.stack(x), *(beliefs[order[k]] for order in orders))
            for k in range(2)
        ]
        several = jax.jit(jax.vmap(run))(*stacks)
        for place, order in enumerate(orders):
            alone = force(tx, remembered(tx, [beliefs[k] for k in order]), WHERE)
            got = flat(jax.tree.map(lambda x: x[place], several))  # noqa: B023 (used at once)
            np.testing.assert_allclose(got, alone, rtol=1e-2, atol=5e-2)

    def test_injected_strengths(self):
        make = optax.inject_hyperparams(structured_elastic, static_args=("like", "tasks"))
        tx = make(strength=2.0, like=fit, tasks=2)
        state = remembered(tx, tasks("kronecker", 1))
        once = force(tx, state, WHERE)
        state.hyperparams["strength"] = jnp.float32(6.0)
        np.testing.assert_allclose(force(tx, state, WHERE), 3 * once, rtol=1e-4)

    def test_half_precision(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        belief = fit(params)
        for tx in (structured_elastic(1.0, fit), structured_proximal(1.0, 0.1, fit)):
            state = consolidate(tx.init(params), params, belief)
            moved = jax.tree.map(lambda p: p + 0.5, params)
            nothing = jax.tree.map(jnp.zeros_like, params)
            updates, _ = tx.update(nothing, state, moved)
            for leaf in jax.tree.leaves(updates):
                assert leaf.dtype == jnp.bfloat16
            assert np.any(flat(updates) != 0)


class TestErrors:
    def test_numbers(self):
        for options, message in (
            ({"strength": -1.0}, "strength must be a number >= 0"),
            ({"strength": 1.0, "decay": -0.1}, r"decay must be in \[0, 1\]"),
            ({"strength": 1.0, "tasks": 0}, "tasks must be a number of slots >= 1"),
            ({"strength": 1.0, "form": "both"}, 'form must be "online" or "separate"'),
        ):
            with pytest.raises(ValueError, match=message):
                structured_elastic(like=fit, **options)
            with pytest.raises(ValueError, match=message):
                structured_proximal(like=fit, learning_rate=0.1, **options)
        with pytest.raises(ValueError, match="steps must be a number of steps >= 1"):
            structured_proximal(1.0, 0.1, fit, steps=0)
        with pytest.raises(ValueError, match="every must be a number of updates >= 1"):
            structured_proximal(1.0, 0.1, fit, every=0)

    def test_what_like_must_be(self):
        with pytest.raises(TypeError, match=r"with correlations, not dict.*structure='kronecker'"):
            structured_elastic(1.0, {})
        with pytest.raises(TypeError, match="not Posterior"):
            structured_elastic(1.0, lambda p: Posterior(p, p)).init(PARAMS)
        with pytest.raises(ValueError, match=r"like= is of parameters with the shapes"):
            structured_elastic(1.0, fit(PARAMS)).init({"w": jnp.ones(3)})

    def test_updates_and_boundaries(self):
        tx = structured_elastic(1.0, fit)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"structured_elastic\(\) needs the parameters"):
            tx.update(PARAMS, state)
        with pytest.raises(ValueError, match=r"given 1 updates for 5 parameters"):
            tx.update({"w": 1.0}, state, PARAMS)
        with pytest.raises(ValueError, match=r"structured_elastic\(\), which needs a belief"):
            consolidate(state, PARAMS)
        with pytest.raises(ValueError, match="with correlations, not Posterior"):
            consolidate(state, PARAMS, Posterior(PARAMS, PARAMS))
        with pytest.raises(ValueError, match="another structure than the memory"):
            consolidate(state, PARAMS, fit(PARAMS, structure="full"))
        broken = fit(PARAMS)
        leaves, treedef = jax.tree.flatten(broken)
        broken = treedef.unflatten([x * jnp.nan for x in leaves])
        with pytest.raises(ValueError, match="is not finite: repair it"):
            consolidate(state, PARAMS, broken)
