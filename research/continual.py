"""Continual learning: what is forgotten while a network learns task after task, and what holds.

Every row learns the same sequence of tasks with the same batches. After each task all tasks so far
are tested; the accuracies make a matrix, from which every number is taken. A protocol (by
permutation, by class, by speaker, a drifting stream) is a config. Strengths are not chosen here:
``configs/continual/*_tuning.yaml`` tries them on other seeds, which draw other tasks.

    python -m research.continual --config configs/continual/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import study
from research.continual_data import PROTOCOLS, Base, load
from research.continual_measures import read_target, summarised, tables
from research.continual_rows import read_row
from research.continual_run import Course

Share = Annotated[float, Range(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """What may be claimed of the rows of a config; a config makes some."""

    first: Hypothesis = study.BLANK
    second: Hypothesis = study.BLANK
    third: Hypothesis = study.BLANK
    fourth: Hypothesis = study.BLANK
    fifth: Hypothesis = study.BLANK
    sixth: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Learning one task after the other."""

    data: Literal["digits", "mnist1d", "mnist", "fashion_mnist", "fsdd"] = "mnist"
    """data set (never replaced by another one)"""
    claims: Claims = Claims()
    """what is claimed"""
    protocol: Literal[
        "permuted", "split", "split_task", "split_domain", "split_class", "speakers", "stream"
    ] = "permuted"
    """what makes a task: see research.continual_data; split: every row begins with task/, domain/
    or class/"""
    tasks: Annotated[int, Range(ge=2)] = 10
    """how many"""
    rows: tuple[str, ...] = ("none", "ewc@100", "si@10")
    """method@strength, or scenario/method@strength"""
    pairs: tuple[str, ...] = ()
    """a row, a colon, another: the gain in average accuracy, paired by seed, is a metric"""
    targets: tuple[str, ...] = ()
    """row metric least value, or row metric near value within value; in per cent"""
    hidden: tuple[int, ...] = (100, 100)
    """units of the hidden layers"""
    bias: bool = True
    """whether layers have biases"""
    steps: Annotated[int, Range(ge=0)] = 0
    """batches a task; 0: as many as the epochs have"""
    epochs: Annotated[int, Range(ge=1)] = 1
    """passes over a task"""
    batch_size: Annotated[int, Range(ge=1)] = 128
    """examples a batch"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """for rows that are no optimizers themselves; its state goes on from task to task"""
    rate: Annotated[float, Range(gt=0)] = 1e-3
    """of the optimizer"""
    fisher_examples: Annotated[int, Range(ge=1)] = 1000
    """examples of a task that a boundary looks at"""
    memory: Annotated[int, Range(ge=0)] = 0
    """examples that rows with a buffer may store, over all tasks"""
    draws: Annotated[int, Range(ge=1)] = 10
    """networks drawn from a belief, in a step and in a test"""
    spread: Annotated[float, Range(gt=0)] = 2.0
    """standard deviations that MESU and BGD begin with, times the root of the fan-in"""
    told: bool = True
    """whether rows are told where a task ends"""
    blend: Share = 0.5
    """of a stream: share of a part in which the part before it fades"""
    stream_length: Annotated[int, Range(ge=0)] = 0
    """of a stream: examples a part; 0: all"""
    tested: Annotated[int, Range(ge=0)] = 0
    """examples that a task is tested on, the first ones; 0: all"""
    checks: Annotated[int, Range(ge=0)] = 0
    """times a task that the first task is tested within it, for the stability gap"""

    def __post_init__(self) -> None:
        """Reads every row, pair and target before anything runs."""
        for row in self.rows:
            read_row(self.apart(row)[1])
        for pair in self.pairs:
            for row in pair.split(":"):
                if row not in self.rows or pair.count(":") != 1:
                    raise ValueError(f"pairs: {pair!r} is not row:row of {', '.join(self.rows)}.")
        for target in self.targets:
            read_target(target, self.rows)

    def apart(self, row: str) -> tuple[str, str]:
        """The protocol of a row, and the row without its scenario."""
        if self.protocol != "split":
            return self.protocol, row
        scenario, sign, rest = row.partition("/")
        if not sign or f"split_{scenario}" not in PROTOCOLS:
            raise ValueError(
                f"row {row!r}: with protocol split write task/{row}, domain/{row} or class/{row}."
            )
        return f"split_{scenario}", rest


def run(config: Config, data: Base, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Learns the sequence of every seed with every row."""
    import numpy as np

    folder, digest = study.open_run("continual", config)
    course = Course(config, data, folder / "parts", digest)
    work = len(seeds) * len(config.rows) * config.tasks
    finished, numbers, shapes = 0, [], []
    for seed in seeds:
        found: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        for row in config.rows:

            def done(task: int, row: str = row) -> None:
                nonlocal finished
                finished += 1
                tick(f"{row}, task {task + 1}", finished / work)

            own = summarised(course.learn(row, seed, done))
            found |= {f"{name}/{row}": value for name, value in own.numbers.items()}
            curves |= {f"{name}/{row}": value for name, value in own.curves.items()}
        for pair in config.pairs:
            one, other = pair.split(":")
            found[f"gain/{pair}"] = found[f"average/{one}"] - found[f"average/{other}"]
        numbers.append(found)
        shapes.append(curves)
    return study.Outcome(
        {name: np.array([n[name] for n in numbers]) for name in numbers[0]},
        {name: np.stack([c[name] for c in shapes]) for name in shapes[0]},
    )


def draw(config: Config, outcome: study.Outcome) -> Any:
    """The accuracy matrices, and accuracies over tasks."""
    from research import continual_figure

    return continual_figure.draw(config, outcome)


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, with the tables of accuracies, gains and targets."""
    return study.judge(config, outcome)._replace(tables=tuple(tables(config, outcome.metrics)))


if __name__ == "__main__":
    study.main(Config, run, judge, draw, load=load)
