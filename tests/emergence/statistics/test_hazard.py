"""The hazard model against closed forms, a linear programme and simulated synapses."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from adaptivenet.emergence.statistics import hazard
from adaptivenet.emergence.statistics._frailty import Likelihood


def synapses(seed, *, slope, frailty, seeds=12, each=25, rounds=15):
    """Regrowing synapses: died, log(1 + age), their seed and their number, row by row."""
    rng = np.random.default_rng(seed)
    own = -1 + rng.normal(0, frailty, seeds * each)
    age, rows = np.zeros(seeds * each), []
    for _ in range(rounds):
        died = rng.random(len(own)) < 1 / (1 + np.exp(-own - slope * np.log1p(age)))
        rows.append((died, np.log1p(age)))
        age = np.where(died, 0, age + 1)
    died, log_age = (np.concatenate(part) for part in zip(*rows, strict=True))
    number = np.tile(np.arange(seeds * each), rounds)
    return died, log_age, number // each, number


def test_two_by_two_is_the_log_odds_ratio():
    died = np.repeat([1, 0, 1, 0], [30, 10, 12, 48])
    kept = np.repeat([0, 1], [40, 60])
    got = hazard(died, {"kept": kept})
    assert got.coefficients["intercept"] == pytest.approx(math.log(30 / 10))
    ratio = math.log(12 / 48) - math.log(30 / 10)
    error = math.sqrt(1 / 30 + 1 / 10 + 1 / 12 + 1 / 48)
    assert got.coefficients["kept"] == pytest.approx(ratio)
    assert got.standard_errors["kept"] == pytest.approx(error, rel=1e-6)
    assert got.p["kept"] == pytest.approx(2 * stats.norm.sf(-ratio / error), rel=1e-4)
    assert (got.n, got.events, got.separated) == (100, 42, False)
    assert got.clusters is got.frailty is None


def test_a_factor_is_dummies_against_its_first_level():
    died = np.repeat([1, 0, 1, 0, 1, 0], [5, 5, 8, 2, 3, 7])
    layer = np.repeat(["l0", "l1", "l2"], 10)
    got = hazard(died, {"layer": layer}, factors=["layer"])
    assert list(got.coefficients) == ["intercept", "layer=l1", "layer=l2"]
    assert got.coefficients["intercept"] == pytest.approx(0.0, abs=1e-9)
    assert got.coefficients["layer=l1"] == pytest.approx(math.log(8 / 2))
    assert got.coefficients["layer=l2"] == pytest.approx(math.log(3 / 7))


def test_errors_by_cluster_are_those_of_leaving_each_out():
    died, age, seed, _ = synapses(0, slope=-0.5, frailty=0.0, each=60)
    got = hazard(died, {"age": age}, clusters=seed)
    X = sm.add_constant(age)

    def slope(rows):
        return sm.GLM(died[rows].astype(float), X[rows], sm.families.Binomial()).fit().params[1]

    without = np.array([slope(seed != s) for s in range(12)])
    error = math.sqrt(11 / 12 * np.sum((without - slope(seed >= 0)) ** 2))
    # The package goes one Newton step instead of fitting anew.
    assert got.standard_errors["age"] == pytest.approx(error, rel=0.03)
    t = got.coefficients["age"] / got.standard_errors["age"]
    assert got.p["age"] == pytest.approx(2 * stats.t.sf(abs(t), 11), rel=1e-6)
    assert got.clusters == 12


def test_a_duplicated_network_is_no_evidence_when_clusters_are_given():
    died, age, seed, _ = synapses(0, slope=-0.5, frailty=0.0)
    one = hazard(died, {"age": age}, clusters=seed)
    two = hazard(np.tile(died, 4), {"age": np.tile(age, 4)}, clusters=np.tile(seed, 4))
    assert two.standard_errors["age"] == pytest.approx(one.standard_errors["age"], rel=1e-3)
    plain = hazard(died, {"age": age})
    fourfold = hazard(np.tile(died, 4), {"age": np.tile(age, 4)})
    assert fourfold.standard_errors["age"] == pytest.approx(plain.standard_errors["age"] / 2)


def test_a_spline_follows_a_bend_that_a_line_cannot():
    rng = np.random.default_rng(3)
    x = rng.uniform(-2, 2, 6000)
    age = np.abs(x) + rng.normal(0, 0.1, 6000)  # goes with the bend, does nothing itself
    died = rng.random(6000) < 1 / (1 + np.exp(1 - np.abs(x) * 1.5))
    line = hazard(died, {"x": x, "age": age})
    bent = hazard(died, {"x": x, "age": age}, splines={"x": 8})
    assert abs(line.coefficients["age"]) > 1
    assert abs(bent.coefficients["age"]) < 3 * bent.standard_errors["age"]
    assert [name for name in bent.coefficients if name.startswith("x[")] == [
        f"x[{k}]" for k in range(8)
    ]


def test_names_of_covariates_may_be_those_of_functions():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 200))
    died = rng.random(200) < 0.4
    got = hazard(died, {"C": values[0], "cr": values[1], "a b+1": values[2]}, splines={"cr": 3})
    want = hazard(died, {"u": values[0], "v": values[1], "w": values[2]}, splines={"v": 3})
    assert list(got.coefficients.values()) == list(want.coefficients.values())
    assert list(got.coefficients) == ["intercept", "C", "cr[0]", "cr[1]", "cr[2]", "a b+1"]


def separated(X, died):
    """Konis' linear programme: is there a direction that no row contradicts, and some obey?"""
    signed = np.where(died, 1.0, -1.0)[:, None] * X
    found = optimize.linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(X)), bounds=(-1, 1))
    assert found.success
    return -found.fun > 1e-7


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=6, max_size=25
    )
)
@settings(deadline=None, max_examples=150)
def test_separation_is_what_the_linear_programme_says(rows):
    x, z, died = (np.array(part) for part in zip(*rows, strict=True))
    X = np.stack([np.ones(len(x)), x, z], 1)
    if np.linalg.matrix_rank(X) < 3:
        with pytest.raises(ValueError, match=r"in every row|depend on each other"):
            hazard(died, {"x": x, "z": z})
        return
    got = hazard(died, {"x": x, "z": z})
    assert got.separated == separated(X, died)
    assert got.separated == any(map(math.isnan, got.coefficients.values()))
    if not got.separated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = sm.Logit(died.astype(float), X).fit(disp=0, method="newton", maxiter=100)
        np.testing.assert_allclose(list(got.coefficients.values()), want.params, atol=1e-4)


def test_no_deaths_or_a_level_without_any_give_no_estimate():
    x = np.arange(10.0)
    for died in (np.zeros(10), np.ones(10)):
        got = hazard(died, {"x": x}, frailty=np.arange(10) // 2)
        assert got.separated
        assert all(map(math.isnan, [*got.coefficients.values(), *got.standard_errors.values()]))
        assert all(map(math.isnan, got.p.values()))
    died = np.tile([0, 1], 10)
    died[:6] = 0
    level = np.repeat([0, 1], [6, 14])
    assert hazard(died, {"level": level}, factors=["level"]).separated


def test_what_separation_leaves_is_the_fit_on_the_other_rows():
    rng = np.random.default_rng(0)
    value, level = rng.normal(size=400), np.repeat(["a", "b", "c", "d"], 100)
    died = (rng.random(400) < 1 / (1 + np.exp(1 - value))) & (level != "c")
    got = hazard(died, {"value": value, "level": level}, factors=["level"])
    rest = level != "c"
    want = hazard(died[rest], {"value": value[rest], "level": level[rest]}, factors=["level"])
    assert got.separated
    assert not want.separated
    assert math.isnan(got.coefficients["level=c"])
    for name in want.coefficients:
        assert got.coefficients[name] == pytest.approx(want.coefficients[name], rel=1e-6)
        assert got.standard_errors[name] == pytest.approx(want.standard_errors[name], rel=1e-6)
    assert got.n == 400


def test_scale_and_place_of_a_covariate_are_a_change_of_unit():
    died, age, _, _ = synapses(1, slope=-0.5, frailty=0.0)
    one, two = hazard(died, {"age": age}), hazard(died, {"age": 1e6 * age + 3e6})
    assert two.coefficients["age"] * 1e6 == pytest.approx(one.coefficients["age"], rel=1e-5)
    assert two.p["age"] == pytest.approx(one.p["age"], rel=1e-3)


def test_the_frailty_likelihood_is_the_integral_and_its_score_the_derivative():
    rng = np.random.default_rng(0)
    died = rng.integers(0, 2, 12).astype(float)
    X = np.stack([np.ones(12), rng.normal(size=12)], 1)
    units = rng.permutation(np.repeat([0, 1, 2], [3, 4, 5]))
    likelihood = Likelihood(X, died, units)
    theta = np.array([-0.3, 0.6, 0.9])

    def density(b, rows):
        chance = 1 / (1 + np.exp(-(X[rows] @ theta[:-1] + theta[-1] * b)))
        return np.prod(np.where(died[rows] > 0, chance, 1 - chance)) * stats.norm.pdf(b)

    want = [math.log(integrate.quad(density, -9, 9, args=(units == u,))[0]) for u in range(3)]
    total, gradient = likelihood.value_and_gradient(theta)
    assert total == pytest.approx(sum(want), rel=1e-7)
    step = 1e-5 * np.eye(3)
    value = likelihood.value_and_gradient
    slopes = [(value(theta + s)[0] - value(theta - s)[0]) / 2e-5 for s in step]
    np.testing.assert_allclose(gradient, slopes, atol=1e-6)
    np.testing.assert_allclose(likelihood.scores(theta).sum(0), gradient, atol=1e-12)


def test_heterogeneity_fakes_an_effect_of_age_and_frailty_takes_it_away():
    died, age, seed, number = synapses(2, slope=0.0, frailty=1.5)
    fake = hazard(died, {"age": age}, clusters=seed)
    assert fake.coefficients["age"] < -0.5
    assert fake.p["age"] < 1e-4
    honest = hazard(died, {"age": age}, clusters=seed, frailty=number)
    assert abs(honest.coefficients["age"]) < 3 * honest.standard_errors["age"]
    assert abs(honest.coefficients["age"]) < 0.2
    assert honest.frailty == pytest.approx(1.5, abs=0.2)


def test_a_real_effect_of_age_survives_frailty():
    died, age, seed, number = synapses(4, slope=-0.7, frailty=1.0, each=60)
    got = hazard(died, {"age": age}, clusters=seed, frailty=number)
    assert got.coefficients["age"] == pytest.approx(-0.7, abs=3 * got.standard_errors["age"])
    assert got.standard_errors["age"] < 0.1
    alone = hazard(died, {"age": age}, frailty=number)
    assert alone.coefficients == pytest.approx(got.coefficients)
    assert alone.standard_errors["age"] == pytest.approx(got.standard_errors["age"], rel=0.6)


def test_without_heterogeneity_frailty_changes_nothing():
    died, age, _, number = synapses(5, slope=-0.4, frailty=0.0, each=60)
    plain, frail = hazard(died, {"age": age}), hazard(died, {"age": age}, frailty=number)
    assert frail.frailty < 0.35
    assert frail.coefficients["age"] == pytest.approx(plain.coefficients["age"], abs=0.1)


def test_of_too_many_rows_a_seeded_part_is_taken_and_whole_synapses():
    died, age, seed, number = synapses(6, slope=-0.4, frailty=0.5)
    got = hazard(died, {"age": age}, clusters=seed, maximum=500, seed=1)
    assert got.n == 500
    assert got == hazard(died, {"age": age}, clusters=seed, maximum=500, seed=1)
    assert got != hazard(died, {"age": age}, clusters=seed, maximum=500, seed=2)
    whole = hazard(died, {"age": age}, frailty=number, maximum=1000, seed=1)
    assert whole.n == 1000 // 15 * 15  # 15 rounds a synapse
    with pytest.raises(ValueError, match="fewer than those of one synapse"):
        hazard(died, {"age": age}, frailty=number, maximum=14)
    with pytest.raises(ValueError, match="at least 1"):
        hazard(died, {"age": age}, maximum=0)


def test_labels_of_synapses_may_come_back_in_other_clusters():
    died, age, seed, number = synapses(7, slope=-0.4, frailty=1.0, each=10)
    apart = hazard(died, {"age": age}, clusters=seed, frailty=number)
    again = hazard(died, {"age": age}, clusters=seed, frailty=number % 10)
    assert again == apart
    assert hazard(died, {"age": age}, frailty=number % 10).frailty != apart.frailty


def test_bad_input_of_hazard():
    died, x = [0, 1, 0, 1, 1], [1.0, 2.0, 3.0, 2.5, 1.5]
    cases = [
        ({"died": [0, 1, 2, 1, 0]}, "True"),
        ({"died": [0, 1, np.nan, 1, 0]}, "died holds 1 values of 5"),
        ({"covariates": {"x": [1, 2, np.nan, 4, np.nan]}}, "x holds 2 values of 5"),
        ({"covariates": {"x": [1.0, 2.0]}}, "x holds 2 values, died 5"),
        ({"covariates": {"x": [1.0] * 5}}, "x is 1 in every row"),
        ({"covariates": {"x": x, "y": [2 * v for v in x]}}, "depend on each other linearly: x, y"),
        ({"splines": {"age": 4}}, "age: no such covariate"),
        ({"splines": {"x": 2}}, "at least 3 degrees"),
        ({"splines": {"x": 3}, "factors": ["x"]}, "one of the two"),
        ({"covariates": {"intercept": x}}, "rename the covariate"),
        ({"splines": {"x": 40}}, "depend on each other linearly"),
        ({"clusters": [0, 0, 0, 0, 0]}, "holds one label"),
        ({"clusters": [0, 1]}, "one label a row"),
        ({"frailty": [0, 1]}, "one label a row"),
        ({"clusters": [0, 0, 1, 1, np.nan]}, "clusters holds 1 nan"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            hazard(**{"died": died, "covariates": {"x": x}, **options})


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_too_steep_to_resolve_gives_no_estimate_rather_than_a_wild_one(seed):
    rng = np.random.default_rng(seed)
    size, age = rng.exponential(0.5, 15_000), rng.integers(0, 13, 15_000)
    died = (size < 0.01) & (rng.random(15_000) < 0.4)
    covariates = {"age": np.log1p(age), "size": size, "layer": rng.integers(0, 3, 15_000)}
    fit = hazard(died, covariates, splines={"size": 4}, factors=("layer",))
    found = np.array(list(fit.coefficients.values()))
    assert fit.separated
    assert np.all(np.isnan(found) | (np.abs(found) < 20))
