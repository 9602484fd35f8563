"""A population over eight host devices, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adaptivenet.training import data_mesh, shard_population

PROGRAM = """
import sys, tempfile
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp, numpy as np
from adaptivenet.training import Checkpoints, data_mesh, fit, shard_population
from tests.training.problems import population, same_bits

assert jax.device_count() == 8
mesh = data_mesh()
assert dict(mesh.shape) == {{"population": 8}}
problem = population(members=8)
sharded = shard_population(problem.state, mesh)
assert same_bits(sharded, problem.state)
for leaf in jax.tree.leaves(sharded):
    assert len(leaf.sharding.device_set) == 8, leaf.sharding
    assert leaf.addressable_shards[0].data.shape[0] == 1
folder = tempfile.mkdtemp()
part = fit(sharded, **problem.arguments(), epochs=1, checkpoints=Checkpoints(folder))
spread = fit(sharded, **problem.arguments(), epochs=2, checkpoints=Checkpoints(folder))
whole = fit(sharded, **problem.arguments(), epochs=2)
alone = fit(problem.state, **problem.arguments(), epochs=2)
assert same_bits(spread.state, whole.state)
for leaf in jax.tree.leaves(spread.state.params):
    assert len(leaf.sharding.device_set) == 8, leaf.sharding
np.testing.assert_array_equal(spread.state.key, alone.state.key)
jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    spread.state.params,
    alone.state.params,
)
try:
    shard_population({{"w": jnp.ones((12, 2))}}, mesh)
except ValueError as error:
    print(error)
"""


def test_population_over_eight_devices():
    root = str(Path(__file__).parents[2])
    flags = "--xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(root=root)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert "w has shape (12, 2); its first axis must be a population of a multiple of 8" in (
        process.stdout
    )


def test_leaves_without_members_are_named():
    mesh = data_mesh(jax.devices()[:1])
    with pytest.raises(ValueError, match=r"step has shape \(\)"):
        shard_population({"step": jnp.int32(0)}, mesh)
    with pytest.raises(ValueError, match="at least one device"):
        data_mesh([])
