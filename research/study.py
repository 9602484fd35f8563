"""The skeleton of a study: a claim, fixed before the run, that the run can refute.

A study is a frozen config and three functions: `run` trains arms on some seeds and returns numbers,
`judge` reads them by the rules that the config fixed, `draw` draws one figure. The rest is here:
command line, run folder, resume by seed, progress, results file, table, verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

import adaptivenet as an
from adaptivenet import training
from adaptivenet.emergence import verdict
from adaptivenet.training import Range
from research.results import (
    Outcome,
    ResultsError,
    config_from_text,
    config_text,
    mean_interval,
    open_run,
    print_table,
    read_results,
    write_results,
)

__all__ = [
    "BLANK",
    "Config",
    "Judgement",
    "Outcome",
    "ResultsError",
    "Table",
    "join",
    "judge",
    "load",
    "main",
    "mean_interval",
    "open_run",
    "print_table",
    "read_results",
    "rejudge",
    "style",
    "write_results",
]

Tick = Callable[[str, float], None]
BLANK = verdict.Hypothesis()  # to be filled in by the config, or refused


@dataclasses.dataclass(frozen=True)
class Config:
    """What every study can be told; a study adds its own fields and its claims."""

    scale: Literal["smoke", "small", "full"] = "smoke"
    """how much is run"""
    data: Literal["digits", "mnist1d", "mnist", "fashion_mnist"] = "mnist1d"
    """data set (never replaced by another one)"""
    validation: Annotated[int, Range(ge=1)] = 500
    """training examples set apart"""
    measured_on: Literal["validation", "test"] = "test"
    """where accuracies are measured: pilots look at validation data only"""
    seeds: tuple[int, ...] = ()
    """one network a seed; the seed is the unit of analysis"""
    chunk: Annotated[int, Range(ge=1)] = 5
    """seeds that run as one population; a run that was stopped loses at most one such chunk"""
    output: str = "runs"
    """root of the run folders (not part of the hash)"""
    keep: str = ""
    """also write the results file here (not part of the hash); until all seeds are finished, those
    that are stand beside it, in a folder that ends in .seeds, with which another machine goes on"""


class Table(NamedTuple):
    """A table to print: a title, the headings, and rows of cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Judgement(NamedTuple):
    """Verdicts, what may be said of emergence (empty where the study does not ask), and tables."""

    verdicts: list[verdict.Verdict]
    emergence: str = ""
    tables: tuple[Table, ...] = ()


def judge(config: Any, outcome: Outcome) -> Judgement:
    """The preregistered tests, nothing else: enough for most studies."""
    return Judgement(verdict.judge(config.claims, outcome.metrics))


def load(config: Config) -> Any:
    """The config's data: flat, standardised, with a validation part."""
    data = an.data.standardise(an.data.flatten(an.data.load(config.data)))
    return an.data.split(data, config.validation, seed=0)


def join(config: Config, outcomes: dict[int, Outcome]) -> Outcome:
    """The outcome of all seeds, in the config's order."""
    parts = [outcomes[seed] for seed in config.seeds]
    metrics = {name: np.concatenate([p.metrics[name] for p in parts]) for name in parts[0].metrics}
    curves = {name: np.concatenate([p.curves[name] for p in parts]) for name in parts[0].curves}
    return Outcome(metrics, curves)


def main(
    Config: type[Any],
    run: Callable[..., Outcome],
    judge: Callable[[Any, Outcome], Judgement],
    draw: Callable[[Any, Outcome], Any],
    *,
    argv: Sequence[str] | None = None,
    load: Callable[[Any], Any] = load,
) -> None:
    """Runs a study from its command line to its verdict.

    Args:
      Config: the study's config, a frozen dataclass that extends :class:`Config` and has a field
        ``claims``, a :class:`adaptivenet.emergence.verdict.Preregistration`.
      run: ``(config, data, seeds, tick) -> Outcome``; pure but for ``tick(what, share_done)``.
      judge: ``(config, outcome) -> Judgement``.
      draw: ``(config, outcome) -> figure``.
      argv: the command line; that of the process by default.
      load: ``config -> data``, with ``name`` and ``sha256``.
    """
    name = Path(inspect.getfile(run)).stem
    program = f"research.{name}"
    config = training.load_config(Config, argv, prog=program, description=Config.__doc__)
    try:
        verdict.check(config.claims, config.seeds)
        data = load(config)
    except (verdict.ClaimError, an.data.DataError) as error:
        sys.exit(f"{program}: {error}")
    folder, digest = open_run(name, config)
    _announce(config, data, folder)
    try:
        outcomes, seconds = _run_seeds(config, run, data, folder)
    except KeyboardInterrupt:
        sys.exit(
            f"\n{program}: stopped; finished seeds are in {_stores(config, folder)[-1]}. Start the "
            "same command again to go on."
        )
    # What is judged and drawn is what the file holds, so that the file alone rebuilds both.
    outcome = join(config, outcomes).rounded()
    try:
        judged = judge(config, outcome)
    except verdict.ClaimError as error:
        sys.exit(f"{program}: {error}")
    document = {
        "study": name,
        "scale": config.scale,
        "config_hash": digest,
        "config": config_text(config),
        "data": {"name": data.name, "sha256": data.sha256},
        "seeds": list(config.seeds),
        "verdict": {v.name: v.word for v in judged.verdicts},
        "verdicts": [v._asdict() for v in judged.verdicts],
        "emergence": judged.emergence,
        "tables": [table.title for table in judged.tables],
        "metrics": {key: mean_interval(value) for key, value in outcome.metrics.items()},
        **outcome.to_json(),
        "seconds": round(seconds, 1),
    }
    path = write_results(folder, document)
    if config.keep:
        Path(config.keep).parent.mkdir(parents=True, exist_ok=True)
        Path(config.keep).write_bytes(path.read_bytes())
        waited = _stores(config, folder)[-1]
        shutil.rmtree(waited)  # the file holds all that was in it
        if not any(waited.parent.iterdir()):  # else seeds of another config wait there
            waited.parent.rmdir()
    save_figure(draw, config, outcome, folder / "figure.png", folder / "figure.pdf", dpi=150)
    _print_verdicts(config, data, judged)
    print(f"results: {path}\nfigure:  {folder / 'figure.png'} (and .pdf)")


def save_figure(draw: Any, config: Any, outcome: Outcome, *paths: Path, dpi: int) -> None:
    """Draws a study's figure, with nothing in it that depends on the day.

    Args:
      draw: the study's ``(config, outcome) -> figure``.
      config: what `draw` takes.
      outcome: what `draw` takes.
      *paths: the files; the suffix (png, pdf) says how.
      dpi: dots an inch, of a png.
    """
    import matplotlib.pyplot as plt

    with style():
        figure = draw(config, outcome)
        for path in paths:
            undated = {"metadata": {"CreationDate": None}} if path.suffix == ".pdf" else {}
            figure.savefig(path, dpi=dpi, **undated)
    plt.close(figure)  # pyplot would keep it, and all its data, until the process ends


def rejudge(path: Path) -> tuple[Any, Any, Outcome, Judgement]:
    """Reads a results file, and judges its seeds anew.

    Args:
      path: a results file of a study.

    Returns:
      The study's module, its config, the outcome, and the judgement, equal to the stored one.

    Raises:
      ResultsError: the file was changed by hand, or its verdicts do not follow from its seeds.
    """
    document = read_results(path)
    module = importlib.import_module(f"research.{document['study']}")
    config = config_from_text(module.Config, document["config"])
    outcome = Outcome.from_json(document)
    judged = module.judge(config, outcome)
    if {v.name: v.word for v in judged.verdicts} != document["verdict"]:
        raise ResultsError(
            f"{path}: its verdicts do not follow from its seeds; run {document['study']} again."
        )
    return module, config, outcome, judged


def style(rows: int = 2, columns: int = 3) -> Any:
    """The figures' one style (context manager), for panels over the whole width of the page.

    Args:
      rows: of panels.
      columns: of panels.

    Returns:
      A context in which matplotlib draws at the size of print, in colours that colour-blind readers
      tell apart (Okabe and Ito's).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from tueplots import axes, bundles, cycler, figsizes

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    settings: dict[Any, Any] = {
        **bundles.icml2024(column="full", family="sans-serif", usetex=False),
        **figsizes.icml2024_full(nrows=rows, ncols=columns, height_to_width_ratio=0.95),
        **axes.lines(),
        **axes.spines(top=False, right=False),
        **cycler.cycler(color=colours),
        "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same on every machine
        "mathtext.fontset": "dejavusans",
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.labelsize": 7,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
    return plt.rc_context(settings)


def _run_seeds(config: Any, run: Any, data: Any, folder: Path) -> tuple[dict[int, Outcome], float]:
    """Outcomes, finished ones from the folder, and the seconds that all seeds took."""
    stores = _stores(config, folder)
    _level(stores)
    done = {seed: stores[0] / f"{seed}.npz" for seed in config.seeds}
    outcomes = {seed: Outcome.load(path) for seed, path in done.items() if path.exists()}
    left = [seed for seed in config.seeds if seed not in outcomes]
    if outcomes and left:
        print(f"resumed: {len(outcomes)} of {len(config.seeds)} seeds are finished")
    chunks = [tuple(left[i : i + config.chunk]) for i in range(0, len(left), config.chunk)]
    for number, seeds in enumerate(chunks):
        started = time.perf_counter()
        with _ticker(f"seeds {seeds[0]}-{seeds[-1]}, {number + 1} of {len(chunks)}") as tick:
            found = run(config, data, seeds, tick)
        share = (time.perf_counter() - started) / len(seeds)
        for place, seed in enumerate(seeds):
            outcomes[seed] = found.at(place)
            done[seed].with_suffix(".seconds").write_text(f"{share:.3f}\n", encoding="utf-8")
            outcomes[seed].save(done[seed])  # last: a seed with this file is finished
        _level(stores)
    spent = [path.with_suffix(".seconds") for path in done.values()]
    return outcomes, sum(float(path.read_text("utf-8")) for path in spent if path.exists())


def _stores(config: Any, folder: Path) -> list[Path]:
    """Folders that hold the finished seeds of this config: of the run, and beside ``keep``."""
    beside = [Path(config.keep).with_suffix(".seeds") / folder.name] if config.keep else []
    return [folder / "seeds", *beside]


def _level(stores: list[Path]) -> None:
    """Gives every store the seeds of all."""
    for store in stores:
        store.mkdir(parents=True, exist_ok=True)
    for store, other in itertools.permutations(stores, 2):
        for path in sorted(store.glob("*.npz")):
            if not (other / path.name).exists():
                for suffix in (".seconds", ".npz"):  # in the order in which a run writes them
                    source = path.with_suffix(suffix)
                    part = (other / path.name).with_suffix(".copy")
                    if source.exists():
                        part.write_bytes(source.read_bytes())
                        part.replace(part.with_suffix(suffix))


@contextlib.contextmanager
def _ticker(label: str) -> Iterator[Tick]:
    """A bar in a terminal, plain lines elsewhere."""
    started = time.perf_counter()
    if not sys.stdout.isatty() or os.environ.get("CI", "").lower() in ("1", "true", "yes"):

        def say(what: str, share: float) -> None:
            spent = time.perf_counter() - started
            print(f"{label}  {share:4.0%}  {what}  {spent:.0f} s", flush=True)

        yield say
        return
    from rich import progress

    columns = ("[bold]{task.description}", progress.BarColumn(), "{task.fields[what]}")
    with progress.Progress(*columns, progress.TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=1.0, what="")
        yield lambda what, share: bar.update(task, completed=share, what=what)


def _announce(config: Any, data: Any, folder: Path) -> None:
    print(f"{data!r}\nrun folder: {folder}")
    for name, claim in verdict.hypotheses(config.claims).items():
        beside = "to" if claim.direction == "equal" else "than"
        what = f"{claim.metric} {claim.direction} {beside} {claim.than:g}"
        print(f"{name}: {claim.statement} [{what}]")
    print(flush=True)


def _print_verdicts(config: Any, data: Any, judged: Judgement) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    for table in judged.tables:
        print_table(*table)
    claims = verdict.hypotheses(config.claims)
    print_table(
        f"{data.name}: {len(config.seeds)} seeds, mean over seeds [{1 - config.claims.alpha:.0%} "
        "BCa interval], two-sided p after Holm",
        ["claim", "primary metric", "mean", "interval", "d", "p", "n", "verdict"],
        [
            [
                v.name,
                f"{v.metric} {claims[v.name].direction} {claims[v.name].than:g}",
                number(v.estimate),
                f"[{number(v.low)}, {number(v.high)}]",
                "-" if v.effect_size is None else f"{v.effect_size:.1f}",
                "-" if v.p_adjusted is None else f"{v.p_adjusted:.2g}",
                str(v.n),
                v.word,
            ]
            for v in judged.verdicts
        ],
    )
    for v in judged.verdicts:
        print(f"{v.word}: {v.statement}" + (f" ({v.reason})" if v.reason else ""))
    if judged.emergence:
        print(f"emergence: {judged.emergence}")
    if config.claims.exploratory:
        print("exploratory: at this scale nothing above is a test of the claims")
