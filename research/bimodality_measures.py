"""What S1 measures in a network: dips, modes, critical gains, and the price of a cut."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet.emergence import nulls, statistics
from research import rounds, study

if TYPE_CHECKING:
    from research.bimodality import Config

BINS = np.linspace(-6, 1, 29)
TINY = 1e-12  # below it a weight is forgotten for good; log needs a floor


@partial(jax.jit, static_argnums=0)
def accuracies(config: Config, params: Any, task: Any) -> tuple[Any, Any, Any]:
    """Accuracy, the same after a cut without fine-tuning, and the share of |w| it keeps."""
    cut, _ = nulls.truncation(params, config.sparsity, allocation=an.pruning.Uniform())
    mass = [sum(jnp.sum(jnp.abs(w)) for w in rounds.kernels(p)) for p in (cut, params)]
    return rounds.accuracy(params, task), rounds.accuracy(cut, task), mass[0] / mass[1]


def dips(params: Any, *, logs: bool) -> np.ndarray:
    """Dip statistic and p of each layer, ``[layers, 2]``: of signed survivors, or of log|w|."""
    found = []
    for kernel in rounds.kernels(params):
        values = np.asarray(kernel, np.float64).ravel()
        values = np.log(np.maximum(np.abs(values), TINY)) if logs else values[values != 0]
        found.append(statistics.dip(values)[:2])
    return np.array(found)


def critical(config: Config, dip: np.ndarray) -> float:
    """Log of the gain from which on both large layers reject one mode at 5 %.

    Between the last gain that does not reject and the first that does, the larger p of the two
    layers is interpolated, log against log. A gain beyond the grid's ends is put one step outside.
    """
    p = np.maximum(dip[:, :2, 1].max(1), 1e-3)
    inside = np.log(config.gains)
    if not np.any(p >= 0.05):
        return float(2 * inside[0] - inside[1])
    last = len(p) - 1 - int(np.argmax(p[::-1] >= 0.05))
    if last == len(p) - 1:
        return float(2 * inside[-1] - inside[-2])
    way = np.log(p[last] / 0.05) / np.log(p[last] / p[last + 1])
    return float(inside[last] + way * (inside[last + 1] - inside[last]))


def modes(kernel: np.ndarray) -> np.ndarray:
    """Up to four modes of log10|w|, nan where there are fewer."""
    found = statistics.modes(np.log10(np.maximum(np.abs(kernel.ravel()), TINY)))[-4:]
    return np.pad(found, (0, 4 - len(found)), constant_values=np.nan)


def histogram(kernel: np.ndarray) -> np.ndarray:
    """Share of the weights in each of `BINS` of log10|w|; what is smaller counts in the first."""
    values = np.log10(np.maximum(np.abs(kernel.ravel()), TINY))
    return np.histogram(np.clip(values, BINS[0], BINS[-1]), BINS)[0] / values.size


def prediction_gain(outcome: study.Outcome) -> np.ndarray:
    """Out of sample, what the dip adds to the kept share of |w| in predicting the cut's price.

    For each seed, both linear models are fitted on the other seeds (all gains), and the difference
    of their mean absolute errors on this seed is its number.
    """
    c = outcome.curves
    price = c["learning_accuracy"] - c["learning_cut"]
    mass, dip = c["learning_mass"], c["learning_log_dip"][:, :, :2, 0].mean(2)
    gain = []
    for seed in range(len(price)):
        others = np.arange(len(price)) != seed
        errors = []
        for inputs in ((mass,), (mass, dip)):
            design = np.stack([np.ones_like(mass), *inputs], -1)
            fit = np.linalg.lstsq(
                design[others].reshape(-1, design.shape[-1]), price[others].ravel(), rcond=None
            )[0]
            errors.append(np.mean(np.abs(design[seed] @ fit - price[seed])))
        gain.append(errors[0] - errors[1])
    return np.array(gain)
