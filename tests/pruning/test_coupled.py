"""Coupled units as a structure of `prune`, against what is chosen and masked out of the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning, testing, trees
from tests.cells import CELLS
from tests.pruning.architectures import OPS, Network

KEY = jax.random.key(0)
PARAMS = an.models.mlp_init(KEY, (6, 8, 4, 3))
INPUTS = jax.random.normal(KEY, (5, 6))
COUPLING = pruning.couple(an.models.mlp, PARAMS, INPUTS)
COUPLED = pruning.Coupled(COUPLING)
FIRST, SECOND = "dense1/bias[0]", "dense2/bias[0]"


def stepped(tx, params=PARAMS, steps=1, **signals):
    state, nothing = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(nothing, state, params, **signals)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("normalise", [True, False])
def test_scores_are_those_of_units_out_of_the_step(pooling, normalise):
    signed = jax.tree.map(lambda p: p - 0.1, trees.synapses(PARAMS))
    own = pruning.Coupled(COUPLING, pooling, normalise).pool(signed)
    found = pruning.unit_scores(COUPLING, signed, pooling=pooling, normalise=normalise)
    assert own.keys() == found.keys()
    for name, values in found.items():
        np.testing.assert_allclose(own[name], values, rtol=1e-5)


@given(
    st.sampled_from(sorted(OPS)),
    st.lists(st.sampled_from(sorted({op for ops in OPS.values() for op in ops})), max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_masks_are_those_of_units_out_of_the_step(kind, names, seed):
    net, rng = Network(kind, ["dense", *names], seed), np.random.default_rng(seed)
    coupling = pruning.couple(net.apply, net.params, net.inputs)
    if not coupling.free:
        return
    alive = {group.name: rng.random(group.count) < 0.6 for group in coupling.free}
    coupled, everything = pruning.Coupled(coupling), jax.tree.map(jnp.ones_like, net.params)
    everything = jax.tree.map(lambda p: p.astype(bool), everything)
    own = coupled.spread({k: jnp.asarray(v) for k, v in alive.items()}, everything)
    kept = {name: np.flatnonzero(values) for name, values in alive.items()}
    expected = pruning.unit_mask(coupling, net.params, kept)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    counted = coupled.pool_mask(own)
    for name, values in alive.items():
        assert not np.any(np.asarray(counted[name]) & ~values)


def test_a_target_is_a_share_of_units_and_shrinking_takes_them_out():
    tx = pruning.prune(0.5, structure=COUPLED)
    params, state = stepped(tx)
    mask = pruning.mask(state)
    first = np.asarray(mask["dense1"]["kernel"])
    assert (first == first[0]).all()  # whole columns
    np.testing.assert_array_equal(
        np.asarray(mask["dense2"]["kernel"]),
        first[0][:, None] & np.asarray(mask["dense3"]["kernel"])[:, :1].T,
    )
    scores = pruning.unit_scores(COUPLING, trees.synapses(pruning.magnitude(PARAMS)))
    ranked = sorted(((s, n, u) for n in scores for u, s in enumerate(scores[n])), reverse=True)
    for _, name, unit in ranked[:6]:
        alive = first[0] if name == FIRST else np.asarray(mask["dense3"]["kernel"])[:, 0]
        assert alive[unit]
    assert first[0].sum() + np.asarray(mask["dense3"]["kernel"])[:, 0].sum() == 6
    small = pruning.shrink(an.models.mlp, params, INPUTS, opt_state=state)
    assert sum(after for _, after in small.report.units.values()) == 6
    np.testing.assert_allclose(
        small.apply(small.params, INPUTS), an.models.mlp(params, INPUTS), atol=1e-6
    )


def test_only_named_groups_lose_units():
    only = pruning.Coupled(COUPLING, groups=[SECOND])
    _, state = stepped(pruning.prune(0.5, structure=only))
    mask = pruning.mask(state)
    assert np.asarray(mask["dense1"]["kernel"]).all()
    assert np.asarray(mask["dense3"]["kernel"])[:, 0].sum() == 2


def test_parameters_that_lie_deeper_in_what_was_traced():
    def apply(variables, x):
        return an.models.mlp(variables["params"], x)

    deeper = pruning.Coupled(pruning.couple(apply, {"params": PARAMS}, INPUTS))
    masks = [pruning.mask(stepped(pruning.prune(0.5, structure=s))[1]) for s in (deeper, COUPLED)]
    for a, b in zip(*map(jax.tree.leaves, masks), strict=True):
        np.testing.assert_array_equal(a, b)


def test_biases_go_as_well_where_they_are_selected():
    _, state = stepped(pruning.prune(0.5, structure=COUPLED, select=[".*"]))
    mask = pruning.mask(state)
    np.testing.assert_array_equal(mask["dense1"]["bias"], mask["dense1"]["kernel"][0])
    assert np.asarray(mask["dense3"]["bias"]).all()  # an axis of the outputs


@given(st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(max_examples=6, deadline=None)
def test_a_budget_is_what_units_cost_before_anything_was_cut(seed, sparsity):
    params = an.models.mlp_init(jax.random.key(seed), (6, 8, 4, 3))
    tx = pruning.prune(sparsity, structure=COUPLED, allocation=pruning.Budget())
    mask = pruning.mask(tx.event(params, tx.init(params), {})[1])
    alive = [int(np.asarray(mask["dense1"]["kernel"])[0].sum())]
    alive.append(int(np.asarray(mask["dense3"]["kernel"])[:, 0].sum()))
    each = (6 + 4, 8 + 3)
    cost = sum(a * e for a, e in zip(alive, each, strict=True))
    assert cost <= round((1 - sparsity) * (8 * 10 + 4 * 11))


def test_units_wake_with_what_joins_them_to_others_that_are_awake():
    tx = pruning.prune(
        pruning.sawtooth(0.7, 0, 6, period=2),
        structure=COUPLED,
        regrow=pruning.at_random(0.3),
        every=1,
    )
    _, state = stepped(tx, steps=3)
    mask = jax.tree.map(np.asarray, pruning.mask(state))
    columns = mask["dense1"]["kernel"]
    rows = mask["dense3"]["kernel"]
    assert (columns == columns[0]).all()
    assert (rows == rows[:, :1]).all()
    between = mask["dense2"]["kernel"]
    assert not between[~columns[0]].any()
    assert not between[:, ~rows[:, 0]].any()


@pytest.mark.parametrize(
    ("subject", "mode"), [cell for cell in CELLS if cell[0] != "list"]
)  # a list has paths of its own
def test_contract(subject, mode):
    shapes = an.models.mlp_init(KEY, (8, 16, 4))
    own = pruning.Coupled(pruning.couple(an.models.mlp, shapes, jnp.ones((1, 8))))

    def make(strength):
        rule = pruning.prune(pruning.cubic(strength, 0, 4), structure=own, every=2)
        return optax.chain(optax.sgd(0.1), rule)

    testing.check(make, subject=subject, mode=mode)


class TestOverrides:
    def test_what_is_to_stay_stays(self):
        coupling = pruning.couple(an.models.mlp, PARAMS, INPUTS, stay=["^dense2/bias"])
        assert [group.name for group in coupling.free] == [FIRST]
        assert "is to stay, by '^dense2/bias'" in str(coupling)
        with pytest.raises(ValueError, match="matches no parameter of dense1/bias"):
            pruning.couple(an.models.mlp, PARAMS, INPUTS, stay=["conv"])

    def test_what_is_tied_falls_together(self):
        params = an.models.mlp_init(KEY, (6, 8, 8, 3))
        tie = [("dense1/kernel[1]", "dense2/kernel[1]")]
        coupling = pruning.couple(an.models.mlp, params, INPUTS, tie=tie)
        (group,) = coupling.free
        assert group.count == 8
        assert {path for path, _ in group.members} == {
            "dense1/bias", "dense1/kernel", "dense2/bias", "dense2/kernel", "dense3/kernel",
        }  # fmt: skip
        zeroed = pruning.zero_units(coupling, params, {group.name: np.arange(5)})
        small = pruning.shrink(an.models.mlp, zeroed, INPUTS)
        assert small.params["dense2"]["kernel"].shape == (5, 5)
        with pytest.raises(ValueError, match=r"dense1/kernel\[0\] has 6 positions"):
            pruning.couple(
                an.models.mlp, params, INPUTS, tie=[("dense1/kernel[0]", "dense2/kernel[1]")]
            )
        with pytest.raises(ValueError, match="is no axis: write path"):
            pruning.couple(an.models.mlp, params, INPUTS, tie=[("dense1", "dense2/kernel[1]")])


class TestErrors:
    def test_groups(self):
        with pytest.raises(ValueError, match="may not lose units; these may: dense1"):
            pruning.Coupled(COUPLING, groups=["dense1/kernel[0]"])
        with pytest.raises(ValueError, match="pooling must be"):
            pruning.Coupled(COUPLING, "most")

    def test_parameters_of_another_function(self):
        tx = pruning.prune(0.5, structure=COUPLED)
        with pytest.raises(ValueError, match="is none of the coupling's parameters"):
            tx.init({"other": {"kernel": jnp.ones((2, 2))}})

    def test_nothing_to_cut(self):
        tx = pruning.prune(0.5, structure=pruning.Coupled(COUPLING, groups=[SECOND]))
        with pytest.raises(ValueError, match="no unit that may go has a part"):
            tx.init({"dense1": {"kernel": PARAMS["dense1"]["kernel"]}})

    def test_no_leaf_of_it_by_path(self):
        with pytest.raises(TypeError, match="ByPath gives a leaf one structure"):
            pruning.ByPath({"dense1": COUPLED})
