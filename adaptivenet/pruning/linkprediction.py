"""Regrowth without gradients: the shape of the mask predicts where it will grow.

A layer is a bipartite graph of inputs and outputs whose links are the living synapses. A missing
link between ``u`` and ``v`` is likely to appear if many paths of three living links join them, and
the more so the fewer links the units on these paths have to the outside of the local community that
the paths make. That is the Cannistraci-Hebb rule, after Hebb's cells that fire together; it needs
no gradient, no activity and no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from adaptivenet.pruning import scores
from adaptivenet.pruning.regrowth import Fraction, check_fraction

PyTree = Any
Rule = Literal["CH3-L3", "RA-L3"]

__all__ = ["ByLinkPrediction", "by_link_prediction", "link_scores"]


def link_scores(mask: jax.Array, rule: Rule = "CH3-L3") -> jax.Array:
    """How likely each missing link of a layer is, by its paths of length three.

    For input ``u`` and output ``v``, summed over all paths ``u - b - a - v`` of living links
    through another output ``b`` and another input ``a``::

        CH3-L3   1 / sqrt((1 + e(a)) (1 + e(b)))     e: links of a unit to the outside
        RA-L3    1 / sqrt(d(a) d(b))                 d: all links of a unit

    The outside of ``(u, v)`` is what lies neither on such a path nor is ``u`` or ``v`` itself. All
    of ``b``'s links to inputs that ``v`` shares are inside, so ``1 + e(b)`` is ``b``'s links less
    those that it has in common with ``v``; likewise for ``a`` and ``u``.

    Args:
      mask: bool ``[inputs, outputs]``; axes before the last are inputs together (a convolution's
        positions and channels).
      rule: "CH3-L3" takes ``(inputs * outputs)^2`` multiplications, as matrix products; "RA-L3",
        resource allocation, which it becomes in a very sparse mask without communities, takes
        ``inputs * outputs * (inputs + outputs)``.

    Returns:
      float32 of the mask's shape; 0 at living links and where no path leads.

    Raises:
      ValueError: another rule.

    References:
      Zhang et al., "Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep learning", ICLR 2024, equation of
      CH3-L3p; Muscoloni, Abdelhamid and Cannistraci, "Local-community network automata modelling
      based on length-three-paths", bioRxiv 346916, for RA-L3.

    >>> mask = jnp.array([[True, False], [True, True]])
    >>> link_scores(mask)[0].tolist()  # one path, none of whose units has a link outside
    [0.0, 1.0]
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r}; choose 'CH3-L3' or 'RA-L3'.")
    links = mask.reshape(-1, mask.shape[-1])
    if rule == "RA-L3":
        found = _resource_allocation(links)
    elif links.shape[0] < links.shape[1]:
        found = _cannistraci_hebb(links.T).T  # a step for each unit of the larger side
    else:
        found = _cannistraci_hebb(links)
    return jnp.where(mask, 0.0, found.reshape(mask.shape))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_root(degree: jax.Array) -> jax.Array:
    return jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1.0)), 0.0)


def _resource_allocation(links: jax.Array) -> jax.Array:
    m = links.astype(jnp.float32)
    of_inputs, of_outputs = (_inverse_root(jnp.sum(m, axis=axis)) for axis in (1, 0))
    return _dot(_dot(m * of_outputs, m.T) * of_inputs, m)


def _cannistraci_hebb(links: jax.Array) -> jax.Array:
    m = links.astype(jnp.float32)
    # Columns: 1 + e(b) for each end v; rows: 1 + e(a) for each end u. Counts, exact in float32.
    outputs = _inverse_root(jnp.sum(m, axis=0)[:, None] - _dot(m.T, m))  # [b, v]
    inputs = _inverse_root(jnp.sum(m, axis=1)[None, :] - _dot(m, m.T))  # [u, a]

    def of_input(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Scores of one input's links, [v]."""
        own, weight = row
        steps = m * weight[:, None] * own[None, :]  # from b back to a, [a, b]
        return jnp.sum(outputs * _dot(steps.T, m), axis=0)

    return jax.lax.map(of_input, (m, inputs))


@dataclass(frozen=True)
class ByLinkPrediction:
    """Wakes the likeliest missing links: see :func:`by_link_prediction`."""

    fraction: Fraction = 0.3
    rule: Rule = "CH3-L3"
    redistribute: bool = False

    def priority(
        self,
        params: PyTree,
        *,
        mask: PyTree,
        key: jax.Array,
        kept: PyTree | None = None,
        **signals: Any,
    ) -> PyTree:
        """The scores of the missing links; ties are broken at random."""
        del signals
        noise = scores.random(params, key=key)

        def leaf(living: jax.Array, u: jax.Array) -> jax.Array:
            found = link_scores(living, self.rule)
            # No path scores below 2^-32, so what no path reaches comes last, in random order.
            return jnp.where(found > 0, found * (1.0 + u * 2.0**-16), u * 2.0**-40)

        return jax.tree.map(leaf, mask if kept is None else kept, noise)


def by_link_prediction(
    fraction: Fraction = 0.3, *, rule: Rule = "CH3-L3", redistribute: bool = False
) -> ByLinkPrediction:
    """Wakes the missing links that the topology of the survivors predicts (Cannistraci-Hebb).

    Needs no signal: only the mask is looked at, after the cut. Links of equal scores (to a relative
    2^-16) and those that no path of length three reaches wake in random order.

    Args:
      fraction: share of the kept synapses that give way at every event, in [0, 1), or a function of
        the step.
      rule: as for :func:`link_scores`.
      redistribute: let the dead of all leaves compete, whatever the allocation.

    Returns:
      The rule.

    Raises:
      ValueError: the fraction is outside [0, 1), or another rule.

    References:
      Zhang et al., "Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep learning", ICLR 2024: ESML and CHT.

    >>> by_link_prediction(0.3).rule
    'CH3-L3'
    """
    check_fraction(fraction)
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r}; choose 'CH3-L3' or 'RA-L3'.")
    return ByLinkPrediction(fraction, rule, redistribute)
