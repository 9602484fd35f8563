"""S3: the parts whose answer is known."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import lottery, lottery_arms, lottery_figure, lottery_measures, rounds, study

# With k = 0 the two rewinding points are one, and whatever differs only by them must be equal.
CONFIG = lottery.Config(
    hidden=(8,), steps=6, rewind=0, batch_size=8, rate=0.5, sparsity=0.75, winning=0.5, points=3
)
SEEDS = (4, 9)


class Data:
    """Noise, with labels that can be learned by heart."""

    train_inputs = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    train_targets = np.random.default_rng(1).integers(0, 10, 64).astype(np.int32)
    test_inputs, test_targets = train_inputs[:50], train_targets[:50]


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """The programs are small and run a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def accuracy(outcome, member):
    return outcome.curves["accuracy"][:, :, lottery_arms.MEMBERS.index(member)]


@pytest.fixture(scope="module")
def outcome():
    said = []
    found = lottery.run(CONFIG, Data, SEEDS, lambda what, share: said.append((what, share)))
    assert [what for what, _ in said] == ["density 100.0%", "density 50.0%", "density 25.0%"]
    assert said[-1][1] == 1.0
    return found


@pytest.fixture(scope="module")
def replay():
    """The three rounds by hand: masks and ends of each, and the parameters after the first."""
    task = rounds.task(Data, "test")
    keys = jax.vmap(jax.random.key)(jnp.array(SEEDS, jnp.uint32))
    begins = lottery_arms.starts(CONFIG, keys, task)
    full = jax.tree.map(
        lambda leaf: jnp.ones_like(leaf, bool) if leaf.ndim == 3 else optax.MaskedNode(),
        begins["original"],
    )
    masks, all_masks, all_ends = dict.fromkeys(lottery_arms.MEMBERS, full), [], []
    for number in range(3):
        nets = {
            member: lottery_arms.begin(CONFIG, begins[lottery_arms.start_of(member)], mask)
            for member, mask in masks.items()
        }
        if number > 0:
            of_kept = all_ends[-1]["kept a"].params
            nets["kept a"] = lottery_arms.begin(CONFIG, of_kept, masks["kept a"])
        if number == 2:
            nets["long a"] = all_ends[1]["long a"]
        all_masks.append(masks)
        all_ends.append(lottery_arms.train_all(CONFIG, number, nets, keys, task))
        dense = all_ends[0]["rewound a"].params
        last = lottery_arms.at_once(CONFIG, dense, full)
        of_masks = jax.vmap(jax.random.fold_in, (0, None))(keys, 1000 + number)
        masks = lottery_arms.next_masks(CONFIG, all_ends[-1], dense, masks, of_masks, last)
    return all_masks, all_ends, dense, task


def test_without_a_cut_every_arm_of_a_start_and_an_order_is_the_dense_network(outcome):
    first = {member: accuracy(outcome, member)[:, 0] for member in lottery_arms.MEMBERS}
    for member in ("random a", "oneshot a", "matched a", "long a", "kept a", "original a"):
        np.testing.assert_array_equal(first[member], first["rewound a"])
    np.testing.assert_array_equal(first["random b"], first["rewound b"])
    assert np.all(outcome.curves["overlap"][:, 0] == 1.0)
    assert np.all(outcome.curves["density"][:, 0] == 1.0)


def test_rewinding_to_the_same_step_finds_the_same_tickets(outcome):
    for order in lottery_arms.ORDERS:
        np.testing.assert_array_equal(
            accuracy(outcome, f"original {order}"), accuracy(outcome, f"rewound {order}")
        )
    overlap = outcome.curves["overlap"]
    np.testing.assert_array_equal(overlap[:, :, 0], overlap[:, :, 1])
    assert np.all(overlap[:, 1:, :, 0] < 1.0)  # other batches, another ticket
    assert np.all(overlap[:, 1:, :, 0] > overlap[:, 1:, :, 1])
    assert np.all(outcome.metrics["overlap_gain"] == 0.0)
    assert np.all(outcome.metrics["error_barrier_beside_original"] == 0.0)


def test_a_seed_is_the_same_network_beside_any_others(outcome):
    turned = lottery.run(CONFIG, Data, SEEDS[::-1], lambda *_: None)
    for name, values in turned.curves.items():
        np.testing.assert_allclose(values[::-1], outcome.curves[name], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(outcome.curves["line"][0], outcome.curves["line"][1])


def test_the_long_arm_goes_on_and_the_others_begin_again(outcome, replay):
    _, ends, _, task = replay
    for member in ("long a", "kept a", "oneshot a", "rewound a"):
        for number in range(3):
            params = ends[number][member].params
            expected = jax.vmap(rounds.accuracy, (0, None))(params, task)
            np.testing.assert_allclose(accuracy(outcome, member)[:, number], expected)
            state = ends[number][member].opt_state
            adam = optax.tree_utils.tree_get(state, "ScaleByAdamState")
            rounds_run = number if member == "long a" and number else 1
            assert np.all(adam.count == CONFIG.steps * rounds_run)


def test_metrics_are_read_at_the_last_density_and_at_the_one_that_may_win(outcome):
    ticket = accuracy(outcome, "rewound a")
    np.testing.assert_allclose(outcome.metrics["beyond_dense"], ticket[:, 1] - ticket[:, 0])
    last = accuracy(outcome, "reinit a")[:, 2]
    np.testing.assert_allclose(outcome.metrics["beyond_reinit"], ticket[:, 2] - last)
    barrier = outcome.curves["barrier_loss"]
    difference = (barrier[:, 1:, 1] - barrier[:, 1:, 2]).mean(1)
    np.testing.assert_allclose(outcome.metrics["loss_barrier_beside_random"], difference, atol=1e-6)
    assert np.all(barrier[:, :, 1] >= 0.0)


def test_the_figure_is_drawn_from_what_the_file_holds(outcome):
    import matplotlib.pyplot as plt

    figure = lottery_figure.draw(CONFIG, study.Outcome.from_json(outcome.rounded().to_json()))
    assert len(figure.axes) == 6
    plt.close(figure)


def counts(mask):
    return np.array([[int(m.sum()) for m in leaf] for leaf in jax.tree.leaves(mask)])


def test_all_arms_have_one_count_and_random_masks_that_of_each_layer(replay):
    (full, first, second), *_ = replay
    size = counts(full["rewound a"]).sum(0)[0]
    left = size - round(0.5 * size), size - round(0.5 * size) - round(0.5 * round(0.5 * size))
    for masks, keep in ((first, left[0]), (second, left[1])):
        for member in lottery_arms.MEMBERS:
            kept = left[1] if member == "long a" else keep
            assert np.all(counts(masks[member]).sum(0) == kept), member
        for member in ("random a", "matched a"):
            np.testing.assert_array_equal(counts(masks[member]), counts(masks["rewound a"]))
        assert masks["reinit a"] is masks["rewound a"]
        assert masks["random b"] is masks["random a"]
        moved, kept = (masks[m]["dense1"]["kernel"] for m in ("random a", "rewound a"))
        assert not np.array_equal(moved, kept)
    for x, y in zip(*(jax.tree.leaves(m["long a"]) for m in (first, second)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_one_cut_keeps_the_strongest_of_the_dense_network(replay):
    (_, first, second), _, dense, _ = replay
    for mask in (first["oneshot a"], second["oneshot a"], first["long a"]):
        for seed in range(len(SEEDS)):
            weights = np.concatenate([np.abs(w[seed]).ravel() for w in rounds.kernels(dense)])
            kept = np.concatenate([m[seed].ravel() for m in jax.tree.leaves(mask)])
            assert weights[kept].min() > weights[~kept].max()


def test_a_cut_to_the_tickets_layers_keeps_the_strongest_of_each(replay):
    (_, first, second), _, dense, _ = replay
    for masks in (first, second):
        layers = zip(rounds.kernels(dense), jax.tree.leaves(masks["matched a"]), strict=True)
        for weights, kept in layers:
            for w, m in zip(np.abs(weights), np.asarray(kept), strict=True):
                assert w[m].min() > w[~m].max()


def test_what_is_cut_stays_zero(replay):
    for masks, ends in zip(*replay[:2], strict=True):
        for member, net in ends.items():
            alive = jax.tree.leaves(masks[member])
            for kernel, mask in zip(rounds.kernels(net.params), alive, strict=True):
                assert np.all(np.asarray(kernel)[~np.asarray(mask)] == 0.0)
                assert np.any(np.asarray(kernel)[np.asarray(mask)] != 0.0)


def test_members_go_back_to_where_their_arm_says():
    assert {lottery_arms.start_of(member) for member in lottery_arms.PART} == {"early"}
    assert [lottery_arms.start_of(m) for m in lottery_arms.WHOLE] == ["original"] * 3 + ["reinit"]
    config = dataclasses.replace(CONFIG, rewind=2)
    keys = jax.vmap(jax.random.key)(jnp.array(SEEDS, jnp.uint32))
    begins = lottery_arms.starts(config, keys, rounds.task(Data, "test"))
    first, early, other = (rounds.kernels(begins[k])[0] for k in ("original", "early", "reinit"))
    moved = np.max(np.abs(first - early))
    assert 0.0 < moved <= 2.01 * config.learning_rate  # two steps of Adam
    assert np.max(np.abs(first - other)) > 0.1


def mask(*layers):
    return {f"dense{i + 1}": {"kernel": jnp.array([layer])} for i, layer in enumerate(layers)}


def test_overlap_counts_what_is_common_and_what_chance_would_give():
    t, f = True, False
    a, b = mask([t, t, f, f], [t, f]), mask([t, f, t, f], [f, t])
    # 1 in common of 5 in either; by chance 2 * 2 / 4 + 1 * 1 / 2 = 1.5 of 6 - 1.5.
    np.testing.assert_allclose(lottery_measures.overlap(a, b), [[1 / 5, 1.5 / 4.5]])
    assert lottery_measures.overlap(a, a)[0, 0] == 1.0
    assert lottery_measures.density(a) == 0.5


def test_a_barrier_stands_between_two_orders_of_the_same_units():
    """Swapped hidden units compute the same function; half way between, they cancel."""
    sides = [
        {
            "dense1": {"kernel": sign * jnp.array([[1.0, -1.0]]), "bias": jnp.zeros(2)},
            "dense2": {"kernel": jnp.eye(2)[:: int(sign)], "bias": jnp.zeros(2)},
        }
        for sign in (1.0, -1.0)
    ]
    inputs, targets = jnp.array([[1.0], [-1.0]]), jnp.array([0, 1])
    task = rounds.Task(inputs, targets, inputs, targets)
    a, b = ([jax.tree.map(lambda leaf: leaf[None], side)] for side in sides)
    error, loss, line = lottery_measures.barriers(3, a, b, task)
    np.testing.assert_allclose(error, [[0.5]])
    end = np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(line, [[[end, np.log(2), end]]], rtol=1e-6)
    np.testing.assert_allclose(loss, [[np.log(2) - end]], rtol=1e-6)
    same = lottery_measures.barriers(3, a, a, task)
    np.testing.assert_allclose([same[0], same[1]], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewind": 6}, "rewind=6 must come before the last of steps=6"),
        ({"winning": 0.8}, "winning=0.8 lies beyond sparsity=0.75"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
