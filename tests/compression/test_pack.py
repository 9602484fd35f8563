"""The packed file: bit-exact round trips, honest sizes, damaged files refused by name."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import compression

DTYPES = ("float32", "float16", "bfloat16", "int8", "uint32", "bool")


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
    zeros=st.booleans(),
)
def test_round_trip_is_identical_bit_for_bit(shape, dtype, share, seed, zeros):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 3 * (rng.random(shape) < share)
    tree = {"layer": {"kernel": np.asarray(values).astype(jnp.dtype(dtype))}}
    back = compression.unpack(compression.pack(tree, zeros=zeros))["layer"]["kernel"]
    assert back.dtype == tree["layer"]["kernel"].dtype
    assert back.shape == tuple(shape)
    assert back.tobytes() == tree["layer"]["kernel"].tobytes()


def test_negative_zero_nan_and_inf_survive():
    special = np.array([-0.0, 0.0, np.nan, np.inf, -np.inf, 1e-45], np.float32)
    back = compression.unpack(compression.pack({"w": special}))["w"]
    assert back.tobytes() == special.tobytes()


def test_bytes_are_what_the_format_says(tmp_path):
    dense = np.arange(1, 1001, dtype=np.float32)
    sparse = np.where(np.arange(1000) % 10 == 0, dense, np.float32(0))
    full = compression.save_packed(tmp_path / "full", {"w": dense})
    cut = compression.save_packed(tmp_path / "cut", {"w": sparse})
    zeros = compression.save_packed(tmp_path / "zeros", {"w": sparse}, zeros=True)
    assert (tmp_path / "cut").stat().st_size == cut
    # 100 values of 4 bytes and 1,000 bits, against 4,000 bytes; headers differ by a few bytes.
    assert abs((full - cut) - (4000 - 400 - 125)) < 10
    assert abs(full - zeros) < 10


def test_a_dense_leaf_is_not_made_larger_by_a_mask():
    dense = np.ones(1000, np.float32)
    assert len(compression.pack({"w": dense})) <= len(compression.pack({"w": dense}, zeros=True))


def test_lists_become_dicts_of_positions():
    back = compression.unpack(compression.pack([jnp.zeros(2), {"b": jnp.ones(1)}]))
    assert dict(_flat(back)).keys() == {"0", "1/b"}


def test_saving_replaces_at_once_and_leaves_no_part(tmp_path):
    path = tmp_path / "deep" / "net.adnt"
    compression.save_packed(path, {"w": jnp.zeros(3)})
    compression.save_packed(path, {"w": jnp.ones(3)})
    np.testing.assert_array_equal(compression.load_packed(path)["w"], np.ones(3))
    assert [item.name for item in path.parent.iterdir()] == ["net.adnt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "net.adnt"
    compression.save_packed(path, {"w": jnp.arange(100.0)})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-7]
    elif damage == "flip":
        content[60] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content[:4] = b"PK\x03\x04"
    path.write_bytes(bytes(content))
    with pytest.raises(compression.PackError, match=r"net\.adnt"):
        compression.load_packed(path)


def test_leaves_with_one_path_are_refused():
    with pytest.raises(compression.PackError, match="one path"):
        compression.pack({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})
