"""Saliency at initialisation: against autodiff by hand, path sums, and dense Hessians."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from adaptivenet import pruning, trees
from adaptivenet.pruning import initial
from adaptivenet.pruning.saliency import saliency

SIZES = (3, 4, 2)


def network(seed=0, sizes=SIZES, bias=0.0):
    key = jax.random.key(seed)
    return {
        f"dense{layer}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, layer), pair),
            "bias": jnp.full(pair[1], bias),
        }
        for layer, pair in enumerate(itertools.pairwise(sizes))
    }


def apply(params, inputs):
    hidden = inputs
    for place, layer in enumerate(params.values()):
        hidden = hidden @ layer["kernel"] + layer["bias"]
        hidden = jax.nn.relu(hidden) if place + 1 < len(params) else hidden
    return hidden


def loss(params, inputs, targets):
    return jnp.mean((jnp.tanh(apply(params, inputs)) - targets) ** 2)


def synflow(params, sparsity, rounds):
    """In one program, which on tiny networks takes less time than its pieces."""
    ones = jnp.ones((1, params["dense0"]["kernel"].shape[0]))
    return jax.jit(lambda p: initial.synflow(apply, p, ones, sparsity=sparsity, rounds=rounds))(
        params
    )


def batch(seed=1):
    key = jax.random.key(seed)
    return jax.random.normal(key, (6, SIZES[0])), jnp.ones((6, SIZES[-1]))


def kernels(tree):
    return {name: layer["kernel"] for name, layer in tree.items()}


def test_snip_is_the_share_of_the_saliency():
    params = network(bias=0.1)
    got = initial.snip(loss, params, *batch())
    grads = jax.grad(loss)(params, *batch())
    expected = saliency(trees.synapses(params), grads=grads)
    total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(expected))
    for name, leaf in kernels(got).items():
        np.testing.assert_allclose(leaf, expected[name]["kernel"] / total, rtol=1e-5)
        assert isinstance(got[name]["bias"], optax.MaskedNode)
    assert sum(float(leaf.sum()) for leaf in jax.tree.leaves(got)) == pytest.approx(1)
    only = initial.snip(loss, params, *batch(), select="dense1/kernel")
    assert trees.paths(only) == ("dense1/kernel",)
    assert float(only["dense1"]["kernel"].sum()) == pytest.approx(1)


def test_grasp_orders_by_the_product_with_the_dense_hessian():
    params = network(bias=0.1)
    got = jax.jit(lambda p: initial.grasp(loss, p, *batch()))(params)
    flat, unravel = ravel_pytree(kernels(params))

    def on_weights(vector):
        full = {
            name: {"kernel": kernel, "bias": params[name]["bias"]}
            for name, kernel in unravel(vector).items()
        }
        return loss(full, *batch())

    hessian = jax.jit(jax.hessian(on_weights))(flat)
    grad = jax.jit(jax.grad(on_weights))(flat)
    # The change of the squared gradient norm (to first order) when a weight is removed, is
    # -2 w (H g): what falls the most is worth the most.
    worth = np.asarray(flat * (hessian @ grad))
    scores = ravel_pytree(kernels(got))[0]
    assert (worth < 0).any()
    assert (np.asarray(scores) >= 0).all()
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(worth))


def test_grasp_predicts_the_fall_of_the_gradient_norm():
    """Shrinking the weight with the largest score lowers the gradient's norm the most."""
    params = {"w": 0.5 * jax.random.normal(jax.random.key(3), (2, 3))}

    def curved(p):
        return jnp.sum(p["w"] ** 4) + jnp.prod(p["w"][0])

    def norm(w):
        return float(jnp.sum(jax.grad(curved)({"w": w})["w"] ** 2))

    scores = initial.grasp(curved, params)["w"]
    change = np.zeros((2, 3))
    for place in np.ndindex(2, 3):
        change[place] = norm(params["w"].at[place].mul(0.99)) - norm(params["w"])
    np.testing.assert_array_equal(np.argsort(np.ravel(scores)), np.argsort(-np.ravel(change)))


def slow_synflow(kernels_):
    """The sum over all paths through a synapse of the product of their weights, relative to R."""
    weights = [np.abs(np.asarray(kernel, np.float64)) for kernel in kernels_]
    scores = [np.zeros_like(weight) for weight in weights]
    total = 0.0
    widths = [weights[0].shape[0], *(weight.shape[1] for weight in weights)]
    for path in itertools.product(*map(range, widths)):
        hops = list(itertools.pairwise(path))
        flow = np.prod([weight[hop] for weight, hop in zip(weights, hops, strict=True)])
        total += flow
        for score, hop in zip(scores, hops, strict=True):
            score[hop] += flow
    return [score / total for score in scores] if total else scores


def test_synflow_of_one_round_is_the_sum_over_paths():
    params = network()
    got = synflow(params, 0.5, 1)
    expected = slow_synflow(kernels(params).values())
    for leaf, scores in zip(jax.tree.leaves(got), expected, strict=True):
        np.testing.assert_allclose(leaf, scores, rtol=1e-5)
        assert float(leaf.sum()) == pytest.approx(1)  # what flows through a layer is conserved


def test_synflow_equals_a_slow_loop():
    params, sparsity, rounds = network(2, (4, 5, 3)), 0.8, 7
    size = 4 * 5 + 5 * 3
    weights = [np.asarray(kernel, np.float64) for kernel in kernels(params).values()]
    for turn in range(rounds):
        scores = slow_synflow(weights)
        if turn == rounds - 1:
            break
        share = 1 - (1 - sparsity) ** ((turn + 1) / rounds)
        keep = size - int(np.floor(share * size + 1e-9))
        flat = np.concatenate([score.ravel() for score in scores])
        kept = np.zeros(size, bool)
        kept[np.argsort(-flat, kind="stable")[:keep]] = True
        parts = np.split(kept, [20])
        weights = [w * part.reshape(w.shape) for w, part in zip(weights, parts, strict=True)]
    got = synflow(params, sparsity, rounds)
    for leaf, expected in zip(jax.tree.leaves(got), scores, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-7)


def test_many_rounds_leave_no_layer_empty():
    params = network(0, (10, 20, 20, 4))
    params["dense1"]["kernel"] *= 1e-3  # a wide layer of small weights, which magnitude would empty
    score = initial.fixed(synflow(params, 0.97, 50))
    layers, flows = {}, {}
    for name, rule in (("synflow", score), ("magnitude", pruning.magnitude)):
        pruner = pruning.prune(0.97, score=rule, every=None)

        @jax.jit
        def cut(params, pruner=pruner):
            return pruning.revise(pruner, params, pruner.init(params))

        pruned, state = cut(params)
        layers[name] = [int(jnp.sum(k != 0)) for k in kernels(pruned).values()]
        flows[name] = float(apply(jax.tree.map(jnp.abs, pruned), jnp.ones((1, 10))).sum())
        assert int(pruning.record(state).kept) == 20  # 3 % of 680 synapses
    assert min(layers["synflow"]) > 0
    assert layers["magnitude"][1] == 0
    # What SynFlow keeps lies on paths from the inputs to the outputs.
    assert flows["synflow"] > 0 == flows["magnitude"]


def test_synflow_takes_shapes_and_ignores_data_and_signs():
    params = network()
    first = initial.synflow(apply, params, jnp.full((1, 3), -7.0), sparsity=0.5, rounds=3)
    shape = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    negative = jax.tree.map(jnp.negative, params)
    second = initial.synflow(apply, negative, shape, sparsity=0.5, rounds=3)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_synflow_of_a_deep_network_does_not_overflow():
    """The flow through 24 layers that amplify by about 100 each is 10^48: beyond float32."""
    sizes = (30,) * 25
    params = network(0, sizes)
    params = {
        name: {"kernel": layer["kernel"] * 4, "bias": layer["bias"]}
        for name, layer in params.items()
    }
    positive = jax.tree.map(jnp.abs, params)
    assert not np.isfinite(apply(positive, jnp.ones((1, 30))).sum())
    got = synflow(params, 0.5, 2)
    # The order of a network whose layers are scaled down is the same, and needs no rescue.
    small = {
        name: {"kernel": layer["kernel"] / 128, "bias": layer["bias"]}
        for name, layer in params.items()
    }
    expected = synflow(small, 0.5, 2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_synflow_without_a_flow_is_refused():
    params = network()
    params["dense0"]["kernel"] = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match="no flow reaches the outputs"):
        initial.synflow(apply, params, jnp.ones((1, 3)), sparsity=0.5)
    huge = jax.tree.map(lambda p: p * 1e37, network())
    with pytest.raises(ValueError, match="flow through the network exceeds float32"):
        initial.synflow(apply, huge, jnp.ones((1, 3)), sparsity=0.5)
    with pytest.raises(ValueError, match=r"sparsity must be a sparsity in \[0, 1\), not 1"):
        initial.synflow(apply, network(), jnp.ones((1, 3)), sparsity=1.0)
    with pytest.raises(ValueError, match="rounds must be an integer >= 1, not 0"):
        initial.synflow(apply, network(), jnp.ones((1, 3)), sparsity=0.5, rounds=0)


def test_under_jit_and_vmap():
    inputs, targets = batch()

    def everything(params, sparsity):
        return (
            initial.snip(loss, params, inputs, targets),
            initial.grasp(loss, params, inputs, targets),
            initial.synflow(apply, params, inputs[:1], sparsity=sparsity, rounds=4),
        )

    members = [network(seed) for seed in range(3)]
    sparsities = jnp.array([0.2, 0.5, 0.8])
    together = jax.jit(jax.vmap(everything))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), sparsities
    )
    for place, params in enumerate(members):
        alone = jax.jit(everything)(params, sparsities[place])
        one = jax.tree.map(lambda leaf: leaf[place], together)  # noqa: B023 (used at once)
        for k in (0, 2):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                one[k],
                alone[k],
            )
        # Signed sums near zero differ in their rounding, and so by their ordinal: compare ranks.
        ranks = [jnp.argsort(ravel_pytree(x)[0]).tolist() for x in (one[1], alone[1])]
        assert ranks[0] == ranks[1]


def test_fixed_within_prune():
    params = network(bias=1.0)
    scores = initial.snip(loss, params, *batch())
    tx = optax.chain(
        optax.sgd(0.0), pruning.prune(pruning.one_shot(0.5, step=1), score=initial.fixed(scores))
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(scores)])
    limit = np.sort(values)[len(values) // 2]
    for name, kernel in kernels(new).items():
        np.testing.assert_array_equal(kernel != 0, scores[name]["kernel"] >= limit)
    assert int(pruning.record(state).kept) == 10


def test_fixed_goes_by_path_not_by_container():
    scores = [{"kernel": jnp.array([1.0, 2.0]), "bias": jnp.ones(1)}, jnp.ones(2)]
    score = initial.fixed(scores)
    params = {"0": {"kernel": jnp.zeros(2), "bias": optax.MaskedNode()}}
    got = score(params)
    assert got["0"]["kernel"].tolist() == [1.0, 2.0]
    assert isinstance(got["0"]["bias"], optax.MaskedNode)
    assert score.__name__ == "fixed"


def test_fixed_refuses_what_does_not_fit():
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    pruner = pruning.prune(0.5, score=initial.fixed({"other": jnp.ones((2, 3))}))
    with pytest.raises(ValueError, match=r"fixed scores have no leaf 'dense/kernel'"):
        pruner.update(params, pruner.init(params), params)
    with pytest.raises(ValueError, match=r"fixed scores have shape \(3,\) at 'dense/kernel'"):
        initial.fixed({"dense": {"kernel": jnp.ones(3)}})(params)
    with pytest.raises(ValueError, match="score 'a' holds 2 negative numbers"):
        initial.fixed({"a": jnp.array([-1.0, 1.0, -2.0])})
    with pytest.raises(ValueError, match="score 'a' holds 1 nan"):
        initial.fixed({"a": jnp.array([1.0, jnp.nan])})
    with pytest.raises(TypeError, match="score 'a' has dtype int32"):
        initial.fixed({"a": jnp.ones(2, jnp.int32)})


def test_fixed_scores_may_be_those_of_a_population():
    def member(seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (2, 4))}
        scores = initial.snip(lambda p: jnp.sum(jnp.sin(p["w"])), params)
        pruner = pruning.prune(0.5, score=initial.fixed(scores), every=None)
        pruned, state = pruning.revise(pruner, params, pruner.init(params))
        return scores["w"], pruning.mask(state)["w"], pruned["w"]

    scores, masks, _ = jax.jit(jax.vmap(member))(jnp.arange(3))
    assert masks.sum(axis=(1, 2)).tolist() == [4, 4, 4]
    for score, mask in zip(np.asarray(scores), np.asarray(masks), strict=True):
        assert score[mask].min() > score[~mask].max()


def test_in_bfloat16():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), network())
    short = [x.astype(jnp.bfloat16) for x in batch()]

    @jax.jit
    def everything(params):
        return (
            initial.snip(loss, params, *short),
            initial.grasp(loss, params, *short),
            initial.synflow(apply, params, short[0][:1], sparsity=0.5, rounds=3),
        )

    for scores in everything(params):
        for leaf in jax.tree.leaves(scores):
            assert leaf.dtype == jnp.float32
            assert np.isfinite(leaf).all()
            assert (np.asarray(leaf) >= 0).all()
