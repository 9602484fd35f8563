"""Choices of coupled units against loops and counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.pruning.units import removable_groups
from tests.pruning.architectures import Network

KEY = jax.random.key(0)
WIDTHS = (6, 8, 4, 3)
PARAMS = an.models.mlp_init(KEY, WIDTHS)
COUPLING = pruning.couple(an.models.mlp, PARAMS, jnp.ones((1, 6)))
FIRST, SECOND = "dense1/bias[0]", "dense2/bias[0]"


def test_scores_of_units_are_those_of_all_their_slices():
    scores = pruning.unit_scores(COUPLING, pruning.magnitude(PARAMS), normalise=False)
    for unit in range(8):
        slices = [PARAMS["dense1"]["kernel"][:, unit], PARAMS["dense1"]["bias"][unit : unit + 1]]
        slices.append(PARAMS["dense2"]["kernel"][unit])
        expected = sum(float(jnp.abs(part).sum()) for part in slices)
        assert scores[FIRST][unit] == pytest.approx(expected, rel=1e-6)
    normal = pruning.unit_scores(COUPLING, pruning.magnitude(PARAMS))
    assert normal[SECOND].mean() == pytest.approx(1.0)
    mean = pruning.unit_scores(COUPLING, pruning.magnitude(PARAMS), pooling="mean", normalise=False)
    np.testing.assert_allclose(mean[FIRST], scores[FIRST] / (6 + 1 + 4))


def test_signed_scores_are_added_before_their_absolute_value():
    products = jax.tree.map(jnp.ones_like, PARAMS)
    products["dense1"]["kernel"] = -products["dense1"]["kernel"]
    scores = pruning.unit_scores(COUPLING, products, normalise=False)
    np.testing.assert_allclose(scores[FIRST], abs(-6 + 1 + 4))


def test_fused_gates_and_heads_are_one_unit():
    net = Network("sequence", ["lstm", "attention"], 0)
    coupling = pruning.couple(net.apply, net.params, net.inputs)
    ones = jax.tree.map(jnp.ones_like, net.params)
    scores = pruning.unit_scores(coupling, ones, normalise=False)
    hidden = net.params["layer0"]["carried"].shape[0]
    heads = next(g for g in coupling.free if g.count == 2 and "query" in str(g.members))
    # Four columns of what is taken, four columns and a row of what is carried (they cross four
    # times), four biases, then what reads it.
    rest = 3 * 2 * 4 + 4 * 2 + 3  # query, key, value, out, the readout's row
    lstm = next(g for g in coupling.free if g.count == hidden)
    assert scores[lstm.name][0] == 4 * 8 + (4 * hidden + 4 * hidden) + 4 + rest
    assert scores[heads.name][0] == 3 * hidden * 4 + 4 * hidden


@given(st.integers(0, 1000), st.floats(0.05, 1.0), st.sampled_from(["macs", "bytes", "parameters"]))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_met_and_no_unit_too_many_goes(seed, target, kind):
    rng = np.random.default_rng(seed)
    scores = {FIRST: rng.random(8), SECOND: rng.random(4)}

    def cost(a, b):
        weights = 6 * a + a * b + b * 3
        return weights if kind == "macs" else (weights + a + b + 3) * (4 if kind == "bytes" else 1)

    whole = cost(8, 4)
    if cost(1, 1) > target * whole:
        with pytest.raises(ValueError, match="cannot be met"):
            pruning.choose_units(COUPLING, scores, target, kind=kind)
        return
    kept = pruning.choose_units(COUPLING, scores, target, kind=kind)
    a, b = len(kept.get(FIRST, range(8))), len(kept.get(SECOND, range(4)))
    assert cost(a, b) <= target * whole
    # By a loop: the lowest give way one by one, the best of each group never.
    order = sorted(
        (s, n, u) for n in scores for u, s in enumerate(scores[n]) if s < scores[n].max()
    )
    left = {FIRST: 8, SECOND: 4}
    for _, name, _ in order:
        if cost(left[FIRST], left[SECOND]) <= target * whole:
            break
        left[name] -= 1
    assert left == {FIRST: a, SECOND: b}
    for name, chosen in kept.items():
        gone = np.setdiff1d(np.arange(len(scores[name])), chosen)
        assert scores[name][gone].max() < scores[name][chosen].min()


def test_what_is_chosen_shrinks_to_the_budget():
    scores = pruning.unit_scores(COUPLING, pruning.magnitude(PARAMS))
    kept = pruning.choose_units(COUPLING, scores, 0.5)
    masked = pruning.zero_units(COUPLING, PARAMS, kept)
    small = pruning.shrink(an.models.mlp, masked, jnp.ones((1, 6)))
    assert small.report.after.macs <= 0.5 * small.report.before.macs
    assert {n: len(k) for n, k in small.kept.items()} == {n: len(k) for n, k in kept.items()}
    mask = pruning.unit_mask(COUPLING, PARAMS, kept)
    by_mask = jax.tree.map(lambda leaf, m: jnp.where(m, leaf, 0), PARAMS, mask)
    jax.tree.map(np.testing.assert_array_equal, masked, by_mask)


def test_multiples_are_kept():
    scores = {FIRST: np.arange(8.0), SECOND: np.arange(4.0)}
    kept = pruning.choose_units(COUPLING, scores, 0.6, multiple=4)
    assert all(len(chosen) % 4 == 0 for chosen in kept.values())


def test_a_measured_cost_is_asked():
    asked = []

    def seconds(kept):
        asked.append(kept)
        return 1.0 + len(kept.get(FIRST, range(8)))

    kept = pruning.choose_units(COUPLING, {FIRST: np.arange(8.0)}, 0.5, cost=seconds)
    assert len(kept[FIRST]) == 3
    assert len(asked) <= 8


def test_the_dear_go_first_per_cost():
    # A unit of the first layer saves 6 + 4, one of the second 8 + 3.
    scores = {FIRST: np.full(8, 1.0), SECOND: np.full(4, 1.05)}
    assert FIRST in pruning.choose_units(COUPLING, scores, 0.9)
    assert list(pruning.choose_units(COUPLING, scores, 0.9, per_cost=True)) == [SECOND]


def test_a_stream_under_a_norm_is_not_removable():
    net = Network("flat", ["residual", "dense", "norm", "dense"], 1)
    coupling = pruning.couple(net.apply, net.params, net.inputs)
    names = removable_groups(coupling, net.params, net.inputs)
    normed = [g.name for g in coupling.free if any("scale" in path for path, _ in g.members)]
    assert len(normed) == 1
    assert set(names) == {g.name for g in coupling.free} - set(normed)


def test_errors_name_the_group():
    with pytest.raises(ValueError, match=r"no group 'x'; there are dense1/bias\[0\]"):
        pruning.zero_units(COUPLING, PARAMS, {"x": [0]})
    with pytest.raises(ValueError, match="have to stay: it is an axis of the inputs"):
        pruning.choose_units(COUPLING, {"dense1/kernel[0]": np.ones(6)}, 0.5)
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        pruning.choose_units(COUPLING, {}, 0.0)
    with pytest.raises(ValueError, match="floor and multiple"):
        pruning.choose_units(COUPLING, {}, 0.5, floor=0)
    with pytest.raises(ValueError, match="kind must be"):
        pruning.choose_units(COUPLING, {FIRST: np.ones(8)}, 0.5, kind="joules")
    with pytest.raises(ValueError, match="leaves where the parameters have 6"):
        pruning.unit_scores(COUPLING, [jnp.ones(3)])
    with pytest.raises(ValueError, match="not finite for dense1/bias"):
        pruning.unit_scores(COUPLING, jax.tree.map(lambda leaf: leaf / 0, PARAMS))
