"""Checkpoints: every leaf comes back bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.training import CheckpointError, Checkpoints, init_state
from tests.training.problems import init_params, same_bits


class Inner(NamedTuple):
    mask: Any
    empty: Any = ()


def every_kind() -> dict[str, Any]:
    """Leaves of every dtype, with the bit patterns that are easily lost."""
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1.0, 65504.0], np.float32)
    return {
        "float32": jnp.asarray(odd),
        "nan payload": jnp.asarray(np.array([0x7FC0BEEF, 0xFFC00001], np.uint32).view(np.float32)),
        "bfloat16": jnp.asarray(odd).astype(jnp.bfloat16),
        "float16": jnp.asarray(odd).astype(jnp.float16),
        "bool": jnp.array([[True, False]]),
        "int8": jnp.array([-128, 127], jnp.int8),
        "int32": jnp.array(-(2**31)),
        "uint32": jnp.array([2**32 - 1], jnp.uint32),
        "empty": jnp.zeros((0, 3)),
        "raw key": jax.random.key_data(jax.random.key(1)),
        "typed key": jax.random.key(2),
        "typed keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "no keys": jax.random.split(jax.random.key(3), 2)[:0],
        "tuple": Inner({"a": jnp.ones((2, 2), bool), "b": optax.MaskedNode()}, ()),
        "list": [jnp.float32(1), (jnp.int32(2),), None],
        "slash/in.name": jnp.float32(3),
    }


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    tree = every_kind()
    checkpoints.save(1, tree, {"any": [1, None, "text"]})
    checkpoints.close()
    for like in (
        jax.tree.map(jnp.zeros_like, tree),
        jax.eval_shape(lambda: tree),
    ):
        back, meta = Checkpoints(tmp_path / "run").restore(like)
        assert same_bits(back, tree)
        assert meta == {"any": [1, None, "text"]}
    assert str(jax.random.key_impl(back["typed keys"])) == "rbg"


MASK = {"dense1": True, "dense2": False}


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), MASK)),
        optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 3),
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.add_noise(0.1, 0.5, 3),
    ],
)
def test_optimizer_states_come_back(tmp_path, tx):
    tx = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
    keys = jax.random.split(jax.random.key(1), 2)
    states = []
    for key in keys:
        state = init_state(init_params, tx, key)
        grads = jax.tree.map(jnp.ones_like, state.params)
        with jax.numpy_dtype_promotion("standard"):  # some of optax's rules mix dtypes
            _, opt_state = tx.update(grads, state.opt_state, state.params)
        states.append(state._replace(opt_state=opt_state))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    for population, tree in ((False, states[0]), (True, stacked)):
        checkpoints = Checkpoints(tmp_path / str(population))
        checkpoints.save(0, tree)
        back, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, tree))
        assert same_bits(back, tree)


def test_weak_types_come_back(tmp_path):
    tree = {"scalar": jnp.asarray(0.1), "stacked": jnp.stack([jnp.asarray(1), jnp.asarray(2)])}
    assert all(leaf.weak_type for leaf in jax.tree.leaves(tree))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, tree)
    back, _ = checkpoints.restore(tree)
    assert same_bits(back, tree)
    assert all(leaf.weak_type for leaf in jax.tree.leaves(back))


def test_a_tree_without_arrays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"nothing": (), "empty": jnp.zeros(0)}, {"a": 1})
    back, meta = checkpoints.restore({"nothing": (), "empty": jnp.zeros(0)})
    assert meta == {"a": 1}
    assert back["empty"].shape == (0,)


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest() is None
    assert not (tmp_path / "run").exists()
    for epoch in (1, 2, 5):
        checkpoints.save(epoch, {"w": jnp.float32(epoch)})
    assert checkpoints.latest() == 5
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == ["2", "5"]
    assert checkpoints.restore({"w": jnp.float32(0)})[0]["w"] == 5
    assert checkpoints.restore({"w": jnp.float32(0)}, 2)[0]["w"] == 2
    with pytest.raises(CheckpointError, match="holds no checkpoint 1"):
        checkpoints.restore({"w": jnp.float32(0)}, 1)
    with pytest.raises(CheckpointError, match="already holds checkpoint 5, so 4 is not written"):
        checkpoints.save(4, {"w": jnp.float32(0)})
    checkpoints.delete()
    assert checkpoints.latest() is None


@pytest.mark.parametrize("like", ["", "commit_success.txt"])
def test_half_written_checkpoints_are_ignored(tmp_path, like):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.float32(1)})
    checkpoints.close()
    # What a process killed while it was saving leaves: a copy under a temporary name.
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-17")
    if like:
        (tmp_path / "2.orbax-checkpoint-tmp-17" / like).unlink(missing_ok=True)
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    assert again.restore({"w": jnp.float32(0)})[0]["w"] == 1
    again.save(2, {"w": jnp.float32(2)})
    assert again.restore({"w": jnp.float32(0)})[0]["w"] == 2


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(3), "m": jnp.zeros(2)}, r"w is float32\[2\], the run has float32\[3\]"),
        ({"w": jnp.zeros(2, jnp.int32), "m": jnp.zeros(2)}, r"the run has int32\[2\]"),
        ({"w": jnp.zeros(2)}, "m is only in the checkpoint"),
        ({"w": jnp.zeros(2), "m": jnp.zeros(2), "v": jnp.zeros(2)}, "v is only in the run"),
        ({"w": jnp.zeros(2), "m": jax.random.key(0)}, r"the run has key<fry>\[\]"),
        (Inner(jnp.zeros(2)), "mask is only in the run; .* only in the checkpoint"),
        ({str(i): jnp.zeros(2) for i in range(5)}, r"\(and 4 more\)"),
    ],
)
def test_another_configuration_is_refused_by_leaf(tmp_path, like, message):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"w": jnp.ones(2), "m": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.restore(like)
    assert str(tmp_path / "3") in str(error.value)
    assert "delete it to start anew" in str(error.value)


def test_another_fingerprint_is_refused(tmp_path):
    Checkpoints(tmp_path, fingerprint="abc").save(1, {"w": jnp.float32(1)})
    with pytest.raises(CheckpointError, match=r"fingerprint 'abc', this run has 'def'"):
        Checkpoints(tmp_path, fingerprint="def").restore({"w": jnp.float32(1)})
    assert Checkpoints(tmp_path, fingerprint="abc").restore({"w": jnp.float32(0)})[0]["w"] == 1


@pytest.mark.parametrize("part", ["document", "arrays"])
def test_damaged_files_are_named(tmp_path, part):
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoints.save(epoch, {"w": jnp.arange(1000.0)})
    checkpoints.close()
    for path in (tmp_path / "2" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="the run continues from 1") as error:
        Checkpoints(tmp_path).restore({"w": jnp.arange(1000.0)})
    assert str(tmp_path / "2") in str(error.value)
    shutil.move(tmp_path / "2", tmp_path.parent / "aside")
    assert Checkpoints(tmp_path).latest() == 1


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep and every"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep and every"):
        Checkpoints(tmp_path, every=0)


def test_nothing_is_printed(tmp_path, capfd, caplog):
    checkpoints = Checkpoints(tmp_path)
    for epoch in range(3):
        checkpoints.save(epoch, every_kind())
    checkpoints.restore(every_kind())
    checkpoints.close()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
