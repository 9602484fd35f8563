"""Logistic regression: the fit, errors by cluster, and rows that are predicted perfectly."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require

_ROWS_AT_A_TIME = 5_000


class Fit(NamedTuple):
    """A maximum-likelihood fit: what is needed for errors of whichever kind.

    Attributes:
      coefficients: float64[k].
      information: negative Hessian of the log likelihood; float64[m, m], m >= k.
      scores: gradient by cluster; float64[clusters, m]; empty where not asked for.
      informations: the information by cluster; float64[clusters, m, m]; likewise.
      converged: whether the fit converged.
    """

    coefficients: np.ndarray
    information: np.ndarray
    scores: np.ndarray
    informations: np.ndarray
    converged: bool


def fit_logistic(columns: np.ndarray, outcome: np.ndarray) -> Fit:
    """Logistic regression by statsmodels; columns may depend on each other (pseudo-inverse)."""
    linear = require("statsmodels.genmod.generalized_linear_model")
    family = require("statsmodels.genmod.families").Binomial()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is looked for in the result
        result = linear.GLM(outcome, columns, family=family).fit(maxiter=50)
    coefficients = np.asarray(result.params, np.float64)
    mean = require("scipy.special").expit(columns @ coefficients)
    information = (columns * (mean * (1 - mean))[:, None]).T @ columns
    converged = bool(result.converged) and bool(np.all(np.isfinite(coefficients)))
    return Fit(coefficients, information, np.empty(0), np.empty(0), converged)


def jackknife(scores: np.ndarray, informations: np.ndarray) -> np.ndarray:
    """Covariance by leaving out each cluster, the fits without it taken one Newton step away.

    Args:
      scores: gradient of the log likelihood by cluster, at the estimate; [clusters, k].
      informations: negative Hessian by cluster; [clusters, k, k].

    Returns:
      Covariance of the estimate, [k, k].

    References:
      MacKinnon, Nielsen and Webb, arXiv:2406.00650, 2024 (CV3L).
    """
    clusters = len(scores)
    total = informations.sum(0)
    without = np.linalg.pinv(total[None] - informations, hermitian=True)
    steps = np.einsum("cij,cj->ci", without, scores)
    return (clusters - 1) / clusters * steps.T @ steps


def overlapping(columns: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Rows that no combination of the columns predicts perfectly.

    A likelihood without a maximum has one on these rows, and it is where the fit on all rows goes
    in the limit.

    Args:
      columns: [n, k].
      outcome: 0 or 1, [n].

    Returns:
      bool[n]; all True where there is no separation.

    References:
      Albert and Anderson, "On the existence of maximum likelihood estimates in logistic regression
      models", Biometrika 71, 1984. Konis, "Linear programming algorithms for detecting separated
      data in binary logistic regression models", University of Oxford, 2007. Geyer, "Likelihood
      inference in exponential families and directions of recession", Electronic Journal of
      Statistics 3, 2009.
    """
    scale = np.max(np.abs(columns), axis=0)
    signed = columns / np.where(scale > 0, scale, 1.0)
    signed = np.where(outcome > 0, 1.0, -1.0)[:, None] * signed
    rows = np.ones(len(signed), bool)
    while rows.any():
        strictly = signed[rows] @ _direction(signed[rows]) > 1e-7
        if not strictly.any():
            break
        rows[np.flatnonzero(rows)[strictly]] = False
    return rows


def _direction(signed: np.ndarray) -> np.ndarray:
    """The direction that puts rows farthest on their right side with none on the wrong one."""
    optimize = require("scipy.optimize")
    objective = -signed.sum(0) / len(signed)
    # Few rows decide, so those that are violated join in as they are found.
    active = np.zeros(len(signed), bool)
    active[:: max(1, len(signed) // _ROWS_AT_A_TIME)] = True
    while True:
        result = optimize.linprog(
            objective, A_ub=-signed[active], b_ub=np.zeros(int(active.sum())), bounds=(-1, 1)
        )
        margins = signed @ result.x
        wrong = np.flatnonzero((margins < -1e-7) & ~active)
        if not len(wrong):
            return result.x
        worst = np.argsort(margins[wrong], kind="stable")[:_ROWS_AT_A_TIME]
        active[wrong[worst]] = True
