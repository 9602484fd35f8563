"""Effective masks against an enumeration of all paths."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet.pruning import effective_masks


def _by_enumeration(masks):
    live = [np.zeros_like(mask) for mask in masks]
    widths = [masks[0].shape[0], *(mask.shape[1] for mask in masks)]
    for path in itertools.product(*(range(width) for width in widths)):
        hops = list(itertools.pairwise(path))
        if all(mask[hop] for mask, hop in zip(masks, hops, strict=True)):
            for layer, hop in zip(live, hops, strict=True):
                layer[hop] = True
    return live


@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_equals_the_enumeration_of_paths(widths, share, seed):
    rng = np.random.default_rng(seed)
    masks = [rng.random(pair) < share for pair in itertools.pairwise(widths)]
    got = effective_masks([jnp.asarray(mask) for mask in masks])
    for mask, expected in zip(got, _by_enumeration(masks), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_under_jit_and_vmap():
    masks = [jnp.ones((3, 2, 4), bool), jnp.zeros((3, 4, 1), bool)]
    live = jax.jit(jax.vmap(lambda *m: effective_masks(m)))(*masks)
    assert [leaf.shape for leaf in live] == [(3, 2, 4), (3, 4, 1)]
    assert not any(bool(leaf.any()) for leaf in live)


def test_layers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"layer 1 .* does not feed layer 2"):
        effective_masks([jnp.ones((2, 3), bool), jnp.ones((4, 1), bool)])
