"""Metrics against scikit-learn, slow loops in float64 and closed forms."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from adaptivenet.posterior import metrics

CALIBRATION = {
    "ece": metrics.expected_calibration_error,
    "classwise": metrics.classwise_calibration_error,
    "mce": metrics.maximum_calibration_error,
}
SEEDS = st.integers(0, 2**31 - 1)
few = hypothesis.settings(max_examples=25)


def sklearn():
    return pytest.importorskip("sklearn.metrics")


@functools.cache
def compiled(name, **options):
    return jax.jit(functools.partial(getattr(metrics, name), **options))


def classification(seed, n=60, classes=4, sharpness=2.0):
    rng = np.random.default_rng(seed)
    logits = (sharpness * rng.normal(size=(n, classes))).astype(np.float32)
    return logits, rng.integers(classes, size=n).astype(np.int32)


def tied(seed, n=60, bins=10):
    """Three classes whose probabilities are multiples of 1 / bins: on edges, and many equal."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(bins, rng.dirichlet(np.ones(3)), size=n)
    return (counts / bins).astype(np.float32), rng.integers(3, size=n).astype(np.int32)


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def slow_bins(confidence, bins, binning):
    """The bin of each, by going through the bins; the edges are float32 as the numbers are."""
    found = []
    for value in confidence:
        if binning == "width":
            inside = [
                value > np.float32(b / bins) and value <= np.float32((b + 1) / bins)
                for b in range(bins)
            ]
            found.append(inside.index(True) if any(inside) else 0)
        else:
            found.append(sum(other < value for other in confidence) * bins // len(confidence))
    return found


def slow_gaps(confidence, right, bins, binning):
    """(count, mean confidence, mean accuracy) of each bin that holds anything."""
    index = slow_bins(confidence, bins, binning)
    rows = {}
    for b in range(bins):
        here = [i for i in range(len(index)) if index[i] == b]
        if here:
            values = [np.mean([x[i] for i in here], dtype=float) for x in (confidence, right)]
            rows[b] = (len(here), *values)
    return rows


def slow_calibration(name, p, labels, bins, binning):
    if name == "classwise":
        per_class = [
            slow_gaps(p[:, k], labels == k, bins, binning).values() for k in range(p.shape[1])
        ]
        return np.mean([sum(n * abs(c - a) for n, c, a in rows) / len(p) for rows in per_class])
    rows = slow_gaps(p.max(1), p.argmax(1) == labels, bins, binning).values()
    if name == "mce":
        return max(abs(c - a) for _, c, a in rows)
    return sum(n * abs(c - a) for n, c, a in rows) / len(p)


class TestLikelihoodAndBrier:
    @few
    @hypothesis.given(SEEDS)
    def test_against_scikit_learn(self, seed):
        logits, labels = classification(seed)
        p = softmax(logits)
        nll = sklearn().log_loss(labels, p, labels=range(4))
        brier = np.mean(np.sum((p - np.eye(4)[labels]) ** 2, 1))
        single = p.astype(np.float32)
        got = compiled("negative_log_likelihood")(single, labels)
        np.testing.assert_allclose(got, nll, rtol=1e-5)
        got = compiled("negative_log_likelihood", from_logits=True)(logits, labels)
        np.testing.assert_allclose(got, nll, rtol=1e-5)
        np.testing.assert_allclose(compiled("brier")(single, labels), brier, rtol=1e-5)
        got = compiled("brier", from_logits=True)(logits, labels)
        np.testing.assert_allclose(got, brier, rtol=1e-5)

    def test_brier_is_twice_that_of_the_positive_class(self):
        p = np.random.default_rng(0).uniform(size=50)
        labels = np.arange(50) % 2
        got = metrics.brier(np.stack([1 - p, p], 1).astype(np.float32), labels)
        expected = 2 * sklearn().brier_score_loss(labels, p)
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_nothing_is_clipped_and_logits_do_not_underflow(self):
        impossible = metrics.log_likelihood(np.array([[1.0, 0.0]], np.float32), [1])
        assert impossible.item() == -np.inf
        far = metrics.log_likelihood(np.array([[0.0, -500.0]], np.float32), [1], from_logits=True)
        assert far.item() == -500.0
        masked = np.array([[0.0, 0.0, -np.inf]], np.float32)
        got = metrics.log_likelihood(masked, [0], from_logits=True)
        np.testing.assert_allclose(got, np.log(0.5), rtol=1e-6)

    def test_half_precision_is_computed_in_single(self):
        logits, labels = classification(1)
        half = jnp.asarray(logits, jnp.bfloat16)
        got = metrics.negative_log_likelihood(half, labels, from_logits=True)
        assert got.dtype == jnp.float32
        p = softmax(np.asarray(half.astype(jnp.float32)))
        np.testing.assert_allclose(got, sklearn().log_loss(labels, p), rtol=1e-5)
        # A softmax in bfloat16 sums to 1 only nearly, and is accepted.
        metrics.brier(jax.nn.softmax(half), labels)


class TestCalibrationErrors:
    @pytest.mark.parametrize("binning", ["width", "mass"])
    @pytest.mark.parametrize("name", sorted(CALIBRATION))
    @few
    @hypothesis.given(SEEDS)
    def test_against_slow_loops(self, name, binning, seed):
        logits, labels = classification(seed)
        p = softmax(logits).astype(np.float32)
        got = jax.jit(CALIBRATION[name], static_argnames=("bins", "binning"))(
            p, labels, bins=15, binning=binning
        )
        np.testing.assert_allclose(got, slow_calibration(name, p, labels, 15, binning), atol=1e-6)

    @pytest.mark.parametrize("binning", ["width", "mass"])
    @few
    @hypothesis.given(SEEDS)
    def test_ties_and_edges(self, binning, seed):
        p, labels = tied(seed)
        for name, function in CALIBRATION.items():
            got = jax.jit(function, static_argnames=("bins", "binning"))(
                p, labels, bins=10, binning=binning
            )
            expected = slow_calibration(name, p, labels, 10, binning)
            np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=name)

    @pytest.mark.parametrize("binning", ["width", "mass"])
    def test_the_order_of_the_examples_does_not_matter(self, binning):
        p, labels = tied(3)
        order = np.random.default_rng(0).permutation(len(p))
        for function in CALIBRATION.values():
            a = function(p, labels, bins=7, binning=binning)
            b = function(p[order], labels[order], bins=7, binning=binning)
            np.testing.assert_allclose(a, b, atol=1e-6)

    def test_equal_mass_without_ties_splits_evenly(self):
        logits, labels = classification(5, n=64)
        p = softmax(logits).astype(np.float32)
        assert len(np.unique(p.max(1))) == 64
        table = metrics.reliability(p, labels, bins=8, binning="mass")
        assert table.count.tolist() == [8] * 8

    def test_the_table_gives_the_errors(self):
        p, labels = tied(7)
        table = metrics.reliability(p, labels, bins=10)
        rows = slow_gaps(p.max(1), p.argmax(1) == labels, 10, "width")
        assert table.count.sum() == len(p)
        for b in range(10):
            if b in rows:
                row = [np.asarray(column)[b] for column in table]
                np.testing.assert_allclose(row, rows[b], rtol=1e-5)
            else:
                assert table.count[b] == 0
                assert np.isnan(table.confidence[b])
                assert np.isnan(table.accuracy[b])
        gaps = np.abs(np.asarray(table.accuracy) - np.asarray(table.confidence))
        ece = np.nansum(gaps * np.asarray(table.count)) / len(p)
        np.testing.assert_allclose(
            metrics.expected_calibration_error(p, labels, bins=10), ece, rtol=1e-5
        )
        np.testing.assert_allclose(
            metrics.maximum_calibration_error(p, labels, bins=10), np.nanmax(gaps), rtol=1e-5
        )

    def test_one_bin_is_the_mean_gap_whatever_the_binning(self):
        p, labels = tied(11)
        gap = abs(np.mean(p.max(1)) - np.mean(p.argmax(1) == labels))
        for binning in ("width", "mass"):
            got = metrics.expected_calibration_error(p, labels, bins=1, binning=binning)
            np.testing.assert_allclose(got, gap, atol=1e-6)

    def test_certain_and_right_is_perfect_certain_and_wrong_is_worst(self):
        p = np.eye(3, dtype=np.float32)
        for function in (CALIBRATION["ece"], CALIBRATION["mce"]):
            assert function(p, [0, 1, 2]).item() == 0.0
            assert function(p, [1, 2, 0]).item() == 1.0

    def test_labels_drawn_from_the_probabilities_are_calibrated(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(20_000, 3)).astype(np.float32)
        labels = (rng.gumbel(size=logits.shape) + logits).argmax(1)
        for name in ("ece", "classwise"):
            assert CALIBRATION[name](logits, labels, from_logits=True) < 0.015
            assert CALIBRATION[name](3 * logits, labels, from_logits=True) > 0.1

    def test_bins_that_are_refused(self):
        p, labels = tied(0)
        for bins in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="bins must be an integer >= 1"):
                metrics.reliability(p, labels, bins=bins)
        with pytest.raises(ValueError, match="binning must be 'width' or 'mass', not 'equal'"):
            metrics.expected_calibration_error(p, labels, binning="equal")


class TestUncertainty:
    def members(self, seed=0):
        logits = 3 * np.random.default_rng(seed).normal(size=(5, 30, 4))
        return logits.astype(np.float32)

    def test_against_scipy(self):
        logits = self.members()
        p = softmax(logits)
        mixed = p.mean(0)
        total = scipy.stats.entropy(mixed, axis=-1)
        expected = scipy.stats.entropy(p, axis=-1).mean(0)
        for given, from_logits in ((logits, True), (p.astype(np.float32), False)):
            options = {"from_logits": from_logits}
            got = metrics.predictive_entropy(given, axis=0, **options)
            np.testing.assert_allclose(got, total, atol=2e-6)
            got = metrics.expected_entropy(given, **options)
            np.testing.assert_allclose(got, expected, atol=2e-6)
            got = metrics.mutual_information(given, **options)
            np.testing.assert_allclose(got, total - expected, atol=2e-6)
            got = metrics.mixture_log_probabilities(given, **options)
            np.testing.assert_allclose(got, np.log(mixed), rtol=1e-4, atol=1e-5)
            got = metrics.predictive_entropy(given[0], **options)
            np.testing.assert_allclose(got, scipy.stats.entropy(p[0], axis=-1), atol=2e-6)

    def test_the_axis_may_stand_anywhere_but_last(self):
        logits = self.members()
        moved = np.moveaxis(logits, 0, 1)
        for name in ("mutual_information", "expected_entropy", "predictive_entropy"):
            function = functools.partial(getattr(metrics, name), from_logits=True)
            expected = function(logits, axis=0)
            for axis in (1, -2):
                np.testing.assert_allclose(function(moved, axis=axis), expected, atol=1e-6)
            for axis in (2, -1, 3, -4):
                with pytest.raises(ValueError, match="must be that of the members"):
                    function(logits, axis=axis)

    def test_members_that_agree_have_no_mutual_information(self):
        same = np.repeat(self.members()[:1], 6, 0)
        got = metrics.mutual_information(same, from_logits=True)
        assert (np.asarray(got) >= 0).all()
        np.testing.assert_allclose(got, np.zeros(30), atol=1e-6)

    def test_disagreement_of_certain_members_is_all_mutual(self):
        certain = np.eye(4, dtype=np.float32)[:, None]
        np.testing.assert_allclose(metrics.mutual_information(certain), [np.log(4)], rtol=1e-6)
        np.testing.assert_allclose(metrics.expected_entropy(certain), [0.0], atol=1e-7)


class TestDetection:
    @pytest.mark.parametrize("levels", [4, 10**6])
    @few
    @hypothesis.given(SEEDS)
    def test_against_scikit_learn(self, levels, seed):
        rng = np.random.default_rng(seed)
        positives = (rng.integers(levels, size=37) + levels // 5).astype(np.float32)
        negatives = rng.integers(levels, size=53).astype(np.float32)
        labels, scores = np.repeat([1, 0], [37, 53]), np.concatenate([positives, negatives])
        got = compiled("auroc")(positives, negatives)
        np.testing.assert_allclose(got, sklearn().roc_auc_score(labels, scores), rtol=1e-5)
        got = compiled("average_precision")(positives, negatives)
        expected = sklearn().average_precision_score(labels, scores)
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_the_other_side_round(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=20).astype(np.float32), rng.normal(size=30).astype(np.float32)
        np.testing.assert_allclose(metrics.auroc(a, b), 1 - metrics.auroc(b, a), atol=1e-6)
        assert metrics.auroc(b, b).item() == pytest.approx(0.5)
        assert metrics.average_precision(b, b).item() != pytest.approx(1.0)

    def test_constant_scores_are_chance(self):
        a, b = np.ones(20, np.float32), np.ones(60, np.float32)
        assert metrics.auroc(a, b).item() == 0.5
        assert metrics.average_precision(a, b).item() == 0.25

    def test_infinite_scores_are_scores(self):
        assert metrics.auroc(np.array([np.inf]), np.array([-np.inf, np.inf])).item() == 0.75

    def test_what_is_refused(self):
        ok = np.ones(3, np.float32)
        for function in (metrics.auroc, metrics.average_precision):
            with pytest.raises(ValueError, match=r"positives must be scores of shape \[n\]"):
                function(np.ones((2, 2)), ok)
            with pytest.raises(ValueError, match=r"negatives must be scores .* not \(0,\)"):
                function(ok, np.ones(0))
            with pytest.raises(ValueError, match="positives holds 1 nan of 2"):
                function(np.array([1.0, np.nan]), ok)
            with pytest.raises(TypeError, match="negatives must be floating"):
                function(ok, np.ones(3, bool))
            assert np.isnan(jax.jit(function)(np.array([1.0, np.nan]), ok))


class TestRegression:
    def gaussians(self):
        rng = np.random.default_rng(0)
        y, mean = rng.normal(size=(2, 20, 3))
        return (x.astype(np.float32) for x in (y, mean, rng.uniform(0.2, 3.0, size=(20, 3))))

    def test_nll_against_scipy(self):
        y, mean, std = self.gaussians()
        expected = -scipy.stats.norm.logpdf(y, mean, std).mean()
        np.testing.assert_allclose(metrics.gaussian_nll(y, mean, std), expected, rtol=1e-5)
        expected = -scipy.stats.norm.logpdf(y, mean, 0.5).mean()
        np.testing.assert_allclose(metrics.gaussian_nll(y, mean, 0.5), expected, rtol=1e-5)

    def test_crps_against_its_integral(self):
        y, mean, std = (x.ravel()[:8] for x in self.gaussians())

        def one(y, mean, std):
            def left(x):
                return scipy.stats.norm.cdf(x, mean, std) ** 2

            def right(x):
                return scipy.stats.norm.sf(x, mean, std) ** 2

            low = scipy.integrate.quad(left, mean - 12 * std - 12, y)[0]
            return low + scipy.integrate.quad(right, y, mean + 12 * std + 12)[0]

        expected = np.mean([one(*row) for row in zip(y, mean, std, strict=True)])
        np.testing.assert_allclose(metrics.gaussian_crps(y, mean, std), expected, rtol=1e-5)

    def test_crps_of_a_point_is_the_absolute_error(self):
        y, mean, _ = self.gaussians()
        got = metrics.gaussian_crps(y, mean, 1e-7)
        np.testing.assert_allclose(got, np.abs(y - mean).mean(), rtol=1e-5)

    def test_coverage_against_scipy_for_several_levels(self):
        y, mean, std = self.gaussians()
        levels = np.array([0.1, 0.5, 0.9, 0.99], np.float32)
        half = scipy.stats.norm.ppf(0.5 + levels.astype(float) / 2)[:, None, None] * std
        expected = (np.abs(y - mean) <= half).mean((1, 2))
        got = metrics.interval_coverage(y, mean, std, levels)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert len(set(np.asarray(got).tolist())) == 4
        together = jax.vmap(lambda level: metrics.interval_coverage(y, mean, std, level))(levels)
        np.testing.assert_allclose(together, expected, rtol=1e-6)

    def test_right_gaussians_cover_as_they_say(self):
        y = np.random.default_rng(1).normal(2.0, 3.0, 40_000).astype(np.float32)
        mean = np.full_like(y, 2.0)
        assert metrics.interval_coverage(y, mean, 3.0, 0.8).item() == pytest.approx(0.8, abs=0.01)
        assert metrics.interval_coverage(y, mean, 1.0, 0.8).item() < 0.4

    @pytest.mark.parametrize(
        "function", [metrics.gaussian_nll, metrics.gaussian_crps, metrics.interval_coverage]
    )
    def test_what_is_refused(self, function):
        y = np.ones(3, np.float32)
        with pytest.raises(ValueError, match=r"std must be > 0, but the smallest is 0"):
            function(y, y, 0.0)
        with pytest.raises(ValueError, match="must have one shape"):
            function(y, np.ones(4), 1.0)
        with pytest.raises(ValueError, match=r"std must be a scalar or have shape \(3,\)"):
            function(y, y, np.ones(2))
        with pytest.raises(TypeError, match="targets must be floating"):
            function(np.ones(3, np.int32), y, 1.0)
        assert np.isnan(jax.jit(function)(y, y, -1.0))

    def test_levels_that_are_refused(self):
        y = np.ones(3, np.float32)
        for level in (0.0, 1.0, 95.0):
            with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
                metrics.interval_coverage(y, y, 1.0, level)


CLASSIFICATION = [
    metrics.negative_log_likelihood,
    metrics.brier,
    metrics.reliability,
    *CALIBRATION.values(),
]


class TestWhatIsRefused:
    P = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)

    @pytest.mark.parametrize("function", CLASSIFICATION)
    def test_predictions(self, function):
        with pytest.raises(ValueError, match=r"range over \[0.25, 1.25\].*from_logits=True"):
            function(self.P + np.array([0.0, 0.5], np.float32), [0, 1])
        with pytest.raises(ValueError, match=r"range over \[-0.75"):
            function(self.P - 1, [0, 1])
        with pytest.raises(ValueError, match="must sum to 1"):
            function(self.P / 2, [0, 1])
        with pytest.raises(ValueError, match="predictions holds 1 nan of 2"):
            function(np.array([[np.nan, 1.0]]), [0])
        with pytest.raises(ValueError, match=r"two or more classes .*stack \[1 - p, p\]"):
            function(self.P[:, :1], [0, 0])
        with pytest.raises(ValueError, match="at least one example"):
            function(self.P[:0], np.zeros(0, int))
        with pytest.raises(ValueError, match=r"shape \[n, classes\], not \(2,\); use jax.vmap"):
            function(self.P[0], 0)
        with pytest.raises(TypeError, match="predictions must be floating, not int32"):
            function(np.eye(2, dtype=np.int32), [0, 1])
        with pytest.raises(ValueError, match="logits hold inf"):
            function(np.array([[np.inf, 1.0]]), [0], from_logits=True)
        with pytest.raises(ValueError, match="a row of -inf only"):
            function(np.array([[-np.inf, -np.inf]]), [0], from_logits=True)

    @pytest.mark.parametrize("function", CLASSIFICATION)
    def test_labels(self, function):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), .* \[0, 2\]"):
            function(self.P, [0, 2])
        with pytest.raises(ValueError, match=r"range over \[-1, 1\]"):
            function(self.P, [-1, 1])
        with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
            function(self.P, [0, 1, 1])
        with pytest.raises(TypeError, match=r"labels must be integers.*argmax\(-1\)"):
            function(self.P, np.eye(2, dtype=np.float32))

    @pytest.mark.parametrize("label", [-1, 2])
    def test_a_wrong_label_is_nan_where_it_cannot_be_checked(self, label):
        for function in CLASSIFICATION:
            got = jax.jit(function)(self.P, np.array([0, label], np.int32))
            if isinstance(got, metrics.Reliability):
                got = got.accuracy
            assert np.isnan(got).all(), function.__name__

    def test_shapes_are_checked_under_jit(self):
        with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
            jax.jit(metrics.brier)(self.P, np.array([0, 1, 1]))


@pytest.mark.parametrize("function", [metrics.log_likelihood, *CLASSIFICATION])
def test_a_population_is_its_members_one_by_one(function):
    members = [tied(seed, n=20) for seed in range(3)]
    p, labels = (np.stack(column) for column in zip(*members, strict=True))
    together = jax.jit(jax.vmap(function))(p, labels)
    for i in range(3):
        one = jax.tree.leaves(function(p[i], labels[i]))
        for a, b in zip(jax.tree.leaves(together), one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
