"""What S2 measures: hazards at equal magnitude, observed and after a randomised reprieve."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptivenet.emergence import statistics

if TYPE_CHECKING:
    from research.feedback import Config

RATIOS = np.array([0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])  # of log(|w| / threshold)


def observed(config: Config, paths: Any, seed: int) -> dict[str, dict[str, Any]]:
    """The hazard of one seed in both arms: coefficient of age, with and without frailty, and rates.

    Magnitudes are equal only where both arms have synapses at risk: in the range just above the
    threshold in which nearly all of the shadow's deaths lie. A layer in which fewer than five die
    says nothing of age there, and is left out.
    """
    last, rows = config.before - 1, {}  # before the reprieve begins
    for arm, path in paths.items():
        alive, died = path.alive[seed, :last], path.died[seed, 1 : last + 1]
        at, which = np.nonzero(alive)
        age, ratio = path.age[seed, :last][alive], path.score[seed, :last][alive]
        rows[arm] = (died[at, which], age, ratio, path.leaf[which], at, which)
    dead, _, ratio = rows["shadow"][:3]
    edge = np.quantile(ratio[dead], config.zone) if dead.any() else 0.0
    found = {}
    for arm, (dead, age, ratio, layer, at, which) in rows.items():
        inside = ratio <= edge
        deaths = np.bincount(layer[inside & dead], minlength=len(paths[arm].names))
        inside &= deaths[layer] >= 5
        covariates = {"age": np.log1p(age), "ratio": ratio, "layer": layer, "round": at}
        covariates = {name: value[inside] for name, value in covariates.items()}
        factors = ("layer",) if np.sum(deaths >= 5) > 1 else ()
        covariates = {k: v for k, v in covariates.items() if k != "layer" or factors}
        ages = [float("nan")] * 2
        if inside.sum() >= 50:
            fit = partial(statistics.hazard, splines={"ratio": 3}, factors=factors)
            ages[0] = fit(dead[inside], covariates).coefficients["age"]
            ages[1] = fit(dead[inside], covariates, frailty=which[inside]).coefficients["age"]
        rates, gap = by_magnitude(dead, age, ratio)
        found[arm] = {"age": ages[0], "frail": ages[1], "gap": gap, "rates": rates}
        found[arm]["hazard"] = dead.mean()
    return found


def by_magnitude(dead: Any, age: Any, ratio: Any) -> tuple[np.ndarray, float]:
    """Death rates of young and old in bins of magnitude, and by how much those of the old are less.

    Unlike a coefficient the difference of rates exists where nobody dies; bins are weighted by how
    well they tell young from old.
    """
    rates, gap, weight = np.full((2, len(RATIOS) - 1), np.nan), 0.0, 0.0
    for place in range(len(RATIOS) - 1):
        inside = (ratio >= RATIOS[place]) & (ratio < RATIOS[place + 1])
        young, old = (dead[inside & group] for group in (age <= 2, age >= 6))
        for row, group in enumerate((young, old)):
            if len(group) >= 20:
                rates[row, place] = group.mean()
        if len(young) and len(old):
            size = 1 / (1 / len(young) + 1 / len(old))
            gap, weight = gap + size * (young.mean() - old.mean()), weight + size
    return rates, gap / weight if weight else float("nan")


def matched(near: Any, forced: Any, ratio: Any, alive: Any) -> float:
    """Among those alive at the release: by how much the kept die less in the next round.

    Compared within tenths of the magnitude at the release; weighted by their size.
    """
    at = near & (ratio >= 0)
    edges = np.quantile(ratio[at], np.linspace(0, 1, 11)[1:-1]) if at.any() else np.zeros(9)
    bins, difference, weight = np.digitize(ratio, edges), 0.0, 0.0
    for bin_ in range(10):
        kept_, spared = (at & (bins == bin_) & group for group in (forced, ~forced))
        if kept_.any() and spared.any():
            size = 1 / (1 / kept_.sum() + 1 / spared.sum())
            difference += size * (alive[kept_].mean() - alive[spared].mean())
            weight += size
    return difference / weight if weight else float("nan")
