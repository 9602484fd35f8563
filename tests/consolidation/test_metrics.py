"""The metrics of continual learning, on matrices whose numbers are worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptivenet.consolidation import metrics
from adaptivenet.posterior.metrics import expected_calibration_error

nan = np.nan

# Four tasks; rows: after task 0, 1, 2, 3. Task 0 is best after task 1 (0.95), not when learnt.
R = np.array(
    [
        [0.90, 0.20, 0.10, 0.30],
        [0.95, 0.80, 0.15, 0.10],
        [0.60, 0.85, 0.70, 0.20],
        [0.50, 0.45, 0.60, 0.90],
    ]
)
LOWER = np.where(np.tril(np.ones((4, 4), bool)), R, nan)
# Seven tasks: after task t the accuracy on task k is (10 t + k) / 100.
SEVEN = np.array([[(10 * t + k) / 100 for k in range(7)] for t in range(7)])


class TestMatrix:
    def test_average_accuracy(self):
        # (0.50 + 0.45 + 0.60 + 0.90) / 4 = 2.45 / 4
        assert metrics.average_accuracy(R) == pytest.approx(0.6125, abs=1e-15)

    def test_last_five(self):
        # The last row is 0.60 ... 0.66; tasks 2 to 6: (62 + 63 + 64 + 65 + 66) / 500.
        assert metrics.last_five(SEVEN) == pytest.approx(0.64, abs=1e-15)
        assert metrics.average_accuracy(SEVEN) == pytest.approx(0.63, abs=1e-15)
        # Four tasks are fewer than five: all of them.
        assert metrics.last_five(R) == metrics.average_accuracy(R)
        assert metrics.last_five(R, tasks=1) == 0.9

    def test_the_newest_task_is_included(self):
        """Published curves average ``acc[t][t - 5 : t]``, which leaves it out."""
        leaving_out = SEVEN[6][6 - 5 : 6].mean()
        assert leaving_out == pytest.approx(0.63)
        assert metrics.last_five_curve(SEVEN)[-1] == pytest.approx(0.64)

    def test_curves(self):
        # After task 2: (0.60 + 0.85 + 0.70) / 3.
        np.testing.assert_allclose(
            metrics.average_curve(LOWER), [0.9, 0.875, 2.15 / 3, 0.6125], rtol=1e-14
        )
        np.testing.assert_allclose(
            metrics.last_five_curve(LOWER, tasks=2), [0.9, 0.875, 0.775, 0.75], rtol=1e-14
        )
        # (10 t + k) / 100 over tasks max(t - 4, 0) to t.
        expected = [(10 * t + (t + max(t - 4, 0)) / 2) / 100 for t in range(7)]
        np.testing.assert_allclose(metrics.last_five_curve(SEVEN), expected, rtol=1e-14)

    def test_curves_have_gaps_where_nothing_was_measured(self):
        sparse = LOWER.copy()
        sparse[1] = nan
        np.testing.assert_array_equal(
            np.isnan(metrics.average_curve(sparse)), [False, True, False, False]
        )

    def test_forgetting(self):
        # 0.95 - 0.50, 0.85 - 0.45, 0.70 - 0.60: 0.45 + 0.40 + 0.10 = 0.95 over three tasks.
        assert metrics.forgetting(R) == pytest.approx(0.95 / 3, abs=1e-15)
        assert metrics.forgetting(LOWER) == pytest.approx(0.95 / 3, abs=1e-15)
        # What was measured before a task was learnt takes part in the best.
        early = R.copy()
        early[0, 2] = 1.0
        assert metrics.forgetting(early) == pytest.approx((0.45 + 0.40 + 0.40) / 3)

    def test_backward_transfer(self):
        # 0.50 - 0.90, 0.45 - 0.80, 0.60 - 0.70: -0.85 over three tasks.
        assert metrics.backward_transfer(LOWER) == pytest.approx(-0.85 / 3, abs=1e-15)

    def test_forward_transfer(self):
        # 0.20 - 0.1, 0.15 - 0.1, 0.20 - 0.3: 0.05 over three tasks; the first baseline is unused.
        base = [nan, 0.1, 0.1, 0.3]
        assert metrics.forward_transfer(R, base) == pytest.approx(0.05 / 3, abs=1e-15)

    def test_learning_accuracy_and_intransigence(self):
        # (0.90 + 0.80 + 0.70 + 0.90) / 4
        assert metrics.learning_accuracy(LOWER) == pytest.approx(0.825, abs=1e-15)
        found = metrics.intransigence(LOWER, [1.0, 0.9, 0.9, 0.85, 0.1])
        np.testing.assert_allclose(found, [0.1, 0.1, 0.2, -0.05], atol=1e-15)

    def test_summary(self):
        found = metrics.summary(R, baseline=[0.0] * 4, reference=[1.0] * 4)
        assert found == {
            "tasks": 4,
            "average_accuracy": pytest.approx(0.6125),
            "last_five": pytest.approx(0.6125),
            "learning_accuracy": pytest.approx(0.825),
            "backward_transfer": pytest.approx(-0.85 / 3),
            "forgetting": pytest.approx(0.95 / 3),
            "forward_transfer": pytest.approx(0.55 / 3),
            "intransigence": pytest.approx(0.175),
        }
        assert all(type(value) is float for name, value in found.items() if name != "tasks")

    def test_summary_of_what_was_measured(self):
        last = np.full((4, 4), nan)
        last[-1] = R[-1]
        found = metrics.summary(last)
        assert found["average_accuracy"] == pytest.approx(0.6125)
        for name in ("learning_accuracy", "backward_transfer", "forgetting"):
            assert np.isnan(found[name])
        one = metrics.summary([[0.5]], baseline=[0.1])
        assert one["average_accuracy"] == one["learning_accuracy"] == 0.5
        assert np.isnan(one["forward_transfer"])

    def test_more_tasks_tested_than_learnt(self):
        wide = np.concatenate([R, np.full((4, 2), 0.99)], axis=1)
        assert metrics.summary(wide) == metrics.summary(R)

    def test_fewer_tasks_tested_than_learnt(self):
        with pytest.raises(ValueError, match=r"task 3 after the last task \(R\[3, 3\]\) was not"):
            metrics.average_accuracy(R[:, :3])

    def test_leading_axes_are_kept(self):
        both = np.stack([R, LOWER, SEVEN[:4, :4]])
        for function in (
            metrics.average_accuracy,
            metrics.last_five,
            metrics.average_curve,
            metrics.forgetting,
            metrics.backward_transfer,
            metrics.learning_accuracy,
        ):
            together = function(both)
            for place in range(3):
                np.testing.assert_array_equal(together[place], function(both[place]))
        assert metrics.summary(both)["forgetting"].shape == (3,)

    @given(matrix=arrays(np.float64, (4, 4), elements=st.floats(0, 1)))
    def test_against_loops(self, matrix):
        T = 4
        best = [max(matrix[i][k] for i in range(T - 1)) for k in range(T - 1)]
        expected = {
            "average_accuracy": sum(matrix[T - 1][k] for k in range(T)) / T,
            "forgetting": sum(best[k] - matrix[T - 1][k] for k in range(T - 1)) / (T - 1),
            "backward_transfer": sum(matrix[T - 1][k] - matrix[k][k] for k in range(T - 1))
            / (T - 1),
            "learning_accuracy": sum(matrix[k][k] for k in range(T)) / T,
        }
        found = metrics.summary(matrix)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-12)
        # Forgetting is at least what was lost since a task was learnt.
        assert found["forgetting"] >= -found["backward_transfer"] - 1e-12


class TestMatrixErrors:
    @pytest.mark.parametrize("matrix", [[0.5], 0.5, np.zeros((0, 0)), np.zeros((2, 0))])
    def test_shapes(self, matrix):
        with pytest.raises(ValueError, match=r"must have shape \[T, K\]"):
            metrics.average_accuracy(matrix)

    def test_missing_values(self):
        last = R.copy()
        last[3, 1] = nan
        with pytest.raises(ValueError, match=r"task 1 after the last task \(R\[3, 1\]\) was not"):
            metrics.average_accuracy(last)
        with pytest.raises(ValueError, match=r"\(R\[3, 1\]\)"):
            metrics.last_five(last, tasks=3)
        with pytest.raises(ValueError, match=r"after the last task"):
            metrics.summary(last)
        assert metrics.last_five(last, tasks=2) == pytest.approx(0.75)
        lower = LOWER.copy()
        lower[2, 0] = nan
        with pytest.raises(ValueError, match=r"forgetting needs R\[2, 0\].*1 such entries"):
            metrics.forgetting(lower)
        with pytest.raises(ValueError, match=r"task 1 right after each was learnt"):
            metrics.learning_accuracy(np.where(np.eye(4)[1] * np.eye(4), nan, R))
        with pytest.raises(ValueError, match=r"forward transfer needs R\[0, 1\]"):
            metrics.forward_transfer(LOWER, [0.0] * 4)
        with pytest.raises(ValueError, match=r"in reference="):
            metrics.intransigence(R, [1.0, nan, 1.0, 1.0])
        with pytest.raises(ValueError, match="task 2 in baseline="):
            metrics.forward_transfer(R, [0.0, 0.0, nan, 0.0])

    def test_infinite(self):
        with pytest.raises(ValueError, match="holds inf; use nan"):
            metrics.average_accuracy([[np.inf]])

    def test_one_task(self):
        for function in (metrics.forgetting, metrics.backward_transfer):
            with pytest.raises(ValueError, match="needs two tasks or more"):
                function([[1.0]])

    def test_vectors(self):
        with pytest.raises(ValueError, match="reference= needs a number for each of 4 tasks"):
            metrics.intransigence(R, [1.0])
        with pytest.raises(ValueError, match="tasks must be a number of tasks >= 1, not 0"):
            metrics.last_five(R, tasks=0)

    def test_traced(self):
        with pytest.raises(TypeError, match="the accuracy matrix is traced"):
            jax.jit(metrics.average_accuracy)(jnp.ones((2, 2)))


# Three tasks, two evaluations of the first, three of the second, two of the third.
CURVES = np.array(
    [
        [0.5, nan, nan],
        [0.9, 0.1, nan],  # end of task 0
        [0.3, 0.4, 0.1],
        [0.6, 0.7, 0.1],
        [0.8, 0.8, 0.2],  # end of task 1
        [0.7, 0.5, 0.6],
        [0.4, 0.75, 1.0],  # end of task 2
    ]
)
ENDS = [1, 4, 6]


class TestCurves:
    def test_stability_gap(self):
        gap = metrics.stability_gap(CURVES, ENDS)
        drop = np.full((3, 3), nan)
        drop[1, 0] = 0.9 - 0.3
        drop[2, :2] = 0.8 - 0.4, 0.8 - 0.5
        recovered = np.full((3, 3), nan)
        recovered[1, 0] = 0.8 - 0.3
        recovered[2, :2] = 0.0, 0.75 - 0.5
        np.testing.assert_allclose(gap.drop, drop, atol=1e-15)
        np.testing.assert_allclose(gap.recovered, recovered, atol=1e-15)

    def test_end_of_task_accuracies_do_not_see_it(self):
        """A drop that comes back within the task: the matrix shows no forgetting."""
        curves = np.array([[1.0, nan], [0.0, 0.5], [1.0, 1.0]])
        ends = [0, 2]
        assert metrics.forgetting(curves[ends]) == 0.0
        assert metrics.stability_gap(curves, ends).drop[1, 0] == 1.0

    def test_min_and_worst_case_accuracy(self):
        # Task 0 falls to 0.3, task 1 (after its end) to 0.5.
        assert metrics.min_accuracy(CURVES, ENDS) == pytest.approx(0.4)
        assert metrics.worst_case_accuracy(CURVES, ENDS) == pytest.approx(1.0 / 3 + 0.4 * 2 / 3)

    def test_windowed_forgetting(self):
        curve = CURVES[:, 0]
        assert metrics.windowed_forgetting(curve, 2) == pytest.approx(0.6)
        slow = [1.0, 0.75, 0.5, 0.25]
        assert metrics.windowed_forgetting(slow, 2) == 0.25
        assert metrics.windowed_forgetting(slow, 3) == 0.5
        assert metrics.windowed_forgetting(slow, 100) == 0.75
        assert metrics.windowed_forgetting([0.0, 0.5], 2) == -0.5

    def test_plasticity(self):
        assert metrics.plasticity([0.45, 0.9], 0.9).tolist() == [0.5, 1.0]
        assert metrics.steps_to([0.1, 0.5, 0.9], 0.6) == 3
        assert metrics.steps_to([0.1, 0.5], 0.6) == np.inf
        assert metrics.plasticity_in_steps([0.1, 0.2, 0.3, 0.6], [0.2, 0.7], 0.5) == 0.5
        assert metrics.plasticity_in_steps([0.1], [0.2, 0.7], 0.5) == 0.0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"curves\[3, 0\] is nan"):
            metrics.stability_gap(np.where(np.arange(7)[:, None] == 3, nan, CURVES), ENDS)
        with pytest.raises(ValueError, match=r"ends= must be ascending rows"):
            metrics.stability_gap(CURVES, [4, 1, 6])
        with pytest.raises(ValueError, match=r"ends= must be ascending rows"):
            metrics.stability_gap(CURVES, [1, 4, 7])
        with pytest.raises(ValueError, match=r"\[evaluations, tasks\] with a column for each of 4"):
            metrics.stability_gap(CURVES, [1, 2, 3, 4])
        with pytest.raises(ValueError, match="needs two tasks or more"):
            metrics.min_accuracy(CURVES, [1])
        with pytest.raises(ValueError, match="needs two evaluations in a window"):
            metrics.windowed_forgetting([1.0, 0.0], 1)
        with pytest.raises(ValueError, match=r"without nan.*with 1 nan"):
            metrics.windowed_forgetting([1.0, nan], 2)
        with pytest.raises(ValueError, match="positive ones of fresh networks"):
            metrics.plasticity(0.5, 0.0)
        with pytest.raises(ValueError, match=r"does not reach 0\.9"):
            metrics.plasticity_in_steps([1.0], [0.5], 0.9)


class TestNetwork:
    def test_dormant_units(self):
        # Layer 1: mean |h| is 1, 3, 0, mean 4/3: scores 3/4, 9/4, 0. Layer 2: scores 1, 1.
        layers = {
            "one": jnp.array([[1.0, -3.0, 0.0], [-1.0, 3.0, 0.0]]),
            "two": jnp.ones((4, 5, 2)),
        }
        scores = metrics.dormant_score(layers)
        np.testing.assert_allclose(scores["one"], [0.75, 2.25, 0.0])
        np.testing.assert_allclose(scores["two"], [1.0, 1.0])
        assert metrics.dormant_fraction(layers, 0.0) == pytest.approx(1 / 5)
        assert metrics.dormant_fraction(layers, 0.75) == pytest.approx(2 / 5)
        swept = jax.jit(jax.vmap(lambda tau: metrics.dormant_fraction(layers, tau)))(
            jnp.array([0.0, 0.8, 1.0])
        )
        np.testing.assert_allclose(swept, [0.2, 0.4, 0.8])

    def test_a_silent_layer_is_dormant(self):
        assert metrics.dormant_fraction(jnp.zeros((3, 4))) == 1.0

    def test_scores_do_not_depend_on_the_scale_of_a_layer(self):
        h = jax.random.normal(jax.random.key(0), (20, 6))
        one, other = metrics.dormant_score(h), metrics.dormant_score(100.0 * h)
        np.testing.assert_allclose(one, other, rtol=1e-5)
        np.testing.assert_allclose(jnp.mean(one), 1.0, rtol=1e-6)

    def test_ranks(self):
        rng = np.random.default_rng(0)
        u, _ = np.linalg.qr(rng.normal(size=(8, 4)))
        v, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        sigma = np.array([8.0, 4.0, 3.0, 1.0])
        features = jnp.asarray(u * sigma @ v.T, jnp.float32)
        p = sigma / 16
        expected = np.exp(-(p * np.log(p)).sum())
        assert metrics.effective_rank(features) == pytest.approx(expected, rel=1e-5)
        # Shares 8, 12, 15, 16 of 16.
        for delta, rank in ((0.6, 1), (0.45, 2), (0.1, 3), (0.05, 4)):
            assert metrics.srank(features, delta) == rank
        assert metrics.srank(jnp.zeros((3, 2))) == 0
        assert metrics.effective_rank(jnp.zeros((3, 2))) == 0.0
        assert metrics.effective_rank(jnp.ones((5, 3))) == pytest.approx(1.0, abs=1e-4)
        assert metrics.srank(jnp.ones((5, 3))) == 1
        assert jax.vmap(metrics.srank)(jnp.stack([jnp.eye(3), jnp.ones((3, 3))])).tolist() == [3, 1]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"activations of dense have shape \(3,\)"):
            metrics.dormant_score({"dense": jnp.ones(3)})
        with pytest.raises(ValueError, match="holds no array"):
            metrics.dormant_fraction({})
        with pytest.raises(ValueError, match="tau must be at least 0"):
            metrics.dormant_fraction(jnp.ones((1, 2)), -1.0)
        with pytest.raises(ValueError, match=r"delta must be in \[0, 1\)"):
            metrics.srank(jnp.ones((1, 2)), 1.0)
        with pytest.raises(ValueError, match=r"shape \[examples, units\]"):
            metrics.effective_rank(jnp.ones(3))


class TestCalibration:
    def test_over_time(self):
        # Confidence 0.8 and 3 of 4 right: 0.05. Confidence 0.9 and all wrong: 0.9.
        sure = jnp.tile(jnp.array([[0.8, 0.2]]), (4, 1))
        wrong = jnp.tile(jnp.array([[0.1, 0.9]]), (4, 1))
        labels = [jnp.array([0, 0, 0, 1]), jnp.zeros(4, jnp.int32)]
        found = metrics.calibration_matrix([[sure, None], [wrong, wrong]], labels)
        expected = np.array([[0.05, nan], [0.65, 0.9]])
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found[1, 1] == float(expected_calibration_error(wrong, labels[1]))
        np.testing.assert_allclose(metrics.average_curve(found), [0.05, 0.775], atol=1e-6)

    def test_options_and_errors(self):
        logits, labels = jnp.log(jnp.array([[0.25, 0.75]])), [jnp.array([1])]
        found = metrics.calibration_matrix([[logits]], labels, from_logits=True, bins=3)
        np.testing.assert_allclose(found, [[0.25]], atol=1e-6)
        with pytest.raises(ValueError, match=r"predictions\[0\] has 2 entries"):
            metrics.calibration_matrix([[None, None]], labels)
