"""The networks of the study of scaling: chains of iterative magnitude pruning at several widths."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from research import rounds

if TYPE_CHECKING:
    from research.scaling import Config


def hidden(family: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The hidden layers of a member of the family.

    >>> hidden((2, 1), 8)
    (16, 8)
    """
    return tuple(factor * width for factor in family)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with decoupled weight decay; its rate falls to zero by a cosine in every round."""
    cosine = optax.cosine_decay_schedule(config.learning_rate, config.steps)

    def rate(count: Any) -> Any:
        return cosine(count.astype(jnp.float32))  # optax mixes dtypes there

    return optax.adamw(rate, weight_decay=config.weight_decay)


@partial(jax.jit, static_argnums=(0, 1))
def chain(config: Config, width: int, key: jax.Array, task: Any) -> tuple[Any, Any]:
    """Trains, prunes by global magnitude, rewinds and trains again, from dense to nearly empty.

    Every round trains equally long with the same batches, so that rounds differ in the mask alone.

    Args:
      config: the study's config.
      width: the member of the family.
      key: random key of weights and batches.
      task: the data.

    Returns:
      Share of the check data classified wrongly, and density of the mask, ``[rounds + 1]`` each;
      the first is the dense network's.

    References:
      Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020.
    """
    of_init, of_start, of_batches = jax.random.split(key, 3)
    params = an.models.mlp_init(of_init, (task.inputs.shape[1], *hidden(config.family, width), 10))
    tx = optax.chain(optimizer(config), an.pruning.prune(0.0, every=None))

    def train(params: Any, mask: Any, key: jax.Array, steps: int) -> Any:
        state = an.pruning.lottery.with_mask(tx.init(params), mask)
        return rounds.train(rounds.Net(params, state), key, task, tx, steps).params

    whole = an.pruning.full_mask(params)
    early = params
    if config.rewind_steps:
        early = train(params, whole, of_start, config.rewind_steps)

    def one(mask: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        end = train(an.pruning.lottery.rewind(params, early, mask), mask, of_batches, config.steps)
        alive, every = (
            jnp.sum(jnp.stack([jnp.sum(m, dtype=jnp.int32) for m in jax.tree.leaves(tree)]))
            for tree in (mask, whole)
        )
        found = 1 - rounds.accuracy(end, task), alive / every
        return an.pruning.lottery.imp_round(end, mask, config.rate), found

    return jax.lax.scan(one, whole, None, config.rounds + 1)[1]
