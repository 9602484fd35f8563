"""Continual learning: what is forgotten while a network learns task after task, and what holds.

Every row learns the same sequence of tasks with the same batches. After each task all tasks so far
are tested; the accuracies make a matrix, from which every number is taken. A protocol (by
permutation, by class, by speaker, a drifting stream) is a config. Strengths are not chosen here:
``configs/continual/*_tuning.yaml`` tries them on other seeds, which draw other tasks.

    python -m research.continual --config configs/continual/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import study
from research.continual_data import PROTOCOLS, Base, load
from research.continual_measures import read_target, summarised, tables
from research.continual_rows import METHODS, read_row
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


class Apart(NamedTuple):
    """A row: what makes its tasks, whether it is told where they end, and its rule."""

    protocol: str
    told: bool
    rule: str


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Learning one task after the other."""

    data: Literal["digits", "mnist1d", "mnist", "fashion_mnist", "fsdd"] = "mnist"
    """data set (never replaced by another one)"""
    claims: Claims = Claims()
    """what is claimed"""
    validation: Annotated[int, Range(ge=0)] = 500
    """training examples held apart; 0: none, and all are learnt from"""
    protocol: Literal[
        "permuted", "split", "split_task", "split_domain", "split_class", "speakers", "stream"
    ] = "permuted"
    """what makes a task: see research.continual_data; split: every row begins with task/, domain/
    or class/"""
    tasks: Annotated[int, Range(ge=2)] = 10
    """how many"""
    inputs: Literal["unit", "standardised"] = "unit"
    """over the greatest grey value; or less their mean, over their standard deviation, of all
    pixels of all examples to learn from (recordings always)"""
    padding: Annotated[int, Range(ge=0)] = 0
    """rows and columns of zeros around an image, before its pixels are permuted"""
    rows: tuple[str, ...] = ("none", "ewc@100", "si@10")
    """method@strength, behind scenario/ in a split, and behind blind/ where no ends are told"""
    pairs: tuple[str, ...] = ()
    """a row, a colon, another: the gain in average accuracy, paired by seed, is a metric"""
    targets: tuple[str, ...] = ()
    """row metric least value, or row metric near value within value; in per cent"""
    hidden: tuple[int, ...] = (100, 100)
    """units of the hidden layers"""
    bias: bool = True
    """whether layers have biases"""
    initial: Literal["glorot", "fan_in"] = "glorot"
    """what begins uniform: kernels, by Glorot and Bengio's rule; or all parameters, within one over
    the root of the fan-in, as PyTorch has it"""
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
    """whether rows are told where a task ends (blind/row is not, whatever is said here)"""
    period: Annotated[int, Range(ge=0)] = 0
    """steps after which rows that are not told take stock of the latest examples, the first time
    after half of it, so that no end of a task is betrayed; 0: never"""
    blend: Share = 0.5
    """of a stream: share of a part in which the part before it fades"""
    stream_length: Annotated[int, Range(ge=0)] = 0
    """of a stream: examples a part; 0: all"""
    tested: Annotated[int, Range(ge=0)] = 0
    """examples that a task is tested on, the first ones (of MNIST's test set, the easier ones); 0:
    all"""
    latest: Annotated[int, Range(ge=0)] = 0
    """tasks that are tested after each one, the latest so many, and after the last one all; 0:
    always all so far"""
    checks: Annotated[int, Range(ge=0)] = 0
    """times a task that the first task is tested within it, for the stability gap"""

    def __post_init__(self) -> None:
        """Reads every row, pair and target before anything runs."""
        if self.measured_on == "validation" and not self.validation:
            raise ValueError("validation: 0 examples are too few to measure on; hold some apart.")
        for row in self.rows:
            self._check(self.apart(row))
        for pair in self.pairs:
            for row in pair.split(":"):
                if row not in self.rows or pair.count(":") != 1:
                    raise ValueError(f"pairs: {pair!r} is not row:row of {', '.join(self.rows)}.")
        for target in self.targets:
            read_target(target, self.rows)

    def _check(self, row: Apart) -> None:
        """Refuses rows that need the end of a task, or something in its place, and have neither."""
        method = METHODS[read_row(row.rule).method]
        if row.told or not method.told or not method.bounded():
            return
        if not method.periodic:
            raise ValueError(f"row {row.rule!r} must be told where tasks end; leave it out.")
        if not self.period:
            raise ValueError(
                f"row {row.rule!r} takes stock at the ends of tasks, of which it is not told: give "
                "period, the number of steps after which it shall do so."
            )
        if self.period // 2 * self.batch_size < self.fisher_examples:
            raise ValueError(
                f"period: half of {self.period} steps of {self.batch_size} examples are fewer than "
                f"fisher_examples ({self.fisher_examples}), which {row.rule!r} looks back at."
            )

    def apart(self, row: str) -> Apart:
        """What the parts of a row's name say."""
        *signs, rule = row.split("/")
        told = self.told and "blind" not in signs
        scenarios = [sign for sign in signs if sign != "blind"]
        if self.protocol != "split":
            if scenarios:
                raise ValueError(f"row {row!r}: only protocol split has scenarios; write {rule}.")
            return Apart(self.protocol, told, rule)
        if len(scenarios) != 1 or f"split_{scenarios[0]}" not in PROTOCOLS:
            raise ValueError(
                f"row {row!r}: with protocol split write task/{rule}, domain/{rule} or "
                f"class/{rule}."
            )
        return Apart(f"split_{scenarios[0]}", told, rule)


def run(config: Config, data: Base, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Learns the sequence of every seed with every row."""
    import jax
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
            if crowded():
                jax.clear_caches()
        for pair in config.pairs:
            one, other = pair.split(":")
            found[f"gain/{pair}"] = found[f"average/{one}"] - found[f"average/{other}"]
        numbers.append(found)
        shapes.append(curves)
    return study.Outcome(
        {name: np.array([n[name] for n in numbers]) for name in numbers[0]},
        {name: np.stack([c[name] for c in shapes]) for name in shapes[0]},
    )


def crowded() -> bool:
    """Whether compiled programs have taken half of the memory maps that Linux allows a process.

    Seeds share the programs of a row only where their tasks have the same sizes: a hundred rows of
    Split MNIST met the limit, which kills the process.
    """
    try:
        held = Path("/proc/self/maps").read_bytes().count(b"\n")
        return held > int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except OSError:  # not on Linux, which alone has this limit
        return False


def draw(config: Config, outcome: study.Outcome) -> Any:
    """The accuracy matrices, and accuracies over tasks."""
    from research import continual_figure

    return continual_figure.draw(config, outcome)


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, with the tables of accuracies, gains and targets."""
    return study.judge(config, outcome)._replace(tables=tuple(tables(config, outcome.metrics)))


if __name__ == "__main__":
    study.main(Config, run, judge, draw, load=load)
