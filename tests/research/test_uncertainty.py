"""The arms of the study of uncertainty do what they say, at a size that takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import models, training, trees
from adaptivenet.emergence import verdict
from research import uncertainty as study
from research import uncertainty_arms as arms
from research.uncertainty_data import load
from research.uncertainty_measures import claimed, gain, tables, title_of

ROOT = Path(__file__).resolve().parents[2]
SETTING = study.Setting(epochs=1, retrain=1, widths=(6, 10), batch_size=250, prior=4.0, noise=1e-9)


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
    # optax's schedules and Adam mix dtypes, which the strict setting of these tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def config():
    return study.Config(
        measured_on="validation",
        validation=1000,
        seeds=(0, 1),
        mnist1d=SETTING,
        sparsities=(0.5, 0.9),
        draws=4,
        shown=50,
        rows=("adam:magnitude", "l2:magnitude", "l2:snr", "ivon:snr", "ivon:magnitude"),
    )


@pytest.fixture(scope="module")
def data(config):
    return load(config)


@pytest.fixture(scope="module")
def task(data):
    return data.tasks["mnist1d"]


@pytest.fixture(scope="module")
def course(task):
    return arms.course(SETTING, task.inputs.shape[-1], len(task.inputs))


@pytest.fixture(scope="module")
def trained(course, task):
    key = jax.random.key(0)
    return {network: course.train(network, key, task) for network in arms.NETWORKS}


@pytest.fixture(scope="module")
def beliefs(course, task, trained):
    return {network: course.believe(network, net, task) for network, net in trained.items()}


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


class TestTraining:
    def test_all_begin_alike_and_see_the_same_batches(self, course):
        key = jax.random.key(3)
        starts = [course.begin(network, key)[0] for network in arms.NETWORKS]
        starts[-1] = starts[-1].mean
        for start in starts[1:]:
            for a, b in zip(leaves(starts[0]), leaves(start), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_noise_of_no_width_is_the_matched_penalty(self, trained):
        for a, b in zip(leaves(trained["noise"][0]), leaves(trained["l2"][0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    def test_the_penalty_is_there_and_shrinks(self, trained):
        norms = {n: float(arms.squares(trained[n][0])) for n in ("adam", "l2")}
        assert norms["l2"] < norms["adam"]

    def test_a_run_again_is_the_same(self, course, task, trained):
        again = course.train("ivon", jax.random.key(0), task)
        for a, b in zip(leaves(again[0]), leaves(trained["ivon"][0]), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_batch_that_examples_do_not_fill(self):
        with pytest.raises(ValueError, match="batch_size=128: 100 training examples do not fill"):
            arms.Course(study.Setting(epochs=1), 40, 100)


class TestBeliefs:
    def test_all_are_positive_and_around_the_network(self, beliefs):
        for belief in beliefs.values():
            for mean, param in zip(
                leaves(belief.posterior.mean), leaves(belief.params), strict=True
            ):
                np.testing.assert_allclose(mean, param, rtol=1e-6)
            assert all((x > 0).all() for x in leaves(belief.posterior.precision))

    def test_the_fisher_information_is_that_of_single_examples(self, beliefs, task):
        belief = beliefs["l2"]
        probe = jax.nn.softmax(models.mlp(belief.params, task.inputs))
        # Of the last bias it is the sum of p (1 - p).
        exact = np.asarray(probe * (1 - probe), np.float64).sum(0)
        found = belief.fisher["dense2"]["bias"]
        np.testing.assert_allclose(found, exact, rtol=1e-3)


class TestCuts:
    def test_scores(self, course, beliefs):
        belief = beliefs["l2"]
        scores = course.scores(belief, jax.random.key(1))
        kernel = np.asarray(belief.params["dense1"]["kernel"], np.float64)
        precision = np.asarray(belief.posterior.precision["dense1"]["kernel"], np.float64)
        snr = np.asarray(scores["snr"]["dense1"]["kernel"])
        np.testing.assert_allclose(snr, np.abs(kernel) * np.sqrt(precision), rtol=1e-5)
        shuffled = np.asarray(scores["shuffled"]["dense1"]["kernel"], np.float64)
        ratio = (shuffled / np.abs(kernel)) ** 2
        np.testing.assert_allclose(np.sort(ratio.ravel()), np.sort(precision.ravel()), rtol=1e-3)
        assert not np.allclose(ratio, precision, rtol=0.1)
        fisher = np.asarray(belief.fisher["dense1"]["kernel"], np.float64)
        obd = np.asarray(scores["obd"]["dense1"]["kernel"])
        np.testing.assert_allclose(obd, 0.5 * kernel**2 * fisher, rtol=1e-4, atol=1e-12)
        assert set(course.scores(beliefs["ivon"], jax.random.key(1))) == set(arms.SCORES[:4])

    def test_one_threshold_and_exact_counts(self, course, beliefs):
        belief = beliefs["adam"]
        scores = course.scores(belief, jax.random.key(1))["magnitude"]
        cut, masks = course.cut(belief.params, scores, jnp.array([0.5, 0.9]))
        size = trees.size(scores)
        flat = np.sort(np.concatenate([x.ravel() for x in leaves(scores)]))[::-1]
        for place, sparsity in enumerate((0.5, 0.9)):
            kept = size - round(sparsity * size)
            assert sum(int(m[place].sum()) for m in leaves(masks)) == kept
            for mask, score in zip(leaves(masks), leaves(scores), strict=True):
                np.testing.assert_array_equal(mask[place], score >= flat[kept - 1])
            for name in ("dense1", "dense2"):
                gone = ~np.asarray(masks[name]["kernel"][place])
                assert np.all(np.asarray(cut[name]["kernel"][place])[gone] == 0)
                np.testing.assert_array_equal(cut[name]["bias"][place], belief.params[name]["bias"])

    def test_what_is_cut_stays_zero_and_the_rest_learns(self, course, beliefs, task):
        belief = beliefs["l2"]
        scores = course.scores(belief, jax.random.key(1))["magnitude"]
        cut, masks = course.cut(belief.params, scores, jnp.array([0.5, 0.9]))
        again = course.retrain("l2", cut, masks, jax.random.key(2), task)
        for name in ("dense1", "dense2"):
            gone = ~np.asarray(masks[name]["kernel"])
            assert np.all(np.asarray(again[name]["kernel"])[gone] == 0)
            assert np.any(np.asarray(again[name]["kernel"] != cut[name]["kernel"])[~gone])
        before, after = (course.measure(net, task)["nll"] for net in (cut, again))
        assert np.all(np.asarray(after) < np.asarray(before))


class TestRows:
    def test_names(self):
        assert title_of("l2:shuffled") == "Adam + L2: Laplace SNR, widths shuffled"
        assert title_of("adam:fisher_tempered") == "Adam: fisher-tempered"

    @pytest.mark.parametrize("row", ["ivon", "sgd:snr", "ivon:size"])
    def test_unknown(self, row):
        with pytest.raises(ValueError, match="write network:score, of the networks adam, l2"):
            arms.read_row(row)

    def test_a_score_that_the_network_has_not(self):
        with pytest.raises(ValueError, match="obd is for the networks that Adam trained"):
            arms.read_row("field:obd")

    def test_configs(self):
        with pytest.raises(ValueError, match="must be among them"):
            study.Config(rows=("adam:magnitude",), mnist1d=SETTING)
        with pytest.raises(ValueError, match="no data set has epochs"):
            study.Config()

    @pytest.mark.parametrize("scale", ["smoke", "small", "full"])
    def test_those_that_are_there(self, scale):
        path = ROOT / "configs" / "uncertainty" / f"{scale}.yaml"
        found = training.load_config(study.Config, ["--config", str(path)], prog="x")
        verdict.check(found.claims, found.seeds)


class TestData:
    def test_temperatures_are_fitted_on_what_is_not_measured(self, config, data, task):
        held = np.asarray(data.held_out["mnist1d"][0])
        assert (len(held), len(task.check_inputs)) == (500, 500)
        both = np.concatenate([held, np.asarray(task.check_inputs)])
        assert len(np.unique(both, axis=0)) == 1000

    def test_foreign_signals_have_the_same_values_at_other_times(self, data, task):
        foreign, own = np.asarray(data.foreign["mnist1d"]), np.asarray(task.check_inputs)
        np.testing.assert_array_equal(np.sort(foreign, 1), np.sort(own, 1))
        assert not np.array_equal(foreign, own)

    @pytest.mark.usefixtures("data_folder")
    def test_foreign_images_are_in_the_scale_of_the_own(self):
        found = load(study.Config(mnist=SETTING))
        foreign, own = found.foreign["mnist"], found.tasks["mnist"].inputs
        assert foreign.shape[1] == own.shape[1]
        assert np.asarray(foreign).min() == pytest.approx(np.asarray(own).min(), abs=1e-5)
        assert np.asarray(foreign).max() == pytest.approx(np.asarray(own).max(), abs=1e-5)


@pytest.fixture(scope="module")
def outcome(config, data):
    told = []
    found = study.run(config, data, (0, 1), lambda what, share: told.append(share))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    return found


class TestOutcome:
    def test_gains_are_paired_means(self, config, outcome):
        m = outcome.metrics
        rows = [m[f"accuracy/mnist1d/once/{r}/0.9"] for r in ("ivon:snr", "l2:magnitude")]
        np.testing.assert_allclose(m["lead_mnist1d_once"], rows[0] - rows[1])
        both = gain(m, config, "mnist1d", "once", "ivon:snr", "l2:magnitude", [0.5, 0.9])
        first = gain(m, config, "mnist1d", "once", "ivon:snr", "l2:magnitude", [0.5])
        np.testing.assert_allclose(2 * both, first + m["lead_mnist1d_once"])
        parts = [
            gain(m, config, "mnist1d", r, "ivon:snr", "ivon:magnitude")
            for r in ("once", "retrained")
        ]
        np.testing.assert_allclose(m["gain_scoring"], np.mean(parts, 0))
        assert "gain_widths" not in claimed(config, m)  # its row was not run

    def test_tables_and_figure(self, config, outcome):
        found = tables(config, outcome.metrics)
        assert len(found) == 5
        for table in found:
            assert table.rows
            assert all(len(row) == len(table.columns) for row in table.rows)
        figure = study.draw(config, outcome)
        assert len(figure.axes) == 4

    def test_targets_on_mnist(self, config, outcome):
        renamed = {k.replace("mnist1d", "mnist"): v for k, v in outcome.metrics.items()}
        renamed |= {k.replace("0.5", "0.95"): v for k, v in renamed.items()}
        own = dataclasses.replace(
            config,
            mnist=SETTING,
            mnist1d=study.Setting(),
            sparsities=(0.9, 0.95),
            rows=(*config.rows,),
        )
        table = next(t for t in tables(own, renamed) if "targets" in t.title)
        assert len(table.rows) == len(config.rows)
        assert {row[3].split()[0] for row in table.rows} <= {"reached", "missed"}
