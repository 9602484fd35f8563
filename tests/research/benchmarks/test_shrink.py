"""The benchmark of smaller models: its candidates compute the same thing; no time is asserted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import models
from adaptivenet.pruning import condensed
from research import shrinking_blocks
from research.benchmarks import shrink as benchmark
from research.benchmarks._timing import Timings


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_shrunk_network_computes_what_the_masked_one_does(name):
    subject = benchmark.subjects()[name]
    task = benchmark._task(subject, benchmark.SHAPES[name])
    found, ratio = benchmark.networks(subject, task, 0.5)
    x = task.inputs[:3]
    dense, masked, small = (
        np.asarray(subject.apply(found[kind], x)) for kind in ("dense", "masked", "shrunk")
    )
    np.testing.assert_allclose(masked, small, atol=1e-6)
    assert np.abs(dense - masked).max() > 1e-3, "the mask must take something away"
    assert 2.0 <= ratio < 2.6
    count = {kind: sum(map(jnp.size, jax.tree.leaves(net))) for kind, net in found.items()}
    assert count["shrunk"] < count["masked"] == count["dense"]


def test_the_wide_network_is_the_study_s_four_times_as_wide():
    wide, narrow = benchmark.subjects()["wide resnet"], benchmark.subjects()["resnet"]
    shapes = [
        jax.eval_shape(lambda k, s=s: s.init(k, benchmark._task(s, (8, 8, 3))), jax.random.key(0))
        for s in (wide, narrow)
    ]
    one, other = (tree["params"]["readout"]["kernel"].shape for tree in shapes)
    assert one == (4 * other[0], other[1])


def test_blocks_of_the_shrunk_network_are_its_masked_kernel():
    params = models.mlp_init(jax.random.key(0), (40, 8, 6, 3))
    cut = benchmark.blocks(params, density=0.25)
    drawn = np.random.default_rng(0)
    mask = benchmark._mask(drawn, (40, 8), (1, 8), 0.25)
    assert mask.sum() == 10 * 8
    masked = {
        **params,
        "dense1": {**params["dense1"], "kernel": jnp.where(mask, params["dense1"]["kernel"], 0)},
    }
    x = jax.random.normal(jax.random.key(1), (5, 40))
    np.testing.assert_allclose(shrinking_blocks.mlp(cut, x), models.mlp(masked, x), atol=1e-5)


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 2)])
def test_masks_hold_the_same_number_of_blocks_in_every_column(block):
    mask = benchmark._mask(np.random.default_rng(0), (16, 8), block, 0.25)
    tiles = mask.reshape(16 // block[0], block[0], 8 // block[1], block[1]).sum(axis=(1, 3))
    assert set(np.unique(tiles)) == {0, block[0] * block[1]}
    assert (tiles > 0).sum(axis=0).tolist() == [round(16 // block[0] * 0.25)] * (8 // block[1])


@pytest.mark.parametrize("density", [0.25, 0.1])
def test_every_format_holds_a_kernel_of_the_density_asked_for(density, monkeypatch):
    size = 192
    monkeypatch.setattr(benchmark, "SIZE", size)
    weights = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    packed = benchmark._packed(weights, density)
    assert {"fan-in", "bcsr", "blocks 1x16"} < set(packed)
    assert any(name.startswith("1:") for name in packed)
    for name, layer in packed.items():
        kernel = np.asarray(condensed.unpack(layer))
        rows = 64 if name == "blocks 64x64" else 16 if name == "blocks 16x16" else 1
        allowed = max(density * 0.3, rows / size)
        assert abs(np.mean(kernel != 0) - density) <= allowed, name
        kept = kernel != 0
        np.testing.assert_array_equal(kernel[kept], weights[kept], err_msg=name)


def test_many_batches_in_a_program_are_the_same_batch_many_times():
    params = models.mlp_init(jax.random.key(0), (4, 3, 2))
    x = jax.random.normal(jax.random.key(1), (2, 4))
    found = benchmark._loop(models.mlp, params, x, 3)()
    assert found.shape == (3, 2, 2)
    np.testing.assert_allclose(found, jnp.stack([models.mlp(params, x)] * 3), rtol=1e-6)


def test_every_way_of_running_is_held_against_its_own_dense():
    timings = Timings(
        {"JAX, dense": [4.0, 6.0], "JAX, shrunk": [2.0, 1.0], "ONNX, dense": [3.0, 3.0]}
    )
    text = benchmark._beside_dense(timings, "title")
    assert [line.split()[-1] for line in text.splitlines()[3:]] == ["1.00", "4.00", "1.00"]


def test_the_time_is_kept_on_one_core(monkeypatch):
    chosen = []
    monkeypatch.setattr(benchmark.os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    monkeypatch.setattr(
        benchmark.os, "sched_setaffinity", lambda _, cores: chosen.append(cores), raising=False
    )
    monkeypatch.setenv("XLA_FLAGS", "--first")
    benchmark.one_core()
    assert chosen == [{3}]
    assert benchmark.os.environ["XLA_FLAGS"].split() == [
        "--first",
        "--xla_cpu_multi_thread_eigen=false",
    ]
