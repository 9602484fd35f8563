"""How long synapses live: Kaplan-Meier curves, restricted means, the log-rank test.

A spell is the time from a synapse's birth to its pruning; it is censored where the record ends
before it is pruned. Spells are treated as independent here. Those of one network are not, so
compare numbers over seeds (such as each seed's restricted mean) where a decision hangs on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require
from adaptivenet.emergence.statistics._values import as_numbers, check_share

__all__ = ["LogRank", "Survival", "kaplan_meier", "log_rank", "restricted_mean"]


class Survival(NamedTuple):
    """A Kaplan-Meier curve: a step function that is right-continuous.

    Attributes:
      times: 0 and every time at which a spell ended or was censored; float64[k].
      survival: share that lives longer; float64[k].
      low: lower confidence limit of each; float64[k].
      high: upper confidence limit of each; float64[k].
      at_risk: spells that lasted up to that time; int64[k].
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray


class LogRank(NamedTuple):
    """The log-rank test.

    Attributes:
      statistic: chi-square with groups - 1 degrees of freedom.
      p: of "all groups have one survival curve".
      groups: how many there are.
      n: number of spells.
    """

    statistic: float
    p: float
    groups: int
    n: int


def _spells(durations: Any, observed: Any) -> tuple[np.ndarray, np.ndarray]:
    lengths = as_numbers(durations, "durations")
    if np.any(lengths < 0):
        raise ValueError(f"durations must not be negative; the least is {lengths.min():g}.")
    ends = as_numbers(observed, "observed")
    if ends.shape != lengths.shape:
        raise ValueError(f"observed holds {len(ends)} values, durations {len(lengths)}.")
    if np.any((ends != 0) & (ends != 1)):
        raise ValueError("observed must be True (pruned) or False (censored).")
    return lengths, ends.astype(bool)


def kaplan_meier(durations: Any, observed: Any, confidence: float = 0.95) -> Survival:
    """Share of spells that last longer than each time.

    Args:
      durations: length of each spell, in rounds or steps, shape [n].
      observed: whether its end was seen (True: pruned) or not (False: censored), shape [n].
      confidence: of the pointwise limits (Greenwood's variance on the scale of log(-log)).

    Returns:
      The curve. Where survival is 1 or 0 it has no variance, and both limits equal it.

    Raises:
      ValueError: nan, negative durations, lengths that differ, or ``observed`` not boolean.
      MissingExtra: lifelines is not installed.

    References:
      Kaplan and Meier, "Nonparametric estimation from incomplete observations", Journal of the
      American Statistical Association 53, 1958.

    >>> curve = kaplan_meier([1, 2, 2, 3], [True, True, False, True])
    >>> curve.times.tolist(), curve.survival.round(3).tolist(), curve.at_risk.tolist()
    ([0.0, 1.0, 2.0, 3.0], [1.0, 0.75, 0.5, 0.0], [4, 4, 3, 1])
    """
    check_share(confidence, "confidence")
    lengths, ends = _spells(durations, observed)
    fitter = require("lifelines").KaplanMeierFitter(alpha=1 - confidence)
    fitter.fit(lengths, ends)
    curve = fitter.survival_function_
    survival = curve.to_numpy()[:, 0]
    limits = fitter.confidence_interval_survival_function_.to_numpy()
    # At 1 and 0 the variance on the scale of log(-log) is 0 / 0.
    limits = np.where(np.isnan(limits), survival[:, None], limits)
    return Survival(
        curve.index.to_numpy(np.float64),
        survival.astype(np.float64),
        limits[:, 0].astype(np.float64),
        limits[:, 1].astype(np.float64),
        fitter.event_table["at_risk"].to_numpy(np.int64),
    )


def restricted_mean(curve: Survival, horizon: float) -> float:
    """Mean lifetime up to a horizon: the area under a Kaplan-Meier curve.

    Args:
      curve: of :func:`kaplan_meier`.
      horizon: where to stop, in the unit of the times; not beyond the last one.

    Returns:
      The mean of min(lifetime, horizon).

    Raises:
      ValueError: the horizon is not positive, or lies beyond the last time, where nothing is known.

    References:
      Royston and Parmar, "Restricted mean survival time", BMC Medical Research Methodology 13:152,
      2013.

    >>> restricted_mean(kaplan_meier([1, 2, 2, 3], [True, True, False, True]), 3)
    2.25
    """
    last = float(curve.times[-1])
    if not 0 < horizon <= last:
        raise ValueError(
            f"horizon={horizon:g} must lie in (0, {last:g}], where the curve is known."
        )
    edges = np.append(np.minimum(curve.times, horizon), horizon)
    return float(np.sum(np.diff(edges) * curve.survival))


def log_rank(durations: Any, observed: Any, groups: Any) -> LogRank:
    """Tests whether groups of spells have one survival curve.

    Args:
      durations: length of each spell, shape [n].
      observed: whether its end was seen, shape [n].
      groups: label of each spell, shape [n].

    Returns:
      The test.

    Raises:
      ValueError: as :func:`kaplan_meier`, or fewer than two groups.
      MissingExtra: lifelines is not installed.

    References:
      Mantel, "Evaluation of survival data", Cancer Chemotherapy Reports 50, 1966.

    >>> log_rank([1, 2, 3, 7, 8, 9], [True] * 6, ["a"] * 3 + ["b"] * 3).p < 0.05
    True
    """
    lengths, ends = _spells(durations, observed)
    labels = np.asarray(groups)
    if labels.shape != lengths.shape:
        raise ValueError(f"groups holds {labels.size} labels, durations {len(lengths)} values.")
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"the log-rank test needs at least two groups, got {names.tolist()}.")
    result = require("lifelines.statistics").multivariate_logrank_test(lengths, codes, ends)
    return LogRank(float(result.test_statistic), float(result.p_value), len(names), len(lengths))
