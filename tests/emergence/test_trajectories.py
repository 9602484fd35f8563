"""The recorder and the history, beside a dict of synapses that live and die one by one."""

from __future__ import annotations

import dataclasses
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.emergence import trajectories
from adaptivenet.emergence.trajectories import Recorder, TrajectoryError

SHAPES = {"a": (3, 4), "b": (2, 2, 2), "c": (5, 1)}
SIZE = 25
ROUNDS = 6
PARAMS = {
    **{name: jnp.zeros(shape, jnp.bfloat16 if name == "b" else jnp.float32)
       for name, shape in SHAPES.items()},
    "bias": jnp.zeros(4),
}  # fmt: skip
RECORDERS = {
    None: Recorder(PARAMS),
    9: Recorder(PARAMS, sample=9, seed=1),
}


def random_history(seed, rounds=ROUNDS, scores=True):
    """Masks, parameters and scores of each round (the masks of round 0 first), as numpy."""
    rng = np.random.default_rng(seed)
    start = rng.random() < 0.5
    masks = [
        {k: np.full(s, True) if start else rng.random(s) < 0.6 for k, s in SHAPES.items()},
        *({k: rng.random(s) < 0.7 for k, s in SHAPES.items()} for _ in range(rounds)),
    ]
    params = [
        {k: rng.normal(size=s).astype(PARAMS[k].dtype) for k, s in SHAPES.items()}
        for _ in range(rounds)
    ]
    ranks = [{k: rng.random(s, np.float32) for k, s in SHAPES.items()} for _ in range(rounds)]

    def stack(trees, bias):
        return {**jax.tree.map(lambda *x: np.stack(x), *trees), "bias": bias}

    masked = optax.MaskedNode()
    return (
        {**masks[0], "bias": masked},
        stack(masks[1:], masked),
        stack(params, np.zeros((rounds, 4), np.float32)),
        stack(ranks, masked) if scores else None,
    )


def scan(recorder, state, masks, params, scores):
    def step(state, now):
        mask, params, scores = now
        return recorder.update(state, params, mask, scores)

    return jax.lax.scan(step, state, (masks, params, scores))


def record(recorder, first, masks, params, scores):
    return scan(recorder, recorder.init(first), masks, params, scores)


jitted = jax.jit(record, static_argnums=0)
populations = jax.jit(lambda *args: jax.vmap(lambda *own: record(RECORDERS[9], *own))(*args))


class Synapse:
    """One synapse, told of its mask round by round; it writes its own diary and its spells."""

    def __init__(self, alive):
        self.age = 0 if alive else None
        self.start = 0 if alive else None
        self.truncated = alive
        self.diary, self.spells = [], []

    def live(self, number, alive):
        was = self.age is not None
        born, died = alive and not was, was and not alive
        if died:
            self.diary.append((alive, born, died, self.age + 1))
            self.spells.append((self.start, number - self.start, True, self.truncated))
            self.age = None
        elif born:
            self.age, self.start, self.truncated = 0, number, False
            self.diary.append((alive, born, died, 0))
        elif alive:
            self.age += 1
            self.diary.append((alive, born, died, self.age))
        else:
            self.diary.append((alive, born, died, -1))

    def close(self, last):
        if self.age is not None:
            self.spells.append((self.start, last - self.start, False, self.truncated))


def simulate(first, masks):
    """A dict of synapses by (leaf, position)."""
    synapses = {
        (name, position): Synapse(bool(alive))
        for name in SHAPES
        for position, alive in enumerate(first[name].ravel())
    }
    rounds = len(masks["a"])
    for number in range(1, rounds + 1):
        for (name, position), synapse in synapses.items():
            synapse.live(number, bool(masks[name][number - 1].ravel()[position]))
    for synapse in synapses.values():
        synapse.close(rounds)
    return synapses


def followed(recorder, synapses):
    names = list(SHAPES)
    return [
        synapses[names[leaf], position]
        for leaf, position in zip(recorder.leaf, recorder.position, strict=True)
    ]


def spells_of(history, member=0):
    spells = history.spells()
    own = spells.seed == history.seeds[member]
    rows: dict[int, list] = {}
    for synapse, *row in zip(
        spells.synapse[own], spells.start[own], spells.duration[own], spells.died[own],
        spells.left_truncated[own], strict=True,
    ):  # fmt: skip
        rows.setdefault(int(synapse), []).append(tuple(map(int, row)))
    return rows


@pytest.mark.parametrize("sample", RECORDERS)
@given(st.integers(0, 2**32 - 1))
def test_a_recording_is_what_a_dict_of_synapses_lives(sample, seed):
    recorder = RECORDERS[sample]
    first, masks, params, scores = random_history(seed)
    state, frames = jitted(recorder, first, masks, params, scores)
    synapses = simulate(first, masks)
    diaries = [synapse.diary for synapse in followed(recorder, synapses)]
    for place, field in enumerate(("alive", "born", "died", "age")):
        expected = np.array([[entry[place] for entry in diary] for diary in diaries]).T
        np.testing.assert_array_equal(getattr(frames, field), expected)
    # Counts are of the whole network, sampled or not.
    for field, place in (("living", 0), ("births", 1), ("deaths", 2)):
        expected = [
            [
                sum(s.diary[number][place] for (leaf, _), s in synapses.items() if leaf == name)
                for name in SHAPES
            ]
            for number in range(ROUNDS)
        ]
        np.testing.assert_array_equal(getattr(frames, field), expected)
    for field, tree in (("magnitude", params), ("score", scores)):
        values = [np.abs(tree[name]).reshape(ROUNDS, -1) for name in SHAPES]
        expected = np.stack(
            [values[i][:, j] for i, j in zip(recorder.leaf, recorder.position, strict=True)], 1
        )
        np.testing.assert_array_equal(getattr(frames, field), expected.astype(np.float32))
    assert frames.round.tolist() == list(range(1, ROUNDS + 1))
    assert int(state.round) == ROUNDS

    history = recorder.trajectory(frames)
    for field in ("alive", "born", "died", "age", "magnitude", "score", "living"):
        np.testing.assert_array_equal(getattr(history, field)[0], getattr(frames, field))
    expected = {
        place: [tuple(map(int, spell)) for spell in synapse.spells]
        for place, synapse in enumerate(followed(recorder, synapses))
        if synapse.spells
    }
    assert spells_of(history) == expected
    assert not history.spells().entry.any()


@given(st.integers(0, 2**32 - 1), st.integers(1, ROUNDS - 1))
@settings(max_examples=25)
def test_a_recording_cut_in_two(seed, cut):
    """Resumed, it is the same recording; its second half alone knows the ages of the first."""
    recorder = RECORDERS[9]
    first, masks, params, scores = random_history(seed)
    state, frames = jitted(recorder, first, masks, params, scores)
    # Step by step, so that every cut is the same two programs.
    middle, rows = jitted_init(first), []
    for number in range(ROUNDS):
        now = jax.tree.map(lambda x: x[number], (params, masks, scores))  # noqa: B023
        middle, row = jitted_update(middle, *now)
        # Through plain numpy arrays, as a checkpoint would keep them.
        middle = jax.tree.map(jnp.asarray, jax.device_get(middle))
        rows.append(row)
    same((state, frames), (middle, jax.tree.map(lambda *x: jnp.stack(x), *rows)))

    chunks = [jax.tree.map(lambda *x: np.stack(x), *part) for part in (rows[:cut], rows[cut:])]
    whole, late = recorder.trajectory(*chunks), recorder.trajectory(chunks[1])
    same(dataclasses.asdict(whole), dataclasses.asdict(recorder.trajectory(frames)))
    assert late.first == cut + 1
    np.testing.assert_array_equal(late.age, whole.age[:, cut:])
    # What ended before the cut is not there; the others are whole, but flagged.
    ends = {
        place: [s for s in spells if s[0] + s[1] > cut or (not s[2])]
        for place, spells in spells_of(whole).items()
    }
    got = spells_of(late)
    for place, spells in ends.items():
        assert [s[:3] for s in got.get(place, [])] == [s[:3] for s in spells]
        for spell in got.get(place, []):
            assert spell[3] == (spell[0] <= cut)
    entry = late.spells()
    np.testing.assert_array_equal(entry.entry, np.maximum(cut - entry.start, 0))


jitted_init = jax.jit(RECORDERS[9].init)
jitted_update = jax.jit(RECORDERS[9].update)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def population(seeds=(4, 5, 6), scores=True):
    histories = [random_history(seed, scores=scores) for seed in seeds]
    return jax.tree.map(lambda *x: np.stack(x), *histories)


def test_a_population_is_its_members():
    stacked = population()
    _, frames = populations(*stacked)
    history = RECORDERS[9].trajectory(frames, seeds=(40, 50, 60))
    assert repr(history) == "Trajectory(3 seeds, 6 rounds, 9 of 25 synapses)"
    for place in range(3):
        own = jax.tree.map(lambda x: x[place], stacked)  # noqa: B023
        alone = RECORDERS[9].trajectory(jitted(RECORDERS[9], *own)[1])
        for field in ("alive", "age", "magnitude", "score", "births", "deaths", "living"):
            np.testing.assert_array_equal(getattr(history, field)[place], getattr(alone, field)[0])
        assert spells_of(history, place) == spells_of(alone)
    spells = history.spells()
    assert set(spells.seed) == {40, 50, 60}
    np.testing.assert_array_equal(spells.leaf, history.leaf[spells.synapse])


def test_beside_a_pruner():
    """Deaths and births agree with the record that the pruner keeps."""
    params = {"w": jax.random.normal(jax.random.key(0), (12, 10)), "b": jnp.zeros(10)}
    pruner = pruning.prune(pruning.linear(0.8, 0, 6), every=None)
    tx, recorder = optax.chain(optax.sgd(0.1), pruner), Recorder(params, sample=30)

    @jax.jit
    def run(params):
        state = tx.init(params)

        def chunk(carry, _):
            params, state, seen = carry
            for _ in range(2):
                updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
                params = optax.apply_updates(params, updates)
            params, state = pruning.revise(pruner, params, state)
            seen, frame = recorder.update(seen, params, pruning.mask(state))
            return (params, state, seen), (frame, pruning.record(state))

        start = (params, state, recorder.init(pruning.mask(state)))
        return jax.lax.scan(chunk, start, length=4)[1]

    frames, records = run(params)
    assert frames.score == ()
    history = recorder.trajectory(frames)
    assert history.score is None
    np.testing.assert_array_equal(history.deaths[0, :, 0], records.deaths)
    np.testing.assert_array_equal(history.living[0, :, 0], records.alive)
    assert not history.births.any()
    assert not history.magnitude[~history.alive].any()
    assert history.living[0, -1, 0] == 24


class TestTheSample:
    def test_it_is_stratified_without_replacement_and_seeded(self):
        params = {"a": jnp.zeros((30, 20)), "b": jnp.zeros((10, 10)), "c": jnp.zeros((3, 1))}
        recorder = Recorder(params, sample=70, seed=3)
        assert np.bincount(recorder.leaf, minlength=3).tolist() == [60, 10, 0]
        places = set(zip(recorder.leaf.tolist(), recorder.position.tolist(), strict=True))
        assert len(places) == 70
        assert np.all(recorder.position < np.array(recorder.sizes)[recorder.leaf])
        again, other = Recorder(params, sample=70, seed=3), Recorder(params, sample=70, seed=4)
        np.testing.assert_array_equal(recorder.position, again.position)
        assert np.any(recorder.position != other.position)
        assert repr(recorder) == "Recorder(70 of 703 synapses, 3 leaves)"

    @given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 200))
    def test_shares_are_proportional_to_within_one(self, sizes, sample):
        params = {f"{place:02}": jnp.zeros((size, 1)) for place, size in enumerate(sizes)}
        recorder = Recorder(params, sample=sample)
        got = np.bincount(recorder.leaf, minlength=len(sizes))
        assert got.sum() == min(sample, sum(sizes))
        ideal = np.array(sizes) * min(sample / sum(sizes), 1.0)
        assert np.all(np.abs(got - ideal) < 1)
        assert np.all(got <= sizes)

    def test_every_synapse_is_as_likely(self):
        params = {"w": jax.ShapeDtypeStruct((5, 4), jnp.float32)}
        counts = np.zeros(20)
        for seed in range(600):
            counts[Recorder(params, sample=5, seed=seed).position] += 1
        # Chi-square of sampling without replacement; 19 degrees: 43.8 once in a thousand.
        assert np.sum((counts - 150.0) ** 2) / (150.0 * 0.75) * 19 / 20 < 43.8

    def test_by_name(self):
        recorder = Recorder(PARAMS, select="bias")
        assert (recorder.names, recorder.sizes) == (("bias",), (4,))
        mask = {"a": optax.MaskedNode(), "b": optax.MaskedNode(), "c": optax.MaskedNode(),
                "bias": jnp.array([True, False, True, True])}  # fmt: skip
        _, frame = recorder.update(recorder.init(mask), PARAMS, mask)
        assert frame.alive.tolist() == [True, False, True, True]

    @pytest.mark.parametrize("scores", [False, True])
    def test_bytes_of_a_round(self, scores):
        recorder = RECORDERS[9]
        first, masks, params, ranks = random_history(0, rounds=1, scores=scores)
        _, frames = jitted(recorder, first, masks, params, ranks)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(frames))
        assert recorder.bytes_per_round(scores=scores) == held

    @pytest.mark.parametrize("kwargs", [{"sample": 0}, {"sample": 2.0}, {"seed": -1}])
    def test_numbers_out_of_range_are_refused(self, kwargs):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be an integer >= "):
            Recorder(PARAMS, **kwargs)


class TestMistakes:
    def test_a_mask_of_other_synapses(self):
        recorder = RECORDERS[None]
        mask = pruning.full_mask(PARAMS, "a")
        with pytest.raises(ValueError, match=r"give the recorder the parameters and the select="):
            recorder.init(mask)
        state = recorder.init(pruning.full_mask(PARAMS))
        with pytest.raises(ValueError, match="this mask is of"):
            recorder.update(state, PARAMS, mask)
        wrong = {**pruning.full_mask(PARAMS), "a": jnp.ones((4, 3), bool)}
        with pytest.raises(ValueError, match=r"\(4, 3\)"):
            recorder.update(state, PARAMS, wrong)
        with pytest.raises(ValueError, match="belongs to another tree"):
            recorder.update(state, {"a": PARAMS["a"]}, pruning.full_mask(PARAMS))

    def test_frames_that_do_not_belong_together(self):
        _, frames = jitted(RECORDERS[9], *random_history(0))
        _, others = jitted(RECORDERS[9], *random_history(1))
        _, bare = jitted(RECORDERS[9], *random_history(0, scores=False))
        part = jax.tree.map(lambda x: x[:3], frames), jax.tree.map(lambda x: x[3:], frames)
        trajectory = RECORDERS[9].trajectory
        for chunks, message in (
            ((), "at least one"),
            ((part[1], part[0]), "not consecutive"),
            ((part[0], part[0]), "not consecutive"),
            ((part[0], jax.tree.map(lambda x: x[3:], others)), "do not continue each other"),
            ((part[0], jax.tree.map(lambda x: x[3:], bare)), "scores were recorded in some"),
            ((jax.tree.map(lambda x: x[0], frames),), "must be stacked"),
        ):
            with pytest.raises(TrajectoryError, match=message):
                trajectory(*chunks)
        with pytest.raises(TrajectoryError, match="use the recorder that made them"):
            RECORDERS[None].trajectory(frames)
        with pytest.raises(TrajectoryError, match="seeds must be of shape"):
            trajectory(frames, seeds=(1, 2))


def recorded(scores=True):
    return RECORDERS[9].trajectory(populations(*population(scores=scores))[1], seeds=(7, 8, 9))


def equal(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y, field.name


class TestFiles:
    @pytest.mark.parametrize("scores", [True, False])
    def test_what_is_read_is_what_was_written(self, tmp_path, scores):
        history = recorded(scores)
        size = history.save(tmp_path / "new" / "run.npz")
        assert size == (tmp_path / "new" / "run.npz").stat().st_size
        equal(trajectories.load(tmp_path / "new" / "run.npz"), history)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.npz"]
        first = (tmp_path / "new" / "run.npz").read_bytes()
        history.save(tmp_path / "again.npz")
        assert (tmp_path / "again.npz").read_bytes() == first

    def test_half_precision_is_half_and_near(self, tmp_path):
        rng = np.random.default_rng(0)
        few = recorded()
        many = dataclasses.replace(
            few,
            **{name: np.repeat(getattr(few, name), 300, axis=-1)
               for name in ("alive", "was", "entry", "leaf", "position")},
            magnitude=rng.random((3, ROUNDS, 2700), np.float32),
            score=rng.random((3, ROUNDS, 2700), np.float32),
        )  # fmt: skip
        whole = many.save(tmp_path / "whole.npz")
        # Packed bits and no ages: far below the bytes of the frames themselves.
        assert whole < 0.6 * 3 * ROUNDS * 2700 * 15
        half = many.save(tmp_path / "half.npz", precision="float16")
        assert half < 0.6 * whole
        back = trajectories.load(tmp_path / "half.npz")
        assert back.magnitude.dtype == np.float32
        np.testing.assert_allclose(back.magnitude, many.magnitude, rtol=5e-4, atol=3e-8)
        np.testing.assert_array_equal(back.age, many.age)
        large = dataclasses.replace(many, magnitude=many.magnitude * 1e5)
        with pytest.raises(TrajectoryError, match="too large for float16"):
            large.save(tmp_path / "large.npz", precision="float16")
        with pytest.raises(ValueError, match="precision must be"):
            many.save(tmp_path / "large.npz", precision="int8")
        assert not (tmp_path / "large.npz").exists()

    def test_damaged_and_foreign_files_are_refused(self, tmp_path):
        path = tmp_path / "run.npz"
        recorded().save(path)
        content = path.read_bytes()
        flipped = bytearray(content)
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("magnitude.npy")
        flipped[member.header_offset + 60 + member.compress_size // 2] ^= 0xFF
        cases = {
            "cut": content[:-100],
            "empty": b"",
            "text": b"seed,round,alive\n",
            "flipped": bytes(flipped),
        }
        for name, damaged in cases.items():
            (tmp_path / name).write_bytes(damaged)
        np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
        np.save(tmp_path / "single.npy", np.ones(3))
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(tmp_path / "later.npz", **{**arrays, "format": np.array("adaptivenet 9")})
        np.savez(tmp_path / "short.npz", **{**arrays, "was": arrays["was"][:-1]})
        np.savez(tmp_path / "odd.npz", **{**arrays, "leaf": arrays["leaf"][:-1]})
        np.savez(tmp_path / "shape.npz", **{**arrays, "shape": np.array([3, 0, 9])})
        names = [*cases, "foreign.npz", "single.npy", "later.npz", "short.npz", "odd.npz"]
        for name in [*names, "shape.npz"]:
            with pytest.raises(TrajectoryError, match=rf"{name} is no trajectory, or damaged"):
                trajectories.load(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            trajectories.load(tmp_path / "missing.npz")


class TestTables:
    def test_a_long_data_frame(self):
        pytest.importorskip("pandas")
        history = recorded()
        table = history.to_frame()
        assert len(table) == 3 * ROUNDS * 9
        assert list(table.columns) == ["seed", "round", "synapse", "leaf", "position", "alive",
                                       "age", "magnitude", "score", "born", "died"]  # fmt: skip
        for row in table.sample(20, random_state=0).itertuples():
            member, number = history.seeds.index(row.seed), row.round - 1
            for field in ("alive", "age", "magnitude", "score", "born", "died"):
                assert getattr(row, field) == getattr(history, field)[member, number, row.synapse]
            assert row.leaf == history.names[history.leaf[row.synapse]]
            assert row.position == history.position[row.synapse]
        assert table.groupby("seed")["died"].sum().tolist() == [
            int(part.sum()) for part in history.died
        ]
        assert "score" not in recorded(scores=False).to_frame().columns

    def test_spells_feed_kaplan_meier(self):
        lifelines = pytest.importorskip("lifelines")
        spells = recorded().spells()
        fitted = lifelines.KaplanMeierFitter().fit(
            spells.duration, event_observed=spells.died, entry=spells.entry
        )
        survival = 1.0
        for time in range(1, ROUNDS + 1):
            risk = np.sum((spells.duration >= time) & (spells.entry < time))
            dead = np.sum((spells.duration == time) & spells.died)
            survival *= 1 - dead / risk if risk else 1.0
            assert fitted.predict(time) == pytest.approx(survival)

    def test_without_pandas_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pandas", None)
        with pytest.raises(ImportError, match=r"pip install 'adaptivenet\[research\]'"):
            recorded().to_frame()


def test_the_recorder_names_leaves_as_the_mask_does():
    assert RECORDERS[None].names == an.trees.paths(pruning.full_mask(PARAMS))
