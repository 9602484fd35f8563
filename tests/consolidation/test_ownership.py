"""Which synapse carries which memory: snapshots of masks, and counts of capacity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.consolidation import ownership
from tests.consolidation.lifelong_cases import tree


class TestOwnership:
    def test_snapshots(self):
        params = tree()
        mask = {"a": params["a"] > 0, "c": params["c"] > 0, "bias": optax.MaskedNode()}
        other = jax.tree.map(lambda m: ~m, mask)
        room = ownership.snapshots(params, 3)
        assert room.nbytes == 3 * (3 + 1)  # 20 and 6 bits

        def fill(room):
            return room.take(jnp.int32(0), mask).take(2, other).released({**other, "c": mask["c"]})

        for kept in (fill(room), jax.jit(fill)(room)):
            assert kept.taken.tolist() == [True, False, True]
            one = kept.view(params, 0)
            np.testing.assert_array_equal(one["a"], np.maximum(params["a"], 0))
            assert not one["c"].any()  # all released
            np.testing.assert_array_equal(one["bias"], params["bias"])
            two = jax.jit(kept.view)(params, 2)
            assert not two["a"].any()
            np.testing.assert_array_equal(two["c"], np.minimum(params["c"], 0))
            np.testing.assert_array_equal(kept.view(params, 1)["a"], params["a"])
        with pytest.raises(ValueError, match=r"task must be in \[0, 3\)"):
            room.take(3, mask)
        with pytest.raises(ValueError, match="belongs to another tree"):
            room.take(0, {"b": mask["a"]})
        with pytest.raises(ValueError, match="tasks must be a number of tasks >= 1"):
            ownership.snapshots(params, 0)
        with pytest.raises(ValueError, match="tasks must be a number of tasks >= 0"):
            ownership.capacity(mask, -1)
