"""Hard-concrete gates: noise that is exactly zero or one at times, with a slope all the same.

A gate multiplies a synapse, or all synapses of a unit. It is a concrete (binary, relaxed) variable
that is stretched past [0, 1] and clipped, so that it has mass at both ends and its chance of not
being zero, the expected L0 norm, can be minimised by gradients::

    gates = concrete.init(params, axis=-2)          # one a unit
    law = concrete.HardConcrete()

    def objective(params, gates, key, batch):
        net = concrete.apply(law.sample(key, gates), params)
        return loss(net, batch) + strength * law.expected_l0(gates, params)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import Axes, known, unit_shape

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["HardConcrete", "apply", "init"]


def init(
    params: PyTree,
    axis: Axes | None = None,
    select: trees.Select = None,
    *,
    drop: Number = 0.5,
) -> PyTree:
    """The locations ``log alpha`` of gates that start open with a given chance.

    Args:
      params: pytree of floating arrays.
      axis: None gives each synapse a gate of its own; the axis (or axes) of a leaf along which its
        units lie gives each unit one: -1 the outputs of a kernel, -2 its inputs or input channels,
        ``(-2, -1)`` each pair of channels.
      select: the leaves with gates, as for :func:`adaptivenet.trees.select_leaves`.
      drop: initial dropout rate, in (0, 1): the locations are ``log((1 - drop) / drop)``.

    Returns:
      Pytree of float32 (float64 where the parameters are); axes that are not of units have length
      1, leaves without gates are masked nodes.

    Raises:
      ValueError: the rate is outside (0, 1), or a selected leaf has no such axis.

    References:
      Louizos et al., "Learning sparse neural networks through L0 regularization", ICLR 2018,
      arXiv:1712.01312, section 4.

    >>> init({"w": jnp.ones((3, 2))}, axis=-1)["w"].tolist()
    [[0.0, 0.0]]
    """
    if known(drop) and not np.all((np.asarray(drop) > 0) & (np.asarray(drop) < 1)):
        raise ValueError(f"drop must be a rate in (0, 1), not {drop}.")
    chosen = trees.synapses(params, select)
    names = iter(trees.paths(chosen))

    def leaf(param: jax.Array) -> jax.Array:
        name = next(names)
        dtype = jnp.float64 if param.dtype == jnp.float64 else jnp.float32
        rate = jnp.asarray(drop).astype(dtype)
        shape = param.shape if axis is None else unit_shape(param.shape, axis, name)
        return jnp.broadcast_to(jnp.log1p(-rate) - jnp.log(rate), shape)

    return jax.tree.map(leaf, chosen)


@dataclass(frozen=True)
class HardConcrete:
    """The law of hard-concrete gates.

    All methods take a pytree of locations ``log alpha`` and return one like it.

    Attributes:
      temperature: of the concrete variable, > 0; the lower, the more binary.
      low: left end of the stretch, < 0.
      high: right end of the stretch, > 1.

    Raises:
      ValueError: a number is out of its range.

    References:
      Louizos et al., 2018, section 2.2, equations 10 to 12; Maddison et al., "The concrete
      distribution", ICLR 2017.

    >>> law = HardConcrete()
    >>> round(law.kept({"w": jnp.zeros(())})["w"].item(), 4)
    0.8318
    """

    temperature: Number = 2 / 3
    low: Number = -0.1
    high: Number = 1.1

    def __post_init__(self) -> None:
        if known(self.temperature) and not np.all(np.asarray(self.temperature) > 0):
            raise ValueError(f"temperature must be positive, not {self.temperature}.")
        if known(self.low) and not np.all(np.asarray(self.low) < 0):
            raise ValueError(f"low must be below 0, not {self.low}: no gate would ever be zero.")
        if known(self.high) and not np.all(np.asarray(self.high) > 1):
            raise ValueError(f"high must be above 1, not {self.high}: no gate would ever be one.")

    def _numbers(self, like: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        numbers = (self.temperature, self.low, self.high)
        temperature, low, high = (jnp.asarray(n).astype(like.dtype) for n in numbers)
        return temperature, low, high

    def _stretch(self, concrete: jax.Array) -> jax.Array:
        _, low, high = self._numbers(concrete)
        return jnp.clip(concrete * (high - low) + low, 0, 1)

    def sample(self, key: jax.Array, log_alpha: PyTree) -> PyTree:
        """Draws gates, in [0, 1], with a slope by ``log_alpha`` where they are between.

        Args:
          key: random key; fold in the example to draw anew for each.
          log_alpha: locations.

        Returns:
          The gates.

        >>> HardConcrete().sample(jax.random.key(0), {"w": jnp.full(2, 50.0)})["w"].tolist()
        [1.0, 1.0]
        """
        places = iter(range(len(jax.tree.leaves(log_alpha))))

        def leaf(location: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, next(places))
            # The logit of a uniform number is logistic.
            noise = jax.random.logistic(own, location.shape, location.dtype)
            temperature, _, _ = self._numbers(location)
            return self._stretch(jax.nn.sigmoid((noise + location) / temperature))

        return jax.tree.map(leaf, log_alpha)

    def gate(self, log_alpha: PyTree) -> PyTree:
        """The gates for testing, without noise.

        Args:
          log_alpha: locations.

        Returns:
          ``clip(sigmoid(log_alpha) (high - low) + low, 0, 1)``.

        References:
          Louizos et al., 2018, equation 13.

        >>> HardConcrete().gate({"w": jnp.array([-3.0, 0.0, 3.0])})["w"].tolist()
        [0.0, 0.5, 1.0]
        """
        return jax.tree.map(lambda x: self._stretch(jax.nn.sigmoid(x)), log_alpha)

    def kept(self, log_alpha: PyTree) -> PyTree:
        """The probability that a gate is not zero.

        Args:
          log_alpha: locations.

        Returns:
          ``sigmoid(log_alpha - temperature log(-low / high))``.

        References:
          Louizos et al., 2018, equation 12.

        >>> HardConcrete().kept({"w": jnp.full((), -50.0)})["w"].item() < 1e-20
        True
        """

        def leaf(location: jax.Array) -> jax.Array:
            temperature, low, high = self._numbers(location)
            return jax.nn.sigmoid(location - temperature * jnp.log(-low / high))

        return jax.tree.map(leaf, log_alpha)

    def whole(self, log_alpha: PyTree) -> PyTree:
        """The probability that a gate is one.

        Args:
          log_alpha: locations.

        Returns:
          ``sigmoid(log_alpha - temperature log((1 - low) / (high - 1)))``.

        >>> law, gates = HardConcrete(), {"w": jnp.zeros(())}
        >>> round(law.kept(gates)["w"].item() + law.whole(gates)["w"].item(), 4)  # symmetric at 0
        1.0
        """

        def leaf(location: jax.Array) -> jax.Array:
            temperature, low, high = self._numbers(location)
            return jax.nn.sigmoid(location - temperature * jnp.log((1 - low) / (high - 1)))

        return jax.tree.map(leaf, log_alpha)

    def expected_l0(self, log_alpha: PyTree, params: PyTree) -> jax.Array:
        """How many synapses are expected to be alive: each counts with its gate's probability.

        Args:
          log_alpha: locations, as :func:`init` makes.
          params: the parameters that the gates multiply.

        Returns:
          A scalar, float32 (float64 where the locations are). Leaves without gates do not count.

        Raises:
          ValueError: gates do not fit the parameters.

        References:
          Louizos et al., 2018, equation 9, and the groups of its appendix.

        >>> params = {"w": jnp.ones((3, 2))}
        >>> HardConcrete().expected_l0({"w": jnp.full((1, 2), 50.0)}, params).item()
        6.0
        """
        _check(log_alpha, params)

        def leaf(chance: jax.Array, param: jax.Array) -> jax.Array:
            return jnp.sum(chance) * (math.prod(jnp.shape(param)) / max(chance.size, 1))

        parts = jax.tree.leaves(trees.map_synapses(leaf, self.kept(log_alpha), params))
        return functools.reduce(jnp.add, parts) if parts else jnp.zeros((), jnp.float32)

    def mask(self, log_alpha: PyTree, params: PyTree) -> PyTree:
        """Keeps the synapses whose gate for testing is not zero.

        Args:
          log_alpha: locations.
          params: the parameters that the gates multiply.

        Returns:
          Pytree of bool, of the parameters' shapes; masked nodes for leaves without gates.

        Raises:
          ValueError: gates do not fit the parameters.

        >>> gates = {"w": jnp.array([[-9.0, 9.0]])}
        >>> HardConcrete().mask(gates, {"w": jnp.ones((1, 2))})["w"].tolist()
        [[False, True]]
        """
        _check(log_alpha, params)
        return trees.map_synapses(
            lambda gate, param: jnp.broadcast_to(gate > 0, jnp.shape(param)),
            self.gate(log_alpha),
            params,
        )


def apply(gates: PyTree, params: PyTree) -> PyTree:
    """Multiplies synapses by their gates.

    Args:
      gates: pytree of gates in [0, 1], with masked nodes for leaves that have none.
      params: pytree of parameters.

    Returns:
      Pytree like ``params``, of its dtypes.

    Raises:
      ValueError: gates do not fit the parameters.

    >>> apply({"w": jnp.array([[0.0, 0.5]])}, {"w": jnp.full((2, 2), 4.0)})["w"].tolist()
    [[0.0, 2.0], [0.0, 2.0]]
    """
    _check(gates, params)
    return trees.merge_synapses(lambda gate, param: param * gate.astype(param.dtype), gates, params)


def _check(gates: PyTree, params: PyTree) -> None:
    names = iter(trees.paths(gates))

    def leaf(gate: jax.Array, param: jax.Array) -> None:
        name = next(names)
        shape = jnp.shape(param)
        pairs = zip(jnp.shape(gate), shape, strict=False)
        if jnp.ndim(gate) != len(shape) or any(g not in (1, n) for g, n in pairs):
            raise ValueError(
                f"leaf {name!r} has gates of shape {jnp.shape(gate)} for parameters of shape "
                f"{shape}: make them with init(params, axis=...)."
            )

    trees.map_synapses(leaf, gates, params)
