"""`prune` as an optax transformation, and `revise` for events out of the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptivenet as an
from adaptivenet import pruning


def parameters(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "dense1": {"kernel": jax.random.normal(keys[0], (6, 8)), "bias": jnp.ones(8)},
        "dense2": {"kernel": jax.random.normal(keys[1], (8, 4)), "bias": jnp.ones(4)},
    }


def gradients(params, step=0):
    return jax.tree.map(lambda p: jnp.sin(3.0 * p + jnp.float32(step)), params)


def train(tx, params, steps, state=None, first=0):
    """Jitted steps; returns the parameters, the state and the record of every step."""
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, number):
        updates, state = tx.update(gradients(params, number), state, params)
        return optax.apply_updates(params, updates), state

    rows = []
    for number in range(first, first + steps):
        params, state = step(params, state, jnp.float32(number))
        rows.append(jax.device_get(pruning.record(state)))
    return params, state, rows


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def landed(params, state):
    mask = pruning.mask(state)
    for layer in ("dense1", "dense2"):
        assert an.trees.is_masked(mask[layer]["bias"])
        dead = ~np.asarray(mask[layer]["kernel"])
        assert not np.any(np.asarray(params[layer]["kernel"])[dead])
    return sum(int(m.sum()) for m in jax.tree.leaves(mask))


def test_the_readme_chain():
    tx = optax.chain(
        optax.adam(1e-2), pruning.prune(pruning.cubic(final=0.75, start=2, end=9), every=3)
    )
    params, state, rows = train(tx, parameters(), 12)
    assert [row.step.item() for row in rows if row.event] == [2, 5, 8, 9]
    assert landed(params, state) == 20
    assert rows[-1].density == np.float32(0.25)
    kept = [row.kept.item() for row in rows]
    assert kept == sorted(kept, reverse=True)


def test_an_event_scores_the_parameters_at_which_the_gradient_was_taken():
    """The update would turn the order around; it is applied after the cut."""
    pruner = pruning.prune(0.5)
    params = {"w": jnp.array([[1.0, 2.0]])}
    updates, state = pruner.update({"w": jnp.array([[9.0, -1.9]])}, pruner.init(params), params)
    assert pruning.mask(state)["w"].tolist() == [[False, True]]
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], [[0.0, 0.1]], atol=1e-6)


def test_revise_scores_the_parameters_given():
    pruner = pruning.prune(0.5, every=None)
    params = {"w": jnp.array([[10.0, 0.1]])}
    new, state = pruning.revise(pruner, params, pruner.init({"w": jnp.ones((1, 2))}))
    assert new["w"].tolist() == [[10.0, 0.0]]
    assert bool(pruning.record(state).event)
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (9, []), (None, [])]
)
def test_events_in_the_step(every, expected):
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    pruner = pruning.prune(pruning.constant(0.5), every=every)
    _, _, rows = train(pruner, params, 6)
    assert [place + 1 for place, row in enumerate(rows) if row.event] == expected


def test_before_the_first_event_nothing_changes():
    inner = optax.sgd(0.1)
    params = parameters()
    plain, _ = inner.update(gradients(params), inner.init(params), params)
    tx = optax.chain(inner, pruning.prune(pruning.cubic(0.9, start=5, end=9)))
    pruned, _ = tx.update(gradients(params), tx.init(params), params)
    same(plain, pruned)


def test_what_is_not_a_synapse_is_untouched():
    inner = optax.adam(0.1)
    params = parameters()
    plain, _ = inner.update(gradients(params), inner.init(params), params)
    tx = optax.chain(inner, pruning.prune(0.9, select="dense1/kernel"))
    pruned, state = tx.update(gradients(params), tx.init(params), params)
    for layer, name in (("dense1", "bias"), ("dense2", "kernel"), ("dense2", "bias")):
        same(plain[layer][name], pruned[layer][name])
    assert an.trees.paths(pruning.mask(state)) == ("dense1/kernel",)
    # Where the mask is True, updates are those of the optimizer.
    keep = np.asarray(pruning.mask(state)["dense1"]["kernel"])
    kernels = plain["dense1"]["kernel"], pruned["dense1"]["kernel"]
    np.testing.assert_array_equal(*(np.asarray(kernel)[keep] for kernel in kernels))


def test_jit_scan_and_eager_steps_agree():
    tx = optax.chain(optax.sgd(0.1), pruning.prune(pruning.linear(0.8, 0, 4), every=2))
    params = parameters()
    jitted, jitted_state, _ = train(tx, params, 5)

    def step(carry, number):
        params, state = carry
        updates, state = tx.update(gradients(params, number), state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5.0))[0]
    eager = (params, tx.init(params))
    for number in range(5):
        eager, _ = step(eager, jnp.float32(number))
    for other in (scanned, eager):
        for x, y in zip(jax.tree.leaves(other[0]), jax.tree.leaves(jitted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
        same(pruning.mask(other[1]), pruning.mask(jitted_state))


def test_the_same_seed_is_the_same_run():
    def make(seed):
        return optax.chain(
            optax.sgd(0.1),
            pruning.prune(0.5, score=pruning.random, regrow=pruning.at_random(0.2), seed=seed),
        )

    first = train(make(0), parameters(), 3)
    same(first[:2], train(make(0), parameters(), 3)[:2])
    other = train(make(1), parameters(), 3)
    masks = [pruning.mask(state)["dense1"]["kernel"] for state in (first[1], other[1])]
    assert np.any(masks[0] != masks[1])


def test_a_seed_is_a_number_or_a_key_and_is_folded_with_the_parameters():
    def key(seed, params):
        return np.asarray(pruning.prune(0.5, seed=seed).init(params).key).tolist()

    assert key(7, parameters()) == key(jax.random.key(7), parameters())
    assert key(7, parameters()) == key(jnp.int32(7), parameters())
    assert key(7, parameters()) != key(8, parameters())
    assert key(7, parameters()) != key(7, parameters(1))


def test_a_run_cut_in_two_is_the_run_uninterrupted():
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        pruning.prune(pruning.cubic(0.7, 0, 6), regrow=pruning.at_random(0.3), every=2, ages=True),
    )
    whole = train(tx, parameters(), 8)
    params, state, _ = train(tx, parameters(), 3)
    # Through plain numpy arrays, as a checkpoint would keep them.
    params, state = jax.tree.map(jnp.asarray, jax.device_get((params, state)))
    resumed = train(tx, params, 5, state=state, first=3)
    same(whole[:2], resumed[:2])


def test_the_state_keeps_its_structure_and_dtypes():
    for kwargs in ({}, {"ages": True}, {"regrow": pruning.at_random(0.1)}):
        tx = optax.chain(optax.sgd(0.1), pruning.prune(pruning.cubic(0.5, 1, 3), **kwargs))
        state = tx.init(parameters())
        after = train(tx, parameters(), 4)[1]
        assert jax.tree.structure(state) == jax.tree.structure(after)
        shapes = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)]
                  for s in (state, jax.tree.map(jnp.asarray, after))]  # fmt: skip
        assert shapes[0] == shapes[1]


def test_a_state_is_found_by_name():
    tx = optax.chain(optax.adam(1e-3), pruning.prune(0.5, select="dense2/kernel"))
    state = tx.init(parameters())
    assert optax.tree_utils.tree_get(state, "mask")["dense2"]["kernel"].shape == (8, 4)
    assert optax.tree_utils.tree_get(state, "record").alive == 32


class TestRevise:
    def test_between_scanned_chunks(self):
        """Chunks of plain steps and events between them are what events in the step would be."""
        params = parameters()
        pruner = pruning.prune(pruning.linear(0.6, 0, 6), every=None)
        tx = optax.chain(optax.sgd(0.1), pruner)

        @jax.jit
        def chunk(carry, numbers):
            def step(carry, number):
                params, state = carry
                updates, state = tx.update(gradients(params, number), state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, carry, numbers)[0]

        event = jax.jit(lambda params, state: pruning.revise(pruner, params, state))
        carry = (params, tx.init(params))
        kept = []
        for numbers in np.arange(6, dtype=np.float32).reshape(3, 2):
            carry = event(*chunk(carry, numbers))
            kept.append(int(pruning.record(carry[1]).kept))
            assert landed(*carry) == kept[-1]
        # 80 synapses; linear to 0.6 over six steps: 0.2, 0.4 and 0.6.
        assert kept == [64, 48, 32]
        carry = chunk(carry, jnp.arange(2.0))
        assert landed(*carry) == 32
        assert not bool(pruning.record(carry[1]).event)

    def test_a_population_over_seeds_and_sparsities(self):
        def member(key, sparsity):
            params = parameters()
            params["dense1"]["kernel"] = jax.random.normal(key, (6, 8))
            pruner = pruning.prune(sparsity, every=None)
            tx = optax.chain(optax.sgd(0.1), pruner)
            params, state = pruning.revise(pruner, params, tx.init(params))
            updates, state = tx.update(gradients(params), state, params)
            return optax.apply_updates(params, updates), state

        keys = jax.random.split(jax.random.key(0), 3)
        sparsities = jnp.array([0.25, 0.5, 0.75], jnp.float32)
        together = jax.jit(jax.vmap(member))(keys, sparsities)
        for place, expected in enumerate((60, 40, 20)):
            one = jax.tree.map(lambda x: x[place], together)  # noqa: B023
            assert landed(*one) == expected
            alone = jax.jit(member)(keys[place], sparsities[place])
            same(pruning.mask(one[1]), pruning.mask(alone[1]))

    def test_only_the_pruning_state_changes(self):
        pruner = pruning.prune(0.5, every=None)
        tx = optax.chain(optax.adam(0.1), pruner)
        params, state, _ = train(tx, parameters(), 2)
        _, revised = pruning.revise(pruner, params, state)
        same(state[0], revised[0])
        assert jax.tree.structure(state) == jax.tree.structure(revised)

    def test_it_repairs_what_an_update_cannot(self):
        pruner = pruning.prune(0.5, every=None)
        params = {"w": jnp.array([[jnp.nan, 1.0, 2.0, 0.5]])}
        state = pruner.init({"w": jnp.ones((1, 4))})
        new, state = pruning.revise(pruner, params, state)
        assert new["w"].tolist() == [[0.0, 1.0, 2.0, 0.0]]
        assert int(pruning.record(state).nonfinite) == 1

    def test_within_an_nnx_optimizer(self):
        model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
        pruner = pruning.prune(0.5, every=None)
        optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), pruner), wrt=nnx.Param)
        with pytest.raises(ValueError, match=r"nnx\.as_pure"):
            pruning.revise(pruner, nnx.state(model, nnx.Param), optimizer.opt_state)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        params, state = pruning.revise(pruner, params, nnx.as_pure(optimizer.opt_state))
        nnx.update(model, params)
        nnx.update(optimizer.opt_state, nnx.state(state))
        for _ in range(2):
            grads = nnx.grad(lambda m: jnp.mean((m(jnp.ones((2, 6))) - 1.0) ** 2))(model)
            optimizer.update(model, grads)
        assert int((model.kernel[...] != 0).sum()) == 24
        assert int(pruning.mask(optimizer.opt_state)["kernel"][...].sum()) == 24
        assert int(pruning.record(optimizer.opt_state).alive[...]) == 24

    def test_it_takes_a_pruner(self):
        params = parameters()
        tx = optax.chain(optax.sgd(0.1), pruning.prune(0.5))
        with pytest.raises(TypeError, match=r"what an\.pruning\.prune\(\.\.\.\) returned, not"):
            pruning.revise(tx, params, tx.init(params))


def test_states_without_a_pruner_and_with_two():
    params = parameters()
    plain = optax.adam(0.1).init(params)
    two = optax.chain(pruning.prune(0.5), pruning.prune(0.5)).init(params)
    pruner = pruning.prune(0.5)
    for function in (
        pruning.mask,
        pruning.record,
        lambda state: pruning.revise(pruner, params, state),
    ):
        with pytest.raises(ValueError, match=r"holds 0 pruning states; put an\.pruning\.prune"):
            function(plain)
        with pytest.raises(ValueError, match="holds 2 pruning states; pass the part"):
            function(two)
    assert pruning.record(two[1]).alive == 80


def test_signals_that_are_arrays_functions_and_words():
    seen = {}

    def score(params, *, loss, value_fn, note, **signals):
        seen.update(loss=loss, note=note)
        return jax.tree.map(lambda p: jnp.abs(value_fn(p)), params)

    pruner = pruning.prune(0.5, score=score)
    params = {"w": jnp.array([[1.0, -5.0]])}
    state = pruner.init(params)
    for loss in (1.0, np.float32(1.0), jnp.float32(1.0)):
        _, after = pruner.update(
            params, state, params, loss=loss, value_fn=lambda p: p - 4.0, note="words"
        )
        assert pruning.mask(after)["w"].tolist() == [[False, True]]
    assert seen["note"] == "words"


def test_a_population_over_every():
    def events(every):
        pruner = pruning.prune(0.5, every=every)
        params = {"w": jnp.ones((2, 2))}

        def step(state, _):
            _, state = pruner.update(params, state, params)
            return state, pruning.record(state).event

        return jax.lax.scan(step, pruner.init(params), None, length=6)[1].sum()

    assert jax.jit(jax.vmap(events))(jnp.array([1, 2, 3, 7])).tolist() == [6, 3, 2, 0]


@pytest.mark.parametrize("every", [0, -1, 0.5, 2.5, True, "10", np.array([1, 0])])
def test_every_that_is_no_number_of_updates_is_refused(every):
    with pytest.raises(ValueError, match=r"every must be a number of updates >= 1, or None, not"):
        pruning.prune(0.5, every=every)


def test_what_init_refuses():
    bad = parameters()
    bad["dense1"]["kernel"] = bad["dense1"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="parameter 'dense1/kernel' holds 1 nan of 48 elements"):
        pruning.prune(0.5).init(bad)
    with pytest.raises(ValueError, match="select='conv' matches no leaf"):
        pruning.prune(0.5, select="conv").init(parameters())
    with pytest.raises(TypeError, match="leaf 'ids' has dtype int32"):
        pruning.prune(0.5, select="ids").init({"ids": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"cannot follow optax\.lookahead"):
        pruning.prune(0.5).init(optax.LookaheadParams.init_synced(parameters()))


def test_a_leaf_that_is_not_pruned_may_hold_nan():
    params = {"w": jnp.ones((2, 2)), "statistics": jnp.array([jnp.nan])}
    pruning.prune(0.5).init(params)


def test_what_update_refuses():
    params = parameters()
    pruner = pruning.prune(0.5)
    state = pruner.init(params)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx\.update\(grads, opt_st"):
        pruner.update(gradients(params), state)
    other = {"dense3": params["dense1"]}
    with pytest.raises(ValueError, match=r"belongs to another tree.*Call init on the parameters"):
        pruner.update(other, state, other)


def test_it_is_what_optax_takes_it_for():
    pruner = pruning.prune(0.5)
    assert isinstance(pruner, optax.GradientTransformationExtraArgs)
    init, update = pruner
    assert callable(init)
    assert callable(update)
    assert isinstance(pruner, pruning.Pruner)
    assert isinstance(pruner.init(parameters()), pruning.PruneState)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_precision_lands_and_counts_exactly(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), parameters())
    tx = optax.chain(optax.sgd(0.1), pruning.prune(pruning.cubic(0.9, 0, 4)))
    state = tx.init(params)
    for number in range(5):
        grads = jax.tree.map(lambda p: jnp.sin(p * 3), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert landed(params, state) == int(pruning.record(state).alive), number
    assert landed(params, state) == 8
    assert params["dense1"]["kernel"].dtype == dtype
