"""Claims: what is refused before a run, and what is said after it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from adaptivenet.emergence import statistics, verdict
from adaptivenet.emergence.verdict import ClaimError, Hypothesis, Preregistration


@dataclasses.dataclass(frozen=True)
class One(Preregistration):
    h1: Hypothesis = Hypothesis(statement="It is above.", metric="gain")


@dataclasses.dataclass(frozen=True)
class Two(One):
    h2: Hypothesis = Hypothesis(statement="It is below.", metric="loss", direction="less")


def one(**changes):
    return One(h1=dataclasses.replace(One().h1, **changes))


def around(mean, n=20, sd=1.0):
    """Values of exactly this mean and deviation."""
    values = np.random.default_rng(0).normal(size=n)
    return mean + sd * (values - values.mean()) / values.std(ddof=1)


@pytest.mark.parametrize(
    ("claims", "seeds", "message"),
    [
        (one(metric=""), (1, 2), "claims.h1 has no primary metric"),
        (One(not_claimed=("h7",)), (1, 2), "names h7; the claims of this study are h1"),
        (one(statement=""), (1, 2), "claims.h1 does not say what is claimed"),
        (one(direction="equal"), (1, 2), "without saying how near is equal"),
        (One(pilot_seeds=(1, 5)), (5, 6), r"seeds [5] were looked at in the pilot"),
        (One(), (5, 6, 5), "seeds are repeated: [5]"),
        (One(), (5,), "fewer than two seeds"),
        (One(exclusions=("accuracy",)), (1, 2), "the exclusion 'accuracy' cannot be read"),
        (One(exclusions=("accuracy < nan",)), (1, 2), "cannot be read"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_the_run(claims, seeds, message):
    with pytest.raises(ClaimError, match=re.escape(message)):
        verdict.check(claims, seeds)


def test_a_claim_that_is_not_made_is_not_judged_nor_corrected_for():
    metrics = {"gain": around(0.52), "loss": around(-0.45)}
    (judged,) = verdict.judge(Two(not_claimed=("h2",)), metrics)
    assert judged == verdict.judge(One(), metrics)[0]


def test_an_exploratory_run_may_use_the_pilots_seeds():
    assert verdict.check(One(pilot_seeds=(1, 2), exploratory=True), (1, 2)) == []


@pytest.mark.parametrize(
    ("claim", "mean", "word"),
    [
        ({}, 1.0, "SUPPORTED"),
        ({}, -1.0, "REFUTED"),
        ({}, 0.1, "INCONCLUSIVE"),
        ({"direction": "less"}, -1.0, "SUPPORTED"),
        ({"direction": "less"}, 1.0, "REFUTED"),
        ({"than": 2.0}, 1.0, "REFUTED"),
        ({"margin": 3.0}, 1.0, "REFUTED"),  # there, but too small to be worth the name
        ({"margin": 1.0}, 0.1, "REFUTED"),
        ({"margin": 0.1}, 1.0, "SUPPORTED"),
        ({"direction": "less", "margin": 3.0}, -1.0, "REFUTED"),
        ({"direction": "equal", "margin": 1.0}, 0.0, "SUPPORTED"),
        ({"direction": "equal", "margin": 1.0}, 2.0, "REFUTED"),
        ({"direction": "equal", "margin": 1.0}, -2.0, "REFUTED"),
        ({"direction": "equal", "margin": 1.0}, 0.9, "INCONCLUSIVE"),
    ],
)
@pytest.mark.parametrize("test", ["t", "wilcoxon", "sign_flip"])
def test_words_on_planted_effects(claim, mean, word, test):
    (judged,) = verdict.judge(one(test=test, **claim), {"gain": around(mean)})
    assert judged.word == word
    assert judged.estimate == pytest.approx(mean)
    assert judged.low < mean < judged.high


def test_p_is_students_two_sided_and_the_effect_is_in_deviations():
    values = around(0.5)
    (judged,) = verdict.judge(one(than=0.2), {"gain": values})
    assert judged.p == pytest.approx(stats.ttest_1samp(values, 0.2).pvalue)
    assert judged.effect_size == pytest.approx(0.3)


def test_holm_spans_the_claims():
    metrics = {"gain": around(0.52), "loss": around(-0.45)}
    alone = [stats.ttest_1samp(v, 0).pvalue for v in metrics.values()]
    judged = verdict.judge(Two(), metrics)
    low, high = sorted(alone)
    assert sorted(v.p_adjusted for v in judged) == pytest.approx([2 * low, max(2 * low, high)])


def test_a_negligible_effect_says_so():
    (judged,) = verdict.judge(one(margin=3.0), {"gain": around(1.0)})
    assert "smaller than the smallest effect" in judged.reason


def test_false_alarms_stay_within_alpha(monkeypatch):
    # The word does not hang on the interval, whose bootstrap would take most of the time.
    monkeypatch.setattr(verdict, "bca", statistics.student)
    rng = np.random.default_rng(1)
    words = [
        verdict.judge(Two(), {"gain": rng.normal(size=10), "loss": rng.normal(size=10)})
        for _ in range(150)
    ]
    wrong = sum(any(v.word != "INCONCLUSIVE" for v in family) for family in words)
    assert stats.binomtest(wrong, 150, 0.05, alternative="greater").pvalue > 0.001
    assert wrong < 150 * 0.12


def test_seeds_are_excluded_by_the_rule_and_counted():
    claims = One(exclusions=("accuracy < 0.4", "spread >= 9"))
    values = np.append(around(1.0), [-50.0, -50.0])
    metrics = {"gain": values, "accuracy": [*[0.5] * 20, 0.3, 0.5], "spread": [*[1.0] * 21, 9.0]}
    (judged,) = verdict.judge(claims, metrics)
    assert (judged.n, judged.word) == (20, "SUPPORTED")


def test_nan_is_never_dropped():
    (judged,) = verdict.judge(One(), {"gain": [1.0, 1.1, np.nan]})
    assert (judged.word, judged.reason) == ("INCONCLUSIVE", "1 of 3 seeds gave no estimate")
    assert judged.estimate is None


def test_too_few_seeds_after_exclusion_decide_nothing():
    (judged,) = verdict.judge(One(exclusions=("gain > 1",)), {"gain": [0.5, 2.0, 3.0]})
    assert judged.word == "INCONCLUSIVE"
    assert "1 seeds are left" in judged.reason


def test_a_number_that_was_not_measured_is_named():
    with pytest.raises(ClaimError, match=r"'gain', which the study does not measure .*: loss"):
        verdict.judge(One(), {"loss": [1.0, 2.0]})


def test_metrics_of_different_length_are_refused():
    with pytest.raises(ClaimError, match="different numbers of seeds"):
        verdict.judge(One(), {"gain": [1.0, 2.0], "loss": [1.0]})


GATES = {"present": "a", "no_learning": "b", "shuffled": "c", "predictive": "d"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SSSS", "emergent"),
        ("RSSS", "absent (a REFUTED)"),
        ("SRRS", "forced (b REFUTED)"),
        ("SSRS", "inherited (c REFUTED)"),
        ("SSSR", "epiphenomenal (d REFUTED)"),
        ("SISS", "not shown (b INCONCLUSIVE)"),
        ("SISR", "epiphenomenal (d REFUTED)"),
    ],
)
def test_emergent_is_said_only_when_every_gate_is_open(words, said):
    spelled = {"S": "SUPPORTED", "R": "REFUTED", "I": "INCONCLUSIVE"}
    blank = dict.fromkeys(verdict.Verdict._fields)
    judged = [
        verdict.Verdict(**{**blank, "name": name, "word": spelled[word]})
        for name, word in zip("abcd", words, strict=True)
    ]
    assert verdict.emergence(judged, **GATES) == said


def test_a_gate_that_was_not_judged_is_named():
    with pytest.raises(ClaimError, match=r"\['a', 'b', 'c', 'd'\]"):
        verdict.emergence([], **GATES)
