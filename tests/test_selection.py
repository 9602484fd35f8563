"""The exact k-th largest of a pytree against a slow oracle: a stable sort in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import counts, selection

METHODS = ("histogram", "bisection")
SHORT = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
EIGHT_BITS = tuple(
    name
    for name in (
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3b11fnuz",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e3m4",
        "float8_e4m3",
    )
    if hasattr(jnp, name)
)


def oracle(leaves, k, where=None):
    """Masks and the k-th value: |score| descending, then nan, then left out; ties by position."""
    flat = np.concatenate([np.abs(np.asarray(x).astype(np.float64)).ravel() for x in leaves])
    flat = np.where(np.isnan(flat), -1.0, flat)
    if where is not None:
        flat = np.where(np.concatenate([np.asarray(w).ravel() for w in where]), flat, -2.0)
    order = np.argsort(-flat, kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    value = np.inf if k == 0 else flat[order[k - 1]]
    parts = np.split(mask, np.cumsum([np.size(x) for x in leaves])[:-1])
    return [m.reshape(np.shape(x)) for m, x in zip(parts, leaves, strict=True)], value


# With k traced, so that every rank of a shape is one program.
select = jax.jit(selection.select, static_argnames="method")


def matches(found, leaves, k, where=None):
    expected, value = oracle(leaves, k, where)
    for got, want in zip(found.mask, expected, strict=True):
        assert got.dtype == bool
        np.testing.assert_array_equal(got, want)
    got = np.asarray(found.threshold)
    # Some formats of eight bits have no infinity.
    value = np.array(np.nan if value < 0 else value).astype(got.dtype).astype(np.float64)
    np.testing.assert_equal(got.astype(np.float64), value)


def agrees(leaves, k, where=None, method="auto"):
    matches(select(leaves, k, where=where, method=method), leaves, k, where)


def bit_patterns(dtype, size):
    """Any bits at all: denormals, both zeros, infinities and nans among them; many of them ties."""
    bits = np.iinfo(SHORT[dtype]).bits
    special = [0, 1, 2, 3, 1 << (bits - 1), (1 << (bits - 1)) + 1]
    as_float = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = np.array([1, -1, np.inf, -np.inf, np.nan, 0.5], np.float32).astype(as_float)
    special += values.view(SHORT[dtype]).tolist()
    pattern = st.sampled_from(special) | st.integers(0, 2**bits - 1)
    return st.lists(pattern, min_size=size, max_size=size).map(
        lambda found: np.array(found, SHORT[dtype]).view(as_float)
    )


@pytest.mark.parametrize("dtype", SHORT)
@given(data=st.data())
@settings(max_examples=40)
def test_any_bits_agree_with_the_oracle(dtype, data):
    values = data.draw(bit_patterns(dtype, 16))
    leaves = [values[:4], values[4:4].reshape(0, 3), values[4:].reshape(3, 4)]
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=16, max_size=16)))
    if data.draw(st.booleans()):
        allowed[:] = True
    where = [allowed[:4], allowed[4:4].reshape(0, 3), allowed[4:].reshape(3, 4)]
    k = data.draw(st.integers(0, 16))
    found = [select(leaves, k, where=where, method=method) for method in METHODS]
    for result in found:
        matches(result, leaves, k, where)
    assert found[0].threshold.dtype == values.dtype
    assert np.asarray(found[0].threshold).tobytes() == np.asarray(found[1].threshold).tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", SHORT)
def test_denormals_are_told_apart(dtype, method):
    as_float = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    denormals = np.array([0, 3, 1, 5, 2], SHORT[dtype]).view(as_float)
    found = selection.select([denormals], 2, method=method)
    assert found.mask[0].tolist() == [False, True, False, True, False]
    assert np.asarray(found.threshold).view(SHORT[dtype]) == 3


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bit_floats(name):
    values = [jnp.asarray(np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name)))]
    for k in (0, 1, 100, 200, 256):
        agrees(values, k, method="bisection")


def test_eight_bit_floats_by_histogram():
    values = [np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2)]
    for k in (0, 1, 100, 200, 256):
        agrees(values, k, method="histogram")


@pytest.mark.parametrize("method", METHODS)
def test_float64_and_mixtures_with_denormals(method):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        double = np.concatenate([rng.normal(size=5), [5e-324, 1e-310, 0.0, np.nan, np.inf, -1.0]])
        single = np.array([1, 3, 2, 0x7FFFFF], np.uint32).view(np.float32)
        brain = np.array([1, 0x7F], np.uint16).view(ml_dtypes.bfloat16)
        half = np.array([1, 2, 0x3FF], np.uint16).view(np.float16)
        # Doubles that no float32 tells apart.
        near = 1.0 + np.arange(4) * 2.0**-50
        leaves = [jnp.asarray(x) for x in (double, single, brain, half, near)]
        assert leaves[0].dtype == jnp.float64
        for k in range(0, sum(x.size for x in leaves) + 1, 3):
            agrees(leaves, k, method=method)
        agrees([leaves[4]], 2, method=method)


def test_mixed_dtypes_are_compared_as_float32():
    leaves = [
        jnp.array([1.0, 0.3], jnp.bfloat16),
        jnp.array([[1.0009765625, 0.3]], jnp.float16),
        jnp.array(1.0001, jnp.float32),
    ]
    for k in range(6):
        agrees(leaves, k)
    assert selection.kth_largest(leaves, 1).dtype == jnp.float32
    assert selection.kth_largest(leaves[:1], 1).dtype == jnp.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 4, 5, 6, 11, 17, 18])
def test_ties_are_kept_by_position(k, method):
    leaves = [jnp.ones((2, 3)), jnp.full(5, -1.0), jnp.array(2.0), jnp.ones((1, 2, 3))]
    agrees(leaves, k, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_signs_are_dropped_and_zeros_are_equal(method):
    zeros = [jnp.array([-0.0, 0.0, -0.0, 0.0, -3.0, 3.0])]
    for k in range(7):
        agrees(zeros, k, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nan_ranks_below_zero_and_above_what_is_left_out(method):
    scores = [jnp.array([jnp.nan, 0.0, 7.0, -jnp.nan])]
    where = [jnp.array([True, True, False, True])]
    order = [1, 0, 3, 2]
    for k in range(5):
        found = select(scores, k, where=where, method=method)
        assert set(np.flatnonzero(found.mask[0])) == set(order[:k])
    assert np.isnan(select(scores, 4, method=method).threshold)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 31, 257])
def test_every_size(size, method):
    scores = [jnp.asarray(np.random.default_rng(size).normal(size=size).astype(np.float32))]
    for k in {0, size // 2, size}:
        agrees(scores, k, method=method)


def test_trees_without_scores():
    found = selection.select({"a": jnp.zeros((0, 3)), "b": optax.MaskedNode()}, 0)
    assert found.mask["a"].shape == (0, 3)
    assert found.mask["b"] == optax.MaskedNode()
    assert np.isinf(found.threshold)
    assert selection.top_mask({}, 0) == {}
    with pytest.raises(ValueError, match=r"k=1 is outside \[0, 0\]"):
        selection.top_mask({}, 1)


def test_the_mask_has_the_tree_of_the_scores():
    scores = {"b": [jnp.array([3.0]), optax.MaskedNode()], "a": (jnp.array([[2.0, 1.0]]),)}
    mask = selection.top_mask(scores, 2)
    assert jax.tree.structure(mask) == jax.tree.structure(scores)
    assert mask["a"][0].tolist() == [[True, False]]


@pytest.mark.parametrize("method", METHODS)
def test_a_large_tree_with_ties(method):
    # Several passes of the histogram with crowded bins, and a tie that is cut within a leaf.
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(100, 300)).round(2).astype(np.float32) for _ in range(3)]
    for k in (1, 44_444, 89_999):
        agrees([jnp.asarray(leaf) for leaf in leaves], k, method=method)


@pytest.mark.parametrize(
    "k", [3, np.int64(3), jnp.int32(3), np.uint8(3), jnp.uint32(3), counts.as_count(3)]
)
def test_k_of_every_kind(k):
    scores = [jnp.array([1.0, 4.0, 3.0, 2.0])]
    assert selection.top_mask(scores, k)[0].tolist() == [False, True, True, True]
    assert selection.kth_largest(scores, k) == 2.0


def test_arrays_of_k_are_clipped():
    scores = [jnp.array([1.0, 4.0])]
    assert selection.top_mask(scores, jnp.int32(-3))[0].tolist() == [False, False]
    assert selection.top_mask(scores, jnp.int32(99))[0].tolist() == [True, True]
    assert selection.top_mask(scores, np.array(2**40))[0].tolist() == [True, True]
    assert selection.top_mask(scores, counts.as_count(2**63))[0].tolist() == [True, True]


@pytest.mark.parametrize("method", METHODS)
def test_populations_of_scores_and_of_counts(method):
    rng = np.random.default_rng(1)
    batch = [rng.integers(0, 4, (3, 4, 5)).astype(np.float32), rng.normal(size=(3, 6))]
    batch[1] = batch[1].astype(np.float32)
    ks = jnp.array([0, 13, 26])

    def one(leaves, k):
        return selection.select(leaves, k, method=method)

    both = jax.jit(jax.vmap(one))(batch, ks)
    same_scores = jax.jit(jax.vmap(one, in_axes=(None, 0)))([leaf[0] for leaf in batch], ks)
    same_k = jax.jit(jax.vmap(one, in_axes=(0, None)))(batch, 13)
    for place in range(3):
        member = [leaf[place] for leaf in batch]
        cases = [
            (both, member, int(ks[place])),
            (same_scores, [leaf[0] for leaf in batch], int(ks[place])),
            (same_k, member, 13),
        ]
        for found, leaves, k in cases:
            expected, value = oracle(leaves, k)
            for got, want in zip(found.mask, expected, strict=True):
                np.testing.assert_array_equal(got[place], want)
            assert float(found.threshold[place]) == np.float32(value)


def test_scan_over_counts():
    scores = [jnp.array([0.5, 2.0, -3.0, 1.0])]
    ks = jnp.arange(5)
    masks = jax.lax.scan(lambda _, k: (None, selection.top_mask(scores, k)[0]), None, ks)[1]
    assert masks.sum(axis=1).tolist() == [0, 1, 2, 3, 4]
    assert masks[2].tolist() == [False, True, True, False]


def test_nothing_is_sorted_or_gathered():
    """The promise of the module, in the program itself."""
    leaves = [jnp.zeros((8, 4)), jnp.zeros(5)]
    for method in METHODS:
        text = str(jax.make_jaxpr(lambda x, m=method: selection.select(x, 7, method=m))(leaves))
        assert " sort[" not in text
        assert "top_k" not in text
        assert "[37]" not in text, "leaves were concatenated"


class TestBeyond32Bits:
    """Each element stands for 2^30 of its kind: counts of a tree that nobody can allocate."""

    MANY = 2**30

    @pytest.fixture(autouse=True)
    def _multiply(self, monkeypatch):
        number, histogram = selection._number, selection._histogram

        def scaled(count):
            # 2^30 = 2^14 * 2^16: repeated doubling is exact.
            for _ in range(30):
                count = count + count
            return count

        monkeypatch.setattr(selection, "_number", lambda flags: scaled(number(flags)))
        monkeypatch.setattr(selection, "_histogram", lambda *args: scaled(histogram(*args)))

    @pytest.mark.parametrize("method", METHODS)
    def test_the_rank_is_found_among_2_to_the_34(self, method):
        values = [jnp.array([3.0, 9.0, 1.0, 9.0, 2.0, 7.0]), jnp.array([[8.0, 4.0], [5.0, 2.0]])]
        ordered = np.sort(np.concatenate([np.ravel(v) for v in values]))[::-1]
        keys = [selection._key(leaf, None, wide=False) for leaf in values]
        kth_key = jax.jit(lambda k: selection._kth_key(keys, k, 32, method == "histogram"))
        for place, value in enumerate(ordered):
            for k in (place * self.MANY + 1, (place + 1) * self.MANY):
                key = kth_key(counts.as_count(k))
                assert float(selection._value(key, jnp.float32, wide=False)) == value
        assert len(ordered) * self.MANY > 2**33


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: selection.top_mask(s, -1), ValueError, r"k=-1 is outside \[0, 3\]"),
        (lambda s: selection.top_mask(s, 4), ValueError, r"k=4 is outside \[0, 3\]"),
        (lambda s: selection.top_mask(s, 1.0), TypeError, "k must be an integer, not 1.0"),
        (lambda s: selection.top_mask(s, True), TypeError, "k must be an integer, not True"),
        (lambda s: selection.top_mask(s, jnp.ones(())), TypeError, "must be an integer"),
        (lambda s: selection.kth_largest(s, 0), ValueError, "k must be at least 1, not 0"),
        (lambda s: selection.kth_largest(s, 4), ValueError, r"k=4 is outside \[0, 3\]"),
        (lambda s: selection.top_mask(s, 1, method="sort"), ValueError, "method='sort'; choose"),
        (
            lambda s: selection.top_mask(s, 1, where={"w": jnp.ones((3, 1), bool)}),
            ValueError,
            r"where= must have leaves shaped like the scores, \[\(3,\)\], not \[\(3, 1\)\]",
        ),
        (lambda s: selection.top_mask(s, 1, where={}), ValueError, r"where= must have leaves"),
        (
            lambda s: selection.top_mask({"net": {"ids": jnp.arange(3)}}, 1),
            TypeError,
            "score 'net/ids' has dtype int32, not a float",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call({"w": jnp.array([1.0, 2.0, 3.0])})


def test_a_leaf_that_positions_cannot_number_is_refused_without_allocating_it():
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"score 'a/0' has more than 4294967295 elements"):
        jax.eval_shape(lambda s: selection.top_mask({"a": [s]}, 5), huge)
    largest = jax.ShapeDtypeStruct((2**16 - 1, 2**16 + 1), jnp.bfloat16)
    for method in METHODS:
        shaped = jax.eval_shape(
            lambda s, m=method: selection.top_mask([s, s, s], 2**33, method=m), largest
        )
        assert shaped[2].shape == largest.shape
