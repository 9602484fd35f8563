"""The frontier: rules by name, what an event does, and measures whose answer is known."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptivenet as an
from research import frontier, frontier_arms, frontier_measures, rounds

SETTING = frontier.Setting(
    rules=("magnitude",),
    sparsities=(0.5, 0.8),
    epochs=2,
    batch_size=8,
    warmup=2,
    calibration=16,
    prune_start=0.0,
    prune_end=0.5,
)
SUBJECT = frontier_arms.SUBJECTS["mlp"]
ALL = [
    *frontier_arms.CONTROLS,
    *frontier_arms.AT_START,
    *frontier_arms.SCORES,
    *(f"magnitude+{regrowth}" for regrowth in frontier_arms.REGROWTH),
]


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax's schedules and Adam mix dtypes, which the strict setting of these tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def task(features=12, examples=32):
    inputs = jax.random.normal(jax.random.key(1), (examples, features))
    targets = jnp.arange(examples) % 10
    return rounds.Task(inputs, targets, inputs, targets)


def training(rule, **changes):
    setting = dataclasses.replace(SETTING, **changes)
    return frontier_arms.training(setting, "mlp", rule, 32)


@pytest.mark.parametrize("rule", ALL)
def test_every_rule_gets_the_signals_that_it_asks_for(rule):
    one, key, sparsity = training(rule), jax.random.key(0), jnp.float32(0.5)
    net = jax.eval_shape(one.begin, key, sparsity, task())
    rows = jnp.zeros((one.steps, 8), jnp.int32)
    after = jax.eval_shape(one.chunk, net, sparsity, key, rows, jnp.int32(1), task(), None)
    assert jax.tree.structure(after) == jax.tree.structure(net)


def test_a_population_ends_at_its_sparsities_and_a_member_is_what_it_is_alone():
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    shares = []
    params = training("magnitude").run(task(), keys, (0.5, 0.8), done=shares.append)
    assert shares == [0.5, 1.0]
    weights = sum(k.size for k in rounds.kernels(params)) // 4
    for column, sparsity in enumerate((0.5, 0.8)):
        alive = sum(int(jnp.sum(k[1, column] != 0)) for k in rounds.kernels(params))
        assert alive == weights - round(sparsity * weights)
    alone = training("magnitude").run(task(), keys[1:], (0.8,))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1, 1], b[0, 0], atol=1e-5)


def test_the_norm_control_loses_the_norm_of_each_cut_and_no_weight():
    one, sparsity = training("l2"), jnp.float32(0.8)
    params = {"dense1": {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5), "bias": jnp.ones(5)}}
    net = one.event(rounds.Net(params, None), sparsity, jax.random.key(0), jnp.int32(one.end), None)
    before, now = (
        float(one.schedule(sparsity)(jnp.int32(t))) for t in (one.end - one.steps, one.end)
    )
    kept = [10 - round(10 * s) for s in (before, now)]
    ratio = np.sqrt(sum(w**2 for w in range(11 - kept[1], 11)))
    ratio /= np.sqrt(sum(w**2 for w in range(11 - kept[0], 11)))
    kernel = net.params["dense1"]["kernel"]
    np.testing.assert_allclose(kernel, ratio * params["dense1"]["kernel"], rtol=1e-6)
    assert ratio < 1
    assert np.all(np.asarray(kernel) != 0)


def test_effective_density_is_that_of_the_paths():
    rng = np.random.default_rng(0)
    masks = [rng.random(shape) < 0.15 for shape in ((12, 9), (9, 8), (8, 10))]
    params = {
        f"dense{i + 1}": {"kernel": jnp.where(m, -0.3, 0.0), "bias": jnp.ones(m.shape[1])}
        for i, m in enumerate(masks)
    }
    live = an.pruning.effective_masks([jnp.asarray(m) for m in masks])
    expected = sum(int(m.sum()) for m in live) / sum(m.size for m in masks)
    assert 0 < expected < np.mean([m.mean() for m in masks])
    found = frontier_measures.effective_density(SUBJECT, (12,), params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_effective_density_of_convolutions_follows_channels():
    params = an.models.lenet5_init(jax.random.key(0), channels=(3, 4), hidden=6)
    dead = params | {"conv2": jax.tree.map(lambda k: k.at[..., 1].set(0.0), params["conv2"])}
    sizes = [k.size for k in rounds.kernels(params)]
    # Channel 1 of the second convolution feeds 16 positions of the hidden layer.
    lost = 5 * 5 * 3 + 16 * 6
    found = frontier_measures.effective_density(frontier_arms.SUBJECTS["lenet5"], (784,), dead)
    np.testing.assert_allclose(found, (sum(sizes) - lost) / sum(sizes), rtol=1e-6)


def test_a_teacher_shifts_the_loss_towards_its_answers():
    params = SUBJECT.init(jax.random.key(0), 12)
    data = task()
    answers = SUBJECT.apply(params, data.inputs)
    plain = frontier_arms.loss(SUBJECT, params, data.inputs, data.targets)
    none = frontier_arms.loss(
        SUBJECT, params, data.inputs, data.targets, -answers, teaching=(0.0, 2.0)
    )
    np.testing.assert_allclose(plain, none, rtol=1e-6)

    def taught(params):
        loss = frontier_arms.loss
        return loss(SUBJECT, params, data.inputs, data.targets, answers, teaching=(0.999999, 1.0))

    # The network is its own teacher: nothing to learn.
    slopes = jax.grad(taught)(params)
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(slopes)) < 1e-5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("magnitud", r"no score 'magnitud'; choose of dense, l2, snip"),
        ("magnitude+links2", "no regrowth 'links2'; choose of random, gradient"),
        ("snip+gradient", "has no regrowth"),
    ],
)
def test_mistakes_in_rules_are_named_before_anything_runs(rule, message):
    with pytest.raises(ValueError, match=message):
        frontier.Config(mlp=dataclasses.replace(SETTING, rules=(rule,)))


def test_a_taught_rule_needs_its_teacher_and_targets_their_sparsities():
    with pytest.raises(ValueError, match="needs 'dense', its teacher, first"):
        frontier.Config(mlp=dataclasses.replace(SETTING, rules=("magnitude*", "dense")))
    with pytest.raises(ValueError, match="one accuracy for each"):
        frontier.Config(mlp=dataclasses.replace(SETTING, targets=(0.9,)))


def test_gains_are_paired_by_seed_and_tables_say_what_was_missed():
    config = frontier.Config(
        seeds=(1, 2),
        mlp=dataclasses.replace(SETTING, rules=("l2", "magnitude"), targets=(0.7, 0.9)),
    )
    m = {}
    for rule, values in {"l2": (0.5, 0.7), "magnitude": (0.6, 0.9)}.items():
        for sparsity in (0.5, 0.8):
            for what in ("accuracy", "density", "effective"):
                m[f"{what}/mlp/{rule}/{sparsity:g}"] = np.array(values)
    found = frontier_measures.claimed(config, m)
    np.testing.assert_allclose(found["gain_norm"], [0.1, 0.2])
    assert set(found) == {"gain_norm"}
    targets = frontier_measures.tables(config, m)[1]
    assert [row[3] for row in targets.rows] == ["reached", "missed by 15.00"]


def test_beside_the_literature_stands_every_rule_that_cuts():
    rules = ("dense", "magnitude", "obd")
    config = frontier.Config(
        seeds=(1, 2), lenet300=dataclasses.replace(SETTING, rules=rules, sparsities=(0.75,))
    )
    m = {}
    for rule, kept in (("dense", 0.0), ("magnitude", 0.75), ("obd", 0.75)):
        for what, value in (("accuracy", 0.98), ("density", 0.25), ("effective", 0.0)):
            m[f"{what}/lenet300/{rule}/{kept:g}"] = np.array([value, value])
    rows = frontier_measures.tables(config, m)[-1].rows
    ours = [row for row in rows if row[0].startswith("ours")]
    assert [row[0] for row in ours] == ["ours, magnitude", "ours, obd"]
    assert [row[2:] for row in ours] == [["4", "none left"]] * 2


class TestShifted:
    def test_each_image_moves_as_a_whole(self):
        images = jnp.zeros((200, 5, 5)).at[:, 2, 1].set(1.0).at[:, 4, 4].set(2.0)
        moved = frontier_arms.shifted(jax.random.key(0), images.reshape(200, 25), 1)
        moved = np.asarray(moved).reshape(200, 5, 5)
        seen = set()
        for image in moved:
            (y, x), *_ = np.argwhere(image == 1.0)
            seen.add((int(y - 2), int(x - 1)))
            corner = np.argwhere(image == 2.0)
            if y > 2 or x > 1:
                assert len(corner) == 0  # it left the frame
            else:
                assert corner.tolist() == [[y + 2, x + 3]]
        assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}

    def test_only_square_images_can_be_moved(self):
        with pytest.raises(ValueError, match="12 features are no square image"):
            frontier_arms.shifted(jax.random.key(0), jnp.zeros((2, 12)), 1)

    def test_training_takes_it(self):
        one = training("magnitude", shift=1, epochs=1)
        made = jax.eval_shape(
            one.chunk,
            jax.eval_shape(one.begin, jax.random.key(0), jnp.float32(0.5), task(16)),
            jnp.float32(0.5), jax.random.key(0), jnp.zeros((one.steps, 8), jnp.int32),
            jnp.int32(0), task(16), None,
        )  # fmt: skip
        assert made.params["dense1"]["kernel"].shape == (16, 128)
