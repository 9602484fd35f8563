"""A mask posterior: which synapses are there, when neighbours tend to share their fate.

Each synapse has a binary variable ``m``: 1 if its weight comes from a slab, 0 if from a spike at
zero. What the data say of it alone is its log odds ``u`` (the evidence of slab against spike);
what its neighbours say is a coupling ``J`` on the edges of a graph of synapses::

    p(m) ~ exp( sum_i u_i m_i  +  sum_(i,j) J_ij [m_i = m_j] )

a Markov random field (an Ising model). Four functions from ``(graph, unary, coupling)`` to
:class:`Marginals` infer it, and :func:`mask_posterior_score` takes any of them. The graph is
static; log odds and couplings may be traced, so that ``vmap`` runs over kernels that share a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior import reduction
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Inference = Callable[..., Any]  # (graph, unary, coupling, *, key) -> Marginals
Form = Literal["chain", "clique"]
Scan = Literal["checkerboard", "sequential"]

__all__ = [
    "Graph",
    "Marginals",
    "by_belief_propagation",
    "by_elimination",
    "by_enumeration",
    "by_gibbs",
    "grid_edges",
    "mask_posterior_score",
    "unit_edges",
]

LARGEST_ENUMERATION = 20
LARGEST_CLIQUES = 20_000_000  # edges


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Graph:
    """Synapses and which of them are neighbours.

    Static under jit: equal if nodes and edges are.

    Attributes:
      nodes: how many synapses; they are numbered from 0, in the order of ``leaf.reshape(-1)``.
      edges: integers ``[edges, 2]``, each pair once, in either order.

    Raises:
      ValueError: an edge leaves the graph, joins a synapse to itself or is there twice.

    >>> Graph(3, [(0, 1), (1, 2)]).edges.shape
    (2, 2)
    """

    nodes: int
    edges: np.ndarray

    def __init__(self, nodes: int, edges: Iterable[Any] | np.ndarray) -> None:
        array = np.asarray(edges if isinstance(edges, np.ndarray) else list(edges))
        array = array.reshape(-1, 2) if array.size else np.zeros((0, 2), np.int32)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"edges must be pairs of integers, not of {array.dtype}.")
        low, high = np.sort(array, axis=1).astype(np.int64).T
        bad = np.ones(len(array), bool)
        bad[np.unique(low * nodes + high, return_index=True)[1]] = False  # but the first of equals
        bad |= (low < 0) | (high >= nodes) | (low == high)
        if bad.any():
            raise ValueError(
                f"edge {tuple(array[bad][0].tolist())} leaves the graph of {nodes} synapses, joins "
                "a synapse to itself or is there twice: leave it out."
            )
        array = array.astype(np.int32)
        array.setflags(write=False)
        object.__setattr__(self, "nodes", int(nodes))
        object.__setattr__(self, "edges", array)

    @functools.cached_property
    def _identity(self) -> tuple[int, bytes]:
        return self.nodes, self.edges.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @functools.cached_property
    def colours(self) -> np.ndarray:
        """A colour of each synapse, none that of a neighbour, ``[nodes]``: two on a chessboard."""
        neighbours = self.neighbours
        found = np.full(self.nodes, -1, np.int32)
        # Breadth first, so that whatever can be coloured with two is.
        for root in range(self.nodes):
            queue = [root] if found[root] < 0 else []
            for node in queue:
                if found[node] < 0:
                    taken = {int(found[other]) for other in neighbours[node]}
                    found[node] = min(set(range(len(taken) + 1)) - taken)
                    queue += [other for other in neighbours[node] if found[other] < 0]
        return found

    @functools.cached_property
    def neighbours(self) -> list[list[int]]:
        """The neighbours of each synapse."""
        found: list[list[int]] = [[] for _ in range(self.nodes)]
        for a, b in self.edges.tolist():
            found[a].append(b)
            found[b].append(a)
        return found


class Marginals(NamedTuple):
    """What is believed of each synapse once its neighbours have been heard.

    Attributes:
      log_odds: ``log p(m = 1) - log p(m = 0)``, ``[nodes]``, of the dtype of the unary log odds.
      residual: how far from settled the answer is, a scalar. 0 for exact methods; the largest
        change of a message in the last round of belief propagation; the largest difference of a
        probability between the halves of a Gibbs run.
      rounds: rounds of messages or sweeps that were made, int32; 0 for exact methods.
    """

    log_odds: jax.Array
    residual: jax.Array
    rounds: jax.Array

    @property
    def probability(self) -> jax.Array:
        """``p(m = 1)`` of each synapse."""
        return jax.nn.sigmoid(self.log_odds)


def _checked(graph: Graph, unary: jax.Array, coupling: Number) -> tuple[jax.Array, jax.Array]:
    unary = wide(unary)
    if unary.shape != (graph.nodes,):
        raise ValueError(f"log odds of shape {unary.shape} for a graph of {graph.nodes} synapses.")
    coupling = jnp.asarray(coupling).astype(unary.dtype)
    if coupling.shape not in ((), (len(graph.edges),)):
        raise ValueError(
            f"couplings of shape {coupling.shape} for {len(graph.edges)} edges: give a number or "
            "one for each edge."
        )
    return unary, jnp.broadcast_to(coupling, (len(graph.edges),))


def _exact(log_odds: jax.Array) -> Marginals:
    return Marginals(log_odds, jnp.zeros((), log_odds.dtype), jnp.zeros((), jnp.int32))


def by_enumeration(
    graph: Graph, unary: jax.Array, coupling: Number, *, key: jax.Array | None = None
) -> Marginals:
    """Exact marginals as sums over all masks.

    Args:
      graph: at most 20 synapses.
      unary: log odds of each synapse by itself, ``[nodes]``.
      coupling: log weight of two neighbours being alike: a number, or one for each edge.
      key: not used.

    Returns:
      The marginals.

    Raises:
      ValueError: the graph is too large, or shapes do not fit.

    >>> by_enumeration(Graph(2, [(0, 1)]), jnp.array([1.0, -1.0]), 0.0).log_odds.round(4).tolist()
    [1.0, -1.0]
    """
    del key
    unary, coupling = _checked(graph, unary, coupling)
    if graph.nodes > LARGEST_ENUMERATION:
        raise ValueError(
            f"{graph.nodes} synapses have 2^{graph.nodes} masks; enumeration takes at most "
            f"{LARGEST_ENUMERATION}: use by_elimination or by_belief_propagation."
        )
    states = np.arange(2**graph.nodes)
    bits = ((states[None] >> np.arange(graph.nodes)[:, None]) & 1).astype(bool)
    weight = jnp.zeros(states.shape, unary.dtype)
    for place in range(graph.nodes):
        weight += jnp.where(bits[place], unary[place], 0)
    for place, (a, b) in enumerate(graph.edges.tolist()):
        weight += jnp.where(bits[a] == bits[b], coupling[place], 0)
    present = jax.nn.logsumexp(jnp.where(bits, weight, -jnp.inf), axis=1)
    return _exact(present - jax.nn.logsumexp(jnp.where(bits, -jnp.inf, weight), axis=1))


def by_elimination(
    graph: Graph,
    unary: jax.Array,
    coupling: Number,
    *,
    key: jax.Array | None = None,
    widest: int = 16,
) -> Marginals:
    """Exact marginals by variable elimination, for graphs of small treewidth.

    Variables are summed out one after another, that of the fewest neighbours first, which gives
    the log partition function; its derivative by the log weight of ``m_i = 1`` is the marginal, so
    that automatic differentiation is the pass back. The work is unrolled in the program: nodes
    times ``2^width``. Log odds beyond about 87 (float32) are cut off there.

    Args:
      graph: of any size that a program can be unrolled for (hundreds), without wide loops.
      unary: as for :func:`by_enumeration`.
      coupling: as for :func:`by_enumeration`.
      key: not used.
      widest: the largest number of variables that a table may have.

    Returns:
      The marginals.

    Raises:
      ValueError: tables would be too wide, or shapes do not fit.

    References:
      Darwiche, "A differential approach to inference in Bayesian networks", JACM 2003; Koller and
      Friedman, "Probabilistic graphical models", 2009, chapter 9.

    >>> chain = Graph(3, [(0, 1), (1, 2)])
    >>> found = by_elimination(chain, jnp.array([2.0, 0.0, 0.0]), 1.0)
    >>> [round(p, 3) for p in found.probability.tolist()]
    [0.881, 0.676, 0.581]
    """
    del key
    unary, coupling = _checked(graph, unary, coupling)
    weights = jnp.stack([jnp.zeros_like(unary), unary], axis=1)  # [nodes, 2]
    chances = jax.grad(_log_partition)(weights, coupling, graph, widest)
    logs = jnp.log(jnp.maximum(chances, jnp.finfo(unary.dtype).tiny))
    return _exact(logs[:, 1] - logs[:, 0])


def _log_partition(weights: jax.Array, coupling: jax.Array, graph: Graph, widest: int) -> jax.Array:
    """The log of the sum over all masks, less constants that would round off the rest."""
    alike = jnp.eye(2, dtype=weights.dtype)
    tables: list[Any] = [((node,), weights[node]) for node in range(graph.nodes)]
    tables += [(pair, coupling[e] * alike) for e, pair in enumerate(graph.edges.tolist())]
    around = [set(others) for others in graph.neighbours]
    left = set(range(graph.nodes))
    while left:
        node = min(left, key=lambda n: (len(around[n]), n))
        left.remove(node)
        axes = [node, *sorted(around[node])]
        if len(axes) > widest:
            raise ValueError(
                f"elimination needs a table of {len(axes)} variables, more than widest={widest}: "
                "use by_belief_propagation or by_gibbs, or fewer edges."
            )
        for other in axes[1:]:
            around[other] = (around[other] | around[node]) - {node, other}
        joint = jnp.zeros((2,) * len(axes), weights.dtype)
        for scope, table in [each for each in tables if node in each[0]]:
            places = [axes.index(member) for member in scope]
            table = jnp.transpose(table, np.argsort(places).tolist())
            joint += jnp.reshape(table, [2 if p in places else 1 for p in range(len(axes))])
        tables = [each for each in tables if node not in each[0]]
        summed = jnp.logaddexp(joint[0], joint[1])
        tables.append((tuple(axes[1:]), summed - jax.lax.stop_gradient(jnp.max(summed))))
    return sum((table for _, table in tables), start=jnp.zeros((), weights.dtype))


def by_belief_propagation(
    graph: Graph,
    unary: jax.Array,
    coupling: Number,
    *,
    key: jax.Array | None = None,
    rounds: int = 200,
    damping: Number = 0.3,
    tolerance: float = 1e-6,
) -> Marginals:
    """Marginals by loopy belief propagation, all messages at once, as log odds.

    Exact on a graph without loops once messages have crossed it, one edge a round. With loops it is
    good for weak couplings; strong ones can keep it from settling, as the residual shows.

    Args:
      graph: any.
      unary: as for :func:`by_enumeration`.
      coupling: as for :func:`by_enumeration`.
      key: not used.
      rounds: the most rounds.
      damping: share of the old message that is kept, in [0, 1).
      tolerance: rounds end when no message changes by more, in nats.

    Returns:
      The marginals.

    Raises:
      ValueError: the damping is outside [0, 1), or shapes do not fit.

    References:
      Pearl, "Probabilistic reasoning in intelligent systems", 1988; Murphy, Weiss and Jordan,
      "Loopy belief propagation for approximate inference", UAI 1999.

    >>> chain = Graph(3, [(0, 1), (1, 2)])
    >>> found = by_belief_propagation(chain, jnp.array([2.0, 0.0, 0.0]), 1.0)
    >>> [round(p, 3) for p in found.probability.tolist()]
    [0.881, 0.676, 0.581]
    """
    del key
    unary, coupling = _checked(graph, unary, coupling)
    if not isinstance(damping, jax.core.Tracer) and not (
        np.all(np.asarray(damping) >= 0) and np.all(np.asarray(damping) < 1)
    ):
        raise ValueError(f"damping must be in [0, 1), not {damping}.")
    kept, count = jnp.asarray(damping).astype(unary.dtype), len(graph.edges)
    # Message e goes from source[e] to target[e]; message e + count is the one back.
    source = np.concatenate([graph.edges[:, 0], graph.edges[:, 1]])
    target = np.concatenate([graph.edges[:, 1], graph.edges[:, 0]])
    strength = jnp.concatenate([coupling, coupling])

    def beliefs(messages: jax.Array) -> jax.Array:
        return unary + jax.ops.segment_sum(messages, target, graph.nodes)

    def advance(carry: Any) -> Any:
        messages, _, done = carry
        back = jnp.roll(messages, count)
        new = _through(strength, beliefs(messages)[source] - back)
        new = (1 - kept) * new + kept * messages
        return new, jnp.max(jnp.abs(new - messages), initial=0), done + 1

    def unsettled(carry: Any) -> jax.Array:
        return (carry[2] < rounds) & (carry[1] > tolerance)

    silence = jnp.zeros(2 * count, unary.dtype)
    start = (silence, jnp.full((), jnp.inf, unary.dtype), jnp.zeros((), jnp.int32))
    messages, *end = jax.lax.while_loop(unsettled, advance, start)
    return Marginals(beliefs(messages), *end)


def _through(coupling: jax.Array, log_odds: jax.Array) -> jax.Array:
    """What a synapse of given log odds says to its neighbour: log((1 + e^(J+c)) / (e^J + e^c))."""
    a, b = jnp.abs(coupling), jnp.abs(log_odds)
    # Odd in both; from their sizes, so that no two large numbers are subtracted.
    said = jnp.minimum(a, b) + jnp.log1p(jnp.exp(-a - b)) - jnp.log1p(jnp.exp(-jnp.abs(a - b)))
    return jnp.sign(coupling) * jnp.sign(log_odds) * said


def by_gibbs(
    graph: Graph,
    unary: jax.Array,
    coupling: Number,
    *,
    key: jax.Array | None = None,
    sweeps: int = 1_000,
    discard: int = 100,
    scan: Scan = "checkerboard",
) -> Marginals:
    """Marginals by Gibbs sampling.

    A sweep draws every synapse given its neighbours; the chances drawn from are averaged.

    Args:
      graph: any.
      unary: as for :func:`by_enumeration`.
      coupling: as for :func:`by_enumeration`.
      key: random key.
      sweeps: sweeps that are averaged, at least 2.
      discard: sweeps before these.
      scan: "checkerboard" draws all synapses of a colour at once (no two are neighbours);
        "sequential" draws one after another in their order.

    Returns:
      The marginals.

    Raises:
      ValueError: no key, another scan, too few sweeps, or shapes do not fit.

    References:
      Geman and Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of
      images", IEEE TPAMI 1984; Gelfand and Smith, JASA 1990, for averages of chances.

    >>> found = by_gibbs(Graph(2, []), jnp.array([1.0, -1.0]), 0.0, key=jax.random.key(0))
    >>> found.log_odds.round(3).tolist()  # without neighbours every sweep says the same
    [1.0, -1.0]
    """
    unary, coupling = _checked(graph, unary, coupling)
    if key is None:
        raise ValueError("by_gibbs draws: give it key=jax.random.key(...).")
    if scan not in get_args(Scan):
        raise ValueError(f"scan={scan!r}; choose 'checkerboard' or 'sequential'.")
    if sweeps < 2 or discard < 0:
        raise ValueError(f"sweeps={sweeps} must be at least 2 and discard={discard} at least 0.")
    order = graph.colours if scan == "checkerboard" else np.arange(graph.nodes)
    step = _sweep(graph, order, unary, coupling)
    of_start, of_sweeps = jax.random.split(key)
    start = jax.random.bernoulli(of_start, 0.5, (graph.nodes,))

    def advance(carry: Any, place: jax.Array) -> tuple[Any, None]:
        state, halves = carry
        own = jax.random.fold_in(of_sweeps, place)
        state, odds = step(state, jax.random.logistic(own, unary.shape, unary.dtype))
        # Rows: each half of the run; columns: the chances of 1 and of 0.
        half = (place >= discard + sweeps // 2).astype(jnp.int32)
        both = jnp.stack([jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds)])
        counted = jnp.where(place >= discard, both, 0)
        return (state, halves.at[half].add(counted)), None

    empty = jnp.zeros((2, 2, graph.nodes), unary.dtype)
    (_, halves), _ = jax.lax.scan(advance, (start, empty), jnp.arange(discard + sweeps))
    sums = jnp.sum(halves, axis=0)
    first, second = halves[0, 0] / (sweeps // 2), halves[1, 0] / (sweeps - sweeps // 2)
    logs = jnp.log(jnp.maximum(sums, jnp.finfo(unary.dtype).tiny))
    return Marginals(
        logs[0] - logs[1],
        jnp.max(jnp.abs(first - second), initial=0),
        jnp.asarray(discard + sweeps, jnp.int32),
    )


def _sweep(
    graph: Graph, order: np.ndarray, unary: jax.Array, coupling: jax.Array
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """A sweep: of state and logistic noise, to state and the log odds that were drawn from."""
    members = [np.flatnonzero(order == group) for group in range(order.max(initial=-1) + 1)]
    # Padded with a synapse that does not exist: it reads the last one and is not written.
    groups = np.full((len(members), max(map(len, members), default=0)), graph.nodes, np.int32)
    for row, own in zip(groups, members, strict=True):
        row[: len(own)] = own
    # Likewise neighbours: an edge without coupling to synapse 0.
    degree = max(map(len, graph.neighbours), default=0)
    table = np.zeros((graph.nodes, degree), np.int32)
    edge = np.full((graph.nodes, degree), len(graph.edges), np.int32)
    filled = np.zeros(graph.nodes, np.int32)
    for place, pair in enumerate(graph.edges.tolist()):
        for node, other in (pair, pair[::-1]):
            table[node, filled[node]], edge[node, filled[node]] = other, place
            filled[node] += 1
    strength = jnp.append(coupling, jnp.zeros(1, coupling.dtype))[edge]  # [nodes, degree]
    others = jnp.asarray(table)

    def sweep(state: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(carry: Any, own: jax.Array) -> tuple[Any, None]:
            state, seen = carry
            said = jnp.where(state[others[own]], strength[own], -strength[own])
            odds = unary[own] + jnp.sum(said, axis=1)
            state = state.at[own].set(logits[own] + odds > 0, mode="drop")
            return (state, seen.at[own].set(odds, mode="drop")), None

        carry, _ = jax.lax.scan(one, (state, unary), jnp.asarray(groups))
        return carry

    return sweep


def grid_edges(shape: tuple[int, ...], axes: Sequence[int] | None = None) -> np.ndarray:
    """Joins synapses that are next to each other in a kernel's grid.

    Args:
      shape: of the leaf.
      axes: the axes along which a step leads to a neighbour; by default those of space, all but the
        last two, in a kernel of more than two axes, and all axes otherwise.

    Returns:
      Edges ``[edges, 2]`` for ``Graph(math.prod(shape), edges)``.

    Raises:
      ValueError: an axis is not one of the shape's.

    >>> grid_edges((2, 2)).tolist()
    [[0, 2], [1, 3], [0, 1], [2, 3]]
    """
    if axes is None:
        axes = range(len(shape) - 2) if len(shape) > 2 else range(len(shape))
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"axes={tuple(axes)} are not all axes of a leaf of shape {shape}.")
    places = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = [np.zeros((0, 2), np.int32)]
    for axis in sorted({axis % len(shape) for axis in axes}):
        lower = np.take(places, np.arange(shape[axis] - 1), axis)
        upper = np.take(places, np.arange(1, shape[axis]), axis)
        found.append(np.stack([lower.ravel(), upper.ravel()], axis=1))
    return np.concatenate(found)


def unit_edges(shape: tuple[int, ...], axis: int = -1, form: Form = "chain") -> np.ndarray:
    """Joins synapses that share a unit.

    Args:
      shape: of the leaf.
      axis: the axis of the units: -1 joins the synapses into an output, -2 those out of an input.
      form: "chain" joins each synapse to the next of its unit (no loops: belief propagation is
        exact); "clique" joins all of them with each other.

    Returns:
      Edges ``[edges, 2]`` for ``Graph(math.prod(shape), edges)``.

    Raises:
      ValueError: no such axis or form, or cliques of more than 20 million edges.

    >>> unit_edges((3, 2)).tolist()
    [[0, 2], [2, 4], [1, 3], [3, 5]]
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis={axis} is no axis of a leaf of shape {shape}.")
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}; choose 'chain' or 'clique'.")
    places = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    units = np.moveaxis(places, axis, 0).reshape(shape[axis], -1)  # [units, synapses]
    size = units.shape[1]
    if form == "chain":
        first, second = np.arange(size - 1), np.arange(1, size)
    else:
        if shape[axis] * (size * (size - 1) // 2) > LARGEST_CLIQUES:
            raise ValueError(f"cliques of {size} synapses are too many edges: use form='chain'.")
        first, second = np.triu_indices(size, 1)
    return np.stack([units[:, first].ravel(), units[:, second].ravel()], axis=1)


def mask_posterior_score(
    params: PyTree,
    *,
    posterior: Posterior,
    coupling: Number = 0.5,
    keep: Number = 0.5,
    prior: Posterior | Number = 1.0,
    spike: Number = 0.0,
    neighbours: Callable[[tuple[int, ...]], Any] = unit_edges,
    infer: Inference = by_belief_propagation,
    scale: Literal["probability", "log"] = "probability",
    key: jax.Array | None = None,
    **signals: Any,
) -> PyTree:
    """A score: the marginal probability that a synapse is there, given its neighbours.

    Set its options with ``functools.partial(mask_posterior_score, coupling=1.0, ...)``. With the
    schedule ``threshold(0.5)`` a pruner keeps what is more probable than not.

    Args:
      params: the synapses (masked nodes elsewhere).
      posterior: belief with a leaf for each of them, under the slab.
      coupling: log weight of two neighbours being alike, a number for all edges; 0 leaves each
        synapse to its own evidence.
      keep: prior probability of the slab, in (0, 1).
      prior: the slab, as for :func:`adaptivenet.posterior.reduction.slab_log_odds`.
      spike: variance of the spike.
      neighbours: function from the shape of a leaf to its edges, such as :func:`grid_edges`.
      infer: how marginals are found, such as ``functools.partial(by_gibbs, sweeps=200)``.
      scale: "probability", which in float32 is the same for all log odds above 17; "log" gives
        ``-log(1 - p)``, in the same order without such ties.
      key: random key, which a pruner supplies; for methods that draw.
      **signals: not used.

    Returns:
      Scores of the parameters' shapes, float32.

    Raises:
      TypeError: the posterior is none.
      ValueError: another scale; the posterior has no belief of a synapse; or as the functions
        named above.

    References:
      Smith and Fahrmeir, "Spatial Bayesian variable selection with application to functional
      magnetic resonance imaging", JASA 2007, for an Ising prior on which variables are there.

    >>> belief = Posterior({"w": jnp.array([[2.0], [0.1]])}, {"w": jnp.array([[10.0], [10.0]])})
    >>> alone = mask_posterior_score(belief.mean, posterior=belief, coupling=0.0)
    >>> beside = mask_posterior_score(belief.mean, posterior=belief, coupling=1.0)
    >>> [round(s["w"][1, 0].item(), 3) for s in (alone, beside)]
    [0.249, 0.475]
    """
    del signals
    if scale not in ("probability", "log"):
        raise ValueError(f"scale={scale!r}; choose 'probability' or 'log'.")
    if isinstance(prior, Posterior):
        prior = reduction.restrict(prior, params)
    unary = reduction.slab_log_odds(reduction.restrict(posterior, params), keep, prior, spike)
    places = iter(range(len(jax.tree.leaves(unary))))

    def leaf(odds: jax.Array) -> jax.Array:
        place = next(places)
        own = None if key is None else jax.random.fold_in(key, place)
        graph = _leaf_graph(odds.shape, neighbours)
        found = infer(graph, odds.reshape(-1), coupling, key=own)
        scores = found.probability if scale == "probability" else jax.nn.softplus(found.log_odds)
        return scores.reshape(odds.shape)

    return jax.tree.map(leaf, unary)


@functools.lru_cache(maxsize=64)
def _leaf_graph(shape: tuple[int, ...], neighbours: Callable[[tuple[int, ...]], Any]) -> Graph:
    return Graph(math.prod(shape), neighbours(shape))
