"""Tickets: rewinding, rounds with exact counts, and barriers whose height is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.pruning import lottery

MaskedNode = optax.MaskedNode()
SHAPES = {"a": (3, 5), "b": (4, 4)}


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}
    return {**params, "bias": jnp.asarray(rng.normal(size=4), dtype)}


def count(mask):
    return sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))


def some_mask(seed, density=0.5):
    rng = np.random.default_rng(seed)
    mask = {name: jnp.asarray(rng.random(s) < density) for name, s in SHAPES.items()}
    return {**mask, "bias": MaskedNode}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rewind_is_early_where_alive_and_zero_elsewhere(dtype):
    trained, early, mask = tree(0, dtype), tree(1), some_mask(2)
    for function in (lottery.rewind, jax.jit(lottery.rewind)):
        back = function(trained, early, mask)
        for name in SHAPES:
            assert back[name].dtype == dtype
            expected = np.where(mask[name], np.asarray(early[name].astype(dtype)), 0)
            np.testing.assert_array_equal(back[name], expected)
        np.testing.assert_array_equal(back["bias"], early["bias"].astype(dtype))
    kept = lottery.rewind(trained, early, mask, rest=False)
    np.testing.assert_array_equal(kept["bias"], trained["bias"])
    np.testing.assert_array_equal(kept["a"], back["a"])


def test_rewind_drops_what_diverged():
    early = {"w": jnp.array([[jnp.inf, jnp.nan, 1.0]])}
    mask = {"w": jnp.array([[False, False, True]])}
    assert lottery.rewind(early, early, mask)["w"].tolist() == [[0.0, 0.0, 1.0]]


def oracle_round(params, mask, rate):
    """Sorts the living of the whole tree and cuts the lowest, one at a time."""
    living = [
        (abs(float(params[name][where])), place)
        for place, (name, where) in enumerate(
            (name, where) for name in SHAPES for where in np.ndindex(SHAPES[name])
        )
        if mask[name][where]
    ]
    cut = int(rate * len(living) + 0.5)
    # Of equals the first stay.
    doomed = {place for _, place in sorted(living, key=lambda item: (item[0], -item[1]))[:cut]}
    flat = np.concatenate([np.ravel(mask[name]) for name in SHAPES])
    flat[list(doomed)] = False
    sizes = np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1]
    leaves = np.split(flat, sizes)
    return {n: leaf.reshape(s) for (n, s), leaf in zip(SHAPES.items(), leaves, strict=True)}


next_mask = jax.jit(lottery.imp_round)


@given(
    st.integers(0, 2**16),
    st.integers(0, 999).map(lambda part: float(np.float32(part / 1000))),
    st.floats(0, 1),
)
@settings(max_examples=30)
def test_a_round_cuts_the_lowest_of_the_living(seed, rate, density):
    params, mask = tree(seed), some_mask(seed + 1, density)
    params = jax.tree.map(lambda p: jnp.round(p, 1), params)  # for ties
    got = next_mask(params, mask, jnp.float32(rate))
    expected = oracle_round(params, mask, rate)
    for name in SHAPES:
        np.testing.assert_array_equal(got[name], expected[name])
    assert got["bias"] == MaskedNode


def test_rounds_are_nested_and_reach_the_sparsity():
    params = tree(0)
    mask = pruning.full_mask(params)
    size = count(mask)
    rounds = lottery.rounds_to(0.8, 0.3)
    for _ in range(rounds):
        new = next_mask(params, mask, 0.3)
        assert count(new) == count(mask) - int(0.3 * count(mask) + 0.5)
        assert all(np.all(~np.asarray(new[n]) | np.asarray(mask[n])) for n in SHAPES)
        before, mask = mask, new
    # Half a synapse of rounding a round, of which later rounds cut their share.
    assert abs(count(mask) - size * 0.7**rounds) <= 0.5 / 0.3
    assert 0.7**rounds <= 0.2 < count(before) / size


def test_a_dead_synapse_stays_dead_whatever_its_weight():
    params = {"w": jnp.array([[9.0, 1.0, 2.0, 3.0]])}
    mask = {"w": jnp.array([[False, True, True, True]])}
    got = lottery.imp_round(params, mask, 1 / 3)
    assert got["w"].tolist() == [[False, False, True, True]]


def test_rounds_by_leaf_by_other_scores_and_over_populations():
    params, mask = tree(0), pruning.full_mask(tree(0))
    uniform = lottery.imp_round(params, mask, 0.5, allocation=pruning.Uniform())
    assert (int(uniform["a"].sum()), int(uniform["b"].sum())) == (7, 8)

    def by_gradient(params, *, grads, **signals):
        return jax.tree.map(jnp.abs, grads)

    grads = {**tree(5), "bias": MaskedNode}
    by_signal = lottery.imp_round(params, mask, 0.5, score=by_gradient, grads=grads)
    by_weight = lottery.imp_round(tree(5), mask, 0.5)
    for name in SHAPES:
        np.testing.assert_array_equal(by_signal[name], by_weight[name])
    with pytest.raises(ValueError, match="asks for the signal 'grads', which nobody supplies"):
        lottery.imp_round(params, mask, 0.5, score=by_gradient)

    draws = [
        lottery.imp_round(params, mask, 0.5, score=pruning.random, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    assert [np.array_equal(draws[0]["a"], draw["a"]) for draw in draws] == [True, True, False]

    rates = jnp.array([0.0, 0.25, 0.5], jnp.float32)
    together = jax.jit(jax.vmap(lottery.imp_round, in_axes=(None, None, 0)))(params, mask, rates)
    for place, rate in enumerate(rates):
        alone = next_mask(params, mask, rate)
        np.testing.assert_array_equal(together["b"][place], alone["b"])


@given(st.integers(0, 60), st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.9]))
def test_rounds_to_inverts_the_power(rounds, rate):
    sparsity = 1 - (1 - rate) ** rounds
    if sparsity < 0.999999:
        assert lottery.rounds_to(sparsity, rate) == rounds


@given(st.floats(0, 0.999), st.floats(0.001, 0.99))
def test_rounds_to_is_the_least_number(sparsity, rate):
    rounds = lottery.rounds_to(sparsity, rate)
    assert 1 - (1 - rate) ** rounds >= sparsity - 1e-9
    assert rounds == 0 or 1 - (1 - rate) ** (rounds - 1) < sparsity + 1e-9


@pytest.mark.parametrize(
    ("sparsity", "rate", "rounds"), [(0.488, 0.2, 3), (0.5, 0.5, 1), (0.51, 0.5, 2), (0.0, 0.5, 0)]
)
def test_rounds_as_one_counts_them(sparsity, rate, rounds):
    assert lottery.rounds_to(sparsity, rate) == rounds


def test_a_masked_run_keeps_its_zeros_and_its_mask():
    params, mask = tree(0), some_mask(3)
    tx = optax.chain(optax.adam(0.1), pruning.prune(0.0, every=None))
    params = lottery.rewind(params, params, mask)
    state = lottery.with_mask(tx.init(params), mask)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params, state = jax.jit(lambda c: jax.lax.scan(step, c, None, length=5)[0])((params, state))
    for name in SHAPES:
        np.testing.assert_array_equal(pruning.mask(state)[name], mask[name])
        np.testing.assert_array_equal(params[name] != 0, mask[name])
    # A ticket found by rounds under the transformation itself.
    again = lottery.imp_round(params, pruning.mask(state), 0.5)
    assert count(again) == count(mask) - int(0.5 * count(mask) + 0.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_interpolate(dtype):
    a, b = tree(0, dtype), tree(1, dtype)
    a["steps"] = b["steps"] = jnp.int32(7)
    mask = {**some_mask(2), "steps": MaskedNode}
    a, b = pruning.apply_mask(a, mask), pruning.apply_mask(b, mask)
    for alpha, end in ((0.0, a), (1.0, b)):
        got = jax.jit(lottery.interpolate)(a, b, alpha)
        for name, leaf in end.items():
            assert got[name].dtype == leaf.dtype
            np.testing.assert_array_equal(got[name], leaf)
    middle = lottery.interpolate(a, b, 0.25)
    for name in SHAPES:
        x, y = (np.asarray(t[name]).astype(np.float64) for t in (a, b))
        expected = 0.75 * x + 0.25 * y
        np.testing.assert_allclose(
            np.asarray(middle[name]).astype(np.float64),
            expected,
            rtol=1e-6 if dtype == jnp.float32 else 1e-2,
            atol=1e-6 if dtype == jnp.float32 else 1e-2,
        )
        assert not np.any(np.asarray(middle[name])[~np.asarray(mask[name])])
    assert int(middle["steps"]) == 7


def double_well(params):
    """Minima at -1 and 1 of different depth, a hill of height 1 between them."""
    w = params["w"]
    return jnp.square(jnp.square(w) - 1.0) + 0.125 * w


ENDS = {"w": jnp.float32(-1.0)}, {"w": jnp.float32(1.0)}


@pytest.mark.parametrize("points", [2, 3, 11])
@pytest.mark.parametrize("batch_size", [None, 2, 4])
def test_the_barrier_of_a_double_well(points, batch_size):
    found = lottery.barrier(double_well, *ENDS, points=points, batch_size=batch_size)
    np.testing.assert_allclose(found.alphas, np.linspace(0, 1, points), atol=1e-7)
    w = 2 * np.linspace(0, 1, points) - 1
    np.testing.assert_allclose(found.losses, (w**2 - 1) ** 2 + w / 8, atol=1e-6)
    # Against the line between the wells the slope cancels.
    assert float(found.height) == pytest.approx(np.max((w**2 - 1) ** 2), abs=1e-6)
    mean = lottery.barrier(double_well, *ENDS, points=points, reference="mean")
    assert float(mean.height) == pytest.approx(float(found.losses.max()), abs=1e-6)
    assert float(mean.height) >= 0.125


@given(st.integers(0, 2**16))
@settings(max_examples=20)
def test_a_convex_loss_has_no_barrier(seed):
    a, b, center = tree(seed), tree(seed + 1), tree(seed + 2)

    def loss(params):
        return sum(jnp.sum(jnp.square(params[n] - center[n])) for n in SHAPES)

    found = lottery.barrier(loss, a, b, 5)
    assert 0 <= float(found.height) <= 1e-5 * float(found.losses.max())


def test_a_barrier_under_jit_and_over_a_population_of_ends():
    ends = {"w": jnp.array([-1.0, -0.5, 1.0])}

    def height(end):
        return lottery.barrier(double_well, end, ENDS[1]).height

    together = jax.jit(jax.vmap(height))(ends)
    for place in range(3):
        alone = height({"w": ends["w"][place]})
        np.testing.assert_allclose(together[place], alone, atol=1e-6)
    assert together[2] == 0


def test_a_loss_that_is_not_a_number_has_no_barrier_that_is_one():
    def loss(params):
        return jnp.where(jnp.abs(params["w"]) < 0.1, jnp.nan, 0.0)

    assert np.isnan(lottery.barrier(loss, *ENDS).height)


PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
MASK = {"w": jnp.ones((2, 2), bool), "b": MaskedNode}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lottery.rewind(PARAMS, {"w": PARAMS["w"]}, MASK),
            "early is another tree: .* w, n",
        ),
        (
            lambda: lottery.rewind(PARAMS, {**PARAMS, "w": jnp.ones((2, 3))}, MASK),
            r"leaf 'w' of early has shape \(2, 3\), not \(2, 2\)",
        ),
        (lambda: lottery.rewind(PARAMS, PARAMS, {"v": MASK["w"]}), "mask belongs to another tree"),
        (
            lambda: lottery.imp_round(PARAMS, MASK, 1.0),
            r"rate must be a share .* \[0, 1\), not 1.0",
        ),
        (lambda: lottery.imp_round(PARAMS, {"v": MASK["w"]}, 0.5), "belongs to another tree"),
        (lambda: lottery.rounds_to(1.0, 0.5), r"sparsity must be in \[0, 1\), not 1.0"),
        (lambda: lottery.rounds_to(0.5, 0.0), r"rate must be in \(0, 1\), not 0.0"),
        (lambda: lottery.interpolate(PARAMS, {"w": PARAMS["w"]}, 0.5), "b is another tree"),
        (lambda: lottery.barrier(double_well, *ENDS, points=1), "points must be at least 2, not 1"),
        (
            lambda: lottery.barrier(double_well, *ENDS, reference="max"),
            "reference='max'; choose 'line' or 'mean'",
        ),
        (
            lambda: lottery.with_mask(optax.adam(0.1).init(PARAMS), MASK),
            "holds 0 pruning states; put an.pruning.prune",
        ),
        (
            lambda: lottery.with_mask(pruning.prune(0.0).init(PARAMS), {"v": MASK["w"]}),
            "belongs to another tree",
        ),
        (
            lambda: lottery.with_mask(
                pruning.prune(0.0).init(PARAMS), {**MASK, "w": jnp.ones((3, 2), bool)}
            ),
            r"leaf 'w' of mask has shape \(3, 2\), not \(2, 2\)",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
