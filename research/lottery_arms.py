"""The arms of S3: two rewinding points, and what a ticket must beat at equal density.

An arm is trained once a round, and twice where the barrier between two orders of batches is
measured. Orders are shared: in a round every `a` sees the same batches, so do every `b` and every
`other`. All arrays have a leading axis of seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet.emergence import nulls
from adaptivenet.pruning import lottery
from research import rounds

if TYPE_CHECKING:
    from research.lottery import Config

# `original` and `rewound` go back to step 0 and to step k; their `other` is a second ticket of the
# same start, found with other batches. `reinit` has the mask of `rewound` and a new initialization,
# `random` its weights of step k at random places. `oneshot` is cut once; `matched` as well, to as
# many synapses in each layer as `rewound` has; and `long`, which is trained in every round, as long
# in all as `rewound`. So is `kept`, which is cut in every round and goes on with the weights that
# it has. WHOLE is trained from step 0, PART from step k.
WHOLE: tuple[str, ...] = ("original a", "original b", "original other", "reinit a")
PART: tuple[str, ...] = ("rewound a", "rewound b", "rewound other", "random a", "random b")
PART += ("oneshot a", "long a", "kept a", "matched a")
MEMBERS: tuple[str, ...] = WHOLE + PART
# Each of these follows its own mask.
IMP = ("original a", "original other", "rewound a", "rewound other", "kept a")
PAIRS = ("original", "rewound", "random")  # trained on two orders
ORDERS = {"a": 0, "b": 1, "other": 2}

Members = Mapping[str, Any]


def stack(trees: Sequence[Any]) -> Any:
    """Puts trees side by side, on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam; what the mask in its state has cut is held at zero."""
    return optax.chain(optax.adam(config.learning_rate), an.pruning.prune(0.0, every=None))


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None))
def starts(config: Config, key: jax.Array, task: Any) -> dict[str, Any]:
    """Where members go back to: step 0, step k, and another draw of step 0."""
    of_init, of_batches, of_other = jax.random.split(jax.random.fold_in(key, 0), 3)
    sizes = (task.inputs.shape[1], *config.hidden, 10)
    first, other = (an.models.mlp_init(k, sizes) for k in (of_init, of_other))
    net = begin_one(config, first, an.pruning.full_mask(first))
    early = rounds.train(
        net, of_batches, task, optimizer(config), config.rewind, batch_size=config.batch_size
    )
    return {"original": first, "early": early.params, "reinit": other}


def start_of(member: str) -> str:
    """Which start a member goes back to."""
    arm = member.split()[0]
    return arm if arm in ("original", "reinit") else "early"


def begin_one(config: Config, start: Any, mask: Any) -> rounds.Net:
    """A network at its start, masked, with a new state of the optimizer."""
    params = lottery.rewind(start, start, mask)
    return rounds.Net(params, lottery.with_mask(optimizer(config).init(params), mask))


begin = jax.jit(jax.vmap(begin_one, (None, 0, 0)), static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1))
def train(config: Config, steps: int, nets: Any, keys: Any, task: Any) -> list[rounds.Net]:
    """Members of one length of training, all of them and their seeds in one program."""

    def one(net: Any, key: jax.Array) -> rounds.Net:
        return rounds.train(net, key, task, optimizer(config), steps, batch_size=config.batch_size)

    ends = jax.vmap(jax.vmap(one))(stack(nets), jnp.stack(keys))
    return [jax.tree.map(lambda leaf, at=at: leaf[at], ends) for at in range(len(nets))]


def train_all(config: Config, number: int, nets: Members, keys: jax.Array, task: Any) -> Members:
    """One round of every member: from step 0, or from step k, to the last step.

    Args:
      config: the study's config.
      number: of the round; it and the order choose the batches.
      nets: member to its networks at their start.
      keys: of the seeds.
      task: the task.

    Returns:
      Member to its networks at the end.
    """
    fold = jax.vmap(jax.random.fold_in, (0, None))
    of_round = fold(keys, number + 1)
    of_order = {order: fold(of_round, place) for order, place in ORDERS.items()}
    ends = {}
    for group, steps in ((WHOLE, config.steps), (PART, config.steps - config.rewind)):
        orders = [of_order[member.split()[1]] for member in group]
        found = train(config, steps, [nets[member] for member in group], orders, task)
        ends |= dict(zip(group, found, strict=True))
    return ends


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def cut(params: Any, mask: Any, rate: Any) -> Any:
    """The next mask of each seed, by global magnitude among the living."""
    return lottery.imp_round(params, mask, rate)


@jax.jit
@jax.vmap
def cut_like(params: Any, mask: Any) -> Any:
    """One cut by magnitude to as many synapses in each layer as a mask has."""

    def layer(kept: jax.Array, weights: jax.Array) -> jax.Array:
        return an.selection.top_mask([jnp.abs(weights)], jnp.sum(kept, dtype=jnp.int32))[0]

    return an.trees.map_synapses(layer, mask, params)


def next_masks(
    config: Config, ends: Members, dense: Any, masks: Members, keys: jax.Array, last: Any
) -> dict[str, Any]:
    """The masks of the next round; all that a round compares have the same count.

    Args:
      config: the study's config.
      ends: member to its networks at the end of this round.
      dense: parameters of `rewound` at the end of the first round, before any cut.
      masks: member to its masks in this round.
      keys: of the seeds, for the random masks.
      last: the masks of `long`.

    Returns:
      Member to its masks.
    """
    found = {member: cut(ends[member].params, masks[member], config.rate) for member in IMP}
    # Cutting the same weights again and again is one cut, with the counts of the rounds.
    found["oneshot a"] = cut(dense, masks["oneshot a"], config.rate)
    shuffled = shuffle(found["rewound a"], keys)
    return found | {
        "original b": found["original a"],
        "rewound b": found["rewound a"],
        "reinit a": found["rewound a"],
        "random a": shuffled,
        "random b": shuffled,
        "matched a": cut_like(dense, found["rewound a"]),
        "long a": last,
    }


shuffle = jax.jit(jax.vmap(nulls.random_mask))


def at_once(config: Config, dense: Any, mask: Any) -> Any:
    """The masks that one cut of the dense networks leaves at the last density."""
    for _ in range(config.rounds):
        mask = cut(dense, mask, config.rate)
    return mask
