"""S1: is the weight distribution that pruning leaves bimodal, and does learning make it so?

The founding note expects two modes in the weights of a network that compresses itself. A cut alone
leaves two humps of signed weights, so the claim must go beyond the cut (H1a). Under soft, ongoing
forgetting the log-magnitudes may split in two: beyond what the same forgetting does with the
gradient off, with shuffled importance, or as a decay of all weights alike (H1b)?

    python -m research.bimodality --config configs/bimodality/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.emergence import nulls, verdict
from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import rounds, study
from research.bimodality_arms import HARD, SOFT, dense, hard, soft
from research.bimodality_measures import (
    accuracies,
    critical,
    dips,
    histogram,
    modes,
    prediction_gain,
)


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """H1a: of hard pruning; H1b: of soft forgetting; H1c: of what the split buys."""

    h1a_oneshot: Hypothesis = study.BLANK
    h1a_gradual: Hypothesis = study.BLANK
    h1b_split: Hypothesis = study.BLANK
    h1b_no_learning: Hypothesis = study.BLANK
    h1b_shuffled: Hypothesis = study.BLANK
    h1b_decay: Hypothesis = study.BLANK
    h1b_critical: Hypothesis = study.BLANK
    h1b_task: Hypothesis = study.BLANK
    h1b_predicts: Hypothesis = study.BLANK
    h1c_buys: Hypothesis = study.BLANK
    h1c_l1: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Bimodality: what the cut forces, what forgetting forces, and what learning adds."""

    claims: Claims = Claims()
    """what is claimed"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers"""
    learning_rate: Annotated[float, Range(gt=0)] = 1e-3
    """Adam's, constant"""
    dense_steps: Annotated[int, Range(ge=1)] = 4000
    """training before the arms part"""
    rounds: Annotated[int, Range(ge=1)] = 20
    """events of an arm"""
    steps: Annotated[int, Range(ge=4)] = 100
    """steps of training a round (the arm `brief` has a quarter)"""
    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.7
    """share cut, and share that is softly forgotten, in each layer"""
    gains: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004, 0.01, 0.03, 0.1, 0.3, 0.8)
    """share that a forgotten weight loses a round, in ascending order"""
    reference_gain: float = 0.3
    """the gain at which arms are compared"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        if (
            list(self.gains) != sorted(set(self.gains))
            or not 0 < self.gains[0] < self.gains[-1] < 1
        ):
            raise ValueError(f"gains must ascend within (0, 1), not {self.gains}")
        if self.reference_gain not in self.gains:
            raise ValueError(f"reference_gain={self.reference_gain} is none of gains={self.gains}")


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every arm on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    wrong = rounds.task(nulls.shuffle_labels(data, seed=1), config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    total, done = len(HARD) + len(SOFT) + 2, iter(range(1, 99))
    start = jax.vmap(partial(dense, config), (0, None))(keys, task)
    tick("dense", next(done) / total)
    start_wrong = jax.vmap(partial(dense, config), (0, None))(keys, wrong)
    tick("dense, labels shuffled", next(done) / total)

    def one(tree: Any, *place: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[place], tree)

    n, metrics, curves = range(len(seeds)), {}, {}
    measure = jax.vmap(partial(accuracies, config), (0, None))
    metrics["dense_accuracy"], metrics["dense_cut_accuracy"], metrics["dense_mass"] = measure(
        start, task
    )
    for arm in HARD:
        ends = jax.vmap(partial(hard, config, arm), (0, 0, None))(keys, start, task)
        dip = np.array([dips(one(ends, i), logs=False) for i in n])
        metrics[f"{arm}_dip"], curves[f"{arm}_dip"] = dip[:, :, 0].mean(1), dip
        metrics[f"{arm}_accuracy"] = measure(ends, task)[0]
        tick(arm, next(done) / total)
    gains, place = jnp.array(config.gains), config.gains.index(config.reference_gain)
    for arm in SOFT:
        begin, data_ = (start_wrong, wrong) if arm == "labels" else (start, task)
        over_seeds = jax.vmap(partial(soft, config, arm), (None, 0, 0, None))
        ends = jax.vmap(over_seeds, (0, None, None, None))(gains, keys, begin, data_)
        dip = np.array([[dips(one(ends, g, i), logs=True) for g in range(len(gains))] for i in n])
        values = jax.vmap(measure, (0, None))(ends, data_)
        for name, value in zip(("accuracy", "cut", "mass"), values, strict=True):
            curves[f"{arm}_{name}"] = np.asarray(value).T
        curves[f"{arm}_log_dip"] = dip
        metrics[f"{arm}_split"] = dip[:, place, :2, 0].mean(1)
        metrics[f"{arm}_critical"] = np.array([critical(config, d) for d in dip])
        if arm in ("learning", "no_learning"):
            first = np.asarray(rounds.kernels(ends)[0])
            curves[f"{arm}_modes"] = np.array(
                [[modes(first[g, i]) for g in range(len(gains))] for i in n]
            )
            curves[f"{arm}_histogram"] = np.array(
                [[histogram(first[g, i]) for g in range(len(gains))] for i in n]
            )
        tick(arm, next(done) / total)
    split = [dips(one(start, i), logs=True)[:2, 0].mean() for i in n]
    m = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    m["dense_split"] = np.array(split)
    for arm in ("oneshot", "gradual", "random"):
        m[f"{arm}_excess"] = m[f"{arm}_dip"] - m["truncation_dip"]
    m["split_excess"] = m["learning_split"] - m["dense_split"]
    for arm in ("no_learning", "shuffled", "decay", "l1", "labels"):
        m[f"beyond_{arm}"] = m["learning_split"] - m[f"{arm}_split"]
        m[f"critical_beyond_{arm}"] = m["learning_critical"] - m[f"{arm}_critical"]
    m["critical_shift"] = m["learning_critical"] - m["brief_critical"]
    m["dense_price"] = m["dense_accuracy"] - m["dense_cut_accuracy"]
    for arm in SOFT:
        lost = curves[f"{arm}_accuracy"] - curves[f"{arm}_cut"]
        m[f"{arm}_price"] = np.asarray(lost, np.float64)[:, place]
    m["split_buys"] = m["dense_price"] - m["learning_price"]
    m["buys_beyond_l1"] = m["l1_price"] - m["learning_price"]
    return study.Outcome(m, {name: np.asarray(value) for name, value in curves.items()})


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, and the gates of emergence."""
    metrics = {**outcome.metrics, "prediction_gain": prediction_gain(outcome)}
    verdicts = verdict.judge(config.claims, metrics)
    gates = {"present": "h1b_split", "no_learning": "h1b_no_learning", "shuffled": "h1b_shuffled"}
    return study.Judgement(
        verdicts, verdict.emergence(verdicts, **gates, predictive="h1b_predicts")
    )


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Dips against their nulls, the bifurcation, critical gains, and what the split buys."""
    from research import bimodality_figure

    return bimodality_figure.draw(config, outcome)


if __name__ == "__main__":
    study.main(Config, run, judge, draw)
