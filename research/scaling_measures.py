"""What the study of scaling measures of a seed, and of the mean over seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from research import scaling_fit
from research.scaling_fit import Points

if TYPE_CHECKING:
    from adaptivenet.emergence.statistics import Interval
    from research.scaling import Config


def points(config: Config, error: np.ndarray, density: np.ndarray, widths: Any) -> Points:
    """The pruned networks of some widths; the dense ones are given to the law, not predicted.

    Args:
      config: the study's config.
      error: ``[widths, rounds + 1]``; the first of a row is the dense network's.
      density: likewise.
      widths: which members to take.

    Returns:
      The points, a row of ``rounds`` for each member.
    """
    rows = [config.widths.index(width) for width in widths]
    pruned = error[rows, 1:]
    dense = np.broadcast_to(error[rows, :1], pruned.shape)
    width = np.broadcast_to(np.array(widths, np.float64)[:, None], pruned.shape)
    return Points(*(x.ravel() for x in (dense, density[rows, 1:], width, pruned)))


def others(config: Config, left_out: int) -> tuple[int, ...]:
    """All widths but one."""
    return tuple(width for width in config.widths if width != left_out)


class Comparison(NamedTuple):
    """The law and its rivals, fitted to all widths but the one held out.

    Attributes:
      constants: of the law.
      fitted: name to predicted errors of the fitted widths, ``[points]``.
      held: name to predicted errors of the held-out width, ``[rounds]``; of that width, all have
        seen at most the dense error.
      train: what was fitted.
      new: what was held out.
    """

    constants: scaling_fit.Law
    fitted: dict[str, np.ndarray]
    held: dict[str, np.ndarray]
    train: Points
    new: Points

    def numbers(self) -> dict[str, float]:
        """Constants, and means of ``|predicted / measured - 1|``."""
        out = {name: float(value) for name, value in self.constants._asdict().items()}
        for name, guess in self.fitted.items():
            out[f"fit_{name}"] = scaling_fit.deviation(guess, self.train.error)
        for name, guess in self.held.items():
            out[f"held_{name}"] = scaling_fit.deviation(guess, self.new.error)
        return out


def compare(
    config: Config, error: np.ndarray, density: np.ndarray, starts: int | None = None
) -> Comparison:
    """Fits the law, the law without the width, and a power law; and interpolates.

    Args:
      config: the study's config.
      error: ``[widths, rounds + 1]``.
      density: likewise.
      starts: of each fit; the config's by default.

    Returns:
      What each says of the fitted widths and of the held-out one.
    """
    f, starts = scaling_fit, starts or config.starts
    train = points(config, error, density, others(config, config.held_out))
    new = points(config, error, density, (config.held_out,))
    law, flat = f.fit(train, starts=starts), f.fit(train, widths=False, starts=starts)
    line = f.fit_power(train)
    between = f.interpolate(train, float(new.dense[0]), new.density, config.held_out)

    def of(points: Points) -> dict[str, np.ndarray]:
        return {
            "law": f.law(law, *points[:3]),
            "no_width": f.law(flat, *points[:3]),
            "power_law": f.power(line, *points[1:3]),
        }

    return Comparison(law, of(train), {**of(new), "interpolation": between}, train, new)


def measure(config: Config, error: np.ndarray, density: np.ndarray, seed: int) -> dict[str, float]:
    """All numbers of one seed, which is a network of each width at each density.

    Args:
      config: the study's config.
      error: ``[widths, rounds + 1]``.
      density: likewise.
      seed: of the null, which permutes errors.

    Returns:
      Name to number.
    """
    f, found = scaling_fit, compare(config, error, density)
    out = found.numbers()
    for rival in ("no_width", "power_law", "interpolation"):
        out[f"gain_over_{rival}"] = out[f"held_{rival}"] - out["held_law"]
    # The null: every width keeps its densities and its errors, but not which belongs to which.
    rows = found.train.error.reshape(-1, config.rounds)
    mixed = np.random.default_rng(seed).permuted(rows, axis=1).ravel()
    null = found.train._replace(error=mixed)
    out["fit_permuted"] = f.deviation(f.law(f.fit(null, starts=config.starts), *null[:3]), mixed)
    for width in config.widths:  # exploratory: every other width held out in its turn
        rest = points(config, error, density, others(config, width))
        new = points(config, error, density, (width,))
        guess = f.law(f.fit(rest, starts=config.starts), *new[:3])
        out[f"left_out_{width}"] = f.deviation(guess, new.error)
    return out


def summary(config: Config, outcome: Any) -> dict[str, Interval]:
    """Constants and deviations of the mean error over seeds, as the law's authors report them.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      Name to bootstrap interval over seeds.
    """
    density = outcome.curves["density"][0]
    names = list(compare(config, outcome.curves["error"].mean(0), density).numbers())

    def numbers(error: np.ndarray) -> tuple[float, ...]:
        return tuple(compare(config, error, density, starts=2).numbers().values())

    found = scaling_fit.intervals(outcome.curves["error"], numbers, config.resamples)
    return dict(zip(names, found, strict=True))
