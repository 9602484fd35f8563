"""One epoch as one compiled scan, and exact evaluation, over device-resident data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptivenet.training.state import TrainState, as_key, like_key

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Metrics = dict[str, jax.Array]


def make_epoch(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    signals: Callable[[Any], Any] | None = None,
    extra: Callable[..., dict[str, Any]] | None = None,
) -> Callable[..., Any]:
    """Builds a pure function that trains for one epoch.

    The epoch draws a permutation from `state.key`, cuts it into `n // batch_size` batches (the
    remainder sits out until another permutation) and scans over them. The keys depend on
    `state.key` alone, never on the optimizer, so arms that start from one seed see the same
    batches and dropout masks.

    Args:
        loss: `loss(params, inputs, targets, key) -> (scalar, {name: scalar})`.
        tx: Any optax transformation. It gets `value=` (the loss of the batch) as an extra
            argument, if it takes any.
        batch_size: Examples a step.
        signals: `signals(opt_state) -> pytree`, read after every step and stacked.
        extra: `extra(params, inputs, targets, key) -> {name: value}`, further extra arguments
            of `tx.update`, computed on the batch.

    Returns:
        `epoch(state, inputs, targets) -> (state, metrics)`, or `(state, metrics, signals)` if
        `signals` is given. `inputs` and `targets` share their first axis; `metrics` are the means
        over the steps, among them `loss`; stacked signals lead with a step axis. The function
        is not jitted: hand it to `over_population`, or to `jax.jit`.

    Raises:
        ValueError: If `batch_size` is not positive; when called, if the data are fewer than a
            batch, or inputs and targets differ in number.

    >>> import jax, jax.numpy as jnp, optax
    >>> from adaptivenet.training import init_state
    >>> def loss(params, inputs, targets, key):
    ...     return jnp.mean((inputs @ params["w"] - targets) ** 2), {}
    >>> tx = optax.sgd(0.1)
    >>> state = init_state(lambda key: {"w": jnp.zeros(2)}, tx, jax.random.key(0))
    >>> inputs = jax.random.normal(jax.random.key(1), (64, 2))
    >>> epoch = jax.jit(make_epoch(loss, tx, batch_size=8))
    >>> for _ in range(20):
    ...     state, metrics = epoch(state, inputs, inputs @ jnp.array([1.0, -2.0]))
    >>> state.params["w"].round(3), int(state.step)
    (Array([ 1., -2.], dtype=float32), 160)
    """
    _check_batch_size(batch_size)
    update = optax.with_extra_args_support(tx).update
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def epoch(state: TrainState, inputs: jax.Array, targets: jax.Array) -> Any:
        count = _check_data(inputs, targets)
        steps = count // batch_size
        if steps == 0:
            raise ValueError(
                f"{count} examples do not fill one batch of {batch_size}; lower batch_size"
            )
        next_key, order_key, step_key = jax.random.split(as_key(state.key), 3)
        order = jax.random.permutation(order_key, count)[: steps * batch_size]

        def step(carry: tuple[Any, Any], batch: tuple[jax.Array, jax.Array]) -> Any:
            params, opt_state = carry
            rows, number = batch
            key = jax.random.fold_in(step_key, number)
            x, y = inputs[rows], targets[rows]
            (value, aux), grads = value_and_grad(params, x, y, key)
            arguments = extra(params, x, y, key) if extra is not None else {}
            updates, opt_state = update(grads, opt_state, params, value=value, **arguments)
            params = optax.apply_updates(params, updates)
            stacked = signals(opt_state) if signals is not None else None
            return (params, opt_state), ({**aux, "loss": value}, stacked)

        batches = (order.reshape(steps, batch_size), jnp.arange(steps))
        (params, opt_state), (metrics, stacked) = jax.lax.scan(
            step, (state.params, state.opt_state), batches
        )
        state = TrainState(
            params, opt_state, like_key(next_key, state.key), state.step + jnp.int32(steps)
        )
        metrics = {name: _mean(values) for name, values in metrics.items()}
        return (state, metrics) if signals is None else (state, metrics, stacked)

    return epoch


def make_evaluate(
    per_example: Callable[[Any, jax.Array, jax.Array], Metrics], *, batch_size: int = 1024
) -> Callable[[Any, jax.Array, jax.Array], Metrics]:
    """Builds a pure function that computes exact means over a data set.

    Every example counts once, those of the last, smaller batch too. Values that are bool or integer
    (a correct answer) are summed as integers, so an accuracy is the exact count over the number of
    examples, rounded once.

    Args:
        per_example: `per_example(params, inputs, targets) -> {name: [batch]}`, without randomness.
        batch_size: Examples at a time; bounds the memory, not the result.

    Returns:
        `evaluate(params, inputs, targets) -> {name: scalar}`, not jitted.

    Raises:
        ValueError: If `batch_size` is not positive; when called, if there are no data, inputs and
            targets differ in number, or a value is not `[batch]`.

    >>> import jax.numpy as jnp
    >>> def per_example(params, inputs, targets):
    ...     return {"accuracy": (inputs > params) == targets}
    >>> evaluate = make_evaluate(per_example, batch_size=4)
    >>> evaluate(jnp.array(1.5), jnp.arange(5.0), jnp.array([False, False, True, True, False]))
    {'accuracy': Array(0.8, dtype=float32)}
    """
    _check_batch_size(batch_size)

    def evaluate(params: Any, inputs: jax.Array, targets: jax.Array) -> Metrics:
        count = _check_data(inputs, targets)
        steps, remainder = divmod(count, batch_size)
        whole = steps * batch_size

        def measure(x: jax.Array, y: jax.Array) -> Metrics:
            metrics = per_example(params, x, y)
            for name, values in metrics.items():
                if values.shape != x.shape[:1]:
                    raise ValueError(
                        f"per_example returned {name!r} of shape {values.shape}; "
                        f"one value an example is {x.shape[:1]}"
                    )
            return metrics

        parts = []
        if steps:
            x, y = (a[:whole].reshape(steps, batch_size, *a.shape[1:]) for a in (inputs, targets))
            full = jax.lax.map(lambda batch: measure(*batch), (x, y))
            parts.append({name: values.reshape(-1) for name, values in full.items()})
        if remainder:
            parts.append(measure(inputs[whole:], targets[whole:]))
        return {name: _mean(jnp.concatenate([part[name] for part in parts])) for name in parts[0]}

    return evaluate


def _mean(values: jax.Array) -> jax.Array:
    """Mean over the first axis in float32; integers are summed exactly."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        return jnp.mean(values.astype(jnp.float32), axis=0)
    total = jnp.sum(values.astype(jnp.int32), axis=0)
    return total.astype(jnp.float32) / jnp.float32(values.shape[0])


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")


def _check_data(inputs: jax.Array, targets: jax.Array) -> int:
    if inputs.shape[0] != targets.shape[0]:
        raise ValueError(f"{inputs.shape[0]} inputs but {targets.shape[0]} targets")
    if inputs.shape[0] == 0:
        raise ValueError("the data set is empty")
    return inputs.shape[0]
