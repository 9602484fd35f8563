"""The benchmark of beliefs: every candidate computes what its name says; no time is asserted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from adaptivenet import data, models, posterior
from adaptivenet.posterior import meanfield
from research.benchmarks import posterior as benchmark

TINY = (6, 5, 4, 3)
NUMBER = 11
TRAINING = sorted(benchmark.training_cases(TINY))


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=(NUMBER, TINY[0])), jnp.float32)
    targets = jnp.asarray(generator.integers(0, TINY[-1], NUMBER), jnp.int32)
    params = jax.tree.map(lambda p: p + 0.05, models.mlp_init(jax.random.key(0), TINY))
    return params, inputs, targets


def assert_close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)


# --- the diagonal of the Fisher information ------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, NUMBER, 50])
def test_batches_add_up_to_all_examples(batch):
    rows = jnp.arange(3.0 * NUMBER).reshape(NUMBER, 3)
    total = benchmark.over_batches(lambda x, y: (x.sum(0), y.sum()), (rows, rows[:, 0]), batch)
    np.testing.assert_allclose(total[0], rows.sum(0))
    np.testing.assert_allclose(total[1], rows[:, 0].sum())


def test_the_reference_sums_the_mean_gradients_of_its_batches(problem):
    params, inputs, targets = problem
    value, grads = benchmark.epoch(models.mlp, params, inputs, targets, batch=4)
    slope = jax.value_and_grad(lambda p, x, y: benchmark.loss(models.mlp, p, x, y))
    parts = [slope(params, inputs[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)]
    np.testing.assert_allclose(value, sum(part[0] for part in parts), rtol=1e-5)
    assert_close(grads, jax.tree.map(lambda *g: sum(g), *(part[1] for part in parts)))


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_the_peer_with_per_example_gradients_is_the_empirical_diagonal(problem, chunk):
    params, inputs, targets = problem
    found = benchmark.vmap_case(models.mlp, params, inputs, targets, chunk)()
    ours = benchmark.fisher_cases(models.mlp, params, inputs, targets)["empirical"]()
    assert_close(found, ours)


def test_products_with_all_basis_vectors_are_the_exact_diagonal(problem):
    params, inputs, targets = problem
    number = benchmark.floats(params)
    found = benchmark.ggn_case(models.mlp, params, inputs, number)()
    exact = benchmark.fisher_cases(models.mlp, params, inputs, targets)["exact"]()
    np.testing.assert_allclose(found, ravel_pytree(exact)[0], rtol=2e-4, atol=1e-6)


def test_the_product_is_of_the_matrix_that_jacobians_give(problem):
    params, inputs, _ = problem
    flat, unravel = ravel_pytree(params)

    def apply(flat):
        return models.mlp(unravel(flat), inputs)

    jacobian, p = jax.jacobian(apply)(flat), jax.nn.softmax(apply(flat))
    hessian = jnp.einsum("nk,kl->nkl", p, jnp.eye(TINY[-1])) - p[:, :, None] * p[:, None, :]
    matrix = jnp.einsum("nki,nkl,nlj->ij", jacobian, hessian, jacobian)
    vector = jax.random.normal(jax.random.key(1), flat.shape)
    found = benchmark.ggn_product(models.mlp, params, inputs, unravel(vector), batch=4)
    np.testing.assert_allclose(ravel_pytree(found)[0], matrix @ vector, rtol=1e-3, atol=1e-5)


def test_the_reference_and_the_sampled_diagonal_run(problem):
    cases = benchmark.fisher_cases(models.mlp, *problem)
    assert list(cases) == [benchmark.EPOCH, "exact", "sampled, 1 draw", "empirical"]
    for leaf in jax.tree.leaves(cases["sampled, 1 draw"]()):
        assert bool(jnp.all(leaf >= 0))
        assert bool(jnp.any(leaf > 0))
    assert benchmark.floats(cases[benchmark.EPOCH]()) == benchmark.floats(problem[0]) + 1


# --- training steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_every_way_to_train_moves_the_parameters_and_what_it_knows_of_them(problem, name):
    _, inputs, targets = problem
    case = benchmark.training_cases(TINY)[name]
    state = case.tx.init(case.params)
    number = 102  # of which the rarest tracker takes in two
    batches = benchmark.batches_of(inputs, targets, number, batch=4)
    params, after = jax.jit(benchmark.steps(case))(case.params, state, batches)
    for before, now in zip(jax.tree.leaves(case.params), jax.tree.leaves(params), strict=True):
        assert bool(jnp.all(jnp.isfinite(now)))
        assert bool(jnp.any(now != before))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    if name == "adam":
        return
    if name == "mean field":
        old, new = meanfield.posterior(case.params), meanfield.posterior(params)
    else:
        old, new = posterior.find(state, case.params), posterior.find(after, params)
    for before, now in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert before.shape == now.shape
        assert bool(jnp.any(now != before))


def test_trackers_leave_the_training_of_adam_alone(problem):
    _, inputs, targets = problem
    cases, batches = benchmark.training_cases(TINY), benchmark.batches_of(inputs, targets, 3, 4)

    def trained(name):
        case = cases[name]
        return benchmark.steps(case)(case.params, case.tx.init(case.params), batches)[0]

    for name in ("squared_gradient", "fisher", "swag, every step", "swag, every 100"):
        assert_close(trained(name), trained("adam"))


def test_the_fisher_tracker_is_handed_squares_of_single_examples(problem):
    params, inputs, targets = problem
    case = benchmark.training_cases(TINY)["fisher"]
    grads, extra = case.slope(params, None, inputs, targets, None)
    ours = posterior.fisher_diagonal(models.mlp, params, inputs, targets, kind="empirical")
    assert_close(extra["squared_grads"], jax.tree.map(lambda s: s / NUMBER, ours))
    assert_close(grads, jax.grad(benchmark.loss, argnums=1)(models.mlp, params, inputs, targets))


def test_batches_are_examples_in_order_and_begin_again():
    inputs, targets = jnp.arange(5.0)[:, None], jnp.arange(5)
    x, y, keys = benchmark.batches_of(inputs, targets, 2, batch=4)
    assert y.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]]
    assert x.tolist() == y[..., None].tolist()
    assert len(keys) == 2
    assert bool(jnp.any(jax.random.key_data(keys[0]) != jax.random.key_data(keys[1])))


def test_floats_leaves_out_counters_and_keys():
    tree = {"a": jnp.zeros((2, 3)), "b": (jnp.int32(0), jax.random.key(0), jnp.float32(1.0), 2.0)}
    assert benchmark.floats(tree) == 8


def test_states_are_counted_for_each_parameter():
    found = benchmark.memory(benchmark.training_cases((100, 50, 10)))
    state = {name: counts["state"] for name, counts in found.items()}
    expected = {
        "adam": 2,  # two moments
        "squared_gradient": 3,
        "fisher": 3,
        "ivon": 2,  # the mean of the gradients, and the curvature
        "mesu": 1,
        "swag, every step": 4,
        "swag, every 100": 4,
        "mean field": 4,  # the moments of twice as many parameters
    }
    assert state == pytest.approx(expected, abs=1e-3)  # but for a few scalars
    assert state["adam"] == 2
    trained = {name: counts["trained"] for name, counts in found.items()}
    assert trained == {**dict.fromkeys(expected, 1.0), "mean field": 2.0}


# --- after training, and all of it ---------------------------------------------------------------


def test_laplace_candidates_are_what_laplace_gives(problem, monkeypatch):
    monkeypatch.setattr(benchmark, "STRUCTURES", ("diagonal", "ekfac"))
    params, inputs, targets = problem
    cases = benchmark.laplace_cases(models.mlp, *problem)
    assert len(cases) == 1 + 2 * len(benchmark.STRUCTURES)
    for structure in benchmark.STRUCTURES:
        ours = posterior.laplace(
            models.mlp, params, inputs, targets, likelihood="categorical", structure=structure
        )
        assert_close(cases[structure]().posterior().precision, ours.posterior().precision)
        drawn = cases[f"{structure}, 1 draw"]().posterior().precision
        both = zip(jax.tree.leaves(drawn), jax.tree.leaves(ours.posterior().precision), strict=True)
        assert any(bool(jnp.any(jnp.abs(a - b) > 1e-3)) for a, b in both)


def test_without_mnist_the_inputs_are_random_and_say_so(monkeypatch):
    def missing(name, **options):
        raise data.MissingDataError(name)

    monkeypatch.setattr(benchmark.data, "load", missing)
    inputs, targets, source = benchmark.pixels(7)
    again = benchmark.pixels(7)
    assert inputs.shape == (7, 784)
    assert inputs.dtype == jnp.float32
    assert 0 <= float(inputs.min()) <= float(inputs.max()) <= 1
    assert targets.shape == (7,)
    assert bool(jnp.all(inputs == again[0]))
    assert "random" in source
    assert "ADAPTIVENET_DATA" in source


def test_with_mnist_the_inputs_are_its_pixels(data_folder):
    inputs, targets, source = benchmark.pixels(5)
    assert source == "MNIST"
    assert inputs.shape == (5, 784)
    assert float(inputs.max()) == 1.0
    assert targets.tolist() == [5, 0, 4, 1, 9]


def test_the_report_has_all_candidates_and_verdicts(monkeypatch, capsys):
    written = {}
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.random((8, 784)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 10, 8), jnp.int32)
    small = (784, 3, 10)
    network = (models.mlp, models.mlp_init(jax.random.key(0), small))
    monkeypatch.setattr(benchmark, "FOUNDING", small)
    monkeypatch.setattr(benchmark, "SIZES", small)
    monkeypatch.setattr(benchmark, "CHUNKS", (1, 4))
    monkeypatch.setattr(benchmark, "VECTORS", (1, 2))
    monkeypatch.setattr(benchmark, "STRUCTURES", ("diagonal",))
    monkeypatch.setattr(benchmark, "BATCH", 4)
    monkeypatch.setattr(benchmark, "networks", lambda: {"a net": network})
    monkeypatch.setattr(benchmark, "pixels", lambda examples: (inputs, targets, "drawn"))
    monkeypatch.setattr(benchmark, "write_results", written.setdefault)

    payload = benchmark.main(["--repeats", "1", "--steps", "2", "--examples", "8"])
    printed = capsys.readouterr().out
    assert written == {"posterior": payload}
    assert payload["data"] == "drawn"
    assert sorted(payload["training"]["cases"]) == TRAINING
    assert "status" in payload["fisher"]["by GGN products"]
    assert payload["fisher"]["by GGN products"]["parameters"] == 784 * 3 + 3 + 3 * 10 + 10
    assert list(payload["laplace"]["networks"]) == ["a net"]
    assert "extrapolated, not run" in printed
    # The exact diagonal, six trackers, and the state of IVON.
    assert printed.count("reached") + printed.count("MISSED") == 8


@pytest.mark.parametrize(
    "argument", [["--repeats", "0"], ["--examples", "1"], ["--examples", "60001"], ["--steps", "0"]]
)
def test_impossible_settings_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(argument)
    assert error.value.code == 2
    assert argument[0] in capsys.readouterr().err
