"""Early stopping of a population: the best weights of each member, chosen on validation data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class StoppingState(NamedTuple):
    """Where early stopping stands; every leaf may lead with the population axis.

    Attributes:
        params: Best parameters so far (the initial ones before the first improvement).
        value: Best value of the metric, float32.
        epoch: Epoch of the best value, counted from 0; -1 before the first improvement. int32.
        wait: Epochs since the best value, int32.
        stopped: Whether the member has stopped, bool.
    """

    params: Any
    value: jax.Array
    epoch: jax.Array
    wait: jax.Array
    stopped: jax.Array


@dataclass(frozen=True)
class EarlyStopping:
    """Stops a member when its metric has not improved for `patience` epochs.

    Pure: `init` and `update` map states to states and may be jitted. A stopped member's best
    weights are frozen; the population goes on until all have stopped. A metric that is nan never
    improves.

    Args:
        patience: Epochs without improvement before a member stops, at least 1.
        metric: Name of the metric, as in the history of `fit`.
        min_epochs: Epochs that always run.
        min_delta: Smallest change that counts as an improvement, in units of the metric.
        start_epoch: First epoch, counted from 0, whose weights may become the best. Set it to the
            end of a pruning schedule to choose among the pruned weights only.
        mode: Whether a smaller ("min") or a larger ("max") metric is better.

    Raises:
        ValueError: If a number is out of range.

    References:
        Prechelt, "Early stopping - but when?", in Neural Networks: Tricks of the Trade (1998).

    >>> import jax.numpy as jnp
    >>> rule = EarlyStopping(patience=2)
    >>> state = rule.init({"w": jnp.array(0.0)})
    >>> for epoch, loss in enumerate([3.0, 1.0, 2.0, 2.0]):
    ...     params = {"w": jnp.array(float(epoch))}
    ...     state = rule.update(state, epoch, {"validation_loss": jnp.array(loss)}, params)
    >>> bool(state.stopped), int(state.epoch), float(state.value), float(state.params["w"])
    (True, 1, 1.0, 1.0)
    """

    patience: int
    metric: str = "validation_loss"
    min_epochs: int = 0
    min_delta: float = 0.0
    start_epoch: int = 0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.min_epochs < 0 or self.start_epoch < 0:
            raise ValueError(
                "min_epochs and start_epoch must not be negative, "
                f"got {self.min_epochs} and {self.start_epoch}"
            )
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta must not be negative, got {self.min_delta}")
        if self.mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max", got {self.mode!r}')

    def init(self, params: Any, members: tuple[int, ...] = ()) -> StoppingState:
        """Starts without a best.

        Args:
            params: Initial parameters.
            members: Shape of the population axis: `()` for one network, `(n,)` for n.

        Returns:
            The state before the first epoch.
        """
        worst = jnp.inf if self.mode == "min" else -jnp.inf
        return StoppingState(
            params=params,
            value=jnp.full(members, worst, jnp.float32),
            epoch=jnp.full(members, -1, jnp.int32),
            wait=jnp.zeros(members, jnp.int32),
            stopped=jnp.zeros(members, jnp.bool_),
        )

    def update(
        self,
        state: StoppingState,
        epoch: int | jax.Array,
        metrics: Mapping[str, jax.Array],
        params: Any,
    ) -> StoppingState:
        """Takes one epoch's metrics and weights into account.

        Args:
            state: The state so far.
            epoch: The epoch that has just ended, counted from 0.
            metrics: Holds `self.metric`, shaped like the population axis.
            params: The weights at the end of the epoch.

        Returns:
            The new state.

        Raises:
            KeyError: If the metric is missing.
        """
        if self.metric not in metrics:
            raise KeyError(
                f"early stopping looks for {self.metric!r}; there are {', '.join(sorted(metrics))}"
            )
        value = jnp.asarray(metrics[self.metric]).astype(jnp.float32)
        epoch = jnp.asarray(epoch, jnp.int32)
        counted = epoch >= self.start_epoch
        sign = jnp.float32(1 if self.mode == "min" else -1)
        better = sign * value < sign * state.value - jnp.float32(self.min_delta)
        improved = better & counted & ~state.stopped
        wait = jnp.where(improved, 0, state.wait + jnp.where(counted, 1, 0)).astype(jnp.int32)
        stop = (wait >= self.patience) & (epoch + 1 >= self.min_epochs)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            mask = improved.reshape(improved.shape + (1,) * (new.ndim - improved.ndim))
            return jnp.where(mask, new, old)

        return StoppingState(
            params=jax.tree.map(choose, params, state.params),
            value=jnp.where(improved, value, state.value),
            epoch=jnp.where(improved, epoch, state.epoch),
            wait=wait,
            stopped=state.stopped | stop,
        )
