"""Schedules that go back and forth against their formulas, and what they do within `prune`."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import as_count
from adaptivenet.pruning import cycles

FOUNDING = 784 * 128 + 128 * 64 + 64 * 10
shares = st.floats(0, 0.999)


def keep(schedule, step, size=FOUNDING):
    """The exact number that an event at a step keeps."""
    demand, _ = schedule.demand(jnp.int32(step), schedule.init(), {})
    return int(demand.keep(as_count(size), size))


def exactly(sparsity, size=FOUNDING):
    return size - int(Fraction(sparsity) * size + Fraction(1, 2))


def due_steps(schedule, every, ongoing=False, last=60):
    due = jax.vmap(lambda step: schedule.due(step, every, ongoing))(jnp.arange(1, last + 1))
    return [step for step, is_due in enumerate(due.tolist(), 1) if is_due]


def swing(step, low, high, period, start, end, shape):
    if step < start:
        return 0.0
    if end is not None and step >= end:
        return high
    place, rise = (step - start) % period, period // 2
    height = place / rise if place <= rise else (period - place) / (period - rise)
    if shape == "cosine":
        height = (1 - math.cos(math.pi * height)) / 2
    return low + (high - low) * height


@pytest.mark.parametrize("shape", ["cosine", "triangular"])
@pytest.mark.parametrize("period", [2, 3, 8, 15])
@pytest.mark.parametrize("end", [None, 33])
def test_cyclic_follows_the_formula(shape, period, end):
    schedule = cycles.cyclic(0.3, 0.95, period, start=5, end=end, shape=shape)
    steps = np.arange(60)
    got = jax.vmap(schedule)(jnp.asarray(steps))
    expected = [swing(step, 0.3, 0.95, period, 5, end, shape) for step in steps]
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert got.dtype == jnp.float32


@given(shares, shares, st.integers(2, 50), st.integers(0, 20), st.integers(0, 4))
def test_the_turning_points_of_cyclic_are_exact(a, b, period, start, cycle):
    low, high = sorted((a, b))
    schedule = cycles.cyclic(low, high, period, start=start)
    bottom = start + cycle * period
    assert keep(schedule, bottom) == exactly(low)
    assert keep(schedule, bottom + period // 2) == exactly(high)


def values(low, high, period, start, step):
    return cycles.cyclic(low, high, period, start=start)(step)


swings = jax.jit(jax.vmap(values, in_axes=(None, None, None, None, 0)))


@given(shares, shares, st.integers(2, 50), st.integers(0, 20))
def test_cyclic_stays_between_its_ends_and_repeats(a, b, period, start):
    low, high = np.sort(np.array([a, b], np.float32))
    got = np.asarray(swings(low, high, period, start, jnp.arange(200)))
    assert np.all(got[:start] == 0)
    tiny = np.finfo(np.float32).tiny  # below which processors may flush to zero
    assert np.all((got[start:] >= low - tiny) & (got[start:] <= high + tiny))
    np.testing.assert_array_equal(got[start : start + 100], got[start + period :][:100])
    # Up in the first half, down in the second.
    one = got[start : start + period + 1]
    rise = period // 2
    assert np.all(np.diff(one[: rise + 1]) >= -1e-6)
    assert np.all(np.diff(one[rise:]) <= 1e-6)


@given(st.integers(2, 20), st.integers(0, 20), st.integers(0, 30), st.integers(1, 12))
def test_the_turning_points_of_cyclic_are_due_whatever_every_is(period, start, width, every):
    schedule = cycles.cyclic(0.5, 0.9, period, start=start, end=start + width)
    turns = {
        step
        for step in range(max(start, 1), start + width + 1)
        if (step - start) % period in (0, period // 2)
    }
    regular = {
        step for step in range(max(start, 1), start + width + 1) if (step - start) % every == 0
    }
    assert due_steps(schedule, every) == sorted(turns | regular | {max(start + width, 1)})


def acdc(step, phase, warm_up, fine_tune):
    """Whether a step is sparse, by walking through the phases."""
    sparse, left = False, warm_up
    for now in range(step + 1):
        if left == 0:
            sparse, left = not sparse, phase
        left -= 1
        if now >= fine_tune:
            sparse = True
    return sparse


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 30))
def test_ac_dc_alternates(phase, warm_up, width):
    schedule = cycles.ac_dc(0.75, phase, warm_up, warm_up + width)
    got = jax.vmap(schedule)(jnp.arange(60))
    expected = [0.75 * acdc(step, phase, warm_up, warm_up + width) for step in range(60)]
    assert got.tolist() == expected


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 30), st.integers(1, 7))
def test_ac_dc_has_events_at_the_switches_and_nowhere_else(phase, warm_up, width, every):
    fine_tune = warm_up + width
    schedule = cycles.ac_dc(0.75, phase, warm_up, fine_tune)
    phases = [False] + [acdc(step, phase, warm_up, fine_tune) for step in range(1, 61)]
    switches = [step for step in range(1, 61) if phases[step] != phases[step - 1]]
    assert due_steps(schedule, every) == switches
    ongoing = set(due_steps(schedule, every, ongoing=True))
    assert set(switches) <= ongoing
    assert {s for s in range(max(warm_up, 1), 61) if (s - warm_up) % every == 0} <= ongoing


def test_the_published_schedule_of_ac_dc():
    """Of 100 epochs, the sparse ones: 11 to 15, 21 to 25, ..., and from the 91st on."""
    schedule = cycles.ac_dc(0.9, phase=5, warm_up=10, fine_tune=90)
    sparse = [epoch for epoch in range(100) if schedule(epoch) > 0]
    expected = [e for e in range(10, 90) if (e // 5) % 2 == 0] + list(range(90, 100))
    assert sparse == expected
    assert keep(schedule, 10) == exactly(0.9)
    assert keep(schedule, 15) == FOUNDING


def train(tx, params, steps):
    """Masks, parameters and records, step by step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"], pruning.mask(state)["w"], pruning.record(state))

    carry = (params, tx.init(params))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[1])(carry)


WEIGHTS = {"w": jnp.arange(1.0, 21.0).reshape(4, 5), "b": jnp.ones(5)}


def test_within_prune_ac_dc_cuts_wakes_all_at_zero_and_all_learns():
    schedule = cycles.ac_dc(0.75, phase=3, warm_up=2, fine_tune=12)
    tx = optax.chain(optax.sgd(-1.0), pruning.prune(schedule))
    params, masks, record = train(tx, WEIGHTS, 14)
    assert masks.sum(axis=(1, 2)).tolist() == [20, 5, 5, 5, 20, 20, 20, 5, 5, 5, 20, 5, 5, 5]
    events = [step for step, event in enumerate(record.event.tolist(), 1) if event]
    assert events == [2, 5, 8, 11, 12]
    cut = ~np.asarray(masks[1])
    for step, value in ((2, 0.0), (4, 0.0), (5, 0.0), (6, 1.0), (7, 2.0)):
        np.testing.assert_array_equal(np.asarray(params[step - 1])[cut], value)
    # Survivors move by one at every step, and are the largest.
    np.testing.assert_array_equal(params[3][3], np.arange(16.0, 21.0) + 4)


def test_within_prune_cyclic_follows_to_the_synapse_and_back():
    schedule = cycles.cyclic(0.2, 0.8, 6, end=15, shape="triangular")
    _, masks, record = train(optax.chain(optax.sgd(0.0), pruning.prune(schedule)), WEIGHTS, 18)
    expected = [
        20 - int(20 * swing(s, 0.2, 0.8, 6, 0, 15, "triangular") + 0.5) for s in range(1, 19)
    ]
    assert masks.sum(axis=(1, 2)).tolist() == expected
    assert min(expected) == expected[-1] == 4
    assert int(record.births.sum()) > 0


@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_sawtooth_follows_the_formula(power, initial):
    schedule = cycles.sawtooth(0.9, 4, 40, period=6, overshoot=0.3, initial=initial, power=power)
    base = pruning.polynomial(0.9, 4, 40, initial=initial, power=power)
    for step in range(60):
        excess = 0.3 * (1 - ((step - 4) % 6) / 6)
        expected = 1 - (1 - float(base(step))) * (1 - excess)
        if step < 4 or step >= 40:
            expected = 0.9 * (step >= 40)
        assert float(schedule(step)) == pytest.approx(expected, abs=2e-6)


@given(shares, shares, st.integers(1, 12))
def test_sawtooth_is_never_below_its_polynomial_and_ends_exactly(final, overshoot, period):
    schedule = cycles.sawtooth(final, 3, 30, period=period, overshoot=overshoot)
    steps = jnp.arange(3, 31)
    above = jax.vmap(schedule)(steps) - jax.vmap(pruning.cubic(final, 3, 30))(steps)
    assert np.all(above >= -1e-6)
    assert keep(schedule, 30) == keep(schedule, 99) == exactly(final)
    assert keep(schedule, 2) == FOUNDING


def test_within_prune_sawtooth_cuts_beyond_and_grows_back():
    schedule = cycles.sawtooth(0.5, 1, 9, period=4, overshoot=0.5, initial=0.5)
    _, masks, _ = train(optax.chain(optax.sgd(0.0), pruning.prune(schedule)), WEIGHTS, 10)
    # Of 20: half of 10 at a cut, then 6.25, 7.5 and 8.75; what is cut is rounded half up.
    assert masks.sum(axis=(1, 2)).tolist() == [5, 6, 7, 9, 5, 6, 7, 9, 10, 10]
    assert due_steps(schedule, 100) == [1, 5, 9]


PROGRESS = {
    "decreasing": lambda u: 1 - (1 - u) ** 2,
    "constant": lambda u: u,
    "increasing": lambda u: u**2,
}


@pytest.mark.parametrize("rate", PROGRESS)
@pytest.mark.parametrize("final", [0.0, 0.5, 0.99])
def test_rates_follow_the_formula(rate, final):
    schedule = cycles.rates(final, 5, 45, rate)
    for step in range(60):
        done = min(max((step - 5) / 40, 0), 1)
        expected = 1 - (1 - final) ** PROGRESS[rate](done)
        assert float(schedule(step)) == pytest.approx(expected, abs=2e-6)
    assert keep(schedule, 45) == keep(schedule, 99) == exactly(final)
    assert keep(schedule, 5) == FOUNDING


@pytest.mark.parametrize(("rate", "sign"), [("decreasing", -1), ("constant", 0), ("increasing", 1)])
def test_the_share_of_the_living_that_is_lost_falls_stays_or_rises(rate, sign):
    schedule = cycles.rates(0.9, 0, 20, rate)
    density = 1 - np.asarray(jax.vmap(schedule)(jnp.arange(21)), np.float64)
    lost = 1 - density[1:] / density[:-1]
    change = np.diff(lost)
    assert np.all(change * sign > 1e-4) if sign else np.all(np.abs(change) < 1e-5)


def test_a_linear_polynomial_has_an_increasing_rate():
    """Which is why its power alone does not state a constant one."""
    density = 1 - np.asarray(jax.vmap(pruning.linear(0.9, 0, 20))(jnp.arange(21)))
    assert np.all(np.diff(1 - density[1:] / density[:-1]) > 0)


def test_schedules_that_may_grow_say_so():
    growing = [
        cycles.cyclic(0.2, 0.5, 4),
        cycles.ac_dc(0.5, 1, 0, 5),
        cycles.sawtooth(0.5, 0, 5, period=2),
        cycles.sawtooth(0.5, 0, 5, period=2, overshoot=0.0, initial=0.9),
    ]
    for schedule in growing:
        assert schedule.may_grow
    for schedule in (
        cycles.cyclic(0.5, 0.5, 4),
        cycles.sawtooth(0.5, 0, 5, period=2, overshoot=0.0),
        cycles.rates(0.9, 0, 5),
    ):
        assert not schedule.may_grow


MAKERS = {
    "cyclic": lambda s: cycles.cyclic(s / 2, s, 6, start=2, end=20),
    "ac_dc": lambda s: cycles.ac_dc(s, 4, 3, 20),
    "sawtooth": lambda s: cycles.sawtooth(s, 2, 20, period=5, overshoot=s / 2),
    "rates": lambda s: cycles.rates(s, 2, 20, "increasing"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_populations_over_sparsities(name):
    def kept(sparsity, step):
        demand, _ = MAKERS[name](sparsity).demand(step, (), {})
        return demand.keep(as_count(1000), 1000).astype(jnp.int32)

    sparsities, steps = jnp.array([0.25, 0.5, 0.875], jnp.float32), jnp.arange(24)
    members = jax.vmap(jax.vmap(kept, in_axes=(None, 0)), in_axes=(0, None))(sparsities, steps)
    for place, sparsity in enumerate(sparsities.tolist()):
        alone = [keep(MAKERS[name](sparsity), step, 1000) for step in range(24)]
        # Between the exact steps float32 decides, and a population rounds as it compiles.
        np.testing.assert_allclose(members[place], alone, atol=1)
        assert members[place, -1] == exactly(sparsity, 1000)


def test_members_of_a_population_are_what_each_would_be_alone():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 7))}

    def masks(sparsity):
        schedule = cycles.cyclic(sparsity / 2, sparsity, 6, start=2, end=9)
        return train(optax.chain(optax.sgd(0.1), pruning.prune(schedule, every=3)), params, 9)[1]

    sparsities = jnp.array([0.25, 0.5, 0.875], jnp.float32)
    together, alone = jax.vmap(masks)(sparsities), jax.jit(masks)
    for place, sparsity in enumerate(sparsities):
        np.testing.assert_array_equal(together[place], alone(sparsity))
        assert together[place, -1].sum() == exactly(float(sparsity), 42)


def test_populations_over_times():
    def at(period, start, step):
        return cycles.cyclic(0.25, 0.75, period, start=start)(step)

    periods, starts = jnp.array([2, 6, 8]), jnp.array([0, 3, 5])
    got = jax.jit(jax.vmap(at, in_axes=(0, 0, None)))(periods, starts, 9)
    expected = [float(at(int(p), int(s), 9)) for p, s in zip(periods, starts, strict=True)]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_every_type_of_step(name):
    schedule = MAKERS[name](0.5)
    expected = float(schedule(7))
    for step in (np.int64(7), jnp.int32(7), jnp.uint32(7)):
        assert float(jax.jit(schedule)(step)) == pytest.approx(expected, abs=1e-6)


SPARSITY = r"must be a sparsity in \[0, 1\), not"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cycles.cyclic(0.5, 1.0, 4), "high " + SPARSITY),
        (lambda: cycles.cyclic(-0.5, 0.5, 4), "low " + SPARSITY),
        (lambda: cycles.cyclic(0.6, 0.5, 4), "low=0.6 is above high=0.5"),
        (lambda: cycles.cyclic(0.2, 0.5, 1), "period must be a number of updates >= 2, not 1"),
        (lambda: cycles.cyclic(0.2, 0.5, 4.5), "period must be a number of updates >= 2"),
        (lambda: cycles.cyclic(0.2, 0.5, True), "period must be a number of updates >= 2"),
        (lambda: cycles.cyclic(0.2, 0.5, 4, start=9, end=3), "end=3 comes before start=9"),
        (lambda: cycles.cyclic(0.2, 0.5, 4, shape="square"), "choose 'cosine' or 'triangular'"),
        (lambda: cycles.ac_dc(1.5, 4, 0, 9), "sparsity " + SPARSITY),
        (lambda: cycles.ac_dc(0.5, 0, 0, 9), "phase must be a number of updates >= 1, not 0"),
        (lambda: cycles.ac_dc(0.5, 4, -1, 9), "warm_up must be a step >= 0, not -1"),
        (lambda: cycles.ac_dc(0.5, 4, 10, 9), "fine_tune=9 comes before warm_up=10"),
        (lambda: cycles.sawtooth(1.0, 0, 9, period=3), "final " + SPARSITY),
        (lambda: cycles.sawtooth(0.5, 0, 9, period=0), "period must be a number of updates >= 1"),
        (
            lambda: cycles.sawtooth(0.5, 0, 9, period=3, overshoot=1.0),
            r"overshoot must be a share in \[0, 1\), not 1.0",
        ),
        (lambda: cycles.sawtooth(0.5, 0, 9, period=3, power=0), "power must be positive"),
        (lambda: cycles.rates(1.0, 0, 9), "final " + SPARSITY),
        (lambda: cycles.rates(0.5, 9, 0), "end=0 comes before start=9"),
        (lambda: cycles.rates(0.5, 0, 9, "linear"), "rate='linear'; choose 'decreasing' or"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
