"""Uncertainty: does what is believed of a synapse say more about its worth than its magnitude?

A network of the founding note's widths is trained in five ways, on the same batches for as many
passes: by Adam, by Adam with the L2 penalty of the others' prior (the control), by the same under
noise of one width, by IVON, and as a mean field. They are cut by magnitude, by the signal-to-noise
ratio of their beliefs, by the same with shuffled widths (the null), at random, and where Adam
trained by optimal brain damage and by the tempered score; once without training after it, and once
with some. Beside them: how well the beliefs are calibrated, and whether they know what is foreign.

    python -m research.uncertainty --config configs/uncertainty/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import numpy as np

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import study
from research.uncertainty_arms import NETWORKS, course, read_row
from research.uncertainty_data import SETS, Lessons, load
from research.uncertainty_measures import Predictions, claimed, tables

Share = Annotated[float, Range(ge=0, lt=1)]
Positive = Annotated[float, Range(gt=0)]


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """One a regime, and others on where a gain comes from; a config makes some."""

    mnist_once: Hypothesis = study.BLANK
    mnist_retrained: Hypothesis = study.BLANK
    fashion_mnist_once: Hypothesis = study.BLANK
    fashion_mnist_retrained: Hypothesis = study.BLANK
    mnist1d_once: Hypothesis = study.BLANK
    mnist1d_retrained: Hypothesis = study.BLANK
    scoring: Hypothesis = study.BLANK
    widths: Hypothesis = study.BLANK
    knowing_mnist: Hypothesis = study.BLANK
    knowing_fashion_mnist: Hypothesis = study.BLANK
    knowing_mnist1d: Hypothesis = study.BLANK
    prior: Hypothesis = study.BLANK
    criterion: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the networks of one data set are trained and cut."""

    epochs: Annotated[int, Range(ge=0)] = 0
    """passes over the training data; 0: the data set is left out"""
    retrain: Annotated[int, Range(ge=1)] = 2
    """passes after a cut, in the regime with training"""
    widths: tuple[int, ...] = (128, 64, 10)
    """units of each layer, the last one the classes"""
    batch_size: Annotated[int, Range(ge=1)] = 128
    """examples a step"""
    prior: Positive = 60.0
    """precision of the Gaussian prior of every weight, but for the network adam, which has none"""
    granularity: Literal["one", "layer", "unit"] = "layer"
    """who shares a prior that is tuned by the evidence of a Laplace approximation"""
    rate: Positive = 1e-3
    """peak of Adam's learning rate; a short warm-up, then a cosine to zero (as for the others)"""
    ivon_rate: Positive = 0.1
    """of IVON"""
    hess_init: Positive = 0.1
    """curvature that IVON starts from"""
    ivon_decay: Share = 0.9995
    """share of the past that its curvature keeps"""
    noise: Positive = 0.03
    """its standard deviation, for the network noise"""
    field_rate: Positive = 2e-3
    """of Adam on the mean field"""
    field_scale: Positive = 0.02
    """standard deviations that the mean field starts from"""
    temperature: Positive = 1.0
    """what the mean field's divergence from its prior is multiplied by; 1 is Bayes' rule"""
    retrain_rate: Positive = 1e-3
    """of Adam after a cut, for all networks"""


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Importance by uncertainty against magnitude, one-shot and with training after it."""

    data: Literal["of each regime"] = "of each regime"
    """every regime has its own"""
    claims: Claims = Claims()
    """what is claimed: by regime, and on where gains come from"""
    mnist: Setting = Setting()
    """MNIST; what is foreign to it is Fashion-MNIST"""
    fashion_mnist: Setting = Setting()
    """Fashion-MNIST; what is foreign to it is MNIST"""
    mnist1d: Setting = Setting()
    """MNIST-1D; what is foreign to it are its signals with their times shuffled"""
    rows: tuple[str, ...] = (
        *("adam:magnitude", "adam:obd", "adam:fisher_tempered", "adam:snr", "l2:random"),
        *("l2:magnitude", "l2:obd", "l2:fisher_tempered", "l2:snr", "l2:shuffled"),
        "noise:magnitude",
        *("ivon:magnitude", "ivon:snr", "ivon:shuffled"),
        *("field:magnitude", "field:snr", "field:shuffled"),
    )
    """network:score"""
    sparsities: tuple[Share, ...] = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
    """shares of the weights that are cut"""
    claimed_from: Share = 0.9
    """claims are about the mean over sparsities from here on"""
    draws: Annotated[int, Range(ge=2)] = 32
    """networks drawn from a belief, to average predictions"""
    shown: Annotated[int, Range(ge=1)] = 1000
    """examples, own and foreign, that calibration and detection are measured on"""
    targets: tuple[float, float] = (0.003, 0.01)
    """accuracy that may be lost at 90 and 95 % after training again, on MNIST"""
    target_error: float = 0.0
    """error of field:snr at 98 % on MNIST without training after it; 0: not aimed at"""

    def __post_init__(self) -> None:
        """Reads every row before anything runs."""
        for row in self.rows:
            read_row(row)
        if "l2:magnitude" not in self.rows:
            raise ValueError("rows: all are compared with l2:magnitude, which must be among them.")
        if not any(getattr(self, name).epochs for name in SETS):
            raise ValueError(f"no data set has epochs: give some to {', '.join(SETS)}.")


def run(config: Config, data: Lessons, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains, believes, cuts and trains again, seed by seed and set by set."""
    names = [name for name in SETS if getattr(config, name).epochs]
    work = sum(_steps(config, name) for name in names) * len(seeds)
    finished, numbers = 0, []
    for seed in seeds:
        found: dict[str, float] = {}
        for name in names:

            def done(what: str, name: str = name) -> None:
                nonlocal finished
                finished += 1
                tick(f"{SETS[name]}, {what}", finished / work)

            found |= _measured(config, data, name, seed, done)
        numbers.append(found)
    metrics = {key: np.array([found[key] for found in numbers]) for key in numbers[0]}
    return study.Outcome({**metrics, **claimed(config, metrics)}, {})


def _steps(config: Config, name: str) -> int:
    return len(_networks(config)) * (getattr(config, name).epochs + 2) + len(config.rows)


def _networks(config: Config) -> list[str]:
    wanted = {read_row(row).network for row in config.rows}
    return [network for network in NETWORKS if network in wanted]


def _measured(config: Config, data: Lessons, name: str, seed: int, done: Any) -> dict[str, float]:
    """All numbers of one data set on one seed."""
    task = data.tasks[name]
    own = course(getattr(config, name), task.inputs.shape[-1], len(task.inputs))
    key = jax.random.fold_in(jax.random.key(seed), list(SETS).index(name))
    sparsities = jax.numpy.asarray(config.sparsities, jax.numpy.float32)
    predictions = Predictions(config, data, name)
    found: dict[str, float] = {}
    for network in _networks(config):
        net = own.train(network, key, task, lambda network=network: done(f"{network} trains"))
        belief = own.believe(network, net, task)
        done(f"belief of {network}")
        whole = own.measure(jax.tree.map(lambda leaf: leaf[None], belief.params), task)
        found |= {f"full_{what}/{name}/{network}": float(v[0]) for what, v in whole.items()}
        found |= predictions.of(network, belief, jax.random.fold_in(key, 1))
        done(f"predictions of {network}")
        scores = own.scores(belief, jax.random.fold_in(key, 2))
        for row in config.rows:
            if read_row(row).network != network:
                continue
            cut, masks = own.cut(belief.params, scores[read_row(row).score], sparsities)
            again = own.retrain(network, cut, masks, jax.random.fold_in(key, 3), task)
            for regime, networks in (("once", cut), ("retrained", again)):
                for what, values in own.measure(networks, task).items():
                    for column, value in zip(config.sparsities, np.asarray(values), strict=True):
                        found[f"{what}/{name}/{regime}/{row}/{column:g}"] = float(value)
            done(f"{row} cuts")
    return found


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Accuracy against weights kept, the paired differences, and what the beliefs are worth."""
    from research import uncertainty_figure

    return uncertainty_figure.draw(config, outcome)


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, with the tables of accuracies, differences, targets, predictions."""
    return study.judge(config, outcome)._replace(tables=tuple(tables(config, outcome.metrics)))


if __name__ == "__main__":
    study.main(Config, run, judge, draw, load=load)
