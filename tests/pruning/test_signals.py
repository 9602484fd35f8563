"""Signals reach every member of a chain, whatever the optimizer, and cost nothing idle."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import moments, pruning, testing, trees
from adaptivenet.pruning import signals
from adaptivenet.pruning.record import prune_states
from adaptivenet.pruning.regrowth import at_random, by_gradient

PARAMS = {
    "a": {"kernel": jnp.linspace(-1.0, 1.0, 30).reshape(6, 5) + 0.01, "bias": jnp.ones(5)},
    "b": {"kernel": jnp.linspace(0.4, -0.5, 20).reshape(5, 4), "bias": jnp.zeros(4)},
    "scale": jnp.full((5,), 1.5),
}


def loss(params, inputs=None):
    inputs = jnp.sin(jnp.arange(42.0)).reshape(7, 6) if inputs is None else inputs
    a, b = params["a"], params["b"]
    hidden = jnp.tanh(inputs @ a["kernel"] + a["bias"]) * params["scale"]
    return jnp.mean(jnp.square(hidden @ b["kernel"] + b["bias"] - 0.5))


def tempered(params, *, fisher, **signals):
    """|w| F^(1/4)."""
    return jax.tree.map(lambda w, f: jnp.abs(w) * jnp.sqrt(jnp.sqrt(f)), params, fisher)


def saliency(params, *, grads, **signals):
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)


def spy(seen):
    """A member of a chain that notes the extra arguments it is given."""

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class TestEstimators:
    def run(self, estimator, steps=5, dtype=jnp.float32):
        rng = np.random.default_rng(0)
        params = {"w": jnp.zeros((2, 3), dtype), "ids": jnp.arange(2)}
        state, rows = estimator.init(params), []
        for _ in range(steps):
            w, g = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
            params = {"w": jnp.asarray(w, dtype), "ids": params["ids"]}
            grads = {"w": jnp.asarray(g, dtype), "ids": np.zeros(2, jax.dtypes.float0)}
            state = estimator.update(state, grads, params)
            rows.append(tuple(np.asarray(x["w"].astype(jnp.float32)) for x in (params, grads)))
        reading = estimator.read(state)
        assert trees.is_masked(reading["ids"])
        assert reading["w"].dtype == jnp.float32
        same(reading, state.reading)
        return np.asarray(reading["w"]), rows

    def average(self, values, decay):
        weights = decay ** np.arange(len(values) - 1.0, -1.0, -1.0)
        return np.tensordot(weights / weights.sum(), np.stack(values), 1)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
    def test_fisher_and_momentum(self, decay, dtype):
        got, rows = self.run(signals.fisher(decay), dtype=dtype)
        np.testing.assert_allclose(got, self.average([g**2 for _, g in rows], decay), rtol=1e-4)
        got, rows = self.run(signals.momentum(decay), dtype=dtype)
        np.testing.assert_allclose(got, self.average([g for _, g in rows], decay), atol=1e-5)

    def test_movement(self):
        got, rows = self.run(signals.movement())
        np.testing.assert_allclose(got, -sum(w * g for w, g in rows), atol=1e-5)

    def test_a_smoothed_score(self):
        got, rows = self.run(signals.smoothed(saliency, 0.7))
        np.testing.assert_allclose(got, self.average([abs(w * g) for w, g in rows], 0.7), rtol=1e-4)
        with pytest.raises(ValueError, match="asks for the signal 'fisher'"):
            self.run(signals.smoothed(tempered))

    def test_a_population_over_decays(self):
        def run(decay):
            estimator = signals.fisher(decay)
            state = estimator.init(jnp.zeros(2))
            for value in (1.0, 2.0, 3.0):
                state = estimator.update(state, jnp.full(2, value), jnp.zeros(2))
            return estimator.read(state)

        decays = jnp.array([0.0, 0.5, 0.9])
        together = jax.vmap(run)(decays)
        for row, decay in zip(together, decays, strict=True):
            np.testing.assert_allclose(row, run(decay), rtol=1e-6)

    def test_decays_that_are_refused(self):
        for build in (signals.fisher, signals.momentum, lambda d: signals.smoothed(saliency, d)):
            for decay in (-0.1, 1.0):
                with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not"):
                    build(decay)


class TestHandingOn:
    def test_raw_gradients_and_readings_reach_every_member(self):
        seen = []
        chain = optax.chain(spy(seen), optax.clip(0.001), optax.chain(optax.adam(0.1), spy(seen)))
        tx = signals.with_signals(chain, fisher=signals.fisher(0.5))
        grads = jax.grad(loss)(PARAMS)
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert len(seen) == 2
        for extra in seen:
            assert set(extra) == {"grads", "fisher"}
            same(extra["grads"], grads)  # not those that clip(0.001) leaves
            same(extra["fisher"], jax.tree.map(jnp.square, grads))
        same(signals.readings(state)["fisher"], jax.tree.map(jnp.square, grads))

    def test_what_the_caller_passes_wins_and_goes_through(self):
        seen = []
        tx = signals.with_signals(spy(seen), fisher=signals.fisher())
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, fisher="mine", value=3.0)
        assert seen[0]["fisher"] == "mine"
        assert seen[0]["value"] == 3.0

    def test_one_within_another(self):
        """The outer one knows the rawer gradients; its signals win."""
        seen = []
        inner = signals.with_signals(
            spy(seen), fisher=signals.fisher(0.0), momentum=signals.momentum(0.0)
        )
        tx = signals.with_signals(optax.chain(optax.scale(10.0), inner), fisher=signals.fisher(0.0))
        params = {"w": jnp.ones((1, 2))}
        _, state = tx.update({"w": jnp.full((1, 2), 2.0)}, tx.init(params), params)
        [extra] = seen
        found = signals.readings(state)
        for reading in (extra, found):
            assert reading["fisher"]["w"].tolist() == [[4.0, 4.0]]
            assert reading["momentum"]["w"].tolist() == [[20.0, 20.0]]
        assert extra["grads"]["w"].tolist() == [[2.0, 2.0]]
        assert "grads" not in found

    def test_trees_like_the_parameters_are_narrowed_to_synapses(self):
        """Wherever they stand in a signal; other leaves would not fit beside the scores."""

        class Belief(NamedTuple):
            mean: Any
            precision: Any

        seen = {}

        def score(params, *, grads, posterior, note, **signals):
            seen.update(grads=grads, posterior=posterior, note=note)
            return jax.tree.map(lambda w, g, p: jnp.abs(w * g) * p, params, grads, posterior.mean)

        pruner = pruning.prune(0.5, score=score, select="kernel")
        belief = Belief(PARAMS, jnp.float32(1.0))
        _, state = pruner.update(
            PARAMS, pruner.init(PARAMS), PARAMS, grads=PARAMS, posterior=belief, note=(1, 2)
        )
        names = ("a/kernel", "b/kernel")
        assert trees.paths(seen["grads"]) == trees.paths(seen["posterior"].mean) == names
        assert isinstance(seen["posterior"], Belief)
        assert jax.tree.structure(seen["posterior"].precision) == jax.tree.structure(0)
        assert len(seen["note"]) == 2
        assert int(pruning.record(state).alive) == 25

    def test_full_signals_within_a_part_of_the_parameters(self):
        """`optax.masked` hands on extra arguments whole, but only a part of the parameters."""
        pruner = pruning.prune(0.5, score=saliency, select="kernel", regrow=by_gradient(0.5))
        part = {"a": True, "b": False, "scale": False}
        tx = signals.with_signals(optax.masked(optax.chain(optax.sgd(0.1), pruner), part))
        _, state = jax.jit(tx.update)(jax.grad(loss)(PARAMS), tx.init(PARAMS), PARAMS)
        assert trees.paths(pruning.mask(state)) == ("a/kernel",)
        assert int(pruning.record(state).alive) == 15

    def test_what_is_refused(self):
        with pytest.raises(TypeError, match=r"wraps an optax transformation.*not None"):
            signals.with_signals(None)
        with pytest.raises(TypeError, match=r"fisher=0\.9 is no estimator: it needs init, update"):
            signals.with_signals(optax.sgd(0.1), fisher=0.9)
        with pytest.raises(ValueError, match="the signal 'grads' is there without an estimator"):
            signals.with_signals(optax.sgd(0.1), grads=signals.fisher())
        tx = signals.with_signals(optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"with_signals\(\) needs the parameters"):
            tx.update(PARAMS, tx.init(PARAMS))
        tx = signals.with_signals(pruning.prune(0.5, score=tempered))
        with pytest.raises(ValueError, match=r"tempered\(\) asks for the signal 'fisher'"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


class TestReadings:
    def test_a_score_that_is_a_signal(self):
        score = signals.reading("smooth")
        assert pruning.scores.required_signals(score) == ("smooth",)
        with pytest.raises(
            ValueError, match=r"reading\('smooth'\)\(\) asks for the signal 'smooth'"
        ):
            pruning.scores.supply(score, PARAMS, {})
        tx = signals.with_signals(
            pruning.prune(0.5, score=score, select="kernel"), smooth=signals.smoothed(saliency)
        )
        grads = jax.grad(loss)(PARAMS)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        products = [np.abs(PARAMS[k]["kernel"] * grads[k]["kernel"]).ravel() for k in ("a", "b")]
        limit = np.sort(np.concatenate(products))[25]
        for product, mask in zip(products, jax.tree.leaves(pruning.mask(state)), strict=True):
            np.testing.assert_array_equal(np.ravel(mask), product >= limit)

    def test_revise_finds_them_in_the_state(self):
        pruner = pruning.prune(0.5, score=tempered, every=None, select="kernel")
        tx = optax.chain(
            optax.clip(9.0), signals.with_signals(optax.chain(optax.sgd(0.1), pruner),
                                                  fisher=signals.fisher(0.0))
        )  # fmt: skip
        grads = jax.grad(loss)(PARAMS)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        params, revised = pruning.revise(pruner, PARAMS, state)
        fisher = jax.tree.map(jnp.square, grads)
        _, expected = pruning.revise(pruner, PARAMS, state, fisher=fisher)
        same(pruning.mask(revised), pruning.mask(expected))
        assert int(pruning.record(revised).alive) == 25
        # What is given wins.
        _, other = pruning.revise(pruner, PARAMS, state, fisher=jax.tree.map(jnp.ones_like, fisher))
        assert np.any(pruning.mask(other)["a"]["kernel"] != pruning.mask(revised)["a"]["kernel"])
        testing.check_landing(params, revised)

    def test_gradients_are_not_kept_between_steps(self):
        for options in ({"score": saliency}, {"regrow": by_gradient(0.3)}):
            pruner = pruning.prune(0.5, every=None, select="kernel", **options)
            tx = signals.with_signals(optax.chain(optax.sgd(0.1), pruner))
            state = tx.init(PARAMS)
            with pytest.raises(ValueError, match=r"not kept between steps: pass grads= to revise"):
                pruning.revise(pruner, PARAMS, state)
            _, state = pruning.revise(pruner, PARAMS, state, grads=jax.grad(loss)(PARAMS))
            assert int(pruning.record(state).alive) == 25

    def test_an_estimator_of_ones_own(self):
        class Largest:
            def init(self, params):
                return jax.tree.map(jnp.zeros_like, params)

            def update(self, state, grads, params):
                return jax.tree.map(lambda s, g: jnp.maximum(s, jnp.abs(g)), state, grads)

            def read(self, state):
                return jax.tree.map(lambda s: s * 2.0, state)

        pruner = pruning.prune(0.5, score=signals.reading("largest"), select="kernel")
        tx = signals.with_signals(pruner, largest=Largest())
        grads = jax.grad(loss)(PARAMS)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert int(pruning.record(state).alive) == 25
        # What it reads is not known from its state alone, and never guessed.
        assert signals.readings(state) == {}
        with pytest.raises(ValueError, match="asks for the signal 'largest'"):
            pruning.revise(pruner, PARAMS, state)


def equations(function, *arguments):
    """Equations of the outermost program on more than one number, by primitive."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = []
    for equation in jaxpr.eqns:
        if any(variable.aval.size > 1 for variable in equation.outvars):
            found.append(equation.primitive.name)
    return sorted(found)


class TestCost:
    """Whatever happens at events only stands within a `cond`."""

    def pair(self, pruner, optimizer):
        chain = optax.chain(optimizer, pruner)
        wrapped = signals.with_signals(chain)
        return (equations(tx.update, PARAMS, tx.init(PARAMS), PARAMS) for tx in (chain, wrapped))

    def test_a_chain_that_cannot_wake_gains_nothing(self):
        plain, wrapped = self.pair(pruning.prune(0.5, every=9), optax.sgd(0.1, momentum=0.9))
        assert plain == wrapped
        assert plain.count("cond") == 1

    def test_a_reset_is_one_more_cond(self):
        regrowing = pruning.prune(0.5, regrow=by_gradient(0.3), every=9, select="kernel")
        chain = optax.chain(optax.sgd(0.1, momentum=0.9), regrowing)
        wrapped = signals.with_signals(chain)
        plain = equations(
            lambda *args: chain.update(*args, grads=PARAMS), PARAMS, chain.init(PARAMS), PARAMS
        )
        assert equations(wrapped.update, PARAMS, wrapped.init(PARAMS), PARAMS) == sorted(
            [*plain, "cond"]
        )

    def test_without_moments_or_without_events_in_the_step_not_even_that(self):
        for optimizer, every in ((optax.sgd(0.1), 9), (optax.sgd(0.1, momentum=0.9), None)):
            pruner = pruning.prune(0.5, regrow=at_random(0.3), every=every)
            plain, wrapped = self.pair(pruner, optimizer)
            assert plain == wrapped

    def test_the_default_pruner_has_one_cond_that_computes_masks_only(self):
        pruner = pruning.prune(0.5, every=9)
        found = equations(pruner.update, PARAMS, pruner.init(PARAMS), PARAMS)
        # Of two kernels: -p and the choice between it and the update.
        assert found == ["cond", "neg", "neg", "select_n", "select_n"] or found == [
            "cond", "jit", "jit", "neg", "neg"]  # fmt: skip


class TestDenseGradients:
    def test_gradients_of_dead_synapses_are_the_true_ones(self):
        """RigL's criterion: the derivative of the loss by a weight that is zero."""
        pruner = pruning.prune(0.6, select="kernel", regrow=by_gradient(0.25))
        tx = signals.with_signals(optax.chain(optax.sgd(0.05), pruner))
        step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        params, state = PARAMS, tx.init(PARAMS)
        for number in range(3):
            before = params
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            [found] = prune_states(state)
            if number == 0:
                continue
            slopes, woken, dead = [], [], []
            for layer in ("a", "b"):
                kernel = np.asarray(before[layer]["kernel"])
                for place in np.ndindex(kernel.shape):
                    if bool(found.survivors[layer]["kernel"][place]):
                        continue
                    # The loss with this one weight moved, in the dense network.
                    ends = []
                    for move in (1e-2, -1e-2):
                        moved = before[layer] | {
                            "kernel": before[layer]["kernel"].at[place].add(move)
                        }
                        ends.append(float(loss(before | {layer: moved})))
                    slopes.append(abs(ends[0] - ends[1]) / 2e-2)
                    woken.append(bool(found.mask[layer]["kernel"][place]))
                    dead.append(place)
            slopes, woken = np.array(slopes), np.array(woken)
            assert woken.sum() == 5  # a quarter of 20
            assert slopes[woken].min() > slopes[~woken].max() - 2e-4
            assert slopes.max() > 1e-2

    def test_leaves_that_are_no_synapses_do_not_compete(self):
        """A bias and a scale of huge gradients: JaxPruner's RigL stumbles over them."""
        grads = jax.tree.map(lambda p: jnp.full_like(p, 1e6), PARAMS)
        grads["a"]["kernel"] = jnp.zeros((6, 5)).at[2, 2].set(7.0)
        grads["b"]["kernel"] = jnp.zeros((5, 4)).at[3, 3].set(5.0).at[0, 0].set(6.0)
        params = jax.tree.map(lambda p: p, PARAMS)
        params["a"]["kernel"] = params["a"]["kernel"].at[2, 2].set(0.0)
        params["b"]["kernel"] = params["b"]["kernel"].at[3, 3].set(0.001).at[0, 0].set(0.002)
        pruner = pruning.prune(0.8, select="kernel", regrow=by_gradient(0.3))
        tx = signals.with_signals(optax.chain(optax.rmsprop(0.1), pruner))
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        [found] = prune_states(state)
        born = moments.woken(found.mask, found.survivors)
        assert [np.argwhere(leaf).tolist() for leaf in jax.tree.leaves(born)] == [
            [[2, 2]], [[0, 0], [3, 3]]]  # fmt: skip
        testing.check_landing(optax.apply_updates(params, updates), state)


# --- every optimizer of optax x {SNR and SET, Fisher and RigL} ----------------------------------
# (Magnitude with every optimizer: test_optimizers.py.)


class Belief(NamedTuple):
    """A posterior, as whoever keeps one hands it on."""

    mean: Any
    precision: Any


PRECISION = jax.tree.map(lambda p: 1.0 + jnp.sin(40.0 * p), PARAMS)

# Shared, so that their events are compiled once for the whole module.
SET = pruning.prune(0.6, score=pruning.snr, regrow=at_random(0.34), select="a/kernel", every=2)
RIGL = pruning.prune(0.5, score=tempered, regrow=by_gradient(0.3), select="b/kernel", every=2)

OPTIONS = {
    "noisy_sgd": {"key": 0},
    "polyak_sgd": {"learning_rate": None},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "cocob": {"learning_rate": None},
}
WANTED = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "reduce_on_plateau": ("value",),
    "sophia": ("obj_fn",),
}
REFUSING = ("lbfgs", "schedule_free_adamw", "schedule_free_sgd")
CONTRIB = [
    "acprop",
    "ademamix",
    "adopt",
    "cocob",
    "dadapt_adamw",
    "dog",
    "dowg",
    "galore",
    "madgrad",
    "momo",
    "momo_adam",
    "muon",
    "prodigy",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "simplified_ademamix",
    "sophia",
]
ALIASES = sorted(
    name
    for name, value in vars(optax).items()
    # nadam and its like are partial applications of functions of that module.
    if getattr(getattr(value, "func", value), "__module__", "") == "optax._src.alias"
    and callable(value)
    and name[0].islower()
    and name != "optimistic_adam"  # deprecated
)


def build(name):
    module = optax if name in ALIASES else optax.contrib
    options = {"learning_rate": 0.01} | OPTIONS.get(name, {})
    built = getattr(module, name)(**{k: v for k, v in options.items() if v is not None})
    return signals.accepting(built, *WANTED.get(name, ())) if name in REFUSING else built


OPTIMIZERS = {name: (lambda name=name: build(name)) for name in (*ALIASES, *CONTRIB)} | {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.adam(0.1))),
    "weight decay": lambda: optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.01)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.rmsprop)(learning_rate=0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "partition": lambda: optax.partition(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)},
        {"a": "adam", "b": {"kernel": "adam", "bias": "sgd"}, "scale": "sgd"},
    ),
    "masked": lambda: optax.masked(optax.adam(0.1), {"a": True, "b": False, "scale": True}),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("name", REFUSING)
def test_members_that_refuse_signals_are_named_with_the_remedy(name):
    module = optax if name in ALIASES else optax.contrib
    tx = signals.with_signals(getattr(module, name)(0.1))
    given = {"value": loss(PARAMS), "grad": PARAMS, "value_fn": loss} if name == "lbfgs" else {}
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(TypeError) as caught,
    ):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **given)
    assert "(grads" in caught.value.__notes__[0] or "grads)" in caught.value.__notes__[0]
    assert "signals.accepting(member, ...)" in caught.value.__notes__[0]


def test_aliases_are_found():
    assert {"adam", "sgd", "lbfgs", "adafactor", "rmsprop", "lion"} <= set(ALIASES)
    assert len(ALIASES) >= 30


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    """Both rules land and count exactly, wake where they should, and moments start anew."""
    tx = signals.with_signals(
        optax.chain(OPTIMIZERS[name](), SET, RIGL), fisher=signals.fisher(0.9)
    )
    params, state = PARAMS, None
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = tx.init(params)
        for number in range(1, 5):
            value, grads = jax.value_and_grad(loss)(params)
            given = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
            given = {key: given[key] for key in WANTED.get(name, ())}
            given["posterior"], before = Belief(params, PRECISION), prune_states(state)[0].mask
            updates, state = tx.update(grads, state, params, **given)
            worth = np.abs(params["a"]["kernel"]) * np.sqrt(PRECISION["a"]["kernel"])
            params = optax.apply_updates(params, updates)
            testing.check_landing(params, state)
            first, second = prune_states(state)
            assert [bool(s.record.event) for s in (first, second)] == [number % 2 == 0] * 2
            if number % 2:
                continue
            # 12 of 30 with a third woken at random; 10 of 20 with 3 by gradient.
            counts = [(int(s.record.alive), int(s.record.births)) for s in (first, second)]
            assert counts == [(12, 4), (10, 3)]
            before, kept = (np.asarray(m["a"]["kernel"]) for m in (before, first.survivors))
            assert worth[kept].min() >= worth[before & ~kept].max()
            mask, kept = (np.asarray(m["b"]["kernel"]) for m in (second.mask, second.survivors))
            slopes = np.abs(grads["b"]["kernel"])
            assert slopes[mask & ~kept].min() >= slopes[~mask].max()
            # Every parameter-like leaf of the optimizer starts anew where synapses woke.
            leaves, fresh = jax.tree.leaves(state), jax.tree.leaves(tx.init(params))
            for found in (first, second):
                born = moments.woken(found.mask, found.survivors)
                marks = jax.tree.leaves(born, is_leaf=trees.is_masked)
                for place, mark in moments.places(state, found.mask).items():
                    chosen = np.asarray(marks[mark])
                    pair = (np.asarray(x[place])[chosen] for x in (leaves, fresh))
                    np.testing.assert_array_equal(*pair)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    assert all(np.any(params[layer]["kernel"] != PARAMS[layer]["kernel"]) for layer in ("a", "b"))


# --- the contract --------------------------------------------------------------------------------


def rigl(sparsity):
    pruner = pruning.prune(
        pruning.cubic(sparsity, 0, 4), score=tempered, regrow=by_gradient(0.3), every=2
    )
    return signals.with_signals(optax.chain(optax.adam(1e-2), pruner), fisher=signals.fisher(0.9))


def evolving(sparsity):
    pruner = pruning.prune(sparsity, regrow=at_random(0.3), every=2)
    return signals.with_signals(optax.chain(optax.sgd(0.1, momentum=0.9), pruner))


@pytest.mark.parametrize(
    ("make", "subject", "mode"),
    [
        (rigl, "dict", "vmap_strengths"),
        (rigl, "list", "eager"),
        (rigl, "linen", "scan"),
        (rigl, "nnx_state", "vmap_seeds"),
        (rigl, "nnx_optimizer", "jit"),
        (evolving, "dict", "eager"),
        (evolving, "nnx_optimizer", "vmap_seeds"),
    ],
)
def test_the_contract(make, subject, mode):
    testing.check(make, subject=subject, mode=mode, steps=4)


def test_resumed_runs():
    testing.check_resume(rigl, subject="nnx_optimizer", steps=4)
