"""The masks of JaxPruner, where the definitions agree.

They are compared with a slow version in numpy, and with JaxPruner itself where the environment
variable JAXPRUNER_PATH names a checkout of it. Where the definitions differ, the numbers here are
chosen so that it does not show: JaxPruner rounds counts half to even and keeps one synapse of every
leaf; of equal scores its N:M keeps the last.

References:
  Lee et al., "JaxPruner", arXiv:2304.14082.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import pruning
from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import Leaf

SHAPES = {"a": (6, 8), "b": (8, 4)}
SPARSITIES = (0.0, 0.25, 0.6, 0.9)


class Slow:
    """What JaxPruner computes, by sorting."""

    @staticmethod
    def top(scores, sparsity):
        number = max(1, round(scores.size * (1 - sparsity)))
        order = np.argsort(-scores.ravel(), kind="stable")
        mask = np.zeros(scores.size, bool)
        mask[order[:number]] = True
        return mask.reshape(scores.shape)

    def uniform(self, scores, sparsity):
        return {name: self.top(np.abs(leaf), sparsity) for name, leaf in scores.items()}

    def everywhere(self, params, sparsity, normalised):
        scores = {
            n: np.abs(p) / (np.linalg.norm(p) if normalised else 1) for n, p in params.items()
        }
        flat = self.top(np.concatenate([leaf.ravel() for leaf in scores.values()]), sparsity)
        parts = np.split(flat, np.cumsum([leaf.size for leaf in scores.values()])[:-1])
        return {n: p.reshape(params[n].shape) for n, p in zip(scores, parts, strict=True)}

    def n_of_m(self, scores, n, m, axis):
        mask = np.zeros(scores.shape, bool)
        rows, out = np.moveaxis(scores, axis, -1), np.moveaxis(mask, axis, -1)
        for index in np.ndindex(rows.shape[:-1]):
            for start in range(0, rows.shape[-1], m):
                best = np.argsort(-rows[index][start : start + m])[:n]
                out[index][start + best] = True
        return mask

    def exchange(self, mask, worth, wish, fraction):
        """Drops the lowest of a leaf and wakes as many where the wish is largest."""
        alive = int(mask.sum())
        kept = self.top(np.where(mask, worth, -1.0), 1 - alive * (1 - fraction) / mask.size)
        return self.top(np.where(kept, np.inf, wish), 1 - alive / mask.size)

    def erdos_renyi(self, shapes, sparsity):
        dense, sizes = set(), {name: int(np.prod(shape)) for name, shape in shapes.items()}
        while True:
            rest = [name for name in shapes if name not in dense]
            weights = {name: sum(shapes[name]) / sizes[name] for name in rest}
            left = sum(sizes[n] - int(sparsity * sizes[n]) for n in rest)
            left -= sum(int(sparsity * sizes[n]) for n in dense)
            scale = left / sum(weights[name] * sizes[name] for name in rest)
            if scale * max(weights.values()) <= 1:
                return {n: 1.0 if n in dense else scale * weights[n] for n in shapes}
            dense |= {name for name in rest if weights[name] == max(weights.values())}

    def cubic(self, target, start, end, step):
        """After ``step`` updates; JaxPruner counts those before this one."""
        done = np.clip((step - start) / (end - start), 0, 1)
        return target * (1 - (1 - done) ** 3)


class Checkout:
    """The same by JaxPruner."""

    def __init__(self, jp):
        self.jp = jp
        self.masks = importlib.import_module("jaxpruner.mask_calculator")
        self.shares = importlib.import_module("jaxpruner.sparsity_distributions")

    def top(self, scores, sparsity):
        return np.asarray(self.masks.topk_mask_calculator(jnp.asarray(scores), sparsity)) == 1

    def uniform(self, scores, sparsity):
        spread = functools.partial(self.shares.uniform, sparsity=sparsity)
        updater = self.jp.MagnitudePruning(sparsity_distribution_fn=spread)
        _, masks = updater.instant_sparsify(jax.tree.map(jnp.asarray, scores))
        return {name: np.asarray(leaf) == 1 for name, leaf in masks.items()}

    def everywhere(self, params, sparsity, normalised):
        updater = self.jp.GlobalMagnitudePruning(sparsity=sparsity, use_normalization=normalised)
        _, masks = updater.instant_sparsify(jax.tree.map(jnp.asarray, params))
        return {name: np.asarray(leaf) == 1 for name, leaf in masks.items()}

    def n_of_m(self, scores, n, m, axis):
        kind = importlib.import_module("jaxpruner.sparsity_types").NByM(n, m, axis)
        return np.asarray(self.masks.get_topk_fn(kind)(jnp.asarray(scores), 0.5)) == 1

    def exchange(self, mask, worth, wish, fraction):
        old = jnp.asarray(mask, jnp.uint8)
        rule = self.jp.RigL()
        new = rule._update_masks(old, jnp.asarray(worth), jnp.asarray(wish), fraction)
        return np.asarray(new) == 1

    def erdos_renyi(self, shapes, sparsity):
        params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return {name: 1 - share for name, share in self.shares.erk(params, sparsity).items()}

    def cubic(self, target, start, end, step):
        schedule = self.jp.sparsity_schedules.PolynomialSchedule(
            update_freq=1, update_start_step=start, update_end_step=end
        )
        return float(schedule.get_sparsity_at_step(target, step - 1))


@pytest.fixture(scope="module", params=["a slow version", "a checkout"])
def peer(request):
    if request.param == "a slow version":
        yield Slow()
        return
    folder = os.environ.get("JAXPRUNER_PATH")
    if not folder:
        pytest.skip("set JAXPRUNER_PATH to a checkout of JaxPruner to compare with it")
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
    ):
        warnings.simplefilter("ignore")
        patch.syspath_prepend(folder)
        patch.setattr(jax, "tree_map", jax.tree.map, raising=False)  # removed from jax
        yield Checkout(importlib.import_module("jaxpruner"))


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@functools.partial(jax.jit, static_argnames=("structure", "allocation"))
def masks(worth, mask, sparsity, wish=None, fraction=0.0, *, structure, allocation):
    """An event; scores are given as a signal, so that one program serves them all."""
    out = pruning.cut_and_wake(
        worth,
        mask,
        pruning.Sparsity(as_share(sparsity)),
        score=pruning.signals.reading("worth"),
        structure=structure,
        allocation=allocation,
        regrow=None if wish is None else pruning.by_gradient(fraction),
        may_grow=False,
        key=jax.random.key(0),
        signals={"worth": worth, "grads": wish},
    )
    return out.mask


FULL = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
UNIFORM = {"structure": pruning.Element(), "allocation": pruning.Uniform()}
GLOBAL = {"structure": pruning.Element(), "allocation": pruning.Global()}


def same(ours, theirs):
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), leaf)


def test_the_same_share_of_every_leaf(peer):
    """Magnitude; and random scores, whose draws differ, but not what is made of them."""
    for seed, sparsity in enumerate(SPARSITIES):
        params, rng = draw(seed), np.random.default_rng(seed)
        wish = draw(9)
        ours = masks(params, FULL, jnp.float32(sparsity), wish, jnp.float32(0), **UNIFORM)
        same(ours, peer.uniform(params, sparsity))
        scores = {name: rng.random(leaf.shape, np.float32) for name, leaf in params.items()}
        scores = jax.tree.map(lambda s: s.round(1), scores)  # with ties, by position
        ours = masks(scores, FULL, jnp.float32(sparsity), wish, jnp.float32(0), **UNIFORM)
        same(ours, peer.uniform(scores, sparsity))


def test_one_threshold_for_all_leaves(peer):
    for seed, sparsity in enumerate(SPARSITIES):
        params = draw(seed)
        params["b"] = params["b"] * np.float32(0.3)
        ours = masks(params, FULL, jnp.float32(sparsity), **GLOBAL)
        same(ours, peer.everywhere(params, sparsity, normalised=False))
        scores = pruning.normalise(pruning.magnitude, by="l2", across="leaf")(params)
        ours = masks(scores, FULL, jnp.float32(sparsity), **GLOBAL)
        same(ours, peer.everywhere(params, sparsity, normalised=True))


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, -1), (1, 2, -2)])
def test_n_of_m(peer, n, m, axis):
    params = draw(3)
    options = GLOBAL | {"structure": pruning.NofM(n, m, axis)}
    ours = masks(params, FULL, jnp.float32(0.5), **options)
    same(ours, {name: peer.n_of_m(np.abs(p), n, m, axis) for name, p in params.items()})


def test_what_rigl_drops_and_wakes(peer):
    """From masks at random, event by event; with random wishes this is SET."""
    mask = peer.uniform(draw(4), 0.5)
    for event, fraction in enumerate((0.25, 0.5, 0.125)):
        params, grads = draw(5 + event), draw(15 + event)
        worth = {name: np.where(mask[name], params[name], 0) for name in params}
        ours = masks(
            worth, mask, jnp.float32(0.5), grads, jnp.float32(fraction), **UNIFORM
        )  # fmt: skip
        theirs = {
            name: peer.exchange(mask[name], np.abs(worth[name]), np.abs(grads[name]), fraction)
            for name in params
        }
        same(ours, theirs)
        assert any(np.any(theirs[name] & ~mask[name]) for name in params)
        mask = theirs


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_densities_of_erdos_renyi(peer, sparsity):
    """Theirs are real numbers of a total rounded leaf by leaf, ours integers of an exact total."""
    shapes = {"conv": (3, 3, 4, 16), "wide": (64, 100), "deep": (100, 30), "head": (30, 10)}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    leaves = [Leaf(name, shape, jnp.float32, sizes[name]) for name, shape in shapes.items()]
    whole = sum(sizes.values())
    numbers = pruning.ErdosRenyiKernel().of_leaves(leaves, whole - int(sparsity * whole + 0.5))
    theirs = peer.erdos_renyi(shapes, sparsity)
    for name, number in zip(shapes, numbers, strict=True):
        assert number == pytest.approx(sizes[name] * theirs[name], abs=1 + len(shapes) / 2)
        assert (number == sizes[name]) == (theirs[name] == 1)
    assert any(share == 1 for share in theirs.values()) == (sparsity < 0.5)


def test_the_cubic_schedule(peer):
    ours = pruning.cubic(0.9, 10, 50)
    for step in (10, 11, 25, 49, 50, 60):
        assert float(ours(step)) == pytest.approx(peer.cubic(0.9, 10, 50, step), abs=1e-6)
