"""What a schedule asks for, as exact counts."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import as_count, as_share
from adaptivenet.pruning.demands import AtLeast, OfAlive, Sparsity, as_demand


@given(st.floats(0, 0.9999), st.integers(0, 2**40), st.integers(0, 2**40))
def test_counts_are_exact_for_any_size(share, size, alive):
    cut = int(Fraction(share) * size + Fraction(1, 2))
    assert int(Sparsity(as_share(share)).keep(as_count(alive), size)) == size - cut
    cut = int(Fraction(share) * alive + Fraction(1, 2))
    assert int(OfAlive(as_share(share)).keep(as_count(alive), size)) == alive - cut


def test_demands_are_batches_of_themselves():
    shares = as_share(jnp.array([0.25, 0.5, 0.0], jnp.float32))
    keep = jax.vmap(lambda s: Sparsity(s).keep(as_count(0), 100).astype(jnp.int32))(shares)
    assert keep.tolist() == [75, 50, 100]


def test_values_for_the_record():
    assert float(Sparsity(as_share(0.75)).value()) == 0.75
    assert float(OfAlive(as_share(0.5)).value()) == 0.5
    assert float(AtLeast(0.25).value()) == 0.25
    for demand in (Sparsity(as_share(0.1)), OfAlive(as_share(0.1)), AtLeast(jnp.float16(0.1))):
        assert demand.value().dtype == jnp.float32


def test_as_demand():
    demand = AtLeast(0.5)
    assert as_demand(demand) is demand
    assert isinstance(as_demand(jnp.float32(0.5)), pruning.Sparsity)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), not 2"):
        as_demand(2)
