"""S2: does keeping a synapse make it stronger, or safer?

The founding note says that what is kept is reinforced. H2a: the same strong synapses grow more when
the others are pruned than in a twin that prunes nothing (same net, same batches). H2b: at equal
magnitude the hazard of being pruned falls with the age of retention, more than in a shadow that
only records the mask; and, by a randomised intervention, synapses just below the threshold that
are kept for some rounds survive longer after their release than those that are not.

    python -m research.feedback --config configs/feedback/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import rounds, study
from research.feedback_arms import ARMS, FUTURES, OPTIMIZERS, dense, recorder_of, twin, watch
from research.feedback_measures import matched, observed


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """H2a: growth; H2b: hazard, observed and randomised; for both optimizers."""

    h2a_adam: Hypothesis = study.BLANK
    h2a_sgd: Hypothesis = study.BLANK
    h2b_observed_adam: Hypothesis = study.BLANK
    h2b_observed_sgd: Hypothesis = study.BLANK
    h2b_randomised_adam: Hypothesis = study.BLANK
    h2b_randomised_sgd: Hypothesis = study.BLANK
    h2b_matched_adam: Hypothesis = study.BLANK
    h2b_matched_sgd: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Feedback: twins, hazards and a randomised reprieve."""

    claims: Claims = Claims()
    """what is claimed"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers"""
    adam_rate: Annotated[float, Range(gt=0)] = 1e-3
    """Adam's learning rate"""
    sgd_rate: Annotated[float, Range(gt=0)] = 0.05
    """learning rate of SGD (momentum 0.9)"""
    sgd_decay: Annotated[float, Range(ge=0)] = 1e-4
    """weight decay of SGD"""
    dense_steps: Annotated[int, Range(ge=1)] = 2000
    """training before the futures part"""
    twin_steps: Annotated[int, Range(ge=1)] = 2000
    """training of each future"""
    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.7
    """share that is not kept, in each layer"""
    steps: Annotated[int, Range(ge=1)] = 50
    """steps of a round; the mask is chosen anew each round"""
    before: Annotated[int, Range(ge=2)] = 14
    """rounds in which the hazard is observed"""
    reprieve: Annotated[int, Range(ge=1)] = 5
    """rounds for which a random half of the synapses just below the threshold is kept"""
    after: Annotated[int, Range(ge=2)] = 8
    """rounds after the release"""
    window: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """how many stand just below the threshold, as a share of the layer"""
    sample: Annotated[int, Range(ge=10)] = 20000
    """synapses followed for the hazard, at most (the small network has fewer)"""
    zone: Annotated[float, Range(gt=0, le=1)] = 0.95
    """share of the shadow's deaths, nearest to the threshold, in whose range arms are compared"""


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every future and arm on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    total = len(OPTIMIZERS) * (2 + len(FUTURES) + len(ARMS))
    done, m, c = iter(range(1, 99)), {}, {}
    for name in OPTIMIZERS:
        start = jax.vmap(partial(dense, config, name), (0, None))(keys, task)
        m[f"accuracy_{name}"] = jax.vmap(rounds.accuracy, (0, None))(start, task)
        tick(f"{name}: dense", next(done) / total)
        for future in FUTURES:
            ends = jax.vmap(partial(twin, config, name, future), (0, 0, None))(keys, start, task)
            c[f"growth_{future}_{name}"] = np.asarray(ends[0], np.float64)
            m[f"growth_{future}_{name}"] = c[f"growth_{future}_{name}"].mean(1)
            m[f"accuracy_{future}_{name}"] = ends[1]
            tick(f"{name}: twin, {future}", next(done) / total)
        recorder, paths = recorder_of(config, jax.tree.map(lambda leaf: leaf[0], start)), {}
        for arm in ARMS:
            found = jax.vmap(partial(watch, config, name, arm), (0, 0, None))(keys, start, task)
            frames, shares, flat, accuracy = found
            paths[arm] = recorder.trajectory(frames, seeds=seeds)
            end = f"{arm}_{name}"
            m[f"accuracy_{end}"] = accuracy
            c[f"shares_{end}"] = np.asarray(shares, np.float64)
            lags = c[f"shares_{end}"][:, config.before + config.reprieve :]
            m[f"reprieve_{end}"] = (lags[..., 0] - lags[..., 1]).mean(1)
            m[f"matched_{end}"] = np.array(
                [matched(*(np.asarray(x[i]) for x in flat)) for i in range(len(seeds))]
            )
            tick(f"{name}: rounds, {arm}", next(done) / total)
        fits = [observed(config, paths, place) for place in range(len(seeds))]
        for arm in ARMS:
            end = f"{arm}_{name}"
            m[f"hazard_age_{end}"] = np.array([fit[arm]["age"] for fit in fits])
            m[f"hazard_frail_{end}"] = np.array([fit[arm]["frail"] for fit in fits])
            m[f"hazard_gap_{end}"] = np.array([fit[arm]["gap"] for fit in fits])
            m[f"hazard_{end}"] = np.array([fit[arm]["hazard"] for fit in fits])
            c[f"rates_{end}"] = np.array([fit[arm]["rates"] for fit in fits])
        tick(f"{name}: hazards", next(done) / total)
        m[f"twin_{name}"] = m[f"growth_pruned_{name}"] - m[f"growth_dense_{name}"]
        for what in ("hazard_age", "hazard_frail", "hazard_gap", "reprieve", "matched"):
            m[f"{what}_{name}"] = m[f"{what}_real_{name}"] - m[f"{what}_shadow_{name}"]
    return study.Outcome({k: np.asarray(v, np.float64) for k, v in m.items()}, c)


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Twins, hazards by magnitude for young and old, and the randomised reprieve."""
    from research import feedback_figure

    return feedback_figure.draw(config, outcome)


judge = study.judge

if __name__ == "__main__":
    study.main(Config, run, judge, draw)
