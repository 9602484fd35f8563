"""Layer-wise OBS against slow oracles that invert the Gram matrix anew for every weight."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning, trees
from adaptivenet.pruning import layerwise

INPUTS, OUTPUTS = 12, 7


def layer(seed, inputs=INPUTS, outputs=OUTPUTS, samples=40):
    """Weights, correlated calibration inputs, and their Gram matrix."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) + 2 * np.eye(inputs)
    x = (rng.normal(size=(samples, inputs)) @ mixing).astype(np.float32)
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x, x.T @ x


def damp(gram, damping=0.01):
    gram = np.asarray(gram, np.float64)
    return gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def half_up(share, number):
    return int(Fraction(share) * number + Fraction(1, 2))


def lowest(score, number):
    """The positions of the lowest scores; of equals the last."""
    order = np.argsort(score.ravel()[::-1], kind="stable")
    return score.size - 1 - order[:number]


def sequential(weight, gram, *, sparsity=None, structure=None, mask=None, block=128, damping=0.01):
    """Row by row in float64, with an explicit inverse of what is left of the Gram matrix."""
    w, h = np.array(weight, np.float64), damp(gram, damping)
    size, outputs = w.shape
    keep = np.ones(w.shape, bool) if mask is None else np.array(mask)
    group = size if mask is not None else structure[1] if structure else min(block, size)
    # Inverses of the trailing blocks, which do not depend on the weights.
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(size)]
    pivots = np.array([inverse[0, 0] for inverse in inverses])
    for i in range(size):
        if mask is None and i % group == 0:
            rows = slice(i, min(i + group, size))
            score = w[rows] ** 2 / pivots[rows, None]
            if structure is None:
                done = half_up(sparsity, i * outputs)
                cut = half_up(sparsity, rows.stop * outputs) - done
                flat = np.ones(score.size, bool)
                flat[lowest(score, cut)] = False
                keep[rows] = flat.reshape(score.shape)
            else:
                for column in range(outputs):
                    keep[i + lowest(score[:, column], group - structure[0]), column] = False
        for column in np.flatnonzero(~keep[i]):
            w[i:, column] -= w[i, column] / pivots[i] * inverses[i][:, 0]
        w[i, ~keep[i]] = 0
    return w, keep


def greedy(weight, gram, sparsity, damping=0.01):
    """Exact OBS: the weight that costs least of the whole layer, one at a time."""
    w, h = np.array(weight, np.float64), damp(gram, damping)
    inverse = np.stack([np.linalg.inv(h)] * w.shape[1])
    keep = np.ones(w.shape, bool)
    for _ in range(half_up(sparsity, w.size)):
        diagonal = np.einsum("oii->io", inverse)
        cost = np.where(keep, w**2 / np.where(keep, diagonal, 1), np.inf)
        i, column = np.unravel_index(np.argmin(cost), cost.shape)
        own = inverse[column]
        w[:, column] -= w[i, column] / own[i, i] * own[:, i]
        inverse[column] = own - np.outer(own[:, i], own[i]) / own[i, i]
        keep[i, column] = False
        w[~keep] = 0
    return w, keep


def error(x, weight, new):
    return np.sum((np.asarray(x, np.float64) @ (np.asarray(weight, np.float64) - new)) ** 2)


RULES = [
    {"sparsity": 0.5},
    {"sparsity": 0.7, "block": 4},
    {"sparsity": 0.35, "block": 5},
    {"sparsity": 0.9, "block": 1},
    {"structure": (2, 4)},
    {"structure": (1, 3), "block": 7},
    {"structure": (3, 4), "block": 4},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_it_is_what_explicit_inverses_give(rule, damping):
    for seed in range(4):
        weight, _, gram = layer(seed)
        new, mask = layerwise.obs(weight, gram, **rule, damping=damping)
        expected, keep = sequential(weight, gram, **rule, damping=damping)
        np.testing.assert_array_equal(mask, keep)
        np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-4)
        assert not np.any(np.asarray(new)[~keep])


@pytest.mark.parametrize("block", [1, 3, 5, 12, 128])
def test_a_given_mask_is_kept_and_blocks_change_nothing(block):
    weight, _, gram = layer(0)
    keep = np.random.default_rng(1).random(weight.shape) < 0.4
    expected, _ = sequential(weight, gram, mask=keep)
    new, mask = layerwise.obs(weight, gram, mask=keep, block=block)
    np.testing.assert_array_equal(mask, keep)
    np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-4)


def test_what_is_left_solves_the_least_squares_problem_where_the_cut_comes_first():
    """For rows cut before rows kept the updates are the exact optimum."""
    weight, _, gram = layer(3)
    h = damp(gram)
    keep = np.zeros(weight.shape, bool)
    keep[5:] = True
    new, _ = layerwise.obs(weight, gram, mask=keep)
    moved = np.linalg.solve(h[5:, 5:], h[5:, :5] @ weight[:5])
    np.testing.assert_allclose(new[5:], weight[5:] + moved, rtol=1e-3, atol=1e-4)


def by_magnitude(weight, sparsity):
    keep = np.ones(weight.size, bool)
    keep[lowest(np.abs(weight), half_up(sparsity, weight.size))] = False
    return keep.reshape(weight.shape)


def test_it_lies_between_exact_obs_and_magnitude():
    errors = []
    for seed in range(6):
        weight, x, gram = layer(seed, 32, 6, 100)
        fast = [layerwise.obs(weight, gram, 0.5, block=8, refine=steps)[0] for steps in (0, 10)]
        results = [
            greedy(weight, gram, 0.5)[0],
            *map(np.asarray, fast[::-1]),
            np.where(by_magnitude(weight, 0.5), weight, 0),
        ]
        errors.append([error(x, weight, new) for new in results])
        assert errors[-1] == sorted(errors[-1])
    exact, refined, plain, magnitude = np.mean(errors, axis=0)
    assert exact < refined < 0.8 * plain < 0.8 * 0.7 * magnitude


@pytest.mark.parametrize("from_mask", [True, False])
def test_refit_reaches_the_least_squares_optimum_of_a_mask(from_mask):
    weight, _, gram = layer(1)
    h, keep = damp(gram), np.random.default_rng(2).random(weight.shape) < 0.5
    keep[:, 0], keep[:, 1] = True, False
    start = None if from_mask else layerwise.obs(weight, gram, mask=keep)[0]
    new = layerwise.refit(weight, keep, gram, start=start, steps=3 * INPUTS)
    for column in range(OUTPUTS):
        rows = keep[:, column]
        own = np.linalg.solve(h[np.ix_(rows, rows)], h[rows] @ weight[:, column])
        np.testing.assert_allclose(new[rows, column], own, rtol=1e-3, atol=1e-4)
        assert not np.any(np.asarray(new)[~rows, column])
    np.testing.assert_allclose(new[:, 0], weight[:, 0], rtol=1e-5)


def test_every_step_of_refit_lowers_the_damped_error():
    weight, _, gram = layer(4, 32, 6, 100)
    keep, h = by_magnitude(weight, 0.5), damp(gram)
    errors = []
    for steps in range(12):
        delta = weight - np.asarray(layerwise.refit(weight, keep, gram, steps=steps), np.float64)
        errors.append(np.sum(delta * (h @ delta)))
    np.testing.assert_allclose(errors[0], error(np.linalg.cholesky(h).T, weight, weight * keep))
    assert np.all(np.diff(errors) < 0)


@given(st.integers(0, 2**16), st.integers(0, 999), st.sampled_from([3, 8, 12]))
@settings(max_examples=20)
def test_with_the_identity_it_is_magnitude_pruning_of_each_block(seed, thousandths, block):
    weight, _, _ = layer(seed)
    weight, sparsity = weight.round(1), thousandths / 1000  # with ties
    new, mask = layerwise.obs(
        weight, np.eye(INPUTS, dtype=np.float32), sparsity, block=block, damping=0
    )
    _, keep = sequential(weight, np.eye(INPUTS), sparsity=sparsity, block=block, damping=0)
    np.testing.assert_array_equal(mask, keep)
    np.testing.assert_array_equal(new, np.where(keep, weight, 0))
    if block == INPUTS:
        np.testing.assert_array_equal(mask, by_magnitude(weight, sparsity))


def test_with_a_diagonal_nothing_is_updated():
    weight, x, _ = layer(0)
    scale = np.linalg.norm(x, axis=0)
    new, mask = layerwise.obs(weight, np.diag(scale**2), 0.5, damping=0)
    wanda = np.abs(weight) * scale[:, None]
    assert wanda[np.asarray(mask)].min() >= wanda[~np.asarray(mask)].max()
    np.testing.assert_array_equal(new, np.where(mask, weight, 0))


@given(st.integers(0, 999), st.sampled_from([1, 4, 5, 12]))
def test_the_count_is_exact(thousandths, block):
    weight, _, gram = layer(0)
    sparsity = thousandths / 1000
    _, mask = layerwise.obs(weight, gram, sparsity, block=block)
    assert int(mask.sum()) == weight.size - half_up(sparsity, weight.size)
    # The share of each block is within one weight of the layer's.
    for first in range(0, INPUTS, block):
        rows = np.asarray(mask)[first : first + block]
        assert abs(rows.sum() - (1 - sparsity) * rows.size) <= 1


@pytest.mark.parametrize("structure", [(2, 4), (1, 4), (3, 6), (1, 2), (4, 4)])
def test_n_of_m(structure):
    n, m = structure
    weight, _, gram = layer(5)
    new, mask = layerwise.obs(weight, gram, structure=structure)
    groups = np.asarray(mask).reshape(INPUTS // m, m, OUTPUTS)
    np.testing.assert_array_equal(groups.sum(axis=1), n)
    if n == m:
        np.testing.assert_array_equal(new, weight)


def test_inputs_that_are_always_zero_go_first_and_disturb_nobody():
    weight, x, _ = layer(0)
    x = x.copy()
    x[:, [2, 7]] = 0
    gram = x.T @ x
    new, mask = layerwise.obs(weight, gram, 0.5)
    assert np.all(np.isfinite(new))
    assert not np.any(np.asarray(mask)[[2, 7]])
    # The others are pruned as if these were not there.
    others = [i for i in range(INPUTS) if i not in (2, 7)]
    keep = np.asarray(mask)[others]
    alone, _ = layerwise.obs(weight[others], gram[np.ix_(others, others)], mask=keep)
    np.testing.assert_allclose(np.asarray(new)[others], alone, rtol=1e-4, atol=1e-5)
    # Where few are cut, what is kept there stays.
    few, kept = layerwise.obs(weight, gram, 0.05)
    dead = np.asarray(kept)[[2, 7]]
    assert dead.any()
    np.testing.assert_array_equal(np.asarray(few)[[2, 7]], np.where(dead, weight[[2, 7]], 0))
    nothing, mask = layerwise.obs(weight, np.zeros_like(gram), 0.5)
    assert int(mask.sum()) == weight.size // 2
    np.testing.assert_array_equal(nothing, np.where(mask, weight, 0))


def test_fewer_samples_than_inputs():
    """Seven of twelve directions cost nothing but the damping."""
    weight, x, gram = layer(0, samples=5)
    new, _ = layerwise.obs(weight, gram, 0.5, block=4, refine=12, damping=1e-3)
    masked = np.where(by_magnitude(weight, 0.5), weight, 0)
    assert error(x, weight, np.asarray(new)) < 0.05 * error(x, weight, masked)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    weight, _, gram = layer(2)
    weight = jnp.asarray(weight).astype(dtype)
    new, mask = layerwise.obs(weight, gram, 0.5)
    wide, same = layerwise.obs(weight.astype(jnp.float32), gram, 0.5)
    assert new.dtype == dtype
    np.testing.assert_array_equal(mask, same)
    np.testing.assert_array_equal(new, wide.astype(dtype))


def test_kernels_of_more_axes_are_flattened_to_their_inputs():
    weight, _, gram = layer(4)
    flat, mask = layerwise.obs(weight, gram, 0.5)
    for shape in ((2, 2, 3, OUTPUTS), (3, 4, OUTPUTS, 1), (12, 1, OUTPUTS)):
        new, kept = layerwise.obs(weight.reshape(shape), gram, 0.5)
        assert new.shape == kept.shape == shape
        np.testing.assert_array_equal(new.reshape(weight.shape), flat)
        np.testing.assert_array_equal(kept.reshape(weight.shape), mask)


def test_jit_and_populations():
    layers = [layer(seed) for seed in range(3)]
    weights, grams = (jnp.stack([item[place] for item in layers]) for place in (0, 2))
    sparsities = jnp.array([0.25, 0.5, 0.75], jnp.float32)

    def prune(weight, gram, sparsity):
        return layerwise.obs(weight, gram, sparsity, block=5)

    together = jax.jit(jax.vmap(prune))(weights, grams, sparsities)
    for place in range(3):
        alone = prune(weights[place], grams[place], float(sparsities[place]))
        np.testing.assert_array_equal(together.mask[place], alone.mask)
        np.testing.assert_allclose(together.params[place], alone.params, rtol=1e-4, atol=1e-5)


def test_output_error_is_that_of_the_outputs():
    weight, x, gram = layer(6)
    new, _ = layerwise.obs(weight, gram, 0.5)
    expected = error(x, weight, np.asarray(new))
    assert float(layerwise.output_error(weight, new, gram)) == pytest.approx(expected, rel=1e-3)
    share = layerwise.output_error(weight, new, gram, relative=True)
    assert float(share) == pytest.approx(expected / error(x, weight, 0), rel=1e-3)
    conv = layerwise.output_error(weight.reshape(2, 6, 7), new.reshape(2, 6, 7), gram)
    assert float(conv) == pytest.approx(expected, rel=1e-3)


def small_tree():
    first, _, gram = layer(0)
    second, _, other = layer(1, OUTPUTS, 4)
    params = {
        "dense1": {"kernel": jnp.asarray(first), "bias": jnp.ones(OUTPUTS)},
        "dense2": {"kernel": jnp.asarray(second), "bias": jnp.ones(4)},
    }
    return params, {"dense1/kernel": gram, "dense2/kernel": other}


def test_a_tree_is_pruned_leaf_by_leaf():
    params, grams = small_tree()
    nested = {
        "dense1": {"kernel": grams["dense1/kernel"], "bias": optax.MaskedNode()},
        "dense2": {"kernel": grams["dense2/kernel"]},
    }
    for given_grams in (grams, nested):
        new, mask = layerwise.obs_tree(params, given_grams, 0.5)
        for name in ("dense1", "dense2"):
            alone, kept = layerwise.obs(params[name]["kernel"], grams[f"{name}/kernel"], 0.5)
            np.testing.assert_array_equal(new[name]["kernel"], alone)
            np.testing.assert_array_equal(mask[name]["kernel"], kept)
            assert new[name]["bias"] is params[name]["bias"]
        assert trees.paths(mask) == ("dense1/kernel", "dense2/kernel")
    only, mask = layerwise.obs_tree(params, {"dense2/kernel": grams["dense2/kernel"]}, 0.5)
    assert only["dense1"]["kernel"] is params["dense1"]["kernel"]
    assert trees.paths(mask) == ("dense2/kernel",)


def test_a_tree_with_masks_of_an_allocation_goes_on_with_the_transformation():
    params, grams = small_tree()
    pruner = pruning.prune(0.7, every=None)
    _, state = pruning.revise(pruner, params, pruner.init(params))
    masks = pruning.mask(state)
    new, mask = layerwise.obs_tree(params, grams, masks=masks, refine=5)
    for name in ("dense1", "dense2"):
        kernel, keep = new[name]["kernel"], masks[name]["kernel"]
        np.testing.assert_array_equal(mask[name]["kernel"], keep)
        np.testing.assert_array_equal(kernel, pruning.apply_mask(new, masks)[name]["kernel"])
        gram = grams[f"{name}/kernel"]
        before = jnp.where(keep, params[name]["kernel"], 0)
        repaired = layerwise.output_error(params[name]["kernel"], kernel, gram)
        assert repaired < layerwise.output_error(params[name]["kernel"], before, gram)


WEIGHT, _, GRAM = layer(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layerwise.obs(WEIGHT, GRAM), "exactly one of sparsity=, structure= and mask="),
        (lambda: layerwise.obs(WEIGHT, GRAM, 0.5, structure=(2, 4)), "exactly one of sparsity="),
        (lambda: layerwise.obs(WEIGHT, GRAM, 1.0), r"sparsity must be a sparsity in \[0, 1\)"),
        (lambda: layerwise.obs(WEIGHT, GRAM, structure=(2, 5)), "5 does not divide the 12 inputs"),
        (lambda: layerwise.obs(WEIGHT, GRAM, structure=(0, 4)), "must keep n of m with 0 < n <= m"),
        (lambda: layerwise.obs(WEIGHT, GRAM[:5, :5], 0.5), r"gram of shape \(5, 5\) does not fit"),
        (lambda: layerwise.obs(WEIGHT, GRAM[:5], 0.5), "gram must be a square matrix"),
        (lambda: layerwise.obs(WEIGHT.T, GRAM, 0.5), r"does not fit a weight of shape \(7, 12\)"),
        (lambda: layerwise.obs(WEIGHT, GRAM, mask=WEIGHT[:5] > 0), r"mask has shape \(5, 7\)"),
        (
            lambda: layerwise.obs(WEIGHT, GRAM, 0.5, block=0),
            "block must be a number of inputs >= 1",
        ),
        (lambda: layerwise.obs(WEIGHT, GRAM, 0.5, damping=-1.0), "damping must be >= 0, not -1.0"),
        (lambda: layerwise.obs(np.ones((2, 2), int), np.eye(2), 0.5), "weight must be floating"),
        (lambda: layerwise.obs(WEIGHT, GRAM * np.nan, 0.5), "argument 'gram' holds 144 nan"),
        (
            lambda: layerwise.obs(WEIGHT, np.ones_like(GRAM), 0.5, damping=0),
            r"not positive definite in float32 .* raise damping=",
        ),
        (lambda: layerwise.obs(WEIGHT, GRAM, 0.5, refine=-1), "refine must be a number of steps"),
        (lambda: layerwise.refit(WEIGHT, WEIGHT[:3] > 0, GRAM), r"mask has shape \(3, 7\), not"),
        (
            lambda: layerwise.refit(WEIGHT, WEIGHT > 0, GRAM, start=WEIGHT[:3]),
            r"start has shape \(3, 7\), not \(12, 7\)",
        ),
        (lambda: layerwise.output_error(WEIGHT, WEIGHT[:3], GRAM), r"pruned has shape \(3, 7\)"),
        (lambda: layerwise.obs_tree({"w": WEIGHT}, {}, 0.5), "grams holds no Gram matrix"),
        (
            lambda: layerwise.obs_tree({"dense": {"kernel": WEIGHT}}, {"dense/kernal": GRAM}, 0.5),
            "'dense/kernal' is no leaf of the parameters. Did you mean 'dense/kernel'",
        ),
        (
            lambda: layerwise.obs_tree({"w": WEIGHT}, {"w": GRAM}, structure=(2, 5)),
            "leaf 'w': structure=.* 5 does not divide",
        ),
        (
            lambda: layerwise.obs_tree(
                {"w": WEIGHT, "v": WEIGHT}, {"w": GRAM}, masks={"w": WEIGHT > 0, "v": WEIGHT > 0}
            ),
            "masks and grams must name the same leaves; only one of them has: v",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
