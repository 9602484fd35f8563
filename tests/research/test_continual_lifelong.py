"""Learners with room: what they release, what a task sees of the network, and that runs go on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import consolidation
from research import continual, continual_data, continual_run
from research.continual_lifelong import LIFELONG, asked
from research.continual_methods import At
from research.continual_rows import learner

life = consolidation.lifelong
FREE = ("lifelong@10", "lifelong_bayes@10")
TOLD = ("packnet", "piggyback", "hat@0.3", "lifelong_ids@10")
STEPS = 150


def config(**changes):
    plain = continual.Config(
        data="digits",
        protocol="permuted",
        rows=("none",),
        tasks=3,
        hidden=(40,),
        steps=STEPS,
        batch_size=20,
        rate=1e-2,
        fisher_examples=200,
        seeds=(0, 1),
        draws=2,
    )
    return dataclasses.replace(plain, **changes)


@functools.cache
def course():
    c = config()
    return c, continual_data.sequence(c, continual.load(c), 0)


@functools.cache
def nets(row) -> tuple[Any, list[Any]]:
    """The learner, and its network after every task."""
    c, tasks = course()
    own, key = learner(row, continual_run.facts(c, tasks)), jax.random.key(0)
    net, found = own.begin(key), []
    for task in range(3):
        at = At(jnp.int32(task), jnp.ones(10, bool), jax.random.fold_in(key, task))
        rows = tasks.rows(task, 20, STEPS, np.random.default_rng(task))
        net = continual_run.taught(own, net, tasks.teach(task), jnp.asarray(rows), jnp.int32(0), at)
        net = continual_run.bounded(own, net, tasks.teach(task), at)
        found.append(net)
    return own, found


def accuracy(row, task, told, after=2):
    """Of a task, where the learner is told that it were another."""
    own, found = nets(row)
    at = At(jnp.int32(after), jnp.ones(10, bool), jax.random.key(1), jnp.int32(told))
    return float(continual_run.tested(own, found[after], course()[1].test(task), at)[0])


@pytest.mark.parametrize("row", FREE + TOLD)
def test_every_row_learns_and_remembers(row):
    assert accuracy(row, 0, 0) > 0.5
    # Three tasks, ten answers and forty units: HAT has few left for the last.
    assert accuracy(row, 2, 2) > 0.3


@pytest.mark.parametrize("row", TOLD)
def test_a_wrong_task_is_worse(row):
    for task, other in ((2, 0), (0, 2)):
        # Without later tasks' synapses an early one cannot tell these of later ones from others.
        if (row, task) != ("lifelong_ids@10", 0):
            assert accuracy(row, task, task) > accuracy(row, task, other) + 0.1


@pytest.mark.parametrize("row", FREE)
def test_rows_without_ids_are_not_told(row):
    assert accuracy(row, 2, 2) == accuracy(row, 2, 0)


class TestRelease:
    @pytest.mark.parametrize("row", FREE)
    def test_what_is_released_is_zero_when_tested(self, row):
        own, found = nets(row)
        state = life.state_of(found[1].opt_state)
        free = [np.asarray(o) < 0 for o in jax.tree.leaves(state.owner)]
        kernels = [np.asarray(layer["kernel"]) for layer in found[1].params.values()]
        size, gone = sum(k.size for k in kernels), sum(int(f.sum()) for f in free)
        assert gone == pytest.approx(own.fraction * size, abs=1)
        for f, k in zip(free, kernels, strict=True):
            np.testing.assert_array_equal(k[f], 0)
        assert sum(int((k == 0).sum()) for k in kernels) == gone

    def test_a_variational_belief_is_certain_of_it_until_it_learns_again(self):
        own, found = nets("lifelong_bayes@10")
        free = np.asarray(found[1].opt_state.owner["dense1"]["kernel"]) < 0
        before = np.asarray(own.widths(found[1])["dense1"]["kernel"])
        assert np.all(before[free] == 0)
        assert np.all(before[~free] > 0)
        at = At(jnp.int32(2), jnp.ones(10, bool), jax.random.key(0))
        rows = jnp.arange(20)[None]
        after = continual_run.taught(own, found[1], course()[1].teach(2), rows, jnp.int32(0), at)
        np.testing.assert_array_equal(np.asarray(after.params["dense1"]["kernel"])[free], 0)
        width = np.asarray(own.widths(after)["dense1"]["kernel"])[free]
        np.testing.assert_allclose(width, width[0])
        assert width[0] > np.median(before[~free])


class TestShared:
    def test_packnet_shares_out_evenly_and_forgets_nothing(self):
        own, found = nets("packnet")
        state = found[2].opt_state[1]
        for owner in jax.tree.leaves(state.owner):
            counts = np.bincount(np.asarray(owner).ravel(), minlength=3)
            assert counts.sum() == owner.size
            assert counts.max() - counts.min() <= 2
        x = course()[1].test(0).inputs
        at = At(jnp.int32(2), jnp.ones(10, bool), jax.random.key(0), jnp.int32(0))
        first = own.logits(found[0], x, at)
        np.testing.assert_array_equal(own.logits(found[2], x, at), first)

    def test_piggyback_keeps_the_network_of_the_first_task(self):
        own, found = nets("piggyback")
        for one, two in zip(*(jax.tree.leaves(n.params) for n in found[::2]), strict=True):
            np.testing.assert_array_equal(one, two)
        x = course()[1].test(1).inputs
        at = At(jnp.int32(2), jnp.ones(10, bool), jax.random.key(0), jnp.int32(1))
        np.testing.assert_array_equal(own.logits(found[2], x, at), own.logits(found[1], x, at))

    def test_hat_keeps_what_it_guards(self):
        """A gate of less than one guards by less than all: logits move, and little."""
        _, found = nets("hat@0.3")
        assert accuracy("hat@0.3", 0, 0) > accuracy("hat@0.3", 0, 0, after=0) - 0.05
        held = consolidation.hat.held(found[2].opt_state[0])
        assert float(consolidation.hat.used(held)) > 0.1


def test_in_training_the_task_is_the_one_that_is_learnt():
    at = At(jnp.int32(1), jnp.ones(10, bool), jax.random.key(0))
    assert int(asked(at)) == 1
    assert int(asked(at._replace(tested=jnp.int32(0)))) == 0


@pytest.mark.parametrize("row", ["lifelong@10", "hat@0.3"])
def test_a_run_killed_between_tasks_is_the_run_uninterrupted(tmp_path, row):
    c = config(rows=(row,))
    base = continual.load(c)

    def learnt(folder, stop=None):
        def tell(task):
            if task == stop:
                raise KeyboardInterrupt

        return continual_run.Course(c, base, tmp_path / folder, "d").learn(row, 0, tell)

    whole = learnt("whole")
    with pytest.raises(KeyboardInterrupt):
        learnt("parts", stop=1)
    again = learnt("parts")
    np.testing.assert_array_equal(again.accuracy, whole.accuracy)
    np.testing.assert_array_equal(again.calibration, whole.calibration)
    assert again.bytes == whole.bytes


def test_controls_differ_in_the_score_alone():
    plain, *others = (LIFELONG[n] for n in ("lifelong", "lifelong_magnitude", "lifelong_random"))
    assert len({getattr(c, "score") for c in (plain, *others)}) == 3  # noqa: B009 (of subclasses)
    for other in others:
        assert set(vars(other)) - {"__module__", "__doc__"} == {"score"}
