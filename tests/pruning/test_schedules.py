"""Schedules against their formulas, exact end points, and when events are due."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import as_count, as_share
from adaptivenet.pruning import demands

FOUNDING = 784 * 128 + 128 * 64 + 64 * 10


def keep(schedule, step, size=FOUNDING, alive=None):
    """The exact number that an event at a step keeps."""
    demand, _ = schedule.demand(jnp.int32(step), schedule.init(), {})
    return int(demand.keep(as_count(size if alive is None else alive), size))


def polynomial(step, final, start, end, initial, power):
    if step < start:
        return 0.0
    left = 1 - min((step - start) / max(end - start, 1), 1)
    return final + (initial - final) * left**power


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.95), (0.5, 0.9), (0.8, 0.2)])
def test_polynomial_follows_the_formula(power, initial, final):
    schedule = pruning.polynomial(final, 7, 40, initial=initial, power=power)
    steps = np.arange(60)
    got = jax.vmap(schedule)(jnp.asarray(steps))
    expected = [polynomial(step, final, 7, 40, initial, power) for step in steps]
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert got.dtype == jnp.float32


def test_cubic_and_linear_are_polynomials():
    for step in (0, 5, 8, 20, 21):
        expected = polynomial(step, 0.9, 5, 20, 0.1, 3)
        assert float(pruning.cubic(0.9, 5, 20, initial=0.1)(step)) == pytest.approx(
            expected, abs=1e-6
        )
        expected = polynomial(step, 0.9, 5, 20, 0.1, 1)
        assert float(pruning.linear(0.9, 5, 20, initial=0.1)(step)) == pytest.approx(
            expected, abs=1e-6
        )


@pytest.mark.parametrize("final", [0.0, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("make", [pruning.cubic, pruning.linear])
def test_the_end_point_is_exact(make, final):
    schedule = make(final=final, start=3, end=50)
    for size in (1, 7, FOUNDING, 10**9):
        exact = size - int(Fraction(final) * size + Fraction(1, 2))
        assert keep(schedule, 50, size) == exact
        assert keep(schedule, 10_000, size) == exact
        assert keep(schedule, 2, size) == size


def test_a_window_of_no_width():
    schedule = pruning.cubic(0.5, 4, 4)
    assert [keep(schedule, step, 10) for step in (3, 4, 5)] == [10, 5, 5]


def due_steps(schedule, every, ongoing=False, last=60):
    due = jax.vmap(lambda step: schedule.due(step, every, ongoing))(jnp.arange(1, last + 1))
    return [step for step, is_due in enumerate(due.tolist(), 1) if is_due]


@given(st.integers(0, 30), st.integers(0, 25), st.integers(1, 12), st.booleans())
def test_due(start, width, every, ongoing):
    end = start + width
    schedule = pruning.cubic(0.9, start, end)
    last = max(end, 1)
    expected = {
        step
        for step in range(max(start, 1), 61)
        if (step - start) % every == 0 and (ongoing or step <= last)
    }
    got = due_steps(schedule, every, ongoing)
    assert got == sorted(expected | {last})


@pytest.mark.parametrize(
    ("schedule", "every", "expected"),
    [
        (pruning.constant(0.5), 20, [20, 40, 60]),
        (pruning.one_shot(0.5, 7), 3, [7]),
        (pruning.one_shot(0.5, 0), 3, [1]),
        (pruning.cubic(0.5, 0, 0), 10, [1]),
        (pruning.cubic(0.5, 10, 35), 10, [10, 20, 30, 35]),
        (pruning.threshold(0.1, start=5, end=20), 6, [5, 11, 17, 20]),
        (pruning.percentile(10.0, start=50), 4, [50, 54, 58]),
        (pruning.auto(0.1, start=30, end=40), 30, [30, 40]),
        (pruning.as_schedule(lambda step: jnp.float32(0.5)), 25, [25, 50]),
    ],
)
def test_due_tables(schedule, every, expected):
    assert due_steps(schedule, every) == expected


def test_one_shot_and_constant():
    schedule = pruning.one_shot(0.7, step=5)
    assert [keep(schedule, step, 10) for step in (0, 4, 5, 9)] == [10, 10, 3, 3]
    assert [float(schedule(step)) for step in (4, 5)] == pytest.approx([0.0, 0.7])
    assert [keep(pruning.constant(0.7), step, 10) for step in (0, 9)] == [3, 3]


def test_threshold_asks_for_a_score():
    schedule = pruning.threshold(0.05, start=3)
    demand, _ = schedule.demand(jnp.int32(3), (), {})
    assert isinstance(demand, pruning.AtLeast)
    assert float(demand.value()) == np.float32(0.05)
    assert float(schedule.demand(jnp.int32(2), (), {})[0].value()) == 0.0


def test_percentile_cuts_of_those_alive_and_within_its_window():
    schedule = pruning.percentile(20.0, start=2, end=4)
    demand, _ = schedule.demand(jnp.int32(3), (), {})
    assert isinstance(demand, pruning.OfAlive)
    assert [keep(schedule, step, 1000, alive=10) for step in (1, 2, 3, 4, 5)] == [10, 8, 8, 8, 10]


def test_schedules_that_never_step_back_say_so():
    """Events of these skip the search for synapses to wake."""
    for schedule in (
        pruning.constant(0.5),
        pruning.cubic(0.9, 0, 5),
        pruning.cubic(0.9, 0, 5, initial=0.5),
        pruning.threshold(0.1),
        pruning.percentile(5.0),
    ):
        assert not schedule.may_grow
    for schedule in (
        pruning.cubic(0.5, 0, 5, initial=0.9),
        pruning.auto(0.1),
        pruning.as_schedule(lambda step: 0.5),
    ):
        assert schedule.may_grow


def test_populations_over_targets_starts_and_ends():
    def number(final, start, end):
        schedule = pruning.cubic(final, start, end)
        demand, _ = schedule.demand(jnp.int32(20), (), {})
        return demand.keep(as_count(1000), 1000).astype(jnp.int32)

    finals = jnp.array([0.5, 0.75, 0.5], jnp.float32)
    starts, ends = jnp.array([0, 0, 30]), jnp.array([10, 20, 40])
    assert jax.vmap(number)(finals, starts, ends).tolist() == [500, 250, 1000]


def test_schedules_work_within_jit_and_on_every_step_type():
    schedule = pruning.cubic(0.8, 0, 4)
    for step in (2, np.int64(2), jnp.int32(2), jnp.uint32(2)):
        assert float(schedule(step)) == pytest.approx(0.7)
        assert float(jax.jit(schedule)(step)) == pytest.approx(0.7)


def test_as_schedule():
    cubic = pruning.cubic(0.5, 0, 1)
    assert pruning.as_schedule(cubic) is cubic
    assert keep(pruning.as_schedule(0.25), 0, 8) == 6
    assert keep(pruning.as_schedule(np.float32(0.25)), 0, 8) == 6
    by_function = pruning.as_schedule(lambda step: jnp.where(step > 3, 0.5, 0.0))
    assert [keep(by_function, step, 8) for step in (3, 4)] == [8, 4]
    demanding = pruning.as_schedule(lambda step: pruning.OfAlive(as_share(0.5)))
    assert keep(demanding, 0, 100, alive=8) == 4
    assert keep(pruning.as_schedule(lambda step: 0.25), 0, 8) == 6
    assert demands.as_demand(0.5).value() == 0.5


def test_the_base_schedule_has_no_value():
    with pytest.raises(NotImplementedError):
        pruning.Schedule()(0)


SPARSITY = r"must be a sparsity in \[0, 1\), not"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pruning.cubic(1.0, 0, 5), ValueError, "final " + SPARSITY + " 1; 0.95 keeps 5 %"),
        (lambda: pruning.cubic(95, 0, 5), ValueError, "final " + SPARSITY + " 95"),
        (lambda: pruning.cubic(-0.1, 0, 5), ValueError, "final " + SPARSITY),
        (lambda: pruning.cubic(float("nan"), 0, 5), ValueError, "final " + SPARSITY + " nan"),
        (lambda: pruning.cubic("0.9", 0, 5), TypeError, "final must be a number .*not '0.9'"),
        (lambda: pruning.linear(0.5, 0, 5, initial=1.5), ValueError, "initial " + SPARSITY),
        (lambda: pruning.cubic(jnp.array([0.5, 1.5]), 0, 5), ValueError, "final " + SPARSITY),
        (lambda: pruning.cubic(0.5, 9, 5), ValueError, "end=5 comes before start=9"),
        (lambda: pruning.cubic(0.5, -1, 5), ValueError, "start must be a step >= 0, not -1"),
        (lambda: pruning.polynomial(0.5, 0, 5, power=0), ValueError, "power must be positive"),
        (lambda: pruning.constant(1.2), ValueError, "sparsity " + SPARSITY + " 1.2"),
        (lambda: pruning.one_shot(1.2, 5), ValueError, "sparsity " + SPARSITY),
        (lambda: pruning.one_shot(0.2, -5), ValueError, "start must be a step >= 0"),
        (lambda: pruning.threshold(-0.1), ValueError, "threshold must be a finite number >= 0"),
        (lambda: pruning.threshold(float("inf")), ValueError, "threshold must be a finite number"),
        (lambda: pruning.threshold(0.1, start=5, end=2), ValueError, "end=2 comes before start=5"),
        (lambda: pruning.percentile(100), ValueError, r"percent must be in \[0, 100\), not 100"),
        (lambda: pruning.percentile(-1), ValueError, r"percent must be in \[0, 100\)"),
        (lambda: pruning.percentile(5, start=5, end=2), ValueError, "end=2 comes before start=5"),
        (lambda: pruning.as_schedule(2.0), ValueError, "sparsity " + SPARSITY + " 2"),
        (lambda: pruning.as_schedule("cubic"), TypeError, "schedule='cubic' is neither"),
        (lambda: pruning.as_schedule(None), TypeError, "schedule=None is neither a schedule such"),
        (lambda: pruning.prune({"final": 0.9}), TypeError, "is neither a schedule"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_function_that_returns_no_sparsity_is_refused_when_it_is_asked():
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), not 1.5"):
        pruning.as_schedule(lambda step: 1.5).demand(0, (), {})
