"""The law of the errors of pruned networks, its fit, and what it is compared with.

Everything here is a function of numbers: no network is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from adaptivenet.emergence import statistics

# Of log p at the mean width, log gamma, psi, log of the plateau: far beyond what was ever found.
_LOW = np.log([1e-8, 0.02, np.exp(-2.0), 1e-3])
_HIGH = np.log([1e3, 20.0, np.exp(6.0), 1.0])
_STARTS = np.log([[1e-3, 0.1, 1.0, 0.5], [1.0, 1.5, np.exp(2.0), 1.0]])


class Points(NamedTuple):
    """Measured errors, one a network, in arrays ``[n]``.

    Attributes:
      dense: error of the unpruned network of the same width.
      density: share of the synapses that are kept, below 1.
      width: of the network.
      error: of the pruned network.
    """

    dense: np.ndarray
    density: np.ndarray
    width: np.ndarray
    error: np.ndarray


class Law(NamedTuple):
    """Constants of the law.

    Attributes:
      scale: p', which sets the density at which the power law begins; one for all widths.
      gamma: exponent of the power law.
      psi: exponent of the width in the invariant ``width ** psi * density``.
      plateau: error of a network that is nearly empty.
    """

    scale: float
    gamma: float
    psi: float
    plateau: float


class Power(NamedTuple):
    """Power law without plateaus, ``factor * (width ** psi * density) ** -gamma``."""

    factor: float
    gamma: float
    psi: float


def law(constants: Law, dense: Any, density: Any, width: Any) -> np.ndarray:
    """Error of a pruned network: a low plateau, a power law, a high plateau.

    With ``p = scale / width ** psi`` and the imaginary unit i, it is ``dense * |(density - i p
    (plateau / dense) ** (1 / gamma)) / (density - i p)| ** gamma``. Depth and the number of
    examples, which the authors vary as well, are constant here and thus part of the scale.

    Args:
      constants: of the law.
      dense: error of the unpruned network.
      density: share of the synapses that are kept.
      width: of the network.

    Returns:
      The error, broadcast over the arguments.

    References:
      Rosenfeld, Frankle, Carbin and Shavit, "On the predictability of pruning across scales", ICML
      2021.

    >>> constants = Law(scale=0.5, gamma=0.4, psi=1.0, plateau=0.9)
    >>> law(constants, 0.1, [1.0, 0.05, 1e-9], 100).round(3).tolist()
    [0.12, 0.358, 0.9]
    >>> law(constants, 0.1, 1.0, 1e9).round(6).item()  # far from the transition
    0.1
    """
    dense, density, width = (np.asarray(x, np.float64) for x in (dense, density, width))
    scale, gamma, psi, plateau = constants
    p = np.log(scale) - psi * np.log(width)
    gap = np.log(plateau) - np.log(dense)
    # |d - i a| ** gamma, in logarithms: (plateau / dense) ** (1 / gamma) may be huge.
    above = np.logaddexp(2 * np.log(density), 2 * (p + gap / gamma))
    below = np.logaddexp(2 * np.log(density), 2 * p)
    return dense * np.exp(gamma / 2 * (above - below))


def power(constants: Power, density: Any, width: Any) -> np.ndarray:
    """A power law without plateaus.

    >>> power(Power(0.1, 0.5, 1.0), [1.0, 0.25], 4.0).tolist()
    [0.05, 0.1]
    """
    factor, gamma, psi = constants
    log = np.log(density) + psi * np.log(width)
    return factor * np.exp(-gamma * log)


def deviation(predicted: Any, measured: Any) -> float:
    """Mean of ``|predicted / measured - 1|``.

    >>> round(deviation([1.1, 0.8], [1.0, 1.0]), 3)
    0.15
    """
    return float(np.mean(np.abs(np.asarray(predicted) / np.asarray(measured) - 1)))


def fit(points: Points, *, widths: bool = True, starts: int = 4, seed: int = 0) -> Law:
    """Fits the law to relative deviations by least squares, from several starts.

    Args:
      points: what was measured.
      widths: whether the width enters; otherwise psi is 0.
      starts: the first is always the same, the others are drawn.
      seed: of the starts.

    Returns:
      The constants of the start that ends lowest.

    Raises:
      ValueError: an error or a density is not positive, or the points are fewer than constants.

    >>> true = Law(scale=2.0, gamma=0.5, psi=1.0, plateau=0.9)
    >>> density, width = (x.ravel() for x in np.meshgrid(np.geomspace(0.01, 0.5, 9), [10.0, 40.0]))
    >>> error = law(true, 0.2, density, width)
    >>> found = fit(Points(np.full(18, 0.2), density, width, error))
    >>> np.allclose(found, true, rtol=1e-3)
    True
    """
    _check(points, 3 + widths)
    middle = float(np.mean(np.log(points.width)))
    free = np.array([True, True, widths, True])

    def constants(x: np.ndarray) -> Law:
        p, gamma, psi, plateau = np.zeros(4) + _put(free, x)
        # The scale is fitted at the mean width, where it does not depend on psi.
        scale = np.exp(p + psi * middle)
        return Law(*(float(c) for c in (scale, np.exp(gamma), psi, np.exp(plateau))))

    def residuals(x: np.ndarray) -> np.ndarray:
        return law(constants(x), *points[:3]) / points.error - 1

    low, high = _STARTS
    drawn = np.random.default_rng(seed).uniform(low, high, (max(starts - 1, 0), 4))
    first = (low + high) / 2
    return constants(_lowest(residuals, [x[free] for x in (first, *drawn)], free))


def fit_power(points: Points) -> Power:
    """Fits the power law without plateaus to relative deviations by least squares.

    Args:
      points: what was measured.

    Returns:
      Its constants.

    Raises:
      ValueError: as :func:`fit`.
    """
    from scipy.optimize import least_squares

    _check(points, 3)
    log = np.stack([np.ones_like(points.width), np.log(points.density), np.log(points.width)], -1)
    begin = np.linalg.lstsq(log, np.log(points.error), rcond=None)[0]
    found = least_squares(lambda x: np.exp(log @ x) / points.error - 1, begin, method="lm").x
    return Power(float(np.exp(found[0])), float(-found[1]), float(found[2] / found[1]))


def interpolate(points: Points, dense: float, density: Any, width: float) -> np.ndarray:
    """What needs no law: log(error / dense) by a straight line in log width, at equal density.

    The line goes through the two widths that are nearest (in log width); outside of them it is
    extended.

    Args:
      points: what was measured.
      dense: error of the unpruned network of the width that is asked for.
      density: the densities that are asked for.
      width: that is asked for.

    Returns:
      Errors, shaped like the densities.

    >>> points = Points(*np.array([[0.2, 0.5, 10.0, 0.4], [0.2, 0.5, 40.0, 0.3]]).T)
    >>> interpolate(points, 0.2, [0.5], 20.0).round(4).tolist()
    [0.3464]
    """
    known = np.unique(points.width)
    near = sorted(known[np.argsort(np.abs(np.log(known / width)))[:2]])
    ends = []
    for one in near:
        at = points.width == one
        order = np.argsort(points.density[at])
        ratio = np.log(points.error[at] / points.dense[at])[order]
        ends.append(np.interp(np.log(density), np.log(points.density[at])[order], ratio))
    way = np.log(width / near[0]) / np.log(near[1] / near[0])
    return dense * np.exp(ends[0] + way * (ends[1] - ends[0]))


def intervals(
    errors: np.ndarray, statistic: Callable[[np.ndarray], tuple[float, ...]], resamples: int
) -> list[statistics.Interval]:
    """Bootstrap over seeds of numbers that come from the mean errors.

    Args:
      errors: ``[seeds, ...]``.
      statistic: from the errors' mean over seeds to some numbers.
      resamples: how often seeds are drawn anew.

    Returns:
      An interval for each number (BCa).
    """
    places = np.arange(len(errors))

    @cache  # all numbers come from the same resamples
    def numbers(drawn: tuple[int, ...]) -> tuple[float, ...]:
        return statistic(errors[list(drawn)].mean(0))

    def one(which: int) -> statistics.Interval:
        def at(drawn: np.ndarray) -> float:
            return numbers(tuple(sorted(int(x) for x in drawn)))[which]

        return statistics.bca(places, at, resamples=resamples)

    return [one(which) for which in range(len(numbers(tuple(places.tolist()))))]


def _put(free: np.ndarray, x: np.ndarray) -> np.ndarray:
    whole = np.zeros(len(free))
    whole[free] = x
    return whole


def _lowest(residuals: Any, starts: Any, free: np.ndarray) -> np.ndarray:
    from scipy.optimize import least_squares

    bounds = (_LOW[free], _HIGH[free])
    ends = [least_squares(residuals, start, bounds=bounds, x_scale="jac") for start in starts]
    return min(ends, key=lambda end: end.cost).x


def _check(points: Points, constants: int) -> None:
    if len(points.error) < constants:
        raise ValueError(
            f"{len(points.error)} points cannot fix {constants} constants; measure more densities "
            "or widths."
        )
    for name, values in points._asdict().items():
        if not np.all(np.asarray(values) > 0):
            raise ValueError(
                f"points.{name} must be positive, as relative deviations are fitted; the least is "
                f"{np.min(values)}. Measure on more examples, or leave such networks out."
            )
