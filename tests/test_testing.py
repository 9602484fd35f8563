"""The contract suite catches what it is there to catch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from adaptivenet import pruning, testing


def good(sparsity):
    return optax.chain(optax.sgd(0.1), pruning.prune(sparsity))


class Tally(NamedTuple):
    count: jax.Array


def wrapped(update_tally, start=None):
    """A transformation that does nothing but keep a tally."""

    def init(params):
        return Tally(jnp.int32(0) if start is None else jnp.asarray(start))

    def update(updates, state, params=None):
        return updates, Tally(update_tally(state.count))

    return optax.chain(optax.sgd(0.1), optax.GradientTransformation(init, update))


@pytest.mark.parametrize(
    ("subject", "mode"), [("list", "eager"), ("nnx_state", "jit"), ("linen", "vmap_strengths")]
)
def test_what_is_in_order_passes(subject, mode):
    """Optimizers that prune nothing have a contract too."""
    testing.check(optax.sgd, subject=subject, mode=mode, steps=2)


@pytest.mark.parametrize("mode", ["jit", "vmap_strengths"])
def test_a_pruner_that_is_not_last_is_caught(mode):
    def make(sparsity):
        return optax.chain(pruning.prune(sparsity), optax.sgd(0.1, momentum=0.9))

    with pytest.raises(
        testing.ContractError, match=rf"subject 'dict', mode '{mode}'.*Is prune\(\) the last"
    ):
        testing.check(make, subject="dict", mode=mode, steps=2)


def test_a_state_that_changes_its_dtype_is_caught():
    def make(strength):
        return wrapped(lambda count: count.astype(jnp.float32) + 1.0)

    with pytest.raises(
        testing.ContractError, match=r"leaf '.*count' changed from int32\(\) to float32\(\)"
    ):
        testing.check(make, subject="list", mode="jit", steps=2)


def test_a_state_that_changes_its_shape_is_caught():
    def make(strength):
        return wrapped(lambda count: jnp.stack([count.sum(), count.sum()]))

    with pytest.raises(testing.ContractError, match=r"changed from int32\(\) to int32\(2,\)"):
        testing.check(make, subject="dict", mode="eager", steps=2)


def test_a_state_that_changes_its_structure_is_caught():
    def make(strength):
        def update(updates, state, params=None):
            return updates, (state, state)

        return optax.GradientTransformation(lambda params: (), update)

    with pytest.raises(testing.ContractError, match="the structure changed from"):
        testing.check(make, subject="dict", mode="jit", steps=1)


def test_state_on_the_side_is_caught():
    """A Python counter advances once a trace and not once a step."""

    def make(strength):
        calls = itertools.count(1)
        return wrapped(lambda count: count * 0 + next(calls))

    with pytest.raises(testing.ContractError, match=r"mode 'eager': '.*count' differs in 1 place"):
        testing.check(make, subject="dict", mode="eager", steps=3)


def test_a_rule_that_mixes_members_of_a_population_is_caught():
    calls = itertools.count()

    def make(strength):
        # The first trace is the population's.
        scale = 1.0 if next(calls) == 0 else 2.0
        return optax.sgd(0.1 * scale)

    with pytest.raises(testing.ContractError, match=r"mode 'vmap_seeds', member 0: .* by up to"):
        testing.check(make, subject="dict", mode="vmap_seeds", steps=2)


def test_parameters_that_diverge_are_caught():
    def make(strength):
        return optax.sgd(1e30)

    with pytest.raises(testing.ContractError, match=r"leaf 'dense1/.*' is not finite"):
        testing.check(make, subject="dict", mode="jit", steps=4)


def test_a_mask_that_does_not_match_is_caught():
    params = {"w": jnp.ones((2, 2))}
    pruner = pruning.prune(0.5)
    _, state = pruner.update(params, pruner.init(params), params)
    with pytest.raises(
        testing.ContractError, match="after step 3: 2 synapses of leaf 'w' are not zero"
    ):
        testing.check_landing(params, state, where="after step 3")
    testing.check_landing(pruning.apply_mask(params, state.mask), state)


@pytest.mark.parametrize("check", [testing.check_checkpoint, testing.check_resume])
def test_state_that_no_checkpoint_holds_is_caught(check, monkeypatch):
    """Stands for a serialization that loses something: one bit of one leaf."""
    through = testing._through_orbax

    def lossy(carry, folder):
        leaves, treedef = jax.tree.flatten(through(carry, folder))
        place = max(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[place] = leaves[place].at[(0,) * leaves[place].ndim].add(1e-6)
        return jax.tree.unflatten(treedef, leaves)

    monkeypatch.setattr(testing, "_through_orbax", lossy)
    with pytest.raises(testing.ContractError, match="is not identical"):
        check(lambda strength: optax.sgd(0.1), subject="dict")


def test_checkpoints_go_to_the_folder_given(tmp_path):
    testing.check_checkpoint(
        lambda strength: optax.noisy_sgd(0.1, key=0), subject="list", folder=str(tmp_path)
    )
    assert list(tmp_path.iterdir())


def test_sharded_on_one_device_is_the_same_run():
    testing.check_sharded(good, steps=2, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: testing.check(good, subject="torch"), "subject='torch'; choose one of dict, list"),
        (lambda: testing.check(good, mode="pmap"), "mode='pmap'; choose one of eager, jit, scan"),
    ],
)
def test_unknown_subjects_and_modes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_suite_for_eight_devices_runs_in_a_process_of_its_own():
    """Only a fresh process can have eight host devices; here one of its tests is run so."""
    root = Path(__file__).parent.parent
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/distributed",
            "-k",
            "test_eight_devices_are_there or test_a_rule_that_depends_on_the_layout_is_caught",
        ],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
