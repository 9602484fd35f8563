"""The shrinking study: a network through its cuts, its arms beside it, and what is said of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import shrinking, shrinking_latency, shrinking_measures
from research import shrinking_blocks as blocks
from research.rounds import Task
from research.shrinking_arms import Course, stepper
from research.shrinking_subjects import SUBJECTS, Subject, load

SETTING = shrinking.Setting(
    shares=(0.5,), epochs=2, recover=2, cuts=2, batch_size=16, learning_rate=0.01, calibration=2
)


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax's schedules and Adam mix dtypes, which the strict setting of these tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def nothing() -> None:
    """In place of a progress bar."""


def task() -> Task:
    """A tenth of the pixels tells the class."""
    keys = jax.random.split(jax.random.key(3), 2)
    targets = jax.random.randint(keys[0], (64,), 0, 10)
    inputs = 0.3 * jax.random.normal(keys[1], (64, 20)) + jax.nn.one_hot(targets, 20)
    return Task(inputs, targets, inputs, targets)


def course(seed: int = 0, **changes) -> Course:
    setting = dataclasses.replace(SETTING, **changes)
    return Course(SUBJECTS["mlp"], setting, task(), seed, stepper(SUBJECTS["mlp"], setting))


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"):
        one = course()
        dense = one.train(one.begin(), 2, 0, 0.01, nothing)
        return one, dense, one.shrink(dense, dense, 0.5, 1, nothing)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_answers_and_trains(name):
    subject = SUBJECTS[name]
    shapes = {"mlp": (12,), "lenet5": (784,), "resnet": (8, 8, 3), "lstm": (8, 8)}
    if name == "transformer":
        x = jnp.arange(12).reshape(2, 6)
        made = Task(x, x, x, x)
    else:
        x = jnp.ones((2, *shapes[name]))
        made = Task(x, jnp.zeros(2, int), x, jnp.zeros(2, int))
    variables = jax.eval_shape(lambda key: subject.init(key, made), jax.random.key(0)) if (
        name != "transformer"
    ) else subject.init(jax.random.key(0), made)  # fmt: skip
    logits = jax.eval_shape(subject.apply, variables, made.inputs)
    again, after = jax.eval_shape(subject.train, variables, made.inputs)
    assert logits.shape == again.shape == (*made.targets.shape, 12 if name == "transformer" else 10)
    assert jax.tree.structure(after) == jax.tree.structure(variables)


def test_a_cut_reaches_its_share_and_the_optimizer_goes_on(trained):
    one, dense, small = trained
    assert small.costs.macs <= 0.5 * dense.costs.macs
    assert small.costs.macs > 0.4 * dense.costs.macs
    adam = small.opt_state[0]
    assert int(adam.count) == 4 * one.steps  # dense and after: no phase began anew
    assert jax.tree.map(jnp.shape, adam.mu) == jax.tree.map(jnp.shape, small.variables)


def test_what_is_masked_answers_as_what_is_shrunk(trained):
    one, dense, small = trained
    masked = one.masked(small, dense)
    assert jax.tree.map(jnp.shape, masked) == jax.tree.map(jnp.shape, dense.variables)
    apply, x = one.subject.apply, one.task.inputs
    np.testing.assert_allclose(apply(masked, x), apply(small.variables, x), atol=1e-5)
    kept = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(masked))
    assert kept == sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(small.variables))


def test_the_network_is_a_function_of_the_seed_alone(trained):
    _, _, small = trained

    def again(seed):
        one = course(seed)
        dense = one.train(one.begin(), 2, 0, 0.01, nothing)
        return one.shrink(dense, dense, 0.5, 1, nothing)

    same, other = again(0), again(1)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(other.variables["dense3"]["bias"], small.variables["dense3"]["bias"])


def test_random_units_are_others_and_cost_as_much(trained):
    one, dense, small = trained
    drawn = one.shrink(dense, dense, 0.5, 1, nothing, random=True)
    assert drawn.costs.macs <= 0.5 * dense.costs.macs
    assert any(
        list(a) != list(b)
        for old, new in zip(small.places, drawn.places, strict=True)
        for a, b in zip(old, new, strict=True)
    )


def test_scratch_has_the_widths_and_nothing_else_of_the_shrunk_network(trained):
    one, _, small = trained
    steps = []
    fresh = one.scratch(small, 1, lambda: steps.append(1))
    assert jax.tree.map(jnp.shape, fresh.variables) == jax.tree.map(jnp.shape, small.variables)
    assert int(fresh.opt_state[0].count) == one.steps
    assert len(steps) == 1
    # Of the same spread as an initialization at these widths: fewer inputs, larger weights.
    untrained = one.scratch(small, 0, nothing).variables["dense2"]["kernel"]
    drawn = one.subject.init(jax.random.fold_in(one.key, 7), one.task)["dense2"]["kernel"]
    assert float(jnp.std(untrained)) > float(jnp.std(drawn))


@pytest.mark.parametrize("score", ["magnitude", "fisher", "taylor"])
def test_scores_know_the_unit_that_nothing_reads(score):
    one = course(score=score, compete="means")
    dense = one.train(one.begin(), 1, 0, 0.01, nothing)
    deaf = jax.tree.map(jnp.array, dense.variables)
    deaf["dense2"]["kernel"] = deaf["dense2"]["kernel"].at[5].set(0.0)
    if score == "magnitude":
        deaf["dense1"]["kernel"] = deaf["dense1"]["kernel"].at[:, 5].set(0.0)
        deaf["dense1"]["bias"] = deaf["dense1"]["bias"].at[5].set(0.0)
    from adaptivenet import pruning

    coupling = pruning.couple(one.subject.apply, deaf, one.example)
    scores = one._scores(coupling, deaf, jax.random.key(0))
    assert int(np.argmin(scores["dense1/bias[0]"])) == 5
    assert np.isclose(scores["dense1/bias[0]"].mean(), 1)
    ranked = course(score=score)._scores(coupling, deaf, jax.random.key(0))
    assert sorted(ranked["dense1/bias[0]"]) == [(1 + place) / 128 for place in range(128)]
    assert np.argsort(ranked["dense1/bias[0]"]).tolist() == (
        np.argsort(scores["dense1/bias[0]"], kind="stable").tolist()
    )


def test_running_statistics_are_found_not_learned():
    subject = SUBJECTS["resnet"]
    small = Subject(
        "small", lambda key, task: _tiny_resnet(key), subject.apply, subject.train, subject.inputs
    )
    x = jax.random.normal(jax.random.key(0), (32, 8, 8, 3)) + 1
    setting = dataclasses.replace(SETTING, weight_decay=0.5, flip=True)
    one = Course(small, setting, Task(x, jnp.arange(32) % 10, x, jnp.arange(32) % 10), 0,
                 stepper(small, setting))  # fmt: skip
    begun = one.begin()
    after = one.train(begun, 1, 0, 0.01, nothing)
    assert not np.array_equal(
        after.variables["stats"]["norm"]["mean"], begun.variables["stats"]["norm"]["mean"]
    )
    moments = jax.tree.leaves(after.opt_state[0].mu["stats"])
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in moments)


def _tiny_resnet(key):
    from adaptivenet import models

    params, stats = models.resnet_init(key, 3, (4, 8), 10)
    return {"params": params, "stats": stats}


def test_blocks_are_cut_and_condensed_without_a_change(trained):
    one, _, _ = trained
    small = one.subject.init(jax.random.key(0), one.task)
    options = shrinking.Blocks(sparsity=0.5, block=(1, 32), epochs=4, batch_size=16)
    params = blocks.train(options, small, one.task, 0, nothing)
    kernel = np.asarray(params["dense1"]["kernel"]).reshape(20, -1, 32)
    alive = (kernel != 0).any(-1)
    assert alive.sum() == alive.size // 2
    condensed = blocks.condense(options, params)
    np.testing.assert_allclose(
        blocks.mlp(condensed, one.task.inputs),
        one.subject.apply(params, one.task.inputs),
        atol=1e-5,
    )
    assert blocks.stored(condensed) < blocks.stored(params)
    assert blocks.products(condensed) < blocks.products(params)


def test_the_clock_times_every_network_by_call_and_in_a_loop():
    x = np.ones((4, 20), np.float32)
    params = SUBJECTS["mlp"].init(jax.random.key(0), task())
    case = {"subject": "mlp", "networks": {"dense": params}, "inputs": x, "batches": (1, 4)}
    found = shrinking_latency.timed({**case, "rounds": 2})
    assert set(found) == {"call/1", "stream/1", "call/4", "stream/4"}
    assert 0 < found["stream/1"]["dense"] < 1


def test_a_clock_that_fails_says_why():
    with pytest.raises(RuntimeError, match="timing the no_such_subject failed"):
        shrinking_latency.measure("no_such_subject", {}, np.ones((1, 2)), (1,), 1)


def test_a_subject_that_is_finished_is_not_run_again(tmp_path, monkeypatch):
    made = shrinking.Config(seeds=(0, 1), output=str(tmp_path), mlp=SETTING, lstm=SETTING)
    calls, told = [], []

    def measured(config, data, name, seed, done):
        calls.append((name, seed))
        done()
        if calls == [("mlp", 0), ("lstm", 0)]:
            raise KeyboardInterrupt
        return {f"accuracy/{name}/{arm}": seed + 0.5 for arm in ("shrunk/0.5", "random/0.5",
                                                                 "scratch/0.5")}  # fmt: skip

    monkeypatch.setattr(shrinking, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        shrinking.run(made, None, (0, 1), lambda what, share: told.append(share))
    found = shrinking.run(made, None, (0, 1), lambda what, share: told.append(share))
    assert calls == [("mlp", 0), ("lstm", 0), ("lstm", 0), ("mlp", 1), ("lstm", 1)]
    assert found.metrics["accuracy/mlp/shrunk/0.5"].tolist() == [0.5, 1.5]
    assert all(0 < share < 1 for share in told)


def config(**changes) -> shrinking.Config:
    made = shrinking.Config(
        seeds=(0, 1),
        mlp=dataclasses.replace(SETTING, shares=(0.5, 0.1)),
        resnet=dataclasses.replace(SETTING, shares=(0.4,)),
        blocks=shrinking.Blocks(sparsity=0.9),
    )
    return dataclasses.replace(made, **changes)


def metrics() -> dict[str, np.ndarray]:
    """Numbers of two seeds from which the answers can be told by hand."""
    found = {}
    for name, shares in (("mlp", ("0.5", "0.1")), ("resnet", ("0.4",))):
        for arm in ("dense", "longer", *(f"{a}/{s}" for a in ("shrunk", "random") for s in shares)):
            found[f"accuracy/{name}/{arm}"] = np.array([0.9, 0.92])
            for what in ("macs", "bytes"):
                found[f"{what}/{name}/{arm}"] = np.array([100.0, 100.0])
            for kind in ("call_1", "call_64", "stream_1", "stream_64"):
                for timed in (arm, arm.replace("shrunk", "masked")):
                    found[f"{kind}/{name}/{timed}"] = np.array([6.0, 6.0])
        found[f"accuracy/{name}/scratch/{shares[-1]}"] = np.array([0.91, 0.93])
        for what in ("macs", "bytes"):
            found[f"{what}/{name}/scratch/{shares[-1]}"] = np.array([100.0, 100.0])
    found["accuracy/mlp/shrunk/0.5"] = np.array([0.94, 0.96])
    found["accuracy/resnet/shrunk/0.4"] = np.array([0.91, 0.93])
    found["accuracy/resnet/dense"] = np.array([0.93, 0.95])
    found["macs/resnet/shrunk/0.4"] = np.array([40.0, 40.0])
    found["call_1/resnet/shrunk/0.4"] = np.array([3.0, 3.0])
    found["call_64/resnet/shrunk/0.4"] = np.array([4.0, 4.0])
    found["accuracy/mlp/condensed"] = np.array([0.976, 0.978])
    found |= {f"{what}/mlp/condensed": np.array([8.0, 8.0]) for what in ("macs", "bytes")}
    for kind, time in (("stream_1", 1.5), ("stream_64", 3.0), ("call_1", 5.0), ("call_64", 5.0)):
        found[f"{kind}/mlp/condensed"] = np.array([time, time])
    return found


def test_gains_are_means_over_subjects_and_shares():
    found = shrinking_measures.claimed(config(), metrics())
    np.testing.assert_allclose(found["gain_units"], [(0.02 + 0.01) / 2] * 2)
    np.testing.assert_allclose(found["gain_scratch"], [-0.005] * 2)
    np.testing.assert_allclose(found["gain_resnet"], [0.01] * 2)


def test_targets_are_said_to_be_reached_or_missed():
    numbers = metrics()
    numbers |= shrinking_measures.claimed(config(), numbers)
    *subjects, targets = shrinking_measures.tables(config(), numbers)
    assert [table.title.split(" (")[0] for table in subjects] == ["founding MLP", "residual CNN"]
    said = {row[0]: row[2:] for row in targets.rows}
    assert said == {
        "founding MLP, condensed: accuracy %": ["97.70", "reached"],
        "founding MLP, condensed: times fewer bytes": ["12.50", "reached"],
        "founding MLP, condensed: times as fast, batch 1, in a compiled loop": ["4.00", "reached"],
        "founding MLP, condensed: times as fast, batch 1, called from Python": ["1.20", "missed"],
        "residual CNN: times fewer MACs": ["2.50", "reached"],
        "residual CNN: points over dense, trained as long": ["1.00", "reached"],
        "residual CNN: points over dense, not trained on": ["-2.00", "missed"],
        "residual CNN: speed over ratio of MACs, batch 1": ["0.80", "reached"],
        "residual CNN: speed over ratio of MACs, batch 64": ["0.60", "missed"],
    }


def test_the_figure_has_a_panel_a_subject_and_one_of_times():
    from research import study

    with study.style():
        figure = shrinking.draw(config(), study.Outcome(metrics(), {}))
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == ["a  founding MLP", "b  residual CNN", "c  what the clock shows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": dataclasses.replace(SETTING, shares=(0.1, 0.5))}, "mlp.shares: give them falling"),
        ({"blocks": shrinking.Blocks(sparsity=0.9, share=0.3)}, "blocks.share=0.3 is none of"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_data_are_those_that_each_subject_names():
    setting = dataclasses.replace(SETTING, data="digits")
    made = shrinking.Config(
        validation=200, measured_on="validation", mlp=setting, lstm=setting, transformer=setting
    )
    lessons = load(made)
    assert lessons.name == "Optical digits 8x8"
    shapes = {name: one.inputs.shape[1:] for name, one in lessons.tasks.items()}
    assert shapes == {"mlp": (64,), "lstm": (8, 8), "transformer": (63,)}
    tokens = lessons.tasks["transformer"]
    np.testing.assert_array_equal(tokens.inputs[:, 1:], tokens.targets[:, :-1])
    assert all(len(one.check_inputs) == 200 for one in lessons.tasks.values())
