"""Logistic regression with a Gaussian random intercept for each group of rows."""

from __future__ import annotations

import numpy as np

from adaptivenet.emergence._extras import require
from adaptivenet.emergence.statistics._logistic import Fit, fit_logistic

_NODES = 21


class Likelihood:
    """Marginal likelihood of binary rows in groups, by Gauss-Hermite quadrature.

    Args:
      columns: [n, k].
      outcome: 0 or 1, [n].
      groups: code of each row's group, [n].
      nodes: of the quadrature.
    """

    def __init__(
        self, columns: np.ndarray, outcome: np.ndarray, groups: np.ndarray, nodes: int = _NODES
    ):
        order = np.argsort(groups, kind="stable")
        self.columns, self.outcome = columns[order], outcome[order]
        ordered = groups[order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.place = np.cumsum(np.r_[True, ordered[1:] != ordered[:-1]]) - 1
        self.groups = ordered[self.starts]
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        self.points, self.log_weights = points, np.log(weights / np.sqrt(2 * np.pi))

    def _integrate(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log likelihood by group, and by row the mean of the residual and of residual x node."""
        special = require("scipy.special")
        odds = (self.columns @ theta[:-1])[:, None] + theta[-1] * self.points
        signs = np.where(self.outcome > 0, 1.0, -1.0)[:, None]
        rows = -np.logaddexp(0.0, -signs * odds)
        joint = np.add.reduceat(rows, self.starts, axis=0) + self.log_weights
        total = special.logsumexp(joint, axis=1)
        share = np.exp(joint - total[:, None])[self.place]
        weighted = share * (self.outcome[:, None] - special.expit(odds))
        return total, weighted.sum(1), weighted @ self.points

    def value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Log likelihood and its gradient; ``theta`` is the coefficients and the intercept's sd."""
        total, residual, slope = self._integrate(theta)
        return float(total.sum()), np.append(self.columns.T @ residual, slope.sum())

    def scores(self, theta: np.ndarray) -> np.ndarray:
        """Gradient by group, [groups, k + 1]."""
        _, residual, slope = self._integrate(theta)
        rows = np.column_stack([self.columns * residual[:, None], slope])
        return np.add.reduceat(rows, self.starts, axis=0)


def fit_frailty(
    columns: np.ndarray, outcome: np.ndarray, synapses: np.ndarray, clusters: np.ndarray | None
) -> tuple[Fit, float]:
    """Maximum likelihood with a random intercept.

    Args:
      columns: [n, k]; they may depend on each other.
      outcome: 0 or 1, [n].
      synapses: code of each row's synapse, [n]; a synapse lies in one cluster.
      clusters: code of each row's cluster, [n], or None.

    Returns:
      The fit, whose information also has a row of the sd, and the sd.
    """
    # Orthogonal columns of one size make the climb short; the sd may take either sign, so that
    # 0 is no boundary.
    _, sizes, rotation = np.linalg.svd(columns.T @ columns / len(columns), hermitian=True)
    kept = sizes > 1e-12 * sizes[0]
    back = rotation[kept].T / np.sqrt(sizes[kept])
    likelihood = Likelihood(columns @ back, outcome, synapses)
    start = np.append(fit_logistic(likelihood.columns, likelihood.outcome).coefficients, 0.7)
    n = len(outcome)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = likelihood.value_and_gradient(theta)
        return -value / n, -gradient / n

    result = require("scipy.optimize").minimize(
        loss, start, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 500}
    )
    theta = result.x
    converged = bool(np.max(np.abs(result.jac)) < 1e-5)
    lengths = np.diff(np.r_[likelihood.starts, n])
    if clusters is None:
        codes = np.zeros(len(lengths), np.int64)
    else:
        of_synapse = np.zeros(int(synapses.max()) + 1, np.int64)
        of_synapse[synapses] = clusters
        codes = np.unique(of_synapse[likelihood.groups], return_inverse=True)[1]
    starts = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[starts], np.arange(codes.max() + 1))

    def by_cluster(theta: np.ndarray) -> np.ndarray:
        return np.add.reduceat(likelihood.scores(theta)[starts], edges, axis=0)

    step = 1e-4
    slopes = [by_cluster(theta + e) - by_cluster(theta - e) for e in step * np.eye(len(theta))]
    informations = -np.stack(slopes, axis=-1) / (2 * step)
    informations = (informations + np.swapaxes(informations, -1, -2)) / 2
    # Back to the columns' own coefficients: theta = (back^+ beta, sd).
    forward = np.zeros((len(theta), columns.shape[1] + 1))
    forward[:-1, :-1] = np.linalg.pinv(back)
    forward[-1, -1] = 1.0
    fit = Fit(
        back @ theta[:-1],
        forward.T @ informations.sum(0) @ forward,
        by_cluster(theta) @ forward,
        forward.T @ informations @ forward,
        converged,
    )
    return fit, abs(float(theta[-1]))
