"""Hard attention to the task, against the formulas of the paper in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptivenet as an
from adaptivenet import pruning, trees
from adaptivenet.consolidation import hat
from adaptivenet.consolidation.boundary import consolidate
from tests.cells import every_cell

SIZES = (3, 5, 4, 2)
PARAMS = an.models.mlp_init(jax.random.key(0), SIZES)
GROUPS = {
    "h1": [("dense1/kernel", 1), ("dense1/bias", 0), ("dense2/kernel", 0)],
    "h2": [("dense2/kernel", 1), ("dense2/bias", 0), ("dense3/kernel", 0)],
}
UNITS = hat.units_of(GROUPS, PARAMS)


def some_attention(seed=0):
    rng = np.random.default_rng(seed)
    return {u.name: jnp.asarray(rng.uniform(size=u.count), jnp.float32) for u in UNITS}


class TestUnits:
    def test_found_by_the_trace(self):
        coupling = pruning.couple(an.models.mlp, PARAMS, jnp.ones((1, 3)))
        found = hat.units_of(coupling)
        mine = {frozenset(u.members) for u in UNITS}
        assert {frozenset(u.members) for u in found} == mine
        assert [u.count for u in found] == [5, 4]

    def test_negative_axes(self):
        groups = {"h1": [("dense1/kernel", -1), ("dense1/bias", -1), ("dense2/kernel", -2)]}
        assert set(hat.units_of(groups, PARAMS)[0].members) == set(UNITS[0].members)

    def test_errors(self):
        for groups, message in (
            ({}, "there are no units"),
            ({"h": []}, "the group 'h' has no slices"),
            ({"h": [("dense9/kernel", 0)]}, "'h': no leaf 'dense9/kernel'; there are dense1/bias"),
            ({"h": [("dense1/bias", 1)]}, r"'dense1/bias' of shape \(5,\) has no axis 1"),
            ({"h": [("dense1/bias", 0), ("dense2/kernel", 1)]}, "cannot be the 5 units of 'h'"),
            (
                {"h": [("dense1/bias", 0)], "g": [("dense1/bias", -1)]},
                "units of 'g': it holds those of 'h'",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                hat.units_of(groups, PARAMS)
        with pytest.raises(ValueError, match="needs the parameters"):
            hat.units_of(GROUPS)


class TestFormulas:
    def test_annealing(self):
        B, top = 7, 400.0
        for b in range(1, B + 1):
            s = 1 / top + (top - 1 / top) * (b - 1) / (B - 1)
            assert float(hat.anneal(b - 1, B, top)) == pytest.approx(s, rel=1e-6)
        swept = jax.jit(jax.vmap(lambda b: hat.anneal(b, B, top)))(jnp.arange(B))
        assert bool(jnp.all(jnp.diff(swept) > 0))

    def test_attention(self):
        tables = hat.init(jax.random.key(0), UNITS, tasks=3)
        assert {k: v.shape for k, v in tables.items()} == {"h1": (3, 5), "h2": (3, 4)}
        for scale in (0.5, 30.0):
            now = jax.jit(hat.attention)(tables, 1, scale)
            for name, table in tables.items():
                e = np.asarray(table, np.float64)[1]
                np.testing.assert_allclose(now[name], 1 / (1 + np.exp(-scale * e)), rtol=1e-5)
        # Only the task's own embeddings have a gradient.
        grads = jax.grad(lambda t: hat.attention(t, 1, 2.0)["h1"].sum())(tables)
        assert not grads["h1"][jnp.array([0, 2])].any()
        assert grads["h1"][1].all()

    def test_regulariser(self):
        now, before = some_attention(0), some_attention(1)
        a, c = (np.concatenate([np.asarray(x[k], np.float64) for k in x]) for x in (now, before))
        expected = (a * (1 - c)).sum() / (1 - c).sum()
        assert float(hat.regulariser(now, before)) == pytest.approx(expected, rel=1e-6)
        full = {k: jnp.ones_like(v) for k, v in before.items()}
        assert float(hat.regulariser(now, full)) == 0.0
        none = {k: jnp.zeros_like(v) for k, v in before.items()}
        assert float(hat.regulariser(now, none)) == pytest.approx(a.mean(), rel=1e-6)

    def test_cumulative_attention_and_capacity(self):
        one, two = some_attention(0), some_attention(1)
        both = hat.cumulative(one, two)
        for k in one:
            np.testing.assert_array_equal(both[k], np.maximum(one[k], two[k]))
        every = np.concatenate([np.asarray(v) for v in both.values()])
        assert float(hat.used(both, 0.7)) == pytest.approx((every > 0.7).mean())

    def test_compensation(self):
        """q' = s_max / s (cosh(s e) + 1) / (cosh(e) + 1) q."""
        rng = np.random.default_rng(0)
        e, q = rng.normal(size=(2, 4, 9)) * 1.5
        for s, top in ((0.01, 400.0), (1.0, 50.0), (20.0, 400.0), (400.0, 400.0)):
            inner = np.cosh(np.clip(s * e, -50, 50)) + 1
            expected = top / s * inner / (np.cosh(e) + 1) * q
            grads, tables = ({"h": jnp.asarray(x, jnp.float32)} for x in (q, e))
            found = hat.compensate(grads, tables, s, top)["h"]
            np.testing.assert_allclose(found, expected, rtol=1e-3)

    def test_compensation_undoes_the_annealed_gate(self):
        """Of the gate sigma(s e) it makes s_max times the gradient of the gate sigma(e)."""
        e = {"h": jnp.linspace(-2.0, 2.0, 9)[None]}
        for s in (0.1, 2.0, 4.0):  # beyond s e of about 16 a gate of 1 has no gradient in float32
            grads = jax.grad(lambda t: hat.attention(t, 0, s)["h"].sum())(e)  # noqa: B023
            plain = jax.grad(lambda t: hat.attention(t, 0, 1.0)["h"].sum())(e)
            fair = hat.compensate(grads, e, s, largest=50.0)
            np.testing.assert_allclose(fair["h"], 50.0 * plain["h"], rtol=1e-2)

    def test_clipping(self):
        assert hat.clip({"h": jnp.array([-7.0, 0.5, 9.0])})["h"].tolist() == [-6.0, 0.5, 6.0]

    def test_gradient_factors(self):
        """Equation 2 with loops: g_ij (1 - min(a_i, a_j)); a bias has 1 - a_i."""
        held = some_attention()
        a1, a2 = np.asarray(held["h1"]), np.asarray(held["h2"])
        found = hat.factors(PARAMS, UNITS, held)
        for i in range(5):
            np.testing.assert_allclose(found["dense1"]["kernel"][0, i], 1 - a1[i], rtol=1e-6)
            np.testing.assert_allclose(found["dense1"]["bias"][i], 1 - a1[i], rtol=1e-6)
            for j in range(4):
                np.testing.assert_allclose(
                    found["dense2"]["kernel"][i, j], 1 - min(a1[i], a2[j]), rtol=1e-6
                )
        np.testing.assert_allclose(found["dense3"]["kernel"][:, 0], 1 - a2, rtol=1e-6)
        assert trees.is_masked(found["dense3"]["bias"])

    def test_gated_parameters_are_gated_activations(self):
        """In value and in the gradients of parameters and embeddings."""
        tables = hat.init(jax.random.key(1), UNITS, tasks=2)
        inputs = jax.random.normal(jax.random.key(2), (6, 3))

        def by_parameters(params, tables):
            now = hat.attention(tables, 1, 2.0)
            return an.models.mlp(hat.gated(params, UNITS, now), inputs)

        def by_activations(params, tables):
            now = hat.attention(tables, 1, 2.0)
            x = inputs
            for layer, gate in (("dense1", now["h1"]), ("dense2", now["h2"]), ("dense3", None)):
                x = x @ params[layer]["kernel"] + params[layer]["bias"]
                x = x if gate is None else jax.nn.relu(x) * gate
            return x

        results = []
        for function in (by_parameters, by_activations):
            loss = jax.value_and_grad(lambda p, t, f=function: jnp.sum(f(p, t) ** 2), (0, 1))
            results.append(loss(PARAMS, tables))
        for one, other in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_convolutions(self):
        params = {"conv1": jnp.ones((3, 3, 1, 4)), "conv2": jnp.ones((3, 3, 4, 2))}
        units = hat.units_of({"c": [("conv1", 3), ("conv2", 2)]}, params)
        now = {"c": jnp.array([0.0, 0.25, 0.5, 1.0])}
        gated = hat.gated(params, units, now)
        np.testing.assert_array_equal(gated["conv1"], params["conv1"])
        np.testing.assert_array_equal(gated["conv2"][0, 0, :, 0], now["c"])
        shares = hat.factors(params, units, now)
        assert shares["conv1"].shape == (1, 1, 1, 4)
        np.testing.assert_array_equal(shares["conv2"][0, 0, :, 0], 1 - now["c"])


class TestTransformation:
    def test_units_in_use_do_not_move(self):
        """Behind Adam with decoupled decay: neither moments nor decay move what is guarded."""
        tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), hat.hat_gradients(UNITS))
        state = tx.init(PARAMS)
        hot = {"h1": jnp.array([1.0, 1, 0, 0, 0.5]), "h2": jnp.array([1.0, 0, 1, 0])}
        step = jax.jit(tx.update)
        params = PARAMS
        for boundary in (False, True):
            if boundary:
                state = consolidate(state, params, attention=hot)
                before = params
            for place in range(3):
                grads = jax.tree.map(lambda p: jnp.cos(p + place), params)  # noqa: B023
                updates, state = step(grads, state, params)
                params = optax.apply_updates(params, updates)
        moved = jax.tree.map(lambda a, b: np.asarray(a != b), params, before)
        one, two = (np.asarray(hot[k]) == 1 for k in ("h1", "h2"))
        np.testing.assert_array_equal(moved["dense1"]["kernel"], np.tile(~one, (3, 1)))
        np.testing.assert_array_equal(moved["dense1"]["bias"], ~one)
        np.testing.assert_array_equal(moved["dense2"]["kernel"], ~(one[:, None] & two[None]))
        np.testing.assert_array_equal(moved["dense2"]["bias"], ~two)
        np.testing.assert_array_equal(moved["dense3"]["kernel"], np.tile(~two[:, None], (1, 2)))
        assert moved["dense3"]["bias"].all()

    def test_in_front_of_adam_they_do(self):
        """Negative control: moments gathered before the boundary go on moving them."""
        tx = optax.chain(hat.hat_gradients(UNITS), optax.adam(1e-2))
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        _, state = tx.update(ones, tx.init(PARAMS), PARAMS)
        full = {u.name: jnp.ones(u.count) for u in UNITS}
        state = consolidate(state, PARAMS, attention=full)
        updates, _ = tx.update(ones, state, PARAMS)
        assert float(jnp.abs(updates["dense1"]["kernel"]).min()) > 1e-4

    def test_before_the_first_boundary_it_is_the_identity(self):
        tx = hat.hat_gradients(UNITS)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS))
        for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(PARAMS), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_the_output_of_a_guarded_task_stays(self):
        """What a task computes through binary attention is the same after another was learnt."""
        tx = optax.chain(optax.sgd(0.3), hat.hat_gradients(UNITS))
        first = {"h1": jnp.array([1.0, 1, 0, 0, 0]), "h2": jnp.array([1.0, 1, 0, 0])}
        second = {"h1": jnp.array([1.0, 1, 1, 1, 0]), "h2": jnp.array([1.0, 1, 1, 0])}
        inputs = jax.random.normal(jax.random.key(3), (32, 3))
        head = {"dense3/bias"}

        def train(params, state, now, sign=1.0):
            def loss(params):
                out = an.models.mlp(hat.gated(params, UNITS, now), inputs)
                return jnp.mean((out - sign * inputs[:, :2]) ** 2)

            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params), state, params)
                updates = jax.tree.unflatten(
                    jax.tree.structure(updates),
                    [
                        jnp.zeros_like(u) if name in head else u
                        for name, u in zip(
                            trees.paths(updates), jax.tree.leaves(updates), strict=True
                        )
                    ],
                )
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), None, 60)[0]

        params, state = train(PARAMS, tx.init(PARAMS), first)
        before = an.models.mlp(hat.gated(params, UNITS, first), inputs)
        kept = consolidate(state, params, attention=first)
        after, _ = train(params, kept, second, -1.0)
        again = an.models.mlp(hat.gated(after, UNITS, first), inputs)
        np.testing.assert_allclose(again, before, atol=1e-6)
        # Without the boundary the first task is forgotten.
        after, _ = train(params, state, second, -1.0)
        again = an.models.mlp(hat.gated(after, UNITS, first), inputs)
        assert float(jnp.abs(again - before).max()) > 0.05

    def test_errors(self):
        tx = hat.hat_gradients(UNITS)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"pass attention=hat\.attention"):
            consolidate(state, PARAMS)
        with pytest.raises(ValueError, match="the groups of units differ"):
            consolidate(state, PARAMS, attention={"h1": jnp.ones(5)})
        with pytest.raises(
            ValueError, match=r"'dense1/kernel' with 5 elements.*shape \(3, 4\) there"
        ):
            tx.init(an.models.mlp_init(jax.random.key(0), (3, 4, 4, 2)))
        with pytest.raises(ValueError, match="no such leaf"):
            tx.init({"w": jnp.ones((2, 2))})
        units = hat.units_of({"h": [("dense1/bias", 0)]}, PARAMS)
        with pytest.raises(ValueError, match="nothing reads the units of 'h'"):
            hat.gated(PARAMS, units, {"h": jnp.ones(5)})
        with pytest.raises(ValueError, match=r"0 states of hat_gradients\(\)"):
            hat.held(optax.EmptyState())
        with pytest.raises(ValueError, match="task 3 is none of the 3"):
            hat.attention(hat.init(jax.random.key(0), UNITS, 3), 3, 1.0)
        with pytest.raises(ValueError, match="tasks must be a number of tasks >= 1"):
            hat.init(jax.random.key(0), UNITS, 0)
        with pytest.raises(ValueError, match="largest must be positive"):
            hat.anneal(0, 3, 0.0)
        with pytest.raises(ValueError, match="batches must be at least 1"):
            hat.anneal(0, 0)
        assert hat.held((optax.EmptyState(), state)) is state.attention


def guarding(strength):
    """Attention that is there from the start, of the units of whatever network comes."""

    def over(params):
        sizes = [leaf.shape for leaf in jax.tree.leaves(params)]
        names = trees.paths(params)
        kernels = sorted(n for n, s in zip(names, sizes, strict=True) if len(s) == 2)
        shapes = dict(zip(names, sizes, strict=True))
        bias = next(n for n in names if shapes[n] == (shapes[kernels[0]][1],))
        return hat.units_of({"h": [(kernels[0], 1), (bias, 0), (kernels[1], 0)]}, params)

    def init(params):
        state = hat.hat_gradients(over(params)).init(params)
        return state.consolidated(params, attention={"h": jnp.full(16, strength, jnp.float32)})

    def update(grads, state, params=None, **extra):
        return hat.hat_gradients(over(grads)).update(grads, state, params, **extra)

    guard = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(optax.adam(1e-2), guard)


@every_cell
def test_contract(subject, mode):
    an.testing.check(guarding, subject=subject, mode=mode, steps=3)
