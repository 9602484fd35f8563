"""Positive and negative controls: can each statistic find what is there, and nothing else?

Every statistic of ``adaptivenet.emergence.statistics`` is run on simulated data sets with a known
effect (how often it is found is the power) and without one (how often it is found all the same is
the size; of an interval, one minus its coverage). Targets: power at least 0.8, size at most 0.06.

    python -m research.controls --config configs/controls/full.yaml

The size is measured on more sets than the power: a true 5 % lies above 6 % in 500 sets 13 times of
100, in 2,000 sets twice. Seeds are fixed and were not chosen; what misses its target is printed so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from adaptivenet import training
from adaptivenet.emergence import statistics
from adaptivenet.training import Range
from research import study

ALPHA = 0.05
POWER, SIZE = 0.8, 0.06
SEEDS = 20  # what most studies have
LIBRARIES = ("scipy", "statsmodels", "scikit-learn", "diptest", "lifelines", "patsy", "pandas")


@dataclass(frozen=True)
class Config:
    """Power and size of every statistic, on simulated data."""

    sets: Annotated[int, Range(ge=1)] = 500
    """data sets with an effect, of each statistic"""
    null_sets: Annotated[int, Range(ge=1)] = 2_000
    """data sets without one"""
    seed: int = 0
    """of all simulations; each set has its own stream"""
    statistics: tuple[str, ...] = ()
    """names of those to run; none: all"""
    keep: str = ""
    """a file to which the results are copied (not part of the hash)"""
    output: str = "runs"
    """root of the run folders (not part of the hash)"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        unknown = sorted(set(self.statistics) - CONTROLS.keys())
        if unknown:
            raise ValueError(f"statistics {unknown} are unknown; there are {list(CONTROLS)}")
        if self.keep and self.statistics:
            raise ValueError("keep wants the results of all statistics; leave statistics empty")


class Control(NamedTuple):
    """How a statistic is tried."""

    run: Callable[[np.random.Generator, bool], bool]  # (generator, effect?) -> found?
    positive: str
    negative: str
    n: str
    interval: bool = False
    costly: bool = False  # no more sets without an effect than with one
    fooled: bool = False  # a wrong analysis on purpose: it must find what is not there


CONTROLS: dict[str, Control] = {}


def control(name: str, positive: str, negative: str, n: str, **options: Any) -> Any:
    """Registers a simulation under the name of the statistic that it tries."""

    def register(run: Callable[[np.random.Generator, bool], bool]) -> Any:
        CONTROLS[name] = Control(run, positive, negative, n, **options)
        return run

    return register


# Modality -----------------------------------------------------------------------------------------


def two_gaussians(rng: np.random.Generator, n: int, apart: float) -> np.ndarray:
    """Half of the values about 0, half about ``apart``, all with a standard deviation of 1."""
    return rng.normal(size=n) + apart * (rng.random(n) < 0.5)


@control("dip", "two Gaussians 4 sd apart", "uniform", "300 values")
def _dip(rng: np.random.Generator, effect: bool) -> bool:
    values = two_gaussians(rng, 300, 4.0) if effect else rng.random(300)
    return statistics.dip(values).p < ALPHA


@control("mixture", "two Gaussians 3 sd apart", "Gaussian", "300 values")
def _mixture(rng: np.random.Generator, effect: bool) -> bool:
    values = two_gaussians(rng, 300, 3.0 if effect else 0.0)
    return statistics.mixture(values, seed=int(rng.integers(2**31))).components > 1


@control("modes", "two Gaussians 4 sd apart", "Gaussian", "300 values")
def _modes(rng: np.random.Generator, effect: bool) -> bool:
    found = len(statistics.modes(two_gaussians(rng, 300, 4.0 if effect else 0.0)))
    return found == 2 if effect else found > 1


# Hazards and survival -----------------------------------------------------------------------------


class Spells(NamedTuple):
    """Simulated rounds of synapses, one row a synapse and round."""

    died: np.ndarray
    age: np.ndarray
    size: np.ndarray
    synapse: np.ndarray
    seed: np.ndarray


def spells(
    rng: np.random.Generator, synapses: int, rounds: int, *, age: float, frailty: float = 0.0
) -> Spells:
    """Synapses of 20 seeds that are pruned and at once regrown; the small ones die first.

    Args:
      rng: the generator.
      synapses: of each seed.
      rounds: how long each is watched, from its first round on.
      age: coefficient of log(1 + rounds since it last grew).
      frailty: standard deviation of each synapse's own log odds.
    """
    n = SEEDS * synapses
    own = frailty * rng.normal(size=n)
    since = np.zeros(n)
    rows = []
    for _ in range(rounds):
        size = rng.normal(size=n)
        # The effect of size is no line, so that the spline has something to do.
        odds = -1.5 + own - size + 0.3 * size**2 + age * np.log1p(since)
        died = rng.random(n) < 1 / (1 + np.exp(-odds))
        rows.append((died, since, size, np.arange(n), np.arange(n) // synapses))
        since = np.where(died, 0, since + 1)
    return Spells(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def age_is_found(data: Spells, frailty: bool) -> bool:
    fit = statistics.hazard(
        data.died,
        {"age": np.log1p(data.age), "size": data.size},
        splines={"size": 4},
        clusters=data.seed,
        frailty=data.synapse if frailty else None,
    )
    return fit.p["age"] < ALPHA


@control("hazard", "log odds fall by 0.4 log(1+age)", "no age", "20 seeds x 20 synapses x 10")
def _hazard(rng: np.random.Generator, effect: bool) -> bool:
    return age_is_found(spells(rng, 20, 10, age=-0.4 if effect else 0.0), frailty=False)


@control(
    "hazard, clusters",
    "0.4 sd of a covariate that seeds share in part",
    "no effect; seeds differ in hazard",
    "20 seeds x 100 rows",
)
def _clusters(rng: np.random.Generator, effect: bool) -> bool:
    seed = np.repeat(np.arange(SEEDS), 100)
    value = 0.5 * rng.normal(size=SEEDS)[seed] + rng.normal(size=len(seed))
    odds = -2 + 0.5 * rng.normal(size=SEEDS)[seed] + (0.4 if effect else 0.0) * value
    died = rng.random(len(seed)) < 1 / (1 + np.exp(-odds))
    return statistics.hazard(died, {"value": value}, clusters=seed).p["value"] < ALPHA


@control(
    "hazard, frailty",
    "age as above, synapses differ by 1 sd",
    "synapses differ by 1 sd, no age",
    "20 seeds x 20 synapses x 10",
    costly=True,
)
def _frailty(rng: np.random.Generator, effect: bool) -> bool:
    data = spells(rng, 20, 10, age=-0.4 if effect else 0.0, frailty=1.0)
    return age_is_found(data, frailty=True)


@control(
    "hazard, frailty ignored",
    "age as above, synapses differ by 1 sd",
    "synapses differ by 1 sd, no age",
    "20 seeds x 20 synapses x 10",
    fooled=True,
)
def _frailty_ignored(rng: np.random.Generator, effect: bool) -> bool:
    data = spells(rng, 20, 10, age=-0.4 if effect else 0.0, frailty=1.0)
    return age_is_found(data, frailty=False)


@control("hazard, separation", "a level in which none dies", "a level in which few die", "300 rows")
def _separation(rng: np.random.Generator, effect: bool) -> bool:
    level = rng.integers(0, 3, 300)
    hazards = np.array([0.2, 0.2, 0.0 if effect else 0.1])
    covariates = {"value": rng.normal(size=300), "level": level}
    return statistics.hazard(
        rng.random(300) < hazards[level], covariates, factors=["level"]
    ).separated


def lifetimes(rng: np.random.Generator, n: int, hazard: float) -> tuple[np.ndarray, np.ndarray]:
    """Exponential lifetimes, watched for a uniform time of up to 4."""
    life, watched = rng.exponential(1 / hazard, n), rng.uniform(0, 4, n)
    return np.minimum(life, watched), life <= watched


@control(
    "kaplan_meier", "hazard 1.8, S(0.7) from 1", "S(0.7) of hazard 1", "100 spells", interval=True
)
def _kaplan_meier(rng: np.random.Generator, effect: bool) -> bool:
    curve = statistics.kaplan_meier(*lifetimes(rng, 100, 1.8 if effect else 1.0))
    place = np.searchsorted(curve.times, 0.7, side="right") - 1
    return not curve.low[place] <= np.exp(-0.7) <= curve.high[place]


@control(
    "restricted_mean, t",
    "hazard 0.7 from 1",
    "one hazard",
    "10 seeds x 2 x 30 spells",
    costly=True,
)
def _restricted_mean(rng: np.random.Generator, effect: bool) -> bool:
    def mean(hazard: float) -> float:
        curve = statistics.kaplan_meier(*lifetimes(rng, 30, hazard))
        return statistics.restricted_mean(curve, min(2.0, float(curve.times[-1])))

    arms = [[mean(hazard) for _ in range(10)] for hazard in (0.7 if effect else 1.0, 1.0)]
    return statistics.paired(*arms).p < ALPHA


@control("log_rank", "hazards 2.25 and 1", "one hazard", "2 x 50 spells")
def _log_rank(rng: np.random.Generator, effect: bool) -> bool:
    first, second = lifetimes(rng, 50, 2.25 if effect else 1.0), lifetimes(rng, 50, 1.0)
    durations, observed = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    return statistics.log_rank(durations, observed, np.arange(100) // 50).p < ALPHA


# Comparisons over seeds ---------------------------------------------------------------------------


@control("paired, t", "difference 0.8 sd", "none; Gaussian", "20 seeds")
def _t(rng: np.random.Generator, effect: bool) -> bool:
    return statistics.paired(rng.normal(0.8 * effect, 1, SEEDS)).p < ALPHA


@control("paired, wilcoxon", "difference 0.8 sd", "none; Laplace", "20 seeds")
def _wilcoxon(rng: np.random.Generator, effect: bool) -> bool:
    values = rng.laplace(0.8 * effect, 0.5**0.5, SEEDS)
    return statistics.paired(values, test="wilcoxon").p < ALPHA


@control("paired, sign_flip", "difference 0.8 sd", "none; Laplace", "20 seeds")
def _sign_flip(rng: np.random.Generator, effect: bool) -> bool:
    values = rng.laplace(0.8 * effect, 0.5**0.5, SEEDS)
    seed = int(rng.integers(2**31))
    return statistics.paired(values, test="sign_flip", seed=seed).p < ALPHA


@control("equivalence", "no difference; bounds 0.8 sd", "difference of 0.8 sd", "20 seeds")
def _equivalence(rng: np.random.Generator, effect: bool) -> bool:
    values = rng.normal(0.0 if effect else 0.8, 1, SEEDS)
    return statistics.equivalence(values, low=-0.8, high=0.8).p < ALPHA


@control("holm", "1 of 5 differs by 1 sd", "none of 5 (any rejection)", "20 seeds")
def _holm(rng: np.random.Generator, effect: bool) -> bool:
    values = rng.normal(size=(5, SEEDS))
    values[0] += 1.0 * effect
    rejected = statistics.holm([statistics.paired(row).p for row in values]) < ALPHA
    return bool(rejected[0] if effect else rejected.any())


@control("page_trend", "0.4 sd from condition to condition", "no order", "20 seeds x 4")
def _page_trend(rng: np.random.Generator, effect: bool) -> bool:
    level = 2 * rng.normal(size=(SEEDS, 1))
    values = level + rng.normal(size=(SEEDS, 4)) + 0.4 * effect * np.arange(4)
    return statistics.page_trend(values).p < ALPHA


# Intervals ----------------------------------------------------------------------------------------


def excludes(interval: statistics.Interval, value: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return not interval.low <= value <= interval.high


@control("student", "mean 0.8 sd", "mean 0; Gaussian", "20 values", interval=True)
def _student(rng: np.random.Generator, effect: bool) -> bool:
    return excludes(statistics.student(rng.normal(0.8 * effect, 1, SEEDS)), 0.0)


@control("bca", "mean 0.8 sd", "mean 0; Gaussian", "20 values", interval=True)
def _bca(rng: np.random.Generator, effect: bool) -> bool:
    values, seed = rng.normal(0.8 * effect, 1, SEEDS), int(rng.integers(2**31))
    return excludes(statistics.bca(values, seed=seed), 0.0)


@control("bca, skewed", "mean 0.8 sd off", "mean 1; exponential", "20 values", interval=True)
def _bca_skewed(rng: np.random.Generator, effect: bool) -> bool:
    values, seed = rng.exponential(1, SEEDS) + 0.8 * effect, int(rng.integers(2**31))
    return excludes(statistics.bca(values, seed=seed), 1.0)


@control("bca, 50", "mean 0.8 sd", "mean 0; Gaussian", "50 values", interval=True)
def _bca_50(rng: np.random.Generator, effect: bool) -> bool:
    values, seed = rng.normal(0.8 * effect, 1, 50), int(rng.integers(2**31))
    return excludes(statistics.bca(values, seed=seed), 0.0)


# The run ------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came of one statistic."""

    name: str
    power: dict[str, Any]
    size: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        """Both targets met (of a wrong analysis: that it was fooled, as it must be)."""
        if CONTROLS[self.name].fooled:
            return self.size["mean"] >= POWER
        return self.power["mean"] >= POWER and self.size["mean"] <= SIZE


def share(found: int, sets: int) -> dict[str, Any]:
    """A share and its exact 95 % interval (Clopper and Pearson)."""
    from scipy import stats

    interval = stats.binomtest(found, sets).proportion_ci(0.95, "exact")
    ends = {"ci_low": float(interval.low), "ci_high": float(interval.high)}
    return {"mean": found / sets, **ends, "n": sets}


def stream(seed: int, name: str, effect: bool, place: int) -> np.random.Generator:
    """The generator of one data set, whatever else is run."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), int(effect), place])


def fingerprint() -> str:
    """Of the code and libraries that a finished statistic was computed with."""
    package = Path(statistics.__file__).parent
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(package.glob("*.py"))]:
        digest.update(path.read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def number_of_sets(config: Config, name: str, effect: bool) -> int:
    if effect:
        return config.sets
    return min(config.sets, config.null_sets) if CONTROLS[name].costly else config.null_sets


def simulate(config: Config, name: str, advance: Callable[[], None]) -> Result:
    """All data sets of one statistic."""
    began = time.perf_counter()
    counts = []
    for effect in (True, False):
        found, sets = 0, number_of_sets(config, name, effect)
        for place in range(sets):
            found += bool(CONTROLS[name].run(stream(config.seed, name, effect, place), effect))
            advance()
        counts.append(share(found, sets))
    return Result(name, counts[0], counts[1], time.perf_counter() - began)


def run(config: Config, folder: Path) -> list[Result]:
    """Every statistic; those that are finished are read from the run folder."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    plain = os.environ.get("CI", "").lower() in ("1", "true", "yes") or not sys.stdout.isatty()
    names = [name for name in CONTROLS if name in (config.statistics or CONTROLS)]
    code = fingerprint()
    results = []
    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=plain) as progress:
        counts = {
            n: sum(number_of_sets(config, n, effect) for effect in (True, False)) for n in names
        }
        task = progress.add_task("controls", total=sum(counts.values()))
        for number, name in enumerate(names, start=1):
            file = folder / "statistics" / f"{name.replace(', ', '_').replace(' ', '_')}.json"
            result = read_finished(file, code)
            if result is None:
                progress.update(task, description=name)
                result = simulate(config, name, lambda: progress.advance(task))
                write_finished(file, code, result)
                said = f"{result.seconds:.1f} s"
            else:
                progress.advance(task, counts[name])
                said = "finished before"
            results.append(result)
            if plain:
                print(f"{name}  {number}/{len(names)}  {said}", flush=True)
    return results


def read_finished(file: Path, code: str) -> Result | None:
    """A statistic that this code has finished in this run folder, if there is one."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Result(**document["result"]) if document.get("code") == code else None


def write_finished(file: Path, code: str, result: Result) -> None:
    file.parent.mkdir(exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps({"code": code, "result": result._asdict()}), encoding="utf-8")
    beside.replace(file)


def judged(result: Result) -> str:
    """The last column of the table."""
    if CONTROLS[result.name].fooled:
        return "fooled, as it must be" if result.passed else "NOT FOOLED"
    missed = [
        word
        for word, bad in (
            ("power", result.power["mean"] < POWER),
            ("size", result.size["mean"] > SIZE),
        )
        if bad
    ]
    return f"MISSES {' and '.join(missed)}" if missed else "met"


def table(config: Config, results: list[Result]) -> None:
    """One row a statistic."""

    def cell(item: dict[str, Any]) -> str:
        return f"{item['mean']:.3f} [{item['ci_low']:.3f}, {item['ci_high']:.3f}]"

    rows = []
    for result in results:
        one = CONTROLS[result.name]
        coverage = f"{1 - result.size['mean']:.3f}" if one.interval else ""
        power, size = cell(result.power), cell(result.size)
        texts = [result.name, one.positive, one.n, power, one.negative, size]
        rows.append([*texts, coverage, judged(result)])
    study.print_table(
        f"Controls: {config.sets:,} sets with an effect, {config.null_sets:,} without "
        f"(of the slowest, {min(config.sets, config.null_sets):,}); share found and exact 95 % "
        f"interval; targets: power >= {POWER}, size <= {SIZE}",
        ["statistic", "effect", "n", "power", "no effect", "size", "coverage", "targets"],
        rows,
    )


def draw(config: Config, results: list[Result]) -> Any:
    """Power and size of each statistic with their intervals, and the targets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = np.arange(len(results))[::-1]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    panels = (
        ("power", POWER, f"found where it is ({config.sets:,} sets)", "#0072B2"),
        ("size", SIZE, f"found where it is not ({config.null_sets:,} sets)", "#D55E00"),
    )
    with plt.rc_context(style):
        height = 1.2 + 0.24 * len(results)
        figure, axes = plt.subplots(1, 2, figsize=(8, height), sharey=True, layout="constrained")
        for axis, (key, target, label, colour) in zip(axes, panels, strict=True):
            items = [getattr(result, key) for result in results]
            means = np.array([item["mean"] for item in items])
            ends = np.array([[item["ci_low"], item["ci_high"]] for item in items])
            good = means >= target if key == "power" else means <= target
            axis.axvline(target, color="0.5", linewidth=0.8, linestyle="--")
            axis.hlines(places, ends[:, 0], ends[:, 1], color=colour, linewidth=1.4)
            axis.plot(means, places, "o", color=colour, markersize=4, markerfacecolor="white")
            axis.plot(means[good], places[good], "o", color=colour, markersize=4)
            axis.set_xlabel(f"{key}: {label}")
            axis.grid(axis="y", color="0.92", linewidth=0.6)
            axis.set_axisbelow(True)
        axes[0].set_yticks(places, [result.name for result in results])
        axes[0].set_xlim(-0.02, 1.02)
        # The wrong analysis finds what is not there nearly always, off the scale of the others.
        shown = [r.size["ci_high"] for r in results if not CONTROLS[r.name].fooled]
        limit = 1.15 * max([SIZE, *shown])
        axes[1].set_xlim(-0.02 * limit, limit)
        for result, place in zip(results, places, strict=True):
            if result.size["mean"] > limit:
                text = f"{result.size['mean']:.2f} \N{RIGHTWARDS ARROW}"
                axes[1].text(0.98 * limit, place, text, ha="right", va="center", color="#D55E00")
        figure.suptitle(
            f"Controls of every statistic (simulated, seed {config.seed})\n"
            "bars: exact 95 % intervals; filled: target met"
        )
    return figure


def main(argv: list[str] | None = None) -> None:
    """Runs the controls: simulates, prints the table, writes the results, draws the figure."""
    config = training.load_config(
        Config, argv, prog="research.controls", description=Config.__doc__
    )
    folder, digest = study.open_run("controls", dataclasses.replace(config, keep=""))
    print(f"run folder: {folder}", flush=True)
    try:
        results = run(config, folder)
    except KeyboardInterrupt:
        sys.exit("\nstopped; what is finished is kept, and the same command goes on from there")
    table(config, results)
    metrics = {}
    for result in results:
        metrics[result.name] = {"power": result.power, "size": result.size}
        if CONTROLS[result.name].interval:
            size = result.size
            ends = {"ci_low": 1 - size["ci_high"], "ci_high": 1 - size["ci_low"]}
            coverage = {"mean": 1 - size["mean"], **ends, "n": size["n"]}
            metrics[result.name]["coverage"] = coverage
    path = study.write_results(
        folder,
        {
            "study": "controls",
            "config_hash": digest,
            "data": {"name": "simulated", "sha256": None},
            "seeds": [config.seed],
            "verdict": None,
            "targets": {"power": POWER, "size": SIZE},
            "metrics": metrics,
            "simulations": {
                result.name: {
                    "positive": CONTROLS[result.name].positive,
                    "negative": CONTROLS[result.name].negative,
                    "n": CONTROLS[result.name].n,
                    "targets": judged(result),
                }
                for result in results
            },
            "libraries": versions(),
            "seconds": sum(result.seconds for result in results),
        },
    )
    figure = draw(config, results)
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"figure.{suffix}", dpi=150)
    print(f"results: {path}\nfigure:  {folder / 'figure.png'} (and .pdf)")
    if config.keep:
        Path(config.keep).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, config.keep)
        print(f"kept:    {config.keep}")


if __name__ == "__main__":
    main()
