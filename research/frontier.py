"""The frontier: accuracy against sparsity, for every score, with regrowth and without.

The founding MLP and the literature's two LeNets, pruned while they train, from dense to a target
sparsity by one global threshold; last epoch, no choice by test data. Beside them stand a dense
network, one that loses by weight decay the norm that a cut would take, and a rule that a dense
teacher helps. Reached and missed targets are printed as they are.

    python -m research.frontier --config configs/frontier/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import rounds, study
from research.frontier_arms import SUBJECTS, read_rule, training
from research.frontier_measures import Measures, claimed, tables

Share = Annotated[float, Range(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """On scores, regrowth, the loss of norm, teachers, and the literature; a config makes some."""

    score: Hypothesis = study.BLANK
    regrowth: Hypothesis = study.BLANK
    both: Hypothesis = study.BLANK
    norm: Hypothesis = study.BLANK
    teacher: Hypothesis = study.BLANK
    lenet300: Hypothesis = study.BLANK
    lenet5: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one subject is trained, and under which rules."""

    rules: tuple[str, ...] = ()
    """score, score+regrowth, and * behind it for a dense teacher; none: the subject is not run"""
    sparsities: tuple[Share, ...] = (0.9, 0.95, 0.98, 0.99, 0.995)
    """final shares of weights that are zero"""
    targets: tuple[float, ...] = ()
    """accuracies to be reached at these sparsities by the best rule, the last one named"""
    epochs: Annotated[int, Range(ge=1)] = 20
    """passes over the training data"""
    batch_size: Annotated[int, Range(ge=1)] = 256
    """examples a step"""
    learning_rate: Annotated[float, Range(gt=0)] = 2e-3
    """peak of Adam's rate for a dense network; linear warm-up, then a cosine to zero"""
    rate_power: Annotated[float, Range(ge=0)] = 0.0
    """the rate is multiplied by the final density to minus this power"""
    warmup: Annotated[int, Range(ge=0)] = 100
    """steps of linear warm-up"""
    weight_decay: Annotated[float, Range(ge=0)] = 0.0
    """decoupled weight decay"""
    dropout: Share = 0.0
    """rate of dropout in a dense network"""
    dropout_power: Annotated[float, Range(ge=0)] = 0.5
    """the rate is multiplied by density to this power"""
    shift: Annotated[int, Range(ge=0)] = 0
    """pixels by which a training image is moved at the most, anew for every step"""
    events: Annotated[int, Range(ge=1)] = 2
    """events an epoch"""
    prune_start: Share = 0.1
    """share of the training at which the schedule begins"""
    prune_end: Annotated[float, Range(gt=0, lt=1)] = 0.65
    """share at which the target is reached"""
    power: Annotated[float, Range(gt=0)] = 3.0
    """of the polynomial schedule"""
    grow_end: Annotated[float, Range(gt=0, le=1)] = 0.85
    """share from which nothing is woken any more"""
    fraction: Share = 0.3
    """share of the kept that gives way to woken synapses, at first; falls along a cosine"""
    decay: Share = 0.99
    """of the running means of gradients and of their squares"""
    prior: Annotated[float, Range(ge=0)] = 1.0
    """precision of the prior, for the score snr"""
    calibration: Annotated[int, Range(ge=1)] = 2048
    """training examples of an event's gradients and activations"""
    teaching: Share = 0.9
    """the teacher's share in the loss of a rule with *"""
    temperature: Annotated[float, Range(gt=0)] = 4.0
    """of both answers there"""


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Accuracy against sparsity for scores x regrowth."""

    claims: Claims = Claims()
    """what is claimed, of the founding MLP"""
    mlp: Setting = Setting()
    """the founding MLP: 128 and 64 hidden units"""
    lenet300: Setting = Setting()
    """LeNet-300-100"""
    lenet5: Setting = Setting()
    """LeNet-5-Caffe"""

    def __post_init__(self) -> None:
        """Reads every rule before anything runs."""
        for name in SUBJECTS:
            setting = getattr(self, name)
            rules = [read_rule(rule) for rule in setting.rules]
            if any(rule.taught for rule in rules) and "dense" not in setting.rules[:1]:
                raise ValueError(f"{name}.rules: a rule with * needs 'dense', its teacher, first.")
            if setting.prune_end <= setting.prune_start:
                raise ValueError(f"{name}.prune_end comes before {name}.prune_start")
            if len(setting.targets) not in (0, len(setting.sparsities)):
                raise ValueError(f"{name}.targets: give one accuracy for each of the sparsities.")


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every subject under every rule on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    plan = [(name, rule) for name in SUBJECTS for rule in getattr(config, name).rules]
    m: dict[str, np.ndarray] = {}
    teachers = None
    for place, (name, spelled) in enumerate(plan):
        setting, rule = getattr(config, name), read_rule(spelled)
        sparsities = (0.0,) if rule.score == "dense" else setting.sparsities
        trained = training(setting, name, spelled, len(task.inputs))
        measures = Measures(SUBJECTS[name], task)

        def done(share: float, place: int = place, what: str = f"{name}: {spelled}") -> None:
            tick(what, (place + share) / len(plan))

        params = trained.run(task, keys, sparsities, teachers if rule.taught else None, done)
        if rule.score == "dense" and any(r.endswith("*") for r in setting.rules):
            teachers = measures.answers(jax.tree.map(lambda leaf: leaf[:, 0], params))
        for what, values in measures.of(params).items():
            for column, sparsity in enumerate(sparsities):
                m[f"{what}/{name}/{spelled}/{sparsity:g}"] = values[:, column]
    return study.Outcome({**m, **claimed(config, m)}, {})


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Accuracy against the weights kept, a panel for each subject."""
    from research import frontier_figure

    return frontier_figure.draw(config, outcome)


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, with the tables of accuracies, of targets, and of the literature."""
    return study.judge(config, outcome)._replace(tables=tuple(tables(config, outcome.metrics)))


if __name__ == "__main__":
    study.main(Config, run, judge, draw)
