"""Marginals of mask fields: four methods against a slow enumeration in float64."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.posterior import markov, reduction
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.markov import Graph

EXACT = [markov.by_enumeration, markov.by_elimination]
NODES = 6


def slowly(graph, unary, coupling):
    """Every mask, one by one."""
    unary = np.asarray(unary, np.float64)
    coupling = np.broadcast_to(np.asarray(coupling, np.float64), len(graph.edges))
    sums = np.zeros((2, graph.nodes))
    for mask in itertools.product((0, 1), repeat=graph.nodes):
        energy = sum(u for u, m in zip(unary, mask, strict=True) if m)
        for (a, b), strength in zip(graph.edges.tolist(), coupling, strict=True):
            energy += strength * (mask[a] == mask[b])
        sums[mask, range(graph.nodes)] += np.exp(energy)
    return sums[1] / sums.sum(axis=0)


def random_tree(rng, nodes=NODES):
    order = rng.permutation(nodes)
    return [(order[rng.integers(place)], order[place]) for place in range(1, nodes)]


def random_graph(rng, nodes=NODES, share=0.4):
    pairs = list(itertools.combinations(range(nodes), 2))
    return [pair for pair in pairs if rng.random() < share]


def numbers(rng, graph, strongest):
    unary = rng.uniform(-4, 4, graph.nodes).astype(np.float32)
    coupling = rng.uniform(-strongest, strongest, len(graph.edges)).astype(np.float32)
    return jnp.asarray(unary), jnp.asarray(coupling)


# Compiled once for each of a few graphs, whatever the numbers.
TREES = [Graph(NODES, random_tree(np.random.default_rng(seed))) for seed in range(3)]
LOOPY = [Graph(NODES, random_graph(np.random.default_rng(seed))) for seed in range(3)]


@functools.cache
def compiled(method, graph):
    return jax.jit(functools.partial(method, graph))


@given(seed=st.integers(0, 10_000), graph=st.sampled_from([*LOOPY[:2], TREES[0]]))
def test_exact_methods_equal_the_slow_enumeration(seed, graph):
    unary, coupling = numbers(np.random.default_rng(seed), graph, 3)
    true = slowly(graph, unary, coupling)
    for method in EXACT:
        found = compiled(method, graph)(unary, coupling)
        np.testing.assert_allclose(found.probability, true, atol=1e-6)
        assert found.residual == 0


@given(seed=st.integers(0, 10_000), graph=st.sampled_from(TREES), damping=st.floats(0, 0.6))
def test_belief_propagation_is_exact_on_trees(seed, graph, damping):
    unary, coupling = numbers(np.random.default_rng(seed), graph, 4)
    method = functools.partial(markov.by_belief_propagation, graph)
    found = _damped(method, graph)(unary, coupling, damping)
    assert found.residual <= 1e-6
    np.testing.assert_allclose(found.probability, slowly(graph, unary, coupling), atol=1e-6)


_JITTED = {}


def _damped(method, graph):
    return _JITTED.setdefault(graph, jax.jit(lambda u, c, d: method(u, c, damping=d)))


def test_belief_propagation_in_float64_is_exact_to_rounding():
    with jax.enable_x64(True):
        for seed, graph in enumerate(TREES):
            unary, coupling = numbers(np.random.default_rng(seed), graph, 4)
            unary, coupling = unary.astype(jnp.float64), coupling.astype(jnp.float64)
            found = markov.by_belief_propagation(graph, unary, coupling, tolerance=1e-13)
            true = slowly(graph, unary, coupling)
            assert found.log_odds.dtype == jnp.float64
            np.testing.assert_allclose(found.probability, true, atol=1e-12)


def test_a_long_chain_by_its_transfer_matrix():
    """24 synapses, too many for enumeration: both methods against products of matrices."""
    size = 24
    graph = Graph(size, [(i, i + 1) for i in range(size - 1)])
    unary, coupling = numbers(np.random.default_rng(0), graph, 2)
    wide, strengths = np.asarray(unary, np.float64), np.asarray(coupling, np.float64)
    own = np.exp(np.stack([np.zeros(size), wide], axis=1))
    steps = [np.exp([[j, 0], [0, j]]) for j in strengths]
    forward, backward = [own[0]], [np.ones(2)]
    for place in range(1, size):
        forward.append(forward[-1] @ steps[place - 1] * own[place])
        backward.append(steps[size - 1 - place] @ (own[size - place] * backward[-1]))
    both = np.array(forward) * np.array(backward[::-1])
    true = both[:, 1] / both.sum(axis=1)
    for method in (markov.by_elimination, markov.by_belief_propagation):
        found = compiled(method, graph)(unary, coupling)
        np.testing.assert_allclose(found.probability, true, atol=1e-6)


@given(seed=st.integers(0, 10_000), graph=st.sampled_from(LOOPY))
@settings(max_examples=20)
def test_belief_propagation_is_close_on_loops_of_weak_couplings(seed, graph):
    unary, coupling = numbers(np.random.default_rng(seed), graph, 0.5)
    found = compiled(markov.by_belief_propagation, graph)(unary, coupling)
    assert found.residual <= 1e-6
    assert np.max(np.abs(found.probability - slowly(graph, unary, coupling))) < 0.02


@pytest.mark.parametrize("scan", ["checkerboard", "sequential"])
@pytest.mark.parametrize("place", range(2))
def test_gibbs_is_near_enumeration_on_loops(scan, place):
    graph = [LOOPY[0], Graph(9, markov.grid_edges((3, 3)))][place]
    unary, coupling = numbers(np.random.default_rng(place), graph, 1.0)
    method = functools.partial(markov.by_gibbs, sweeps=10_000, discard=100, scan=scan)
    found = jax.jit(functools.partial(method, graph))(unary, coupling, key=jax.random.key(place))
    true = slowly(graph, unary, coupling)
    assert np.max(np.abs(found.probability - true)) < 0.02
    assert found.residual < 0.04
    # Without the couplings the answer is another one, so that the bound means something.
    assert np.max(np.abs(jax.nn.sigmoid(unary) - true)) > 0.04


@given(unary=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=6))
@settings(max_examples=15)
def test_without_coupling_odds_are_independent(unary):
    odds = np.asarray(unary, np.float32)
    padded = jnp.asarray(np.pad(odds, (0, 6 - len(odds))))
    graph = Graph(6, list(itertools.combinations(range(6), 2)))
    for method in (*EXACT, markov.by_belief_propagation):
        found = compiled(method, graph)(padded, jnp.float32(0))
        np.testing.assert_allclose(found.log_odds, padded, rtol=1e-5, atol=1e-5)
    gibbs = _short_gibbs(padded, jnp.float32(0))
    np.testing.assert_allclose(gibbs.log_odds, padded, rtol=1e-4, atol=1e-4)


@jax.jit
def _short_gibbs(unary, coupling):
    graph = Graph(6, list(itertools.combinations(range(6), 2)))
    return markov.by_gibbs(graph, unary, coupling, key=jax.random.key(0), sweeps=10, discard=1)


def test_strong_couplings_bind_a_chain_together():
    graph = Graph(5, [(i, i + 1) for i in range(4)])
    unary = jnp.array([3.0, -0.5, -0.5, -0.5, -0.5])
    found = markov.by_belief_propagation(graph, unary, 30.0)
    np.testing.assert_allclose(found.log_odds, 1.0, atol=1e-4)  # the sum of all


def test_the_answer_does_not_depend_on_the_sign_convention_of_the_mask():
    """Turning every synapse over turns the log odds over."""
    graph = LOOPY[0]
    unary, coupling = numbers(np.random.default_rng(3), graph, 1)
    for method in (*EXACT, markov.by_belief_propagation):
        there, back = (compiled(method, graph)(sign * unary, coupling) for sign in (1, -1))
        np.testing.assert_allclose(there.log_odds, -back.log_odds, atol=2e-5)


def test_kernels_that_share_a_graph_go_through_vmap():
    graph = Graph(9, markov.grid_edges((3, 3)))
    unary = jax.random.normal(jax.random.key(0), (4, 9))
    strengths = jnp.array([0.0, 0.2, 0.4, 0.8])
    for method in (markov.by_elimination, markov.by_belief_propagation):
        alone = compiled(method, graph)
        found = jax.jit(jax.vmap(functools.partial(method, graph)))(unary, strengths)
        for row, (u, c) in enumerate(zip(unary, strengths, strict=True)):
            one = alone(u, c)
            np.testing.assert_allclose(found.log_odds[row], one.log_odds, atol=2e-5)


def test_a_chessboard_has_two_colours_and_a_graph_is_static():
    graph = Graph(20, markov.grid_edges((4, 5)))
    assert sorted(set(graph.colours.tolist())) == [0, 1]
    for each in (*LOOPY, graph):
        a, b = each.edges.T
        assert np.all(each.colours[a] != each.colours[b])
    same = Graph(20, markov.grid_edges((4, 5)))
    assert same == graph
    assert hash(same) == hash(graph)
    assert graph != Graph(21, markov.grid_edges((4, 5)))
    assert jax.tree.leaves(graph) == []
    assert jax.jit(lambda g, u: markov.by_belief_propagation(g, u, 0.0).log_odds)(
        graph, jnp.ones(20)
    ).shape == (20,)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
def test_edges_of_grids_and_units_are_those_of_a_loop(shape):
    places = list(np.ndindex(shape))
    index = {place: number for number, place in enumerate(places)}
    axes = range(len(shape) - 2) if len(shape) > 2 else range(len(shape))
    grid = {
        (index[p], index[tuple(np.add(p, np.eye(len(shape), dtype=int)[axis]).tolist())])
        for p in places
        for axis in axes
        if p[axis] + 1 < shape[axis]
    }
    assert {tuple(e) for e in markov.grid_edges(shape).tolist()} == grid
    for axis in range(-len(shape), 0):
        units = [[index[p] for p in places if p[axis] == u] for u in range(shape[axis])]
        for form, pairs in (
            ("chain", {pair for unit in units for pair in itertools.pairwise(unit)}),
            ("clique", {pair for unit in units for pair in itertools.combinations(unit, 2)}),
        ):
            found = markov.unit_edges(shape, axis, form)
            assert {tuple(e) for e in found.tolist()} == pairs
            assert len(found) == len(pairs)
            Graph(math.prod(shape), found)


def belief_of(seed=0):
    params = {"b": jnp.ones(3), "w": 0.4 * jax.random.normal(jax.random.key(seed), (4, 3))}
    gone = optax.MaskedNode()
    belief = Posterior({"b": gone, "w": params["w"]}, {"b": gone, "w": jnp.full((4, 3), 30.0)})
    return params, belief


@pytest.mark.parametrize(
    "infer",
    [
        markov.by_elimination,
        markov.by_enumeration,
        functools.partial(markov.by_gibbs, sweeps=5_000),
    ],
)
def test_the_score_is_the_marginal_of_the_leafs_field(infer):
    params, belief = belief_of()
    synapses = {"b": optax.MaskedNode(), "w": params["w"]}
    score = functools.partial(markov.mask_posterior_score, coupling=0.8, keep=0.3, prior=2.0)
    found = jax.jit(lambda key: score(synapses, posterior=belief, infer=infer, key=key))(
        jax.random.key(0)
    )
    odds = reduction.slab_log_odds(belief, 0.3, 2.0)["w"]
    true = slowly(Graph(12, markov.unit_edges((4, 3))), odds.reshape(-1), 0.8)
    np.testing.assert_allclose(found["w"].reshape(-1), true, atol=0.02)
    default = score(synapses, posterior=belief)  # belief propagation on chains: exact
    np.testing.assert_allclose(default["w"].reshape(-1), true, atol=1e-6)
    assert isinstance(found["b"], optax.MaskedNode)


def test_the_score_prunes_and_neighbours_have_a_say():
    params, belief = belief_of()
    masks = []
    for coupling in (0.0, 1.0):
        score = functools.partial(markov.mask_posterior_score, coupling=coupling)
        tx = pruning.prune(pruning.threshold(0.5), score=score)
        updates = jax.tree.map(jnp.zeros_like, params)
        _, state = jax.jit(tx.update)(updates, tx.init(params), params, posterior=belief)
        masks.append(np.asarray(state.mask["w"]))
    np.testing.assert_array_equal(masks[0], reduction.reduction_mask(belief)["w"])
    assert np.any(masks[0] != masks[1])


def test_log_scores_keep_the_order_that_probabilities_lose():
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 0.1]])}
    belief = Posterior(params, {"w": jnp.full((2, 2), 100.0)})
    score = functools.partial(markov.mask_posterior_score, params, posterior=belief, coupling=0.1)
    assert len(set(np.ravel(score()["w"]).tolist())) == 2
    logs = np.ravel(score(scale="log")["w"])
    assert np.argsort(logs).tolist() == [3, 0, 1, 2]
    np.testing.assert_allclose(-np.expm1(-logs), np.ravel(score()["w"]), atol=1e-6)


def test_errors_name_what_is_wrong():
    for edges in ([(0, 3)], [(-1, 0)], [(1, 1)], [(0, 1), (1, 0)]):
        with pytest.raises(ValueError, match=r"edge \(.*leaves the graph of 3 synapses"):
            Graph(3, edges)
    with pytest.raises(ValueError, match="pairs of integers"):
        Graph(3, [(0.0, 1.0)])
    graph = Graph(3, [(0, 1)])
    with pytest.raises(ValueError, match=r"log odds of shape \(2,\)"):
        markov.by_enumeration(graph, jnp.ones(2), 0.0)
    with pytest.raises(ValueError, match=r"couplings of shape \(2,\) for 1 edges"):
        markov.by_belief_propagation(graph, jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match="21 synapses have 2\\^21 masks"):
        markov.by_enumeration(Graph(21, []), jnp.ones(21), 0.0)
    clique = Graph(6, markov.unit_edges((6, 1), form="clique"))
    with pytest.raises(ValueError, match="a table of 6 variables, more than widest=4"):
        markov.by_elimination(clique, jnp.ones(6), 0.1, widest=4)
    with pytest.raises(ValueError, match=r"damping must be in \[0, 1\), not 1"):
        markov.by_belief_propagation(graph, jnp.ones(3), 0.0, damping=1.0)
    with pytest.raises(ValueError, match="give it key="):
        markov.by_gibbs(graph, jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="scan='diagonal'"):
        markov.by_gibbs(graph, jnp.ones(3), 0.0, key=jax.random.key(0), scan="diagonal")
    with pytest.raises(ValueError, match="sweeps=1 must be at least 2"):
        markov.by_gibbs(graph, jnp.ones(3), 0.0, key=jax.random.key(0), sweeps=1)
    with pytest.raises(ValueError, match="axes=\\(2,\\) are not all axes"):
        markov.grid_edges((2, 2), [2])
    with pytest.raises(ValueError, match="axis=2 is no axis"):
        markov.unit_edges((2, 2), 2)
    with pytest.raises(ValueError, match="form='ring'"):
        markov.unit_edges((2, 2), form="ring")
    with pytest.raises(ValueError, match="use form='chain'"):
        markov.unit_edges((4096, 16), form="clique")
    params, belief = belief_of()
    with pytest.raises(ValueError, match="scale='odds'"):
        markov.mask_posterior_score({"w": params["w"]}, posterior=belief, scale="odds")
    with pytest.raises(ValueError, match="no mean of leaf 'b'"):
        markov.mask_posterior_score(params, posterior=belief)
    tx = pruning.prune(0.5, score=markov.mask_posterior_score)
    with pytest.raises(ValueError, match="asks for the signal 'posterior'"):
        tx.update(params, tx.init(params), params)
