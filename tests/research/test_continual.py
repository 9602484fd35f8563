"""The study of continual learning: its tasks, its learners, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import continual, continual_data, continual_figure, continual_run
from research.continual_measures import read_target, summarised
from research.continual_methods import At, Facts
from research.continual_rows import METHODS, learner, read_row
from research.continual_run import Course, Learned
from research.study import Outcome

BASE = continual_data.Base(
    "toy",
    "0",
    (
        np.random.default_rng(0).random((60, 6), np.float32),
        np.repeat(np.arange(6, dtype=np.int32), 10),
    ),
    (
        np.random.default_rng(1).random((30, 6), np.float32),
        np.repeat(np.arange(6, dtype=np.int32), 5),
    ),
)


def config(**changes):
    plain = continual.Config(
        data="digits", rows=("none",), tasks=3, hidden=(5,), batch_size=10, seeds=(0, 1), draws=2
    )
    return dataclasses.replace(plain, **changes)


class TestSequences:
    def test_permutations_differ_by_task_and_seed_and_serve_both_parts(self):
        tasks = continual_data.sequence(config(protocol="permuted"), BASE, 0)
        firsts = [np.asarray(tasks.teach(k).inputs[0]) for k in range(3)]
        assert all(sorted(f) == sorted(BASE.train[0][0]) for f in firsts)
        assert len({tuple(f) for f in firsts}) == 3
        order = [int(np.flatnonzero(BASE.train[0][0] == v)[0]) for v in firsts[1]]
        np.testing.assert_array_equal(tasks.test(1).inputs, BASE.check[0][:, order])
        other = continual_data.sequence(config(protocol="permuted"), BASE, 1)
        assert not np.array_equal(other.teach(0).inputs, tasks.teach(0).inputs)

    @pytest.mark.parametrize("protocol", ["permuted", "stream", "split_task", "split_domain"])
    def test_some_of_a_task_are_as_in_the_whole(self, protocol):
        tasks = continual_data.sequence(config(protocol=protocol), BASE, 0)
        rows = np.array([5, 0, 17, 5])
        for some, whole in zip(tasks.teach(1, rows), tasks.teach(1), strict=True):
            np.testing.assert_array_equal(some, np.asarray(whole)[rows])
        for some, whole in zip(tasks.test(1, 7), tasks.test(1), strict=True):
            np.testing.assert_array_equal(some, np.asarray(whole)[:7])

    @pytest.mark.parametrize("protocol", ["split_task", "split_class", "split_domain"])
    def test_split_tasks_have_two_classes_each(self, protocol):
        tasks = continual_data.sequence(config(protocol=protocol), BASE, 0)
        for task in range(3):
            assert len(np.unique(tasks.teach(task).targets)) == 2
            assert len(tasks.test(task).targets) == 10
        if protocol == "split_domain":
            assert tasks.classes == 2
        else:
            assert tasks.active.sum(1).tolist() == [2, 2, 2]
            assert tasks.active.sum(0).tolist() == [1] * 6
        seen = tasks.answers(0, after=2).sum()
        assert seen == (6 if protocol == "split_class" else 2)

    def test_a_stream_blends_one_order_into_the_next(self):
        length = {"stream_length": 60, "blend": 0.5}
        tasks = continual_data.sequence(config(protocol="stream", **length), BASE, 0)
        pure = continual_data.sequence(
            config(protocol="stream", stream_length=60, blend=0.0), BASE, 0
        )
        later, same = np.asarray(tasks.teach(1).inputs), np.asarray(pure.teach(1).inputs)
        changed = (later != same).any(1)
        assert 5 < changed[:30].sum() < 25
        assert not changed[30:].any()
        assert tasks.rows(1, 10, 6, np.random.default_rng(0)).ravel().tolist() == list(range(60))

    def test_every_pass_shows_every_example_once(self):
        tasks = continual_data.sequence(config(protocol="permuted"), BASE, 0)
        rows = tasks.rows(0, 10, 12, np.random.default_rng(0))
        assert sorted(rows[:6].ravel()) == sorted(rows[6:].ravel()) == list(range(60))

    def test_labels_that_the_head_has_not(self):
        tasks = continual_data.sequence(config(protocol="split_class"), BASE, 0)
        assert len(tasks.lesson(1).targets) == 20
        fewer = dataclasses.replace(tasks, active=tasks.active & (np.arange(6) < 3))
        with pytest.raises(ValueError, match="no output stands for"):
            [fewer.lesson(task) for task in range(3)]

    def test_scenarios_of_one_split(self):
        rows = ("task/none", "class/ewc@1")
        split = config(protocol="split", rows=rows, pairs=("task/none:class/ewc@1",))
        assert split.apart("class/ewc@1") == ("split_class", True, "ewc@1")
        assert config().apart("ewc@1") == ("permuted", True, "ewc@1")
        for row in ("none", "by/none"):
            with pytest.raises(ValueError, match="write task/"):
                config(protocol="split", rows=(row,))
        with pytest.raises(ValueError, match="only protocol split has scenarios"):
            config(rows=("class/none",))

    def test_who_is_not_told_where_tasks_end(self):
        blind = config(rows=("blind/ewc@1", "ewc@1"), period=4, fisher_examples=20)
        assert [blind.apart(row).told for row in blind.rows] == [False, True]
        assert not config(told=False, rows=("none", "mesu@1")).apart("none").told
        with pytest.raises(ValueError, match="give period"):
            config(rows=("blind/ewc@1",))
        with pytest.raises(ValueError, match="fewer than fisher_examples"):
            config(rows=("blind/ewc@1",), period=4, fisher_examples=21)
        with pytest.raises(ValueError, match="must be told where tasks end"):
            config(told=False, rows=("packnet",), period=4, fisher_examples=20)

    def test_more_tasks_than_there_are(self):
        with pytest.raises(ValueError, match="parts for 3, not 4"):
            continual_data.sequence(config(protocol="split_class", tasks=4), BASE, 0)

    def test_inputs_are_scaled_by_what_is_learnt_from(self):
        unit, standard = (
            continual_data.load(config(inputs=inputs, validation=0))
            for inputs in ("unit", "standardised")
        )
        assert (unit.train[0].min(), unit.train[0].max()) == (0, 1)
        mean, scale = np.mean(unit.train[0], dtype=float), np.std(unit.train[0], dtype=float)
        for one, other in ((unit.train, standard.train), (unit.check, standard.check)):
            np.testing.assert_allclose(other[0], (one[0] - mean) / scale, atol=1e-5)
            np.testing.assert_array_equal(one[1], other[1])

    def test_zeros_around_an_image(self):
        plain, wide = (continual_data.load(config(padding=rows)).train[0] for rows in (0, 2))
        images = wide.reshape(-1, 12, 12)
        np.testing.assert_array_equal(images[:, 2:-2, 2:-2].reshape(plain.shape), plain)
        assert wide.sum() == pytest.approx(plain.sum())
        with pytest.raises(ValueError, match="nothing to pad"):
            continual_data.load(config(data="mnist1d", padding=2))

    def test_nothing_is_measured_on_no_examples(self):
        assert len(continual_data.load(config(validation=0)).train[1]) > len(
            continual_data.load(config(validation=100)).train[1]
        )
        with pytest.raises(ValueError, match="hold some apart"):
            config(validation=0, measured_on="validation")

    def test_data_of_another_protocol(self):
        with pytest.raises(ValueError, match="is not one of data 'fsdd'"):
            continual_data.load(config(data="fsdd"))


def test_spectrograms_tell_a_low_tone_from_a_high_one():
    time = np.arange(4000) / 8000
    waves = [(2**14 * np.sin(2 * np.pi * f * time)).astype(np.int16) for f in (400, 2900)]
    low, high = continual_data.spectrograms(waves).reshape(2, 16, 16).mean(1)
    assert low.argmax() == 400 * 16 // 4000
    assert high.argmax() == 2900 * 16 // 4000


class TestRows:
    @pytest.mark.parametrize(
        ("row", "match"),
        [("nothing", "no method"), ("ewc", "needs a strength"), ("none@1", "has no strength"),
         ("ewc@much", "not a number"), ("ewc@-1", ">= 0"), ("ewc@nan", ">= 0"),
         ("ewc@1*0.5", "does not fade"),
         ("online_ewc@1*2", r"share in \[0, 1\]"), ("online_ewc@1*some", "not a number")],
    )  # fmt: skip
    def test_errors(self, row, match):
        with pytest.raises(ValueError, match=match):
            read_row(row)

    def test_strengths(self):
        assert read_row("si@0.5") == ("si", 0.5, 1.0)
        assert read_row("kronecker@3*0.9") == ("kronecker", 3.0, 0.9)
        assert math.isnan(read_row("none")[1])

    def test_targets(self):
        assert read_target("none average least 3", ("none",)).within is None
        with pytest.raises(ValueError, match="is not 'row metric least value'"):
            read_target("none average above 3", ("none",))
        with pytest.raises(ValueError, match="pairs"):
            config(pairs=("none:si@1",))


FACTS = Facts((6, 5, 6), 3, True, "adam", 1e-2, 10, 20, 20, 30, 2, True, 1.0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_learner_learns_a_task_and_passes_a_boundary(method):
    row = f"{method}@1.0" if METHODS[method].needs_strength else method
    own, key = learner(row, FACTS), jax.random.key(0)
    net = own.begin(key)
    x, y = (jnp.asarray(a[:20]) for a in BASE.train)
    at = At(jnp.int32(0), jnp.arange(6) < 2, key)
    task = continual_data.Examples(x, y)

    def loss(net):
        logits = own.logits(net, x, at)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    step = jax.jit(lambda net, key: own.step(net, x[:10], y[:10], at._replace(key=key)))
    after = net
    for number in range(60):
        after = step(after, jax.random.fold_in(key, number))
    shown = jnp.where(at.active, own.logits(after, x[:10], at), -jnp.inf)
    assert float(jnp.mean(shown.argmax(-1) == y[:10])) >= 0.8
    bounded = jax.jit(own.boundary)(after, task, at)
    assert jax.tree.structure(bounded) == jax.tree.structure(net)
    shapes = [leaf.shape for leaf in jax.tree.leaves(net)]
    assert [leaf.shape for leaf in jax.tree.leaves(bounded)] == shapes
    assert np.isfinite(float(loss(bounded)))


class TestCourse:
    def learnt(self, folder, row, stop=None):
        done = []

        def tell(task):
            done.append(task)
            if stop is not None and task == stop:
                raise KeyboardInterrupt

        course = Course(config(rows=(row,), protocol="split_class", checks=2), BASE, folder, "d")
        return course.learn(row, 0, tell), done

    @pytest.mark.parametrize("row", ["ewc@10", "mesu@100", "kronecker@100"])
    def test_a_run_killed_between_tasks_is_the_run_uninterrupted(self, tmp_path, row):
        whole, _ = self.learnt(tmp_path / "whole", row)
        with pytest.raises(KeyboardInterrupt):
            self.learnt(tmp_path / "parts", row, stop=1)
        again, done = self.learnt(tmp_path / "parts", row)
        assert done == [0, 1, 2]
        np.testing.assert_array_equal(again.accuracy, whole.accuracy)
        np.testing.assert_array_equal(again.within, whole.within)
        np.testing.assert_array_equal(again.calibration, whole.calibration)

    def test_of_many_tasks_only_the_latest_are_tested_until_the_end(self, tmp_path):
        found = [
            Course(config(latest=latest), BASE, tmp_path / str(latest), "d").learn(
                "none", 0, lambda task: None
            )
            for latest in (0, 1)
        ]
        known = ~np.isnan(found[1].accuracy)
        assert known.tolist() == [[True, False, False], [False, True, False], [True, True, True]]
        np.testing.assert_array_equal(found[0].accuracy[known], found[1].accuracy[known])
        numbers, curves = summarised(found[1])
        assert numbers["last5"] == numbers["average"]
        assert sorted(curves) == ["last", "learnt", "matrix"]
        assert "forgetting" not in numbers

    @pytest.mark.parametrize("crowded", [True, False])
    def test_programs_are_given_up_where_memory_maps_run_out(self, tmp_path, monkeypatch, crowded):
        jax.clear_caches()
        monkeypatch.setattr(continual, "crowded", lambda: crowded)
        plain = config(output=str(tmp_path), rows=("none", "ewc@1"))
        outcome = continual.run(plain, BASE, (0, 1), lambda what, share: None)
        assert outcome.metrics["average/ewc@1"].shape == (2,)
        held = continual_run.taught._cache_size()
        assert held == (0 if crowded else 2)  # of both rows; seeds share them

    def test_memory_maps_are_counted(self, monkeypatch):
        assert not continual.crowded()
        real = Path.read_text
        small = {"/proc/sys/vm/max_map_count": "10\n"}
        monkeypatch.setattr(Path, "read_text", lambda p, *a: small.get(str(p)) or real(p, *a))
        assert continual.crowded() == Path("/proc/self/maps").exists()

    def test_stock_is_taken_between_the_ends_of_tasks(self, tmp_path, monkeypatch):
        seen = []

        def bounded(own, net, task, at):
            seen.append(np.asarray(task.targets))
            return net

        monkeypatch.setattr(continual_run, "bounded", bounded)
        own = config(
            rows=("blind/online_ewc@1",), protocol="split_class", period=2, steps=5,
            fisher_examples=10,
        )  # fmt: skip
        Course(own, BASE, tmp_path, "d").learn("blind/online_ewc@1", 0, lambda task: None)
        assert len(seen) == 3 * 3  # after one step, and every two from then on
        assert all(len(targets) == 10 for targets in seen)
        assert len({tuple(sorted(set(targets))) for targets in seen}) == 3

    def test_tasks_too_short_for_what_happens_within_them(self):
        with pytest.raises(ValueError, match="cannot be looked at 4 times"):
            continual_run.pauses(3, 4, 0)
        with pytest.raises(ValueError, match="stock would never be taken"):
            continual_run.pauses(3, 0, 8)

    def test_what_was_learnt_is_summarised(self):
        nan = np.nan
        matrix = np.array([[1.0, nan], [0.5, 0.9]])
        within, taken = np.array([[0.2, 1.0], [0.4, 0.6]]), np.array([0.5, 0.7])
        learned = Learned(matrix, np.full((2, 2), 0.1), within, taken, 80, 0.5)
        numbers, curves = summarised(learned)
        assert (numbers["average"], numbers["latest"]) == pytest.approx((0.7, 0.9))
        assert numbers["forgetting"] == pytest.approx(0.5)
        assert numbers["gap"] == pytest.approx(0.4)
        assert curves["learnt"].tolist() == [1.0, 0.9]
        assert (numbers["capacity"], curves["capacity"].tolist()) == (0.7, [0.5, 0.7])
        assert curves["matrix"].tolist() == [[1.0, -1.0], [0.5, 0.9]]


def test_parameters_begin_within_one_over_the_root_of_the_fan_in():
    own = learner("none", FACTS._replace(sizes=(100, 400, 10), initial="fan_in"))
    params = own.begin(jax.random.key(0)).params
    for name, limit in (("dense1", 0.1), ("dense2", 0.05)):
        for part in params[name].values():
            assert limit * 0.7 < np.abs(part).max() <= limit
        assert np.std(params[name]["kernel"]) == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_what_is_averaged_is_tested_and_remembered():
    own, key = learner("kronecker_averaged@10", FACTS), jax.random.key(0)
    x, y = (jnp.asarray(a) for a in BASE.train)
    at = At(jnp.int32(0), jnp.ones(6, bool), key)
    net = own.begin(key)
    slow = np.asarray(net.params["dense1"]["kernel"])
    for place in range(0, 60, 10):
        net = jax.jit(own.step)(net, x[place : place + 10], y[place : place + 10], at)
        share = FACTS.batch_size / own.reach
        slow = (1 - share) * slow + share * np.asarray(net.params["dense1"]["kernel"])
    np.testing.assert_allclose(net.memory["dense1"]["kernel"], slow, rtol=1e-5)
    ended = jax.jit(own.boundary)(net, continual_data.Examples(x, y), at)
    np.testing.assert_array_equal(ended.params["dense1"]["kernel"], net.memory["dense1"]["kernel"])
    expected = own.masked(net.memory, x, at.active)
    np.testing.assert_allclose(own.logits(net, x, at), expected, rtol=1e-6)
    assert np.abs(expected - own.masked(net.params, x, at.active)).max() > 1e-4


def outcome_of(plain):
    """Curves and numbers of two seeds, every row a little better than the one before it."""
    names, curves, numbers = ("average", "learnt", "last", "last5"), {}, {}
    for place, row in enumerate(plain.rows):
        level = 0.5 + 0.01 * place + np.array([[0.0], [0.002]])
        curves |= {f"{name}/{row}": level + np.zeros((2, plain.tasks)) for name in names}
        numbers |= {f"average/{row}": level[:, 0], f"last5/{row}": level[:, 0] + 0.2}
    return Outcome(numbers, curves)


class TestFigure:
    def test_a_split_has_a_column_for_every_scenario(self):
        rows = ("task/none", "task/ewc@1", "domain/none", "class/none", "class/er", "class/ewc@5")
        plain = config(protocol="split", rows=rows, memory=10)
        panels = continual_figure.draw(plain, outcome_of(plain)).axes
        assert [len(ax.lines) for ax in panels] == [2, 1, 3, 2, 1, 3]
        colour = {line.get_label(): line.get_color() for line in panels[2].lines}
        assert colour["ewc"] == panels[0].lines[1].get_color() != colour["none"]

    def test_where_matrices_are_too_large_what_is_traded_is_drawn(self):
        plain = config(tasks=200, rows=("none", "mesu@300"))
        panels = continual_figure.draw(plain, outcome_of(plain)).axes
        assert [ax.get_title() for ax in panels].index("what is traded") == 3
        points = [points[0].get_xydata()[0] for points in panels[3].containers]
        np.testing.assert_allclose(points, [[50.1, 70.1], [51.1, 71.1]])


class TestUnified:
    def after(self, row):
        """A network at a boundary, and after it; with its examples."""
        own, key = learner(row, FACTS), jax.random.key(0)
        x, y = (jnp.asarray(a) for a in BASE.train)
        at = At(jnp.int32(0), jnp.ones(6, bool), key)
        net = own.begin(key)
        step = jax.jit(own.step)
        for number in range(60):
            rows = jax.random.randint(jax.random.fold_in(key, number), (10,), 0, len(y))
            net = step(net, x[rows], y[rows], at)
        return own, net, jax.jit(own.boundary)(net, continual_data.Examples(x, y), at), x

    @pytest.mark.parametrize(
        "row", ["unified@1", "unified_penalty@1", "unified_magnitude@1", "unified_random@1"]
    )
    def test_half_is_zero_and_what_is_left_makes_up_for_it(self, row):
        own, net, after, x = self.after(row)
        assert float(own.capacity(after)) == pytest.approx(0.5, abs=0.02)
        bare = jax.tree.map(lambda p, q: jnp.where(q == 0, 0.0, p), net.params, after.params)
        said, made_up, cut = (jax.nn.softmax(own.apply(p, x)) for p in
                              (net.params, after.params, bare))  # fmt: skip
        assert float(jnp.sum((made_up - said) ** 2)) < 0.7 * float(jnp.sum((cut - said) ** 2))

    def test_the_control_moves_nothing(self):
        _, net, after, _ = self.after("unified_bare@1")
        for p, q in zip(jax.tree.leaves(net.params), jax.tree.leaves(after.params), strict=True):
            np.testing.assert_array_equal(np.where(q == 0, 0.0, p), q)
