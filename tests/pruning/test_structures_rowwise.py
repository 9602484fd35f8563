"""Row-wise structures against loops over rows: N:M and constant fan-in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import as_count, as_share
from adaptivenet.pruning.allocations import Fixed, PerPath
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from adaptivenet.pruning.rowwise import FanIn, NofM, top_rows
from adaptivenet.pruning.structures import ByPath, Unit
from tests.pruning.events import cut, draw, ones

GLOBAL, UNIFORM = pruning.Global(), pruning.Uniform()


def sparsity(value):
    return pruning.Sparsity(as_share(value))


def best(scores, alive, k):
    """The k best of one row by a stable sort: nan behind zero, ties by position."""
    worth = np.abs(scores.astype(np.float64))
    worth = np.where(np.isnan(worth), -1.0, worth)
    order = np.argsort(np.where(alive, -worth, np.inf), kind="stable")
    kept = np.zeros(len(scores), bool)
    kept[order[: min(k, alive.sum())]] = True
    return kept


def by_groups(leaf, alive, n, m, axis=-2):
    """n of m along an axis, by a loop over all other axes and groups."""
    leaf, alive = np.moveaxis(leaf, axis, -1), np.moveaxis(np.asarray(alive), axis, -1)
    kept = np.zeros(leaf.shape, bool)
    for index in np.ndindex(leaf.shape[:-1]):
        for start in range(0, leaf.shape[-1], m):
            part = slice(start, start + m)
            kept[index][part] = best(leaf[index][part], alive[index][part], n)
    return np.moveaxis(kept, -1, axis)


def by_outputs(leaf, alive, k):
    """k inputs of every output, by a loop over outputs."""
    kept = np.zeros(leaf.shape, bool)
    for output in range(leaf.shape[-1]):
        row = best(leaf[..., output].ravel(), np.asarray(alive)[..., output].ravel(), k)
        kept[..., output] = row.reshape(leaf.shape[:-1])
    return kept


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    length=st.sampled_from([1, 4, 7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    data=st.data(),
)
def test_rows_by_a_stable_sort(rows, length, dtype, data):
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0, np.inf, np.nan])
    scores = data.draw(st.lists(values, min_size=rows * length, max_size=rows * length))
    scores = np.array(scores, np.float32).reshape(rows, length)
    alive = np.random.default_rng(data.draw(st.integers(0, 99))).random(scores.shape) < 0.7
    k = data.draw(st.lists(st.integers(0, length + 1), min_size=rows, max_size=rows))
    got = top_rows(jnp.asarray(scores, dtype), jnp.asarray(k, jnp.uint32), jnp.asarray(alive))
    for row in range(rows):
        np.testing.assert_array_equal(got[row], best(scores[row], alive[row], k[row]))


DENSE, CONV = (12, 5), (3, 2, 8, 4)


@pytest.mark.parametrize("shape", [DENSE, CONV])
@pytest.mark.parametrize("structure", [NofM(2, 4), NofM(1, 2), NofM(3, 4)], ids=str)
@pytest.mark.parametrize("allocation", [GLOBAL, UNIFORM], ids=["global", "uniform"])
def test_n_of_every_m_inputs_are_kept(structure, shape, allocation):
    params = draw(0, w=shape)
    out = cut(params, ones(params), sparsity(0.9), structure, allocation)
    expected = by_groups(params["w"], np.ones(shape, bool), structure.n, structure.m)
    np.testing.assert_array_equal(out.mask["w"], expected)
    assert float(out.threshold) == np.abs(params["w"][expected]).min()


def test_groups_along_another_axis():
    params = draw(1, w=(5, 8))
    out = cut(params, ones(params), sparsity(0.5), NofM(1, 4, axis=-1))
    expected = by_groups(params["w"], np.ones((5, 8), bool), 1, 4, axis=-1)
    np.testing.assert_array_equal(out.mask["w"], expected)


@pytest.mark.parametrize(
    ("demand", "cuts"),
    [
        (sparsity(0.0), False),
        (sparsity(0.005), False),  # less than half a synapse of 60
        (sparsity(0.1), True),
        (pruning.OfAlive(as_share(0.1)), True),
        (pruning.AtLeast(jnp.float32(0.0)), False),
        (pruning.AtLeast(jnp.float32(0.1)), True),
    ],
)
def test_a_fixed_pattern_holds_as_soon_as_anything_is_asked_for(demand, cuts):
    params = draw(2, w=DENSE)
    out = cut(params, ones(params), demand, NofM(2, 4))
    assert int(out.mask["w"].sum()) == (30 if cuts else 60)


def test_a_gradual_pattern_follows_the_target():
    params = draw(3, w=(40, 3))
    targets = [0.0, 0.05, 0.1, 0.3, 0.55, 0.7, 0.75, 0.9, 0.99]
    shares = jnp.asarray(targets, jnp.float32)
    for m in (4, 10):
        masks = jax.vmap(lambda s: cut(params, ones(params), sparsity(s), NofM(m=m)).mask["w"])(  # noqa: B023
            shares
        )
        for target, mask in zip(targets, masks, strict=True):
            # In the decimals as they are written: 0.7 of 10 is 7.
            n = m - int(np.floor(round(target * m, 6)))
            expected = by_groups(params["w"], np.ones((40, 3), bool), n, m)
            np.testing.assert_array_equal(mask, expected, err_msg=f"{target} of {m}")


def test_a_target_in_float32_is_not_one_too_few_in_a_large_leaf():
    # 0.7 in float32 lies below 0.7, by 12 of a billion synapses; 7 of 10 are cut all the same.
    rows, demand = 10**8, sparsity(jnp.float32(0.7))
    keep = demand.keep(as_count(0), rows * 10)
    assert int(keep) == 300_000_012
    assert int(NofM(m=10).per_row(keep, rows, 10)) == 3


@pytest.mark.parametrize("shape", [DENSE, CONV])
@pytest.mark.parametrize("allocation", [GLOBAL, UNIFORM], ids=["global", "uniform"])
def test_every_output_keeps_the_same_number_of_inputs(shape, allocation):
    params = draw(4, w=shape)
    shares = [0.0, 0.3, 0.5, 0.8, 0.99]
    masks = jax.vmap(
        lambda s: cut(params, ones(params), sparsity(s), FanIn(), allocation).mask["w"]
    )(jnp.asarray(shares, jnp.float32))
    fan_in = int(np.prod(shape[:-1]))
    for share, mask in zip(shares, masks, strict=True):
        size = fan_in * shape[-1]
        count = size - int(np.float32(share).astype(float) * size + 0.5)
        k = max(1, int(count / shape[-1] + 0.5))
        assert abs(k - max(1, (1 - share) * fan_in)) <= 0.51
        np.testing.assert_array_equal(mask, by_outputs(params["w"], np.ones(shape, bool), k))


def test_outputs_of_several_axes():
    params = draw(5, w=(6, 2, 3))
    out = cut(params, ones(params), sparsity(0.5), FanIn(axis=(1, 2)))
    assert np.asarray(out.mask["w"]).sum(axis=0).tolist() == [[3, 3, 3], [3, 3, 3]]
    flat = params["w"].reshape(6, 6)
    expected = by_outputs(flat, np.ones((6, 6), bool), 3).reshape(6, 2, 3)
    np.testing.assert_array_equal(out.mask["w"], expected)


@pytest.mark.parametrize("structure", [NofM(2, 4), NofM(m=4), FanIn(), FanIn(axis=(0, 1))], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5)])
def test_folding_is_undone(structure, shape):
    leaf = jnp.arange(float(np.prod(shape))).reshape(shape)
    np.testing.assert_array_equal(structure.unfold(structure.fold(leaf), shape), leaf)


def test_the_dead_are_never_kept_for_their_score():
    params = draw(6, w=DENSE)
    alive = np.random.default_rng(7).random(DENSE) < 0.5
    for structure, expected in (
        (NofM(2, 4), by_groups(params["w"], alive, 2, 4)),
        (FanIn(), by_outputs(params["w"], alive, 3)),
    ):
        out = cut(params, {"w": jnp.asarray(alive)}, sparsity(0.75), structure)
        np.testing.assert_array_equal(out.mask["w"], expected)


def test_a_share_of_the_living_of_every_output():
    params = draw(8, w=(10, 4))
    out = cut(params, ones(params), sparsity(0.5), FanIn())
    again = cut(params, out.mask, pruning.OfAlive(as_share(0.4)), FanIn())
    assert np.asarray(again.mask["w"]).sum(axis=0).tolist() == [3, 3, 3, 3]
    assert not np.any(np.asarray(again.mask["w"]) & ~np.asarray(out.mask["w"]))


def test_other_leaves_compete_for_their_own_share():
    params = draw(9, a=(8, 5), b=(6, 4), c=(4, 4))
    mixed = ByPath({"a": NofM(2, 4), "b": FanIn()})
    out = cut(params, ones(params), sparsity(0.75), mixed)
    np.testing.assert_array_equal(
        out.mask["a"], by_groups(params["a"], np.ones((8, 5), bool), 2, 4)
    )
    # 6 of 24 synapses, 1.5 of every output: rounded up.
    np.testing.assert_array_equal(out.mask["b"], by_outputs(params["b"], np.ones((6, 4), bool), 2))
    assert int(out.mask["c"].sum()) == 4


def test_per_leaf_allocations_set_the_fan_in():
    params = draw(10, a=(16, 16), b=(4, 4))
    out = cut(params, ones(params), sparsity(0.75), FanIn(), ErdosRenyiKernel())
    # 68 of 272 synapses as 32 to 8: 54 and 14, of 16 outputs and of 4.
    assert np.asarray(out.mask["a"]).sum(axis=0).tolist() == [3] * 16
    assert np.asarray(out.mask["b"]).sum(axis=0).tolist() == [4] * 4
    rules = PerPath({"a": Fixed(0.5), "b": 0.0})
    out = cut(params, ones(params), sparsity(0.75), FanIn(), rules)
    assert np.asarray(out.mask["a"]).sum(axis=0).tolist() == [8] * 16
    assert out.mask["b"].all()
    floor = cut(params, ones(params), sparsity(0.9), FanIn(), pruning.Uniform(floor_share=0.5))
    assert np.asarray(floor.mask["b"]).sum(axis=0).tolist() == [2] * 4


def test_half_precision():
    params = draw(11, w=CONV)
    exact = jax.tree.map(lambda p: np.asarray(jnp.asarray(p, jnp.bfloat16), np.float32), params)
    out = cut(params, ones(params), sparsity(0.5), NofM(2, 4), dtype=jnp.bfloat16)
    expected = by_groups(exact["w"], np.ones(CONV, bool), 2, 4)
    np.testing.assert_array_equal(out.mask["w"], expected)


def test_eager_runs_agree():
    params = draw(12, w=(4, 3))
    for structure in (NofM(2, 4), FanIn()):
        eager = cut.__wrapped__(params, ones(params), sparsity(0.5), structure)
        jitted = cut(params, ones(params), sparsity(0.5), structure)
        np.testing.assert_array_equal(eager.mask["w"], jitted.mask["w"])


def test_leaves_without_elements():
    params = {"w": np.zeros((0, 3), np.float32), "v": np.ones((4, 0), np.float32)}
    for structure in (NofM(2, 4), FanIn()):
        out = cut(params, ones(params), sparsity(0.5), structure)
        assert out.mask["w"].shape == (0, 3)
        assert out.mask["v"].shape == (4, 0)


def test_within_a_chain():
    params = {"w": jnp.asarray(draw(13, w=(8, 4))["w"]), "b": jnp.ones(4)}
    tx = optax.chain(optax.sgd(0.1), pruning.prune(0.5, structure=NofM(2, 4)))
    updates, state = tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)["w"].reshape(2, 4, 4)
    mask = np.asarray(pruning.mask(state)["w"]).reshape(2, 4, 4)
    assert (mask.sum(axis=1) == 2).all()
    assert not np.asarray(new)[~mask].any()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (NofM(2, 4), r"leaf 'b/kernel' of shape \(6, 3\): the 6 entries of axis -2 are not .*m=4"),
        (NofM(1, 2, axis=-3), r"leaf 'a/kernel' of shape \(8, 3\): it has no axis -3"),
        (FanIn(axis=2), r"leaf 'a/kernel' of shape \(8, 3\): it has not all axes"),
        (FanIn(axis=(1, -1)), r"leaf 'a/kernel' .* names an axis twice"),
        (ByPath({"b": NofM(m=5)}, Unit()), r"leaf 'b/kernel' of shape \(6, 3\).*m=5"),
    ],
)
def test_what_does_not_fit_is_named(structure, message):
    params = draw(14, **{"a/kernel": (8, 3), "b/kernel": (6, 3)})
    with pytest.raises(ValueError, match=message):
        cut(params, ones(params), sparsity(0.5), structure)
    with pytest.raises(ValueError, match=message):
        pruning.event.check(params, structure=structure, allocation=GLOBAL)


@pytest.mark.parametrize(
    ("structure", "demand", "message"),
    [
        (FanIn(), pruning.AtLeast(jnp.float32(0.1)), "leaf 'w': FanIn.* threshold"),
        (NofM(m=4), pruning.AtLeast(jnp.float32(0.1)), "leaf 'w': NofM.* threshold"),
        (NofM(m=4), pruning.OfAlive(as_share(0.1)), "leaf 'w': NofM.* share of the living"),
    ],
)
def test_demands_that_tell_no_number_a_row(structure, demand, message):
    params = draw(15, w=(8, 3))
    with pytest.raises(ValueError, match=message):
        cut(params, ones(params), demand, structure)


def test_a_target_of_zero_that_would_never_cut_is_refused():
    params = draw(16, w=(8, 3))
    with pytest.raises(ValueError, match=r"leaf 'w': NofM.*fixes the density"):
        pruning.event.check(params, structure=NofM(2, 4), allocation=GLOBAL, target=0.0)
    pruning.event.check(params, structure=NofM(m=4), allocation=GLOBAL, target=0.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NofM(5, 4), ValueError, "n=5 is more than m=4"),
        (lambda: NofM(0, 4), ValueError, "n must be an integer >= 1"),
        (lambda: NofM(m=0), ValueError, "m must be an integer >= 1"),
        (lambda: NofM(2, 4, "inputs"), TypeError, "axis must be an integer, not 'inputs'"),
        (lambda: FanIn(axis=None), TypeError, "axis must be an integer"),
    ],
)
def test_bad_structures_are_refused_when_built(make, error, message):
    with pytest.raises(error, match=message):
        make()
