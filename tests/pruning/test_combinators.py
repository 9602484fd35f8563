"""Scores of scores: against numpy, through `supply`, and through `prune`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptivenet import pruning
from adaptivenet.pruning import combinators, scores
from adaptivenet.pruning.saliency import fisher_tempered, saliency, snr


def by_rank(values, counted):
    return np.array([(values[counted] <= x).sum() / counted.sum() for x in values])


SIZES = {
    "mean": lambda x: x.mean(),
    "max": lambda x: x.max(),
    "l2": lambda x: np.sqrt((x**2).sum()),
}


def slow_normalise(trees, alive, by, across):
    groups = [list(trees)] if across == "tree" else [[name] for name in trees]
    out = {}
    for group in groups:
        joined = np.concatenate([trees[name].ravel() for name in group]).astype(np.float64)
        counted = np.concatenate([alive[name].ravel() for name in group])
        if by == "rank":
            result = by_rank(joined, counted)
        else:
            result = joined / (SIZES[by](joined[counted]) or 1.0)
        ends = np.cumsum([trees[name].size for name in group])[:-1]
        for name, part in zip(group, np.split(result, ends), strict=True):
            out[name] = part.reshape(trees[name].shape)
    return out


VALUES = hnp.arrays(
    np.float32, (3, 4), elements=st.sampled_from([0.0, 0.5, 1.0, 1.5, -2.0, 3.25, -7.0])
)


@pytest.mark.parametrize("across", ["leaf", "tree"])
@pytest.mark.parametrize("by", ["mean", "max", "l2", "rank"])
@given(a=VALUES, b=VALUES, seed=st.integers(0, 99))
def test_normalise_equals_numpy(by, across, a, b, seed):
    mask = {k: np.random.default_rng(seed).random((3, 4)) < 0.7 for k in "ab"}
    mask["a"][0, 0] = mask["b"][0, 0] = True
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b), "c": optax.MaskedNode()}
    got = combinators.normalise(by=by, across=across)(params, mask=mask)
    expected = slow_normalise({"a": abs(a), "b": abs(b)}, mask, by, across)
    for name in "ab":
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
    assert isinstance(got["c"], optax.MaskedNode)


def test_without_a_mask_all_are_counted():
    params = {"w": jnp.array([0.0, 2.0, 4.0])}
    assert combinators.normalise()(params)["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("by", ["mean", "max", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalise_neither_overflows_nor_vanishes(by, scale):
    params = {"w": jnp.linspace(0.1, 1.0, 50)}
    scaled = {"w": params["w"] * jnp.float32(scale)}
    normal = combinators.normalise(by=by)
    np.testing.assert_allclose(normal(scaled)["w"], normal(params)["w"], rtol=1e-5)


def test_what_is_not_finite_does_not_spread():
    params = {"w": jnp.array([1.0, jnp.nan, 3.0, jnp.inf])}
    for by in ("mean", "max", "l2", "rank"):
        got = np.asarray(combinators.normalise(by=by)(params)["w"])
        assert np.isfinite(got[[0, 2]]).all()
        assert np.isnan(got[1])
        assert got[3] == (1.0 if by == "rank" else np.inf)
        assert got[0] < got[2] <= got[3]


def test_zeros_stay_zero():
    for by in ("mean", "max", "l2"):
        got = combinators.normalise(by=by)({"w": jnp.zeros((2, 2), jnp.bfloat16)})["w"]
        assert got.dtype == jnp.float32
        assert got.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_mix_is_the_weighted_sum():
    w = {"a": jnp.array([1.0, -3.0]), "b": jnp.array([[2.0, 6.0]])}
    g = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([[0.5, -1.0]])}
    score = combinators.mix({scores.magnitude: 2.0, saliency: 0.5})
    got = score(w, grads=g)
    first, second = np.array([1.0, 3, 2, 6]), np.array([4.0, 3, 1, 6])
    expected = 2 * first / first.mean() + 0.5 * second / second.mean()
    flat = np.concatenate([np.ravel(got["a"]), np.ravel(got["b"])])
    np.testing.assert_allclose(flat, expected, rtol=1e-6)
    raw = combinators.mix([(scores.magnitude, 2.0), (saliency, 0.5)], by=None)
    np.testing.assert_allclose(raw(w, grads=g)["a"], 2 * first[:2] + 0.5 * second[:2])


def test_product_is_the_product():
    w = {"a": jnp.array([1.0, -3.0]), "b": jnp.array([[2.0, 6.0]])}
    g = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([[0.5, -1.0]])}
    raw = combinators.product(scores.magnitude, saliency, powers=(2, 0.5), by=None)
    np.testing.assert_allclose(raw(w, grads=g)["a"], [1 * 2, 9 * 3**0.5], rtol=1e-6)
    scaled = combinators.product(scores.magnitude, saliency, powers=(2, 0.5))
    ratio = np.asarray(scaled(w, grads=g)["a"]) / np.asarray(raw(w, grads=g)["a"])
    np.testing.assert_allclose(ratio, 1 / (3.0**2 * 3.5**0.5), rtol=1e-5)


def test_a_fisher_tempered_score_can_be_composed():
    """|w| F^(1/4) is a product of two scores."""

    def curvature(params, *, fisher, **signals):
        return fisher

    key = jax.random.key(0)
    w = {"w": jax.random.normal(key, (4, 5))}
    f = {"w": jax.random.uniform(jax.random.fold_in(key, 1), (4, 5))}
    composed = combinators.product(scores.magnitude, curvature, powers=(1, 0.25))(w, fisher=f)
    direct = fisher_tempered(0.25)(w, fisher=f)
    ratio = np.asarray(composed["w"] / direct["w"])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def slow_lamp(values):
    """The paper's definition: weights in ascending order, of equal ones the first comes last."""
    flat = np.abs(values.ravel()).astype(np.float64)
    order = sorted(range(flat.size), key=lambda i: (flat[i], -i))
    result = np.zeros(flat.size)
    for rank, place in enumerate(order):
        total = sum(flat[other] ** 2 for other in order[rank:])
        result[place] = flat[place] ** 2 / total if total else 0.0
    return result.reshape(values.shape)


@given(a=VALUES, b=hnp.arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32)))
def test_lamp_equals_the_definition(a, b):
    got = combinators.lamp()({"a": jnp.asarray(a), "b": jnp.asarray(b)})
    for name, values in (("a", a), ("b", b)):
        np.testing.assert_allclose(got[name], slow_lamp(values), rtol=1e-5, atol=1e-30)
        assert float(got[name].max()) == (1.0 if values.any() else 0.0)


def test_lamp_keeps_the_order_within_a_leaf_however_many():
    w = jax.random.normal(jax.random.key(0), (300, 300))
    got = np.ravel(combinators.lamp()({"w": w})["w"])
    order = np.argsort(-np.abs(np.ravel(w)), kind="stable")
    assert (np.diff(got[order]) <= 0).all()
    assert got[order[0]] == 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lamp_does_not_depend_on_the_scale(scale):
    w = jax.random.normal(jax.random.key(0), (6, 7))
    small = combinators.lamp()({"w": w * jnp.float32(scale)})["w"]
    np.testing.assert_allclose(small, combinators.lamp()({"w": w})["w"], rtol=1e-5)


def test_lamp_gives_no_layer_all_and_empties_none():
    """Where one layer's weights are all larger, a global threshold empties the other."""
    key = jax.random.key(0)
    small = 0.01 * jax.random.normal(key, (8, 8))
    params = {"large": 10 + jax.random.normal(key, (8, 8)), "small": small, "none": jnp.ones(3)}

    def kept(score):
        pruner = pruning.prune(0.9375, score=score, allocation=pruning.Global(), every=None)
        _, state = pruning.revise(pruner, params, pruner.init(params))
        return {name: int(pruning.mask(state)[name].sum()) for name in ("large", "small")}

    assert kept(scores.magnitude) == {"large": 8, "small": 0}
    by_lamp = kept(combinators.lamp())
    assert by_lamp["large"] + by_lamp["small"] == 8
    assert by_lamp["small"] >= 1
    assert by_lamp["large"] >= 1
    # Within the leaf, the largest stay.
    pruner = pruning.prune(0.9375, score=combinators.lamp(), every=None)
    pruned, _ = pruning.revise(pruner, params, pruner.init(params))
    alive = np.abs(np.asarray(pruned["small"])[np.asarray(pruned["small"]) != 0])
    assert sorted(np.ravel(abs(small)))[-by_lamp["small"] :] == sorted(alive)


def test_lamp_of_another_score_leaves_out_the_dead():
    mask = {"w": jnp.array([True, False, True])}
    flat = combinators.lamp(lambda p, **signals: {"w": jnp.array([1.0, 9.0, 2.0])})
    got = flat({"w": jnp.zeros(3)}, mask=mask)["w"]
    np.testing.assert_allclose(got, [1 / 5, 0, 1], rtol=1e-6)
    bad = combinators.lamp()({"w": jnp.array([1.0, jnp.nan, 2.0])})["w"]
    assert np.isnan(bad[1])
    np.testing.assert_allclose(bad[jnp.array([0, 2])], [1 / 5, 1], rtol=1e-6)


COMBINED = {
    "normalise(snr)": lambda: combinators.normalise(snr),
    "lamp(snr)": lambda: combinators.lamp(snr),
    "mix(magnitude, snr)": lambda: combinators.mix({scores.magnitude: 1, snr: 1}),
    "product(snr, magnitude)": lambda: combinators.product(snr, scores.magnitude),
    "mix(lamp(snr), random)": lambda: combinators.mix(
        [(combinators.lamp(snr), 1), (scores.random, 0.5)]
    ),
}


@pytest.mark.parametrize("name", COMBINED)
def test_required_signals_are_those_of_the_members(name):
    score = COMBINED[name]()
    wanted = ("posterior", "key") if "random" in name else ("posterior",)
    assert score.__name__ == name
    assert scores.required_signals(score) == wanted
    message = r"\(\) asks for the signal 'posterior', which nobody supplies: wrap the chain in"
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=message) as caught:
        scores.supply(score, params, {"key": jax.random.key(0)})
    assert str(caught.value).startswith(name)
    pruner = pruning.prune(0.5, score=score)
    with pytest.raises(ValueError, match=message):
        pruner.update(params, pruner.init(params), params)
    with pytest.raises(ValueError, match=message):
        pruning.revise(pruner, params, pruner.init(params))


def test_a_mix_within_prune_prunes_as_its_scores_say():
    w = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    grads = {"w": jnp.array([[8.0, 0.0, 1.0, 0.1]])}
    # |w| / 2.5 + |w g| / 2.85: 3.2, 0.8, 2.3, 1.7
    pruner = pruning.prune(0.5, score=combinators.mix({scores.magnitude: 1, saliency: 1}))
    _, state = pruner.update(grads, pruner.init(w), w, grads=grads)
    assert pruning.mask(state)["w"].tolist() == [[True, False, True, False]]


def test_the_dead_do_not_change_the_statistics():
    """Half of one leaf is dead: its mean is that of the living."""
    w = {"a": jnp.array([[4.0, 2.0, 0.0, 0.0]]), "b": jnp.array([[3.0, 3.0, 3.0, 1.0]])}
    mask = {"a": jnp.array([[True, True, False, False]]), "b": jnp.ones((1, 4), bool)}
    got = combinators.normalise()(w, mask=mask)
    np.testing.assert_allclose(got["a"], [[4 / 3, 2 / 3, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(got["b"], [[1.2, 1.2, 1.2, 0.4]], rtol=1e-6)


def test_random_members_draw_different_numbers():
    params = {"w": jnp.zeros(100)}
    one = combinators.mix([(scores.random, 1.0), (scores.random, 0.0)], by=None)
    two = combinators.mix([(scores.random, 0.0), (scores.random, 1.0)], by=None)
    key = jax.random.key(0)
    assert float(jnp.abs(one(params, key=key)["w"] - two(params, key=key)["w"]).max()) > 0.1


def test_weights_and_powers_may_be_swept():
    params, fisher = {"w": jnp.linspace(-1.0, 2.0, 9)}, {"w": jnp.linspace(1.0, 0.0, 9)}

    def curvature(params, *, fisher, **signals):
        return fisher

    def run(strength):
        mixed = combinators.mix([(scores.magnitude, strength), (curvature, 1.0)])
        power = combinators.product(scores.magnitude, curvature, powers=(1.0, strength))
        return mixed(params, fisher=fisher), power(params, fisher=fisher)

    strengths = jnp.array([0.5, 1.0, 2.0])
    together = jax.jit(jax.vmap(run))(strengths)
    for place, strength in enumerate(strengths.tolist()):
        for got, alone in zip(together, run(strength), strict=True):
            np.testing.assert_allclose(got["w"][place], alone["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [combinators.normalise, combinators.lamp])
@pytest.mark.parametrize("by", ["mean", "rank"])
def test_members_of_a_population_are_scored_one_by_one(make, by):
    score = make() if make is combinators.lamp else make(by=by, across="tree")
    batch = {"w": jax.random.normal(jax.random.key(0), (3, 4, 5)), "v": jnp.ones((3, 2))}
    together = jax.jit(jax.vmap(score))(batch)
    for place in range(3):
        alone = score(jax.tree.map(lambda leaf: leaf[place], batch))  # noqa: B023 (used at once)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[place], b, rtol=1e-6),  # noqa: B023
            together,
            alone,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: combinators.normalise(by="median"), r"by='median'; choose one of mean, max"),
        (lambda: combinators.normalise(across="row"), r"across='row'; choose one of leaf, tree"),
        (lambda: combinators.mix({}), "at least one score"),
        (lambda: combinators.mix({scores.magnitude: -1}), "weight of magnitude must be >= 0"),
        (lambda: combinators.mix({scores.magnitude: 0}), "every weight of mix"),
        (lambda: combinators.mix({scores.magnitude: 1}, by="x"), "by='x'"),
        (lambda: combinators.product(), "at least one score"),
        (lambda: combinators.product(scores.magnitude, powers=[1, 2]), "1 scores but 2 powers"),
        (lambda: combinators.product(scores.magnitude, across="x"), "across='x'"),
    ],
)
def test_mistakes_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
