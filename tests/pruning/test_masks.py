"""Landing: exact zeros after `optax.apply_updates`, whatever the formats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning

FORMATS = {
    "float32": (np.uint32, np.dtype(np.float32)),
    "float16": (np.uint16, np.dtype(np.float16)),
    "bfloat16": (np.uint16, np.dtype(ml_dtypes.bfloat16)),
}
MaskedNode = optax.MaskedNode()


@st.composite
def finite_bits(draw, name, size=8):
    """Any finite numbers of a format: zeros, denormals and the largest among them."""
    unsigned, dtype = FORMATS[name]
    bits = draw(st.lists(st.integers(0, np.iinfo(unsigned).max), min_size=size, max_size=size))
    values = np.array(bits, unsigned).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling nans
        return np.where(np.isfinite(values), values, np.array(1, dtype)).astype(dtype)


def land_and_apply(updates, params, mask):
    return optax.apply_updates(params, pruning.landing(updates, params, mask))


jitted = jax.jit(land_and_apply)


@pytest.mark.parametrize("update_format", FORMATS)
@pytest.mark.parametrize("format_", FORMATS)
@given(data=st.data())
def test_landing_is_exact(format_, update_format, data):
    params = {"w": data.draw(finite_bits(format_)), "b": data.draw(finite_bits(format_))}
    updates = {"w": data.draw(finite_bits(update_format)), "b": data.draw(finite_bits(format_))}
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    mask = {"w": keep, "b": MaskedNode}
    with jax.numpy_dtype_promotion("standard"):  # optax.apply_updates adds unlike dtypes
        landed = jitted(updates, params, mask)
        plain = jax.jit(optax.apply_updates)(params, updates)
    assert landed["w"].dtype == params["w"].dtype
    assert np.all(np.asarray(landed["w"])[~keep].astype(np.float64) == 0)
    # Survivors and other leaves move as they would have without.
    for name, where in (("w", keep), ("b", slice(None))):
        np.testing.assert_array_equal(
            np.asarray(landed[name])[where].astype(np.float64),
            np.asarray(plain[name])[where].astype(np.float64),
        )


@pytest.mark.parametrize("format_", FORMATS)
def test_landing_is_exact_at_the_ends_of_the_range(format_):
    unsigned, dtype = FORMATS[format_]
    info = ml_dtypes.finfo(dtype)
    one_bit = np.array([1], unsigned).view(dtype)[0]
    values = np.array([info.max, -info.max, info.tiny, one_bit, -one_bit, 0.0, -0.0], dtype)
    params = {"w": jnp.asarray(values)}
    mask = {"w": jnp.zeros(7, bool)}
    for function in (land_and_apply, jitted):
        landed = function({"w": jnp.full(7, jnp.nan, dtype)}, params, mask)
        assert np.all(np.asarray(landed["w"]).astype(np.float64) == 0)


def test_updates_have_at_least_the_precision_of_parameters():
    params = {"w": jnp.ones(2, jnp.float32)}
    mask = {"w": jnp.array([True, False])}
    updates = {"w": jnp.ones(2, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        assert pruning.landing(updates, params, mask)["w"].dtype == jnp.float32
        assert pruning.landing(params, updates, mask)["w"].dtype == jnp.float32


def test_what_is_not_a_synapse_is_the_very_same_array():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates = jax.tree.map(jnp.negative, params)
    mask = pruning.full_mask(params)
    assert pruning.landing(updates, params, mask)["bias"] is updates["bias"]
    assert pruning.apply_mask(params, mask)["bias"] is params["bias"]


def test_apply_mask_repairs_inf_and_nan():
    bad = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0])
    repaired = pruning.apply_mask({"w": bad}, {"w": jnp.array([False, False, False, True])})
    assert repaired["w"].tolist() == [0.0, 0.0, 0.0, 1.0]
    # ... and touches nothing that is kept.
    kept = pruning.apply_mask({"w": bad}, {"w": jnp.ones(4, bool)})["w"]
    np.testing.assert_array_equal(kept, bad)


def test_full_mask_keeps_shapes_and_marks_the_rest():
    params = {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(3)}
    mask = pruning.full_mask(params)
    assert mask["bias"] == MaskedNode
    assert mask["kernel"].dtype == bool
    assert mask["kernel"].shape == (2, 3)
    assert bool(mask["kernel"].all())
    assert pruning.full_mask(params, "bias")["kernel"] == MaskedNode


def test_a_mask_of_another_tree_is_refused():
    with pytest.raises(ValueError, match="belongs to another tree"):
        pruning.apply_mask({"v": jnp.ones(2)}, {"w": jnp.ones(2, bool)})
