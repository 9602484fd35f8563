"""Is the error of pruned networks predictable, from width and density, by one law?

Rosenfeld et al. found that iterative magnitude pruning takes the error from a low plateau over a
power law to a high plateau, and that ``width ** psi * density`` decides where. The law is fitted
here to a family of small MLPs over width x density (S-a), and predicts a width that the fit never
saw, given that network's dense error: one between the others, and one twice as large as all of them
(S-b), better than a law without the width does (S-c).

    python -m research.scaling --config configs/scaling/smoke.yaml
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
from research.scaling_arms import chain
from research.scaling_measures import measure, summary


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """S-a: the law fits; S-b: it predicts new widths; S-c: by the width."""

    sa_fits: Hypothesis = study.BLANK
    sb_between: Hypothesis = study.BLANK
    sb_beyond: Hypothesis = study.BLANK
    sc_width: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Scaling: errors of a family of MLPs over width x density, a law, and a width held out."""

    claims: Claims = Claims()
    """what is claimed"""
    family: tuple[int, ...] = (1,)
    """hidden layers, as multiples of the width; with several, the number of synapses is no power of
    the width where the inputs are few (the pilot predicted (2, 1) worse)"""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """members of the family, in ascending order"""
    held_out: int = 256
    """the width that the fit does not see"""
    learning_rate: Annotated[float, Range(gt=0)] = 3e-3
    """Adam's at the start of a round; it falls to zero by a cosine"""
    weight_decay: Annotated[float, Range(ge=0)] = 1e-4
    """decoupled, times the learning rate"""
    rewind_steps: Annotated[int, Range(ge=0)] = 100
    """training before the weights that every round goes back to"""
    steps: Annotated[int, Range(ge=1)] = 500
    """training of a round"""
    rounds: Annotated[int, Range(ge=4)] = 15
    """of pruning; the density after n of them is (1 - rate) ** n"""
    rate: Annotated[float, Range(gt=0, lt=1)] = 0.3
    """share of the living synapses cut in a round"""
    starts: Annotated[int, Range(ge=1)] = 4
    """from which a fit begins"""
    resamples: Annotated[int, Range(ge=20)] = 199
    """of the bootstrap of constants over seeds, which is printed and decides nothing"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        if min(self.family, default=0) < 1:
            raise ValueError(f"family must hold at least one multiple >= 1, not {self.family}")
        if list(self.widths) != sorted(set(self.widths)) or min(self.widths, default=0) < 1:
            raise ValueError(f"widths must ascend from 1 or more, not {self.widths}")
        if self.held_out not in self.widths:
            raise ValueError(f"held_out={self.held_out} is none of widths={self.widths}")
        if len(self.widths) < 3:
            raise ValueError(f"widths={self.widths}: at least two must be left to fit; give three")


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Prunes every member of the family on the seeds, then fits the law to each seed."""
    task = rounds.task(data, config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    errors, densities = [], []
    work = np.cumsum([1.0, *(50.0 + width for width in config.widths)])
    for width, done in zip(config.widths, work[1:] / work[-1], strict=True):
        found = jax.vmap(partial(chain, config, width), (0, None))(keys, task)
        errors.append(np.asarray(found[0], np.float64))
        densities.append(np.asarray(found[1], np.float64))
        tick(f"width {width}", float(done))
    error, density = np.stack(errors, 1), np.stack(densities, 1)  # [seeds, widths, rounds + 1]
    seen = [measure(config, e, d, seed) for seed, e, d in zip(seeds, error, density, strict=True)]
    metrics = {name: np.array([one[name] for one in seen]) for name in seen[0]}
    for place, width in enumerate(config.widths):
        metrics[f"dense_error_{width}"] = error[:, place, 0]
    metrics["least_error"] = error.min((1, 2))  # a relative deviation needs an error
    return study.Outcome(metrics, {"error": error, "density": density})


def draw(config: Config, outcome: study.Outcome) -> Any:
    """The law over the data, the invariant, the held-out width, and deviations with baselines."""
    from research import scaling_figure

    return scaling_figure.draw(config, outcome)


def tell(config: Config, outcome: study.Outcome) -> Any:
    """Draws, and prints what the mean over seeds says: constants, deviations, baselines."""
    study.print_table(
        f"fitted to the mean error of {len(config.seeds)} seeds [95% interval, bootstrap over "
        f"seeds]; width {config.held_out} held out",
        ["", "value", "interval"],
        [
            [name, f"{i.estimate:.4g}", f"[{i.low:.4g}, {i.high:.4g}]"]
            for name, i in summary(config, outcome).items()
        ],
    )
    return draw(config, outcome)


judge = study.judge

if __name__ == "__main__":
    study.main(Config, run, judge, tell)
