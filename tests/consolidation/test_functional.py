"""Functional penalties are their dense formulas; on linear models they are those of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from adaptivenet import trees
from adaptivenet.consolidation.functional import (
    distillation,
    empty_memory,
    functional_penalty,
    memorable,
    noise_precision,
    refresh,
    remember,
    teacher,
)
from adaptivenet.posterior.gaussian import Posterior, isotropic


def net(params, inputs):
    hidden = jnp.tanh(inputs @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    return hidden @ params["dense2"]["kernel"]


def network(seed, inputs=3, hidden=4, outputs=3):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "dense1": {
            "kernel": jax.random.normal(a, (inputs, hidden)),
            "bias": 0.1 * jax.random.normal(b, (hidden,)),
        },
        "dense2": {"kernel": jax.random.normal(c, (hidden, outputs))},
    }


PARAMS = network(0)
BELIEF = Posterior(PARAMS, jax.tree.map(lambda p: 5.0 + 20.0 * jnp.abs(p), PARAMS))
LINKS = {
    "categorical": jax.nn.softmax,
    "bernoulli": jax.nn.sigmoid,
    "gaussian": lambda outputs: outputs,
}


def points(seed, count=4, inputs=3):
    return jax.random.normal(jax.random.key(100 + seed), (count, inputs))


class TestDistillation:
    def by_hand(self, student, teacher, temperature, keep):
        """Cross entropy less entropy, in float64."""
        student, teacher = (
            np.asarray(x, np.float64)[keep] / temperature for x in (student, teacher)
        )
        p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, student))
        return -np.sum(p * np.log(q)) + np.sum(p * np.log(p))

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
    def test_it_is_the_cross_entropy_less_the_teachers_entropy(self, temperature):
        rng = np.random.default_rng(0)
        student, old = rng.normal(size=(2, 6, 5)) * 3
        keep = np.array([True, False, True, True, False])
        for classes in (None, keep):
            got = distillation(
                jnp.asarray(student, jnp.float32),
                jnp.asarray(old, jnp.float32),
                temperature=temperature,
                classes=None if classes is None else jnp.asarray(classes),
            )
            chosen = np.full(5, True) if classes is None else classes
            expected = [
                self.by_hand(s, t, temperature, chosen) for s, t in zip(student, old, strict=True)
            ]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

    def test_its_gradient_is_that_of_the_articles_loss(self):
        student, old = jnp.array([0.3, -2.0, 1.0]), jnp.array([1.0, 0.0, -1.0])

        def article(logits):
            return -jnp.sum(jax.nn.softmax(old / 2) * jax.nn.log_softmax(logits / 2))

        got = jax.grad(lambda logits: distillation(logits, old))(student)
        np.testing.assert_allclose(got, jax.grad(article)(student), rtol=1e-5)
        into = jax.grad(lambda logits: distillation(student, logits))(old)
        assert into.tolist() == [0.0, 0.0, 0.0]

    def test_classes_that_are_left_out_have_no_gradient_and_no_nan(self):
        student = jnp.array([[1.0, jnp.inf, 3.0], [1.0, 2.0, 3.0]])
        old = jnp.array([[1.0, jnp.nan, 0.0], [1.0, jnp.nan, -jnp.inf]])
        classes = jnp.array([[True, False, True], [False, False, False]])
        value = distillation(student, old, classes=classes)
        assert value[1] == 0.0
        assert np.isfinite(value[0])
        grad = jax.grad(lambda s: distillation(s, old, classes=classes).sum())(student)
        assert np.all(np.isfinite(grad))
        assert grad[0, 1] == 0.0
        assert grad[1].tolist() == [0.0, 0.0, 0.0]

    def test_the_teacher_stays_as_it_was(self):
        params = {"w": jnp.ones(2)}
        old = teacher(lambda p, x: jnp.dot(p["w"], x), params)
        trained = {"w": params["w"] + 5.0}
        assert old(jnp.ones(2)) == 2.0
        grad = jax.grad(lambda x: old(x))(jnp.ones(2))
        assert grad.tolist() == [0.0, 0.0]
        del trained

    def test_errors(self):
        with pytest.raises(ValueError, match="temperature must be positive"):
            distillation(jnp.ones(2), jnp.ones(2), temperature=0.0)
        with pytest.raises(ValueError, match="the teacher's"):
            distillation(jnp.ones(2), jnp.ones(3))


class TestMemorable:
    def test_noise_precision_is_the_trace_of_the_hessian(self):
        logits = jnp.array([0.5, -1.0, 2.0])

        def nll(f):
            return -jax.nn.log_softmax(f)[0]

        hessian = jax.hessian(nll)(logits)
        np.testing.assert_allclose(noise_precision(logits), jnp.trace(hessian), rtol=1e-5)
        hessian = jax.hessian(lambda f: jnp.sum(jax.nn.softplus(f)))(logits)
        got = noise_precision(logits, "bernoulli")
        np.testing.assert_allclose(got, jnp.trace(hessian), rtol=1e-5)
        assert noise_precision(logits, "gaussian") == 3.0
        two = noise_precision(logits, classes=jnp.array([True, True, False]))
        np.testing.assert_allclose(two, noise_precision(logits[:2]), rtol=1e-5)

    def test_the_undecided_are_kept(self):
        inputs = points(0, 40)
        weight = np.asarray(noise_precision(net(PARAMS, inputs)))
        got = jax.jit(lambda x: memorable(net, PARAMS, x, 7))(inputs)
        assert got.tolist() == np.argsort(-weight, kind="stable")[:7].tolist()

    def test_as_many_of_each_class(self):
        inputs, labels = points(0, 40), np.arange(40) % 3
        got = np.asarray(
            memorable(net, PARAMS, inputs, 9, labels=jnp.asarray(labels), label_count=3)
        )
        weight = np.asarray(noise_precision(net(PARAMS, inputs)))
        for c in range(3):
            own = np.flatnonzero(labels == c)
            best = own[np.argsort(-weight[own], kind="stable")][:3]
            assert got[3 * c : 3 * c + 3].tolist() == best.tolist()

    def test_errors(self):
        inputs, labels = points(0, 6), jnp.array([0, 0, 0, 0, 0, 1])
        for options, message in (
            ({"count": 7}, "count must be between 1 and the 6 examples"),
            ({"count": 4, "labels": labels}, "labels= need label_count="),
            ({"count": 3, "labels": labels, "label_count": 2}, "divides count=3, not 2"),
            (
                {"count": 4, "labels": labels, "label_count": 2},
                "class 1 has 1 examples, fewer than 2",
            ),
            ({"count": 4, "likelihood": "poisson"}, "likelihood must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                memorable(net, PARAMS, inputs, **options)


def dense_penalty(params, tasks, likelihood, jitter, classes=None):
    """The formula with explicit Jacobians and inverses, task by task and output by output."""
    variance = 1 / np.asarray(ravel_pytree(BELIEF.precision)[0], np.float64)
    flat, unravel = ravel_pytree(PARAMS)
    total = 0.0
    for task, inputs in enumerate(tasks):
        head = slice(None) if classes is None else np.flatnonzero(classes[task])

        def said(vector, inputs=inputs, head=head):
            return LINKS[likelihood](net(unravel(vector), inputs)[:, head])

        jacobian = np.asarray(jax.jacrev(said)(flat), np.float64)  # [slots, outputs, P]
        gap = np.asarray(said(ravel_pytree(params)[0]) - said(flat), np.float64)
        for c in range(gap.shape[1]):
            kernel = (jacobian[:, c] * variance) @ jacobian[:, c].T + jitter * np.eye(len(inputs))
            total += 0.5 * gap[:, c] @ np.linalg.inv(kernel) @ gap[:, c]
    return total


class TestPenalty:
    def memory(self, tasks, likelihood, jitter=1e-3, room=3, classes=None):
        memory = empty_memory(jnp.zeros(3), outputs=3, tasks=room, slots=4)
        for task, inputs in enumerate(tasks):
            own = None if classes is None else jnp.asarray(classes[task])
            memory = remember(
                net,
                PARAMS,
                BELIEF,
                memory,
                inputs,
                classes=own,
                likelihood=likelihood,
                jitter=jitter,
            )
        return memory

    @pytest.mark.parametrize("likelihood", list(LINKS))
    def test_it_is_the_dense_formula(self, likelihood):
        tasks = [points(0), points(1)]
        memory = self.memory(tasks, likelihood)
        moved = network(1)
        got = functional_penalty(net, moved, memory, strength=0.7, likelihood=likelihood)
        np.testing.assert_allclose(
            got, 0.7 * dense_penalty(moved, tasks, likelihood, 1e-3), rtol=2e-3
        )
        assert functional_penalty(net, PARAMS, memory, likelihood=likelihood) < 1e-9

    def test_heads_of_their_own(self):
        classes = [[True, True, False], [False, True, True]]
        tasks = [points(0), points(1)]
        memory = self.memory(tasks, "categorical", classes=classes)
        moved = network(1)
        expected = dense_penalty(moved, tasks, "categorical", 1e-3, np.array(classes))
        np.testing.assert_allclose(functional_penalty(net, moved, memory), expected, rtol=2e-3)

    def test_its_gradient_is_j_k_inverse_gap(self):
        """As the authors write it: the sum over outputs of J(now)^T K^-1 (m - m_t)."""
        inputs, moved = points(0), network(1)
        memory = self.memory([inputs], "categorical")
        got = ravel_pytree(jax.grad(lambda p: functional_penalty(net, p, memory))(moved))[0]
        flat, unravel = ravel_pytree(moved)
        jacobian = np.asarray(jax.jacrev(lambda v: jax.nn.softmax(net(unravel(v), inputs)))(flat))
        gap = np.asarray(jax.nn.softmax(net(moved, inputs)) - jax.nn.softmax(net(PARAMS, inputs)))
        expected = np.zeros_like(flat)
        for c in range(3):
            kernel = np.asarray(memory.factor[0, c], np.float64)
            kernel = kernel @ kernel.T
            expected += jacobian[:, c].T @ np.linalg.solve(kernel, gap[:, c])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)

    def test_on_a_linear_model_it_is_elastic_weight_consolidation(self):
        """As many inputs as parameters of an output: the same quadratic form."""

        def linear(params, inputs):
            return inputs @ params["w"]

        rng = np.random.default_rng(0)
        params = {"w": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
        belief = Posterior(params, {"w": jnp.asarray(rng.uniform(1, 9, (4, 2)), jnp.float32)})
        inputs = jnp.asarray(np.eye(4) + 0.2 * rng.normal(size=(4, 4)), jnp.float32)
        memory = empty_memory(inputs[0], outputs=2, tasks=1, slots=4)
        kind = {"likelihood": "gaussian"}
        memory = remember(linear, params, belief, memory, inputs, jitter=0.0, **kind)
        moved = {"w": params["w"] + jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
        elastic = 0.5 * jnp.sum(belief.precision["w"] * jnp.square(moved["w"] - params["w"]))
        got = functional_penalty(linear, moved, memory, **kind)
        np.testing.assert_allclose(got, elastic, rtol=1e-3)
        # With fewer inputs than parameters something is free (negative control).
        fewer = empty_memory(inputs[0], outputs=2, tasks=1, slots=2)
        fewer = remember(linear, params, belief, fewer, inputs[:2], jitter=0.0, **kind)
        assert functional_penalty(linear, moved, fewer, **kind) < 0.9 * elastic

    def test_nothing_is_remembered_at_first(self):
        memory = empty_memory(jnp.zeros(3), outputs=3, tasks=2, slots=4)
        value, grad = jax.value_and_grad(lambda p: functional_penalty(net, p, memory))(PARAMS)
        assert value == 0.0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grad))


class TestMemory:
    def test_a_boundary_may_be_compiled_and_scanned(self):
        tasks = jnp.stack([points(seed) for seed in range(3)])
        empty = empty_memory(jnp.zeros(3), outputs=3, tasks=3, slots=4)

        def boundary(memory, inputs):
            return remember(net, PARAMS, BELIEF, memory, inputs), memory.count

        scanned, counts = jax.jit(lambda m: jax.lax.scan(boundary, m, tasks))(empty)
        assert counts.tolist() == [0, 1, 2]
        loop = empty
        for inputs in tasks:
            loop = boundary(loop, inputs)[0]
        for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(loop), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
            assert a.dtype == b.dtype

    def test_a_full_memory_forgets_the_oldest(self):
        memory = empty_memory(jnp.zeros(3), outputs=3, tasks=2, slots=4)
        for seed in range(3):
            memory = remember(net, PARAMS, BELIEF, memory, points(seed))
        np.testing.assert_array_equal(memory.inputs[0], points(2))
        np.testing.assert_array_equal(memory.inputs[1], points(1))
        assert memory.filled.tolist() == [True, True]

    def test_refreshing_looks_at_old_tasks_anew(self):
        memory = empty_memory(jnp.zeros(3), outputs=3, tasks=2, slots=4)
        memory = remember(net, PARAMS, BELIEF, memory, points(0))
        later = network(1)
        assert functional_penalty(net, later, memory) > 1.0
        memory = refresh(net, later, isotropic(later, 10.0), memory)
        assert functional_penalty(net, later, memory) < 1e-9

    def test_leaves_that_nothing_is_believed_of_are_certain(self):
        part = Posterior(
            {**BELIEF.mean, "dense1": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}},
            {
                **BELIEF.precision,
                "dense1": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()},
            },
        )
        sure = Posterior(
            BELIEF.mean,
            {**BELIEF.precision, "dense1": jax.tree.map(lambda p: p + 1e12, PARAMS["dense1"])},
        )
        empty = empty_memory(jnp.zeros(3), outputs=3, tasks=1, slots=4)
        a, b = (remember(net, PARAMS, s, empty, points(0), jitter=1e-3) for s in (part, sure))
        np.testing.assert_allclose(a.factor, b.factor, rtol=1e-3, atol=1e-4)

    def test_other_trees_and_leaves_that_are_not_floating(self):
        params = [PARAMS["dense1"]["kernel"], jnp.arange(2)]

        def apply(params, inputs):
            return inputs @ params[0]

        empty = empty_memory(jnp.zeros(3), outputs=4, tasks=1, slots=4)
        memory = remember(apply, params, isotropic(params, 3.0), empty, points(0))
        assert np.all(np.isfinite(memory.factor))
        assert trees.is_masked(isotropic(params, 3.0).mean[1])

    def test_errors(self):
        memory = empty_memory(jnp.zeros(3), outputs=3, tasks=2, slots=4)
        with pytest.raises(ValueError, match=r"inputs of the shape \(4, 3\), not \(5, 3\)"):
            remember(net, PARAMS, BELIEF, memory, points(0, 5))
        with pytest.raises(ValueError, match="needs a belief"):
            remember(net, PARAMS, None, memory, points(0))
        other = empty_memory(jnp.zeros(3), outputs=2, tasks=2, slots=4)
        with pytest.raises(ValueError, match=r"the memory was made for \[examples, 2\]"):
            remember(net, PARAMS, BELIEF, other, points(0))
        with pytest.raises(ValueError, match="strength must be a number >= 0"):
            functional_penalty(net, PARAMS, memory, strength=-1.0)
        with pytest.raises(ValueError, match="slots must be at least 1"):
            empty_memory(jnp.zeros(3), outputs=2, tasks=2, slots=0)


def test_a_network_keeps_its_first_task():
    """Two tasks of three classes each on other inputs; negative control: without the penalty."""
    inputs = jax.random.normal(jax.random.key(0), (2, 60, 3))
    shift = jnp.array([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0]])
    inputs = inputs + shift[:, None]
    labels = jnp.stack(
        [
            jnp.argmax(inputs[0][:, [1, 2, 1]] * jnp.array([1.0, 1.0, -1.0]), -1),
            jnp.argmax(inputs[1][:, [2, 1, 1]] * jnp.array([1.0, -1.0, 1.0]), -1),
        ]
    )

    def loss(params, task):
        logits = net(params, inputs[task])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[task]))

    def train(params, task, penalty):
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.03))

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(p, task) + penalty(p))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 300)[0][0]

    params = train(network(3, hidden=8), 0, lambda p: 0.0)
    places = memorable(net, params, inputs[0], 20)
    memory = empty_memory(inputs[0][0], outputs=3, tasks=2, slots=20)
    memory = remember(net, params, isotropic(params, 20.0), memory, inputs[0][places])
    free = train(params, 1, lambda p: 0.0)
    held = train(params, 1, lambda p: functional_penalty(net, p, memory, strength=1 / 60))
    assert loss(params, 0) < 0.4
    assert loss(free, 0) > 1.0
    assert loss(held, 0) < 0.5 * loss(free, 0)
    assert loss(held, 1) < 0.7
