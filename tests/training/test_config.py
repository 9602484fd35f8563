"""Configurations: what YAML and the command line may say, and what a mistake is told."""

from __future__ import annotations

import dataclasses
import enum
import math
import pathlib
import subprocess
import sys
from typing import Annotated, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from adaptivenet.training import Range, config_hash, load_config, save_config


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How to step."""

    rate: Annotated[float, Range(gt=0, le=1)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.betas[0] > self.betas[1]:
            raise ValueError("betas must not fall")


@dataclasses.dataclass(frozen=True)
class Config:
    """A study."""

    epochs: int = 3
    seeds: tuple[int, ...] = (0, 1)
    densities: Annotated[list[float], Range(ge=0, le=1)] = dataclasses.field(default_factory=list)
    name: str = "x"
    note: str | None = None
    optimizer: Optimizer = Optimizer()
    mode: Literal["vmap", "map"] = "vmap"
    fast: bool = False
    limit: int | None = None
    folder: pathlib.Path = pathlib.Path("runs")
    colour: Colour = Colour.RED
    names: tuple[str, ...] = ()
    tolerance: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if -1 in self.seeds:
            raise ValueError("a seed of -1 is none")
        if self.name == "nobody":
            raise ValueError("nobody will answer")


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text: str, *argv: str) -> Config:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return load_config(Config, ["--config", "c.yaml", *argv], prog="study")

    return load


def test_every_type_is_read(load):
    text = """
        epochs: 7
        seeds: [3, 4]
        densities: [0.1, 1e-2]
        optimizer: {rate: 1e-2}
        note: null
        name: --dashed
        fast: true
        limit: 5
        folder: out/here
        colour: BLUE
        names: [a, b]
        tolerance: [0.1, 0.2]
    """
    expected = Config(
        epochs=7,
        seeds=(3, 4),
        densities=[0.1, 0.01],
        optimizer=Optimizer(rate=0.01),
        name="--dashed",
        fast=True,
        limit=5,
        folder=pathlib.Path("out/here"),
        colour=Colour.BLUE,
        names=("a", "b"),
        tolerance=(0.1, 0.2),
    )
    assert load(text) == expected
    overridden = load(
        text, "--optimizer.rate", "0.5", "--seeds", "9", "--limit=None", "--tolerance", "2"
    )
    assert overridden == dataclasses.replace(
        expected, optimizer=Optimizer(rate=0.5), seeds=(9,), limit=None, tolerance=2.0
    )
    assert load("") == Config()
    assert load("optimizer:\n") == Config()
    assert load("seeds: []").seeds == ()


def test_hyphens_and_equals_are_understood():
    assert load_config(Config, ["--epochs=4", "--optimizer.rate=0.25"]) == Config(
        epochs=4, optimizer=Optimizer(rate=0.25)
    )


def test_an_override_repairs_the_file(load):
    assert load("epochs: 0", "--epochs", "2").epochs == 2


@pytest.mark.parametrize(
    ("text", "argv", "parts"),
    [
        ("epoch: 5", [], ["c.yaml", "unknown key 'epoch'", "did you mean epochs?"]),
        ("rate: 5", [], ["c.yaml", "unknown key 'rate'", "did you mean optimizer.rate?"]),
        ("optimizer: {rte: 1}", [], ["c.yaml", "'optimizer.rte'", "did you mean optimizer.rate?"]),
        ("zzz: 1", [], ["unknown key 'zzz'", "known: colour, densities, epochs"]),
        ("epochs: five", [], ["c.yaml: epochs must be int, got 'five'"]),
        ("epochs: 2.5", [], ["c.yaml: epochs must be int, got 2.5"]),
        ("epochs: true", [], ["c.yaml: epochs must be int, got True"]),
        ("epochs: null", [], ["epochs must be int, got None", "null is not allowed"]),
        ("epochs: [1, 2]", [], ["epochs must be int, got [1, 2]", "not a list"]),
        ("epochs: {a: 1}", [], ["epochs must be int", "not a section"]),
        ("seeds: 3", [], ["seeds must be tuple[int, ...], got 3", "such as [3]"]),
        ("seeds: [a]", [], ["seeds must be tuple[int, ...], got ['a']"]),
        ("seeds: [{a: 1}]", [], ["a list may not hold sections"]),
        ("name: no", [], ["name must be str, got False", "quotation marks"]),
        ("names: [no]", [], ["item False must be text"]),
        ("names: [--x]", [], ["item '--x' of a list may not begin with a dash"]),
        ('note: "None"', [], ["note must be str or null, got 'None'", "read as null"]),
        ('fast: "true"', [], ["fast must be bool, got 'true'", "without quotation marks"]),
        ("mode: loop", [], ["mode must be 'vmap' or 'map', got 'loop'"]),
        ("optimizer: 3", [], ["c.yaml: optimizer must hold keys and values, got 3"]),
        ("optimizer: {betas: [1]}", [], ["optimizer.betas must be tuple[float, float], got [1]"]),
        (
            "optimizer: {rate: 3}",
            [],
            ["c.yaml: optimizer.rate must be above 0 and at most 1, got 3.0"],
        ),
        ("optimizer: {rate: .nan}", [], ["optimizer.rate must be above 0 and at most 1, got nan"]),
        (
            "densities: [0.5, 2]",
            [],
            ["c.yaml: densities must be at least 0 and at most 1, got 2.0"],
        ),
        ("epochs: 0", [], ["c.yaml: epochs: epochs must be positive, got 0"]),
        ("optimizer: {betas: [1, 0]}", [], ["c.yaml: optimizer.betas: betas must not fall"]),
        ("seeds: [-1]\nepochs: 5", [], ["study: c.yaml: seeds: a seed of -1 is none"]),
        ("name: nobody\nepochs: 5", [], ["study: c.yaml: nobody will answer"]),
        (
            "epochs: 1\nfast: true\nepochs: 2",
            [],
            ["c.yaml: key 'epochs' is given twice, in lines 1 and 3"],
        ),
        ("optimizer: {rate: 1, rate: 2}", [], ["key 'rate' is given twice"]),
        ("- 1", [], ["c.yaml: must hold keys and values, got a list"]),
        ("a: [", [], ["c.yaml: not YAML", "line 1"]),
        ("", ["--epoch", "3"], ["unknown option --epoch; did you mean --epochs?"]),
        ("", ["--epochs", "x"], ["Error parsing --epochs", "'x'"]),
        ("", ["--epochs", "0"], ["--epochs: epochs must be positive, got 0"]),
        ("", ["--optimizer.rate", "-1"], ["--optimizer.rate must be above 0", "got -1.0"]),
        ("", ["--mode", "x"], ["--mode", "'vmap', 'map'"]),
        ("", ["stray"], ["stray"]),
        ("", ["--config", "d.yaml"], ["--config is given 2 times"]),
    ],
)
def test_mistakes_are_told_in_one_message(load, capsys, text, argv, parts):
    with pytest.raises(SystemExit) as stop:
        load(text, *argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("study: ")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--config"], "--config needs the path"),
        (["--config="], "--config needs the path"),
        (["--config", "d.yaml"], "d.yaml: there is no such file (there are c.yaml)"),
        (["--config", "no/d.yaml"], "nor a folder no"),
        (["--config", "."], "cannot be read"),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, capsys, argv, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").touch()
    with pytest.raises(SystemExit) as stop:
        load_config(Config, argv, prog="study")
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


def test_help_shows_fields_and_the_file_option(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(Config, ["--help"], prog="study", description="What it does.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("What it does.", "--config path.yaml", "--optimizer.rate", "--epochs"):
        assert part in text


def test_not_a_dataclass():
    with pytest.raises(TypeError, match="dataclass type"):
        load_config(dict, [])
    with pytest.raises(TypeError, match="dataclass instance"):
        config_hash({"a": 1})


texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=8
)
configs = st.builds(
    Config,
    epochs=st.integers(1, 10**9),
    seeds=st.lists(st.integers(0, 2**40)).map(tuple),
    densities=st.lists(st.floats(0, 1)),
    name=texts,
    note=st.none() | texts.filter(lambda text: text != "None"),
    optimizer=st.builds(Optimizer, rate=st.floats(1e-30, 1.0)),
    mode=st.sampled_from(["vmap", "map"]),
    fast=st.booleans(),
    limit=st.none() | st.integers(),
    colour=st.sampled_from(Colour),
    tolerance=st.floats(allow_nan=False) | st.lists(st.floats(0, 1), min_size=2).map(tuple),
)


@settings(max_examples=20)
@given(config=configs)
def test_saved_configs_load_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("configs") / "c.yaml"
    save_config(config, path)
    back = load_config(Config, ["--config", str(path)])
    assert back == config
    assert config_hash(back) == config_hash(config)
    assert [item.name for item in path.parent.iterdir()] == ["c.yaml"]


def test_what_would_not_load_back_is_not_saved(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(ValueError, match=r"cannot save Config .*note must be str or null"):
        save_config(Config(note="None"), path)
    with pytest.raises(ValueError, match="would not load back equal: seeds"):
        save_config(Config(seeds=[1, 2]), path)  # pyright: ignore
    with pytest.raises(ValueError, match=r"tolerance .* read as a single value"):
        save_config(Config(tolerance=(1.0,)), path)
    with pytest.raises(TypeError, match="limit: object has no form"):
        save_config(Config(limit=object()), path)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4},
        {"seeds": (0, 1, 2)},
        {"seeds": (1, 0)},
        {"name": "y"},
        {"note": ""},
        {"optimizer": Optimizer(rate=math.nextafter(1e-3, 1))},
        {"fast": True},
        {"limit": 0},
    ],
)
def test_hash_sees_every_change(change):
    assert config_hash(dataclasses.replace(Config(), **change)) != config_hash(Config())


def test_hash_and_file_take_equal_values_for_one(tmp_path):
    whole, real = Config(optimizer=Optimizer(rate=1)), Config(optimizer=Optimizer(rate=1.0))
    numpy_like = Config(optimizer=Optimizer(rate=np.float64(1.0)))
    assert config_hash(whole) == config_hash(real) == config_hash(numpy_like)
    save_config(numpy_like, tmp_path / "c.yaml")
    assert load_config(Config, ["--config", str(tmp_path / "c.yaml")]) == real
    nan = Config(tolerance=math.nan)
    save_config(nan, tmp_path / "c.yaml")
    assert config_hash(load_config(Config, ["--config", str(tmp_path / "c.yaml")])) == config_hash(
        nan
    )


def test_hash_ignores_the_order_of_fields():
    a = dataclasses.make_dataclass("A", [("x", int, 1), ("y", float, 2.0)])
    b = dataclasses.make_dataclass("B", [("y", float, 2.0), ("x", int, 1)])
    assert config_hash(a()) == config_hash(b())


def test_hash_is_the_same_in_another_process():
    program = (
        "import dataclasses\n"
        "from adaptivenet.training import config_hash\n"
        "A = dataclasses.make_dataclass('A', [('x', int, 1), ('y', str, 'text')])\n"
        "print(config_hash(A()))"
    )
    local = dataclasses.make_dataclass("A", [("x", int, 1), ("y", str, "text")])
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == config_hash(local())


@dataclasses.dataclass(frozen=True)
class Interval:
    """Shaped like the bounds of the annotated-types package."""

    ge: float | None = None
    lt: float | None = None


@dataclasses.dataclass(frozen=True)
class Foreign:
    share: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    maybe: Annotated[int, Range(ge=2)] | None = None


def test_foreign_bounds_and_optional_ranges(capsys):
    assert load_config(Foreign, ["--share", "0.5"]).share == 0.5
    assert load_config(Foreign, ["--maybe", "None"]).maybe is None
    for argv, part in [
        (["--share", "1"], "--share must be at least 0 and below 1, got 1.0"),
        (["--maybe", "1"], "--maybe must be at least 2, got 1"),
    ]:
        with pytest.raises(SystemExit):
            load_config(Foreign, argv)
        assert part in capsys.readouterr().err
