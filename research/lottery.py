"""S3: what is in a lottery ticket, its weights or its mask, and when is it found?

Iterative magnitude pruning trains, cuts a share of the living, and goes back to step k. Are such
tickets better than the dense network (L0), than a new initialization of their mask (L1), than a
random mask of equal layers (L2)? Is the barrier between two children of a ticket, trained on other
batches, lower with k > 0, and lower than a random mask's (L3)? Do they beat one cut, one cut that
is trained for as many steps in all, and rounds that never go back (L4)? Are tickets of k > 0 better
(L5), and found again by other batches (L6)?

    python -m research.lottery --config configs/lottery/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.pruning import lottery
from adaptivenet.training import Range
from research import rounds, study
from research.lottery_arms import (
    MEMBERS,
    PAIRS,
    at_once,
    begin,
    next_masks,
    start_of,
    starts,
    train_all,
)
from research.lottery_measures import accuracies, barriers, density, metrics, overlap


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """L0: tickets win; L1, L2: by weights and mask; L3: barriers; L4: rounds; L5, L6: step k."""

    l0_dense: Hypothesis = study.BLANK
    l1_reinit: Hypothesis = study.BLANK
    l2_random: Hypothesis = study.BLANK
    l3_rewinding: Hypothesis = study.BLANK
    l3_random: Hypothesis = study.BLANK
    l4_density: Hypothesis = study.BLANK
    l4_layers: Hypothesis = study.BLANK
    l4_compute: Hypothesis = study.BLANK
    l4_rewinding: Hypothesis = study.BLANK
    l5_accuracy: Hypothesis = study.BLANK
    l6_overlap: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Lottery: tickets, their rewinding point, and the line between their children."""

    claims: Claims = Claims()
    """what is claimed"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers"""
    learning_rate: Annotated[float, Range(gt=0)] = 1e-2
    """Adam's, constant"""
    batch_size: Annotated[int, Range(ge=1)] = 32
    """examples a step"""
    steps: Annotated[int, Range(ge=2)] = 1000
    """last step of a training that begins at step 0"""
    rewind: Annotated[int, Range(ge=1)] = 200
    """k, the step that the arm `rewound` goes back to"""
    rate: Annotated[float, Range(gt=0, lt=1)] = 0.36
    """share of the living that a round cuts, over all layers together (0.2, twice)"""
    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.95
    """where the rounds end (the first that reaches it); arms are compared there"""
    winning: Annotated[float, Range(gt=0, lt=1)] = 0.8
    """where tickets are compared with the dense network (the first round that reaches it)"""
    points: Annotated[int, Range(ge=2)] = 11
    """positions on the line between two networks"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        if self.rewind >= self.steps:
            raise ValueError(
                f"rewind={self.rewind} must come before the last of steps={self.steps}"
            )
        if self.winning > self.sparsity:
            raise ValueError(f"winning={self.winning} lies beyond sparsity={self.sparsity}")

    @property
    def rounds(self) -> int:
        """Cuts until the sparsity is reached; there is one training more."""
        return lottery.rounds_to(self.sparsity, self.rate)

    @property
    def winning_round(self) -> int:
        """The round in which tickets are compared with the dense network."""
        return lottery.rounds_to(self.winning, self.rate)


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every arm at every density on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    begins = starts(config, keys, task)
    masks = dict.fromkeys(MEMBERS, jax.vmap(an.pruning.full_mask)(begins["original"]))
    ends, dense, last, found = {}, None, None, []
    for number in range(config.rounds + 1):
        nets = {m: begin(config, begins[start_of(m)], masks[m]) for m in MEMBERS}
        if number > 0:
            nets["kept a"] = begin(config, ends["kept a"].params, masks["kept a"])
        if number > 1:
            nets["long a"] = ends["long a"]  # goes on, with the state of its optimizer
        ends = train_all(config, number, nets, keys, task)
        params = {member: ends[member].params for member in MEMBERS}
        children = [[params[f"{arm} {order}"] for arm in PAIRS] for order in "ab"]
        errors, losses, lines = barriers(config.points, *children, task)
        found.append(
            {
                "accuracy": np.asarray(accuracies(list(params.values()), task)),
                "barrier_error": np.asarray(errors),
                "barrier_loss": np.asarray(losses),
                "line": np.asarray(lines),
                "overlap": np.stack(
                    [overlap(masks[f"{a} a"], masks[f"{a} other"]) for a in PAIRS[:2]], 1
                ),
                "density": np.full(len(seeds), density(masks["rewound a"])),
            }
        )
        if number == 0:
            dense = params["rewound a"]
            last = at_once(config, dense, masks["rewound a"])
        if number < config.rounds:
            of_masks = jax.vmap(jax.random.fold_in, (0, None))(keys, 1000 + number)
            masks = next_masks(config, ends, dense, masks, of_masks, last)
        tick(f"density {found[-1]['density'][0]:.1%}", (number + 1) / (config.rounds + 1))
    curves = {name: np.stack([one[name] for one in found], 1) for name in found[0]}
    return study.Outcome(metrics(config, curves), curves)


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Accuracy by density, leads at the last one, barriers, lines between children, overlap."""
    from research import lottery_figure

    return lottery_figure.draw(config, outcome)


judge = study.judge

if __name__ == "__main__":
    study.main(Config, run, judge, draw)
