"""Scores from gradients, curvature and beliefs, against their formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptivenet import pruning
from adaptivenet.pruning.saliency import (
    fisher_tempered,
    movement,
    obd,
    ordinal,
    saliency,
    snr,
    taylor,
)

FACTORIES = {
    "saliency": lambda: saliency,
    "taylor": lambda: taylor,
    "fisher_tempered": lambda: fisher_tempered(),
    "obd": lambda: obd,
    "snr": lambda: snr,
    "movement": lambda: movement,
}
NAMES = list(FACTORIES)


def signals_for(seed, dtype=jnp.float32):
    """Parameters with a leaf that is no synapse, and every signal, with leaves beyond those."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}

    def tree(key, positive=False):
        leaves = {
            name: jax.random.normal(jax.random.fold_in(key, place), shape, dtype)
            for place, (name, shape) in enumerate(shapes.items())
        }
        return jax.tree.map(jnp.abs, leaves) if positive else leaves

    params = {**tree(keys[0]), "b": optax.MaskedNode()}
    signals = {
        "grads": tree(keys[1]),
        "fisher": tree(keys[2], positive=True),
        "movement": tree(keys[3]),
        "posterior": SimpleNamespace(mean=tree(keys[4]), precision=tree(keys[5], positive=True)),
    }
    return params, signals


def oracle(name, w, g, f, m, mean, precision, top):
    return {
        "saliency": abs(w * g),
        "taylor": (w * g) ** 2,
        "fisher_tempered": abs(w) * (f / top) ** 0.25,
        "obd": w**2 * f / 2,
        "snr": abs(mean) * precision**0.5,
    }[name]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "movement"])
def test_equals_its_formula(name, dtype):
    params, signals = signals_for(0, dtype)
    got = FACTORIES[name]()(params, **signals, step=3)
    assert isinstance(got["b"], optax.MaskedNode)
    belief = signals["posterior"]
    top = max(np.asarray(signals["fisher"][leaf], np.float64).max() for leaf in "ac")
    for leaf in "ac":
        trees = (params, *(signals[n] for n in ("grads", "fisher", "movement")))
        parts = [tree[leaf] for tree in (*trees, belief.mean, belief.precision)]
        expected = oracle(name, *(np.asarray(part, np.float64) for part in parts), top)
        assert got[leaf].dtype == jnp.float32
        np.testing.assert_allclose(got[leaf], expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_jit_and_vmap_change_nothing(name):
    members = [signals_for(seed) for seed in range(3)]

    def run(params, grads, fisher, moved, mean, precision):
        posterior = SimpleNamespace(mean=mean, precision=precision)
        signals = {"grads": grads, "fisher": fisher, "movement": moved, "posterior": posterior}
        return FACTORIES[name]()(params, **signals)

    rows = [
        (p, s["grads"], s["fisher"], s["movement"], s["posterior"].mean, s["posterior"].precision)
        for p, s in members
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    together = jax.jit(jax.vmap(run))(*stacked)
    for place, row in enumerate(rows):
        for alone in (run(*row), jax.jit(run)(*row)):
            one = jax.tree.map(lambda leaf: leaf[place], together)  # noqa: B023 (used at once)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, alone)


def test_relations_between_the_scores():
    params, signals = signals_for(1)
    first = saliency(params, **signals)
    second = taylor(params, **signals)
    np.testing.assert_allclose(second["a"], first["a"] ** 2, rtol=1e-6)
    still = fisher_tempered(0.0)(params, **signals)
    np.testing.assert_allclose(still["a"], abs(params["a"]), rtol=1e-6)
    # Posterior SNR squared is twice optimal brain damage at the mean, with precision as curvature.
    belief = signals["posterior"]
    damage = obd({"a": belief.mean["a"]}, fisher=belief.precision)
    certain = snr(params, posterior=belief)
    np.testing.assert_allclose(certain["a"] ** 2, 2 * damage["a"], rtol=1e-5)


def test_pooled_taylor_is_the_importance_of_a_unit():
    """The sum over a unit's synapses, the form in which the paper's groups add up."""
    w = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    g = jnp.array([[1.0, -1.0], [3.0, 2.0]])
    units = taylor({"w": w}, grads={"w": g})["w"].sum(axis=0)
    assert units.tolist() == [1.0 + 9.0, 4.0 + 1.0]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_tempering_does_not_depend_on_the_scale_of_the_gradients(scale):
    params, signals = signals_for(2)
    small = jax.tree.map(lambda f: f * jnp.float32(scale), signals["fisher"])
    score = fisher_tempered(1.0)
    got, expected = score(params, fisher=small), score(params, fisher=signals["fisher"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_a_fisher_of_zeros_is_no_nan():
    params, signals = signals_for(2)
    nothing = jax.tree.map(jnp.zeros_like, signals["fisher"])
    got = fisher_tempered()(params, fisher=nothing)
    assert float(got["a"].max()) == float(got["a"].min()) == 0.0


def test_power_may_be_swept():
    params, signals = signals_for(3)

    def score(power):
        return fisher_tempered(power)(params, fisher=signals["fisher"])

    powers = jnp.array([0.0, 0.25, 1.0])
    together = jax.vmap(score)(powers)
    for place, power in enumerate(powers.tolist()):
        np.testing.assert_allclose(together["a"][place], score(power)["a"], rtol=1e-6)
    with pytest.raises(ValueError, match="power must be a number >= 0, not -1"):
        fisher_tempered(-1)


FLOATS = hnp.arrays(np.float32, 30, elements=st.floats(width=32, allow_nan=False))


@given(values=FLOATS)
def test_ordinal_keeps_the_order(values):
    got = np.asarray(ordinal(jnp.asarray(values)))
    assert (got >= 0).all()
    order = np.argsort(values, kind="stable")
    assert (got[order][1:] >= got[order][:-1]).all()
    # Only neighbours among float32 may become equal.
    low, high = values[order][:-1], values[order][1:]
    with np.errstate(over="ignore"):
        apart = np.isfinite(low) & (np.nextafter(low, np.float32(np.inf)) < high)
    assert (got[order][1:] > got[order][:-1])[apart].all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_ordinal_keeps_all_short_floats_distinct(dtype):
    every = jax.lax.bitcast_convert_type(
        jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16), dtype
    )
    wide = np.asarray(every.astype(jnp.float32))
    got = np.asarray(ordinal(every))
    normal = np.isfinite(wide) & ((np.abs(wide) >= 2.0**-126) | (wide == 0))
    values, scores = wide[normal], got[normal]
    assert len(np.unique(values)) == len(np.unique(scores)) > 2**15
    assert (np.diff(scores[np.argsort(values, kind="stable")]) >= 0).all()
    assert np.isnan(got[np.isnan(wide)]).all()


def test_ordinal_at_the_edges():
    largest = np.finfo(np.float32).max
    edges = jnp.array([-jnp.inf, -largest, -0.0, 0.0, largest, jnp.inf, jnp.nan])
    got = ordinal(edges).tolist()
    assert got[:6] == [0.0, 0.0, 1.5, 1.5, float(largest), float("inf")]
    assert np.isnan(got[6])


def test_movement_prunes_what_shrinks():
    params = {"w": jnp.array([[1.0, 1.0, 1.0, 1.0]])}
    sums = {"w": jnp.array([[-3.0, 0.2, -0.1, 4.0]])}
    pruner = pruning.prune(0.5, score=movement)
    _, state = pruner.update(params, pruner.init(params), params, movement=sums)
    assert pruning.mask(state)["w"].tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("name", NAMES)
def test_within_prune(name):
    params, signals = signals_for(4)
    params["b"] = jnp.ones(5)
    pruner = pruning.prune(0.5, score=FACTORIES[name](), every=None)
    pruned, state = pruning.revise(pruner, params, pruner.init(params), **signals)
    scores = FACTORIES[name]()({**params, "b": optax.MaskedNode()}, **signals)
    kept = pruning.mask(state)
    alive = np.concatenate([np.ravel(kept[leaf]) for leaf in "ac"])
    values = np.concatenate([np.ravel(scores[leaf]) for leaf in "ac"])
    assert alive.sum() == 10
    assert values[alive].min() > values[~alive].max()
    np.testing.assert_array_equal(pruned["a"] != 0, kept["a"])


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("saliency", "grads"),
        ("taylor", "grads"),
        ("fisher_tempered", "fisher"),
        ("obd", "fisher"),
        ("snr", "posterior"),
        ("movement", "movement"),
    ],
)
def test_what_is_missing_is_named(name, signal):
    params = {"w": jnp.ones((2, 2))}
    pruner = pruning.prune(0.5, score=FACTORIES[name]())
    with pytest.raises(ValueError, match=rf"{name}\(\) asks for the signal '{signal}'"):
        pruner.update(params, pruner.init(params), params)


def test_signals_that_do_not_fit_are_refused_by_path():
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"grads have no leaf 'dense/kernel', .* they have other"):
        saliency(params, grads={"other": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"fisher have shape \(3,\) at 'dense/kernel', but .*2, 3"):
        obd(params, fisher={"dense": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match="two leaves of the path 'a/b'"):
        saliency(params, grads={"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(TypeError, match="trees mean and precision, which dict has not"):
        snr(params, posterior={})
