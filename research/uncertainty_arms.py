"""The arms of the study of uncertainty: four trainings, their beliefs, and what is cut by them.

A row is spelled ``network:score``. Networks are trained on the same batches for as many passes:
``adam`` without a prior, ``l2`` (Adam on the loss and the penalty of the prior that all that follow
have: the *matched* control), ``noise`` (the same with Gaussian noise of one width on every weight:
the control of training under noise that knows nothing), ``ivon``, and ``field`` (mean field). Noise
of the last but one is drawn by weight, of ``noise`` and ``field`` at every unit's sum (local
reparametrisation). Every network has a belief: the three of Adam a Laplace approximation with its
prior tuned by the evidence. Scores: ``magnitude``, ``snr`` of the belief, ``shuffled`` (its widths
permuted within each kernel: the null), ``random``; ``obd`` and ``fisher_tempered`` by the Fisher
information that the Laplace approximation is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet import models
from research.rounds import Task, map_kernels, noisy

if TYPE_CHECKING:
    from research.uncertainty import Setting

PyTree = Any
post = an.posterior

NETWORKS = ("adam", "l2", "noise", "ivon", "field")
TITLES = {
    "adam": "Adam",
    "l2": "Adam + L2",
    "noise": "Adam + L2 + noise",
    "ivon": "IVON",
    "field": "mean field",
}
SCORES = ("magnitude", "snr", "shuffled", "random", "obd", "fisher_tempered")
OF_CURVATURE = ("obd", "fisher_tempered")


class Row(NamedTuple):
    """A network, and the score that it is cut by."""

    network: str
    score: str


class Belief(NamedTuple):
    """A trained network, what is believed of it, and the Fisher information where it was taken."""

    params: PyTree
    posterior: Any
    fisher: PyTree | None


def read_row(name: str) -> Row:
    """Reads a row's name.

    Args:
      name: such as ``ivon:snr``.

    Returns:
      The row.

    Raises:
      ValueError: no such network or score, or a score that the network does not have.

    >>> read_row("ivon:snr")
    Row(network='ivon', score='snr')
    """
    network, _, score = name.partition(":")
    if network not in NETWORKS or score not in SCORES:
        raise ValueError(
            f"row {name!r}: write network:score, of the networks {', '.join(NETWORKS)} and the "
            f"scores {', '.join(SCORES)}."
        )
    if score in OF_CURVATURE and network in ("ivon", "field"):
        raise ValueError(f"row {name!r}: {score} is for the networks that Adam trained.")
    return Row(network, score)


def cross_entropy(params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over a batch, in nats."""
    logits = models.mlp(params, inputs)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


class Course:
    """How networks of one setting are trained, believed of, cut, and trained again.

    Args:
      setting: of the study's config.
      features: of an input.
      examples: of the training data.
    """

    def __init__(self, setting: Setting, features: int, examples: int) -> None:
        self.setting, self.features, self.examples = setting, features, examples
        self.steps = examples // setting.batch_size
        if self.steps == 0:
            raise ValueError(
                f"batch_size={setting.batch_size}: {examples} training examples do not fill a "
                "batch; lower it."
            )
        self.decay = setting.prior / examples
        self._epoch = jax.jit(self._pass, static_argnums=0)
        self._again = jax.jit(jax.vmap(self._retrain, (0, 0, None, None, None)))
        self._laplace = jax.jit(self._curved)
        self.scores = jax.jit(self._scores)
        self.cut = jax.jit(self._cut)
        self.measure = jax.jit(jax.vmap(self._measure, (0, None)))

    # --- training

    def rate(self, peak: float, epochs: int) -> Any:
        """A short warm-up, then a cosine to zero."""
        whole = epochs * self.steps
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, whole - 1), whole)

    def optimizer(self, network: str) -> Any:
        """Of a network's first training."""
        s = self.setting
        if network == "ivon":
            return post.ivon(
                self.rate(s.ivon_rate, s.epochs),
                ess=float(self.examples),
                hess_init=s.hess_init,
                b2=s.ivon_decay,
                weight_decay=self.decay,
            )
        return optax.adam(self.rate(s.field_rate if network == "field" else s.rate, s.epochs))

    def begin(self, network: str, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Parameters (of a mean field: those of the belief), and the optimizer's state."""
        params = models.mlp_init(key, (self.features, *self.setting.widths))
        if network == "field":
            params = post.meanfield.init(params, self.setting.field_scale)
        return params, self.optimizer(network).init(params)

    def train(
        self, network: str, key: jax.Array, task: Task, done: Callable[[], None] = lambda: None
    ) -> tuple[PyTree, PyTree]:
        """Trains a network; ``done`` is told of every epoch."""
        net = self.begin(network, jax.random.fold_in(key, 0))
        for epoch in range(self.setting.epochs):
            net = self._epoch(network, net, jax.random.fold_in(key, epoch + 1), task)
            jax.block_until_ready(net)
            done()
        return net

    def _rows(self, key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, self.examples)
        return order[: self.steps * self.setting.batch_size].reshape(self.steps, -1)

    def _pass(self, network: str, net: Any, key: jax.Array, task: Task) -> Any:
        """An epoch; the same key, the same batches for every network."""
        tx = optax.with_extra_args_support(self.optimizer(network))
        of_rows, of_noise = jax.random.split(key)

        def penalised(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
            return cross_entropy(params, x, y) + 0.5 * self.decay * squares(params)

        def fit(params: PyTree, scales: PyTree, x: Any, y: Any, key: Any) -> jax.Array:
            logits = noisy(params, scales, x, key)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        def under_noise(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
            scales = jax.tree.map(lambda p: jnp.full_like(p, self.setting.noise), params)
            return fit(params, scales, x, y, key) + 0.5 * self.decay * squares(params)

        def bound(fields: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
            prior = post.meanfield.kl(fields, prior_scale=self.setting.prior**-0.5)
            scales = post.meanfield.scales(fields)
            whole = self.setting.temperature * prior
            return fit(fields.mean, scales, x, y, key) + whole / self.examples

        def step(net: Any, at: Any) -> Any:
            (params, state), (rows, number) = net, at
            x, y = task.inputs[rows], task.targets[rows]
            extra: dict[str, Any] = {}
            if network == "ivon":
                _, grads, extra = post.noisy_value_and_grad(cross_entropy, state, params, x, y)
            elif network in ("noise", "field"):
                loss = bound if network == "field" else under_noise
                grads = jax.grad(loss)(params, x, y, jax.random.fold_in(of_noise, number))
            else:
                grads = jax.grad(penalised if network == "l2" else cross_entropy)(params, x, y)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, net, (self._rows(of_rows), jnp.arange(self.steps)))[0]

    # --- what is believed

    def believe(self, network: str, net: Any, task: Task) -> Belief:
        """What is believed of a trained network."""
        params, state = net
        if network == "ivon":
            return Belief(params, post.find(state, params), None)
        if network == "field":
            return Belief(params.mean, post.meanfield.posterior(params), None)
        return Belief(params, *self._laplace(params, task))

    def _curved(self, params: PyTree, task: Task) -> tuple[Any, PyTree]:
        fit = post.laplace(
            models.mlp,
            params,
            task.inputs,
            task.targets,
            likelihood="categorical",
            prior_precision=self.setting.prior,
            batch_size=500,
        )
        tuned = post.tune_prior(fit, self.setting.granularity).laplace
        # The Fisher information: the precision, less that of a prior as small as float32 has.
        bare = fit.with_prior(1e-30).posterior().precision
        return tuned.posterior(), bare

    # --- what is cut

    def _scores(self, belief: Belief, key: jax.Array) -> dict[str, PyTree]:
        """Every score of a network's kernels; masked nodes for its biases."""
        params = belief.params
        kernels = an.trees.synapses(params)
        places = iter(range(len(params)))

        def shuffle(precision: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, next(places))
            return jax.random.permutation(own, precision.ravel()).reshape(precision.shape)

        shuffled = belief.posterior._replace(
            precision=map_kernels(shuffle, belief.posterior.precision)
        )
        found = {
            "magnitude": an.pruning.magnitude(kernels),
            "snr": an.pruning.snr(kernels, posterior=belief.posterior),
            "shuffled": an.pruning.snr(kernels, posterior=shuffled),
            "random": an.pruning.random(kernels, key=jax.random.fold_in(key, len(params))),
        }
        if belief.fisher is not None:
            found["obd"] = an.pruning.obd(kernels, fisher=belief.fisher)
            found["fisher_tempered"] = an.pruning.fisher_tempered(0.25)(
                kernels, fisher=belief.fisher
            )
        return found

    def _cut(self, params: PyTree, scores: PyTree, sparsities: jax.Array) -> tuple[PyTree, PyTree]:
        """The network at each sparsity, by one global threshold, and its masks."""
        size = an.trees.size(scores)

        def at(sparsity: jax.Array) -> tuple[PyTree, PyTree]:
            kept = size - jnp.round(sparsity * size).astype(jnp.int32)
            mask = an.selection.top_mask(scores, kept)
            return an.pruning.apply_mask(params, mask), mask

        return jax.vmap(at)(sparsities)

    def retrain(
        self, network: str, params: PyTree, masks: PyTree, key: jax.Array, task: Task
    ) -> Any:
        """Trains cut networks for some more passes, all alike: by Adam, what is cut stays zero.

        Args:
          network: whose penalty is kept: none for ``adam``, else that of the matched prior.
          params: networks ``[sparsities, ...]``.
          masks: of their kernels.
          key: of the batches.
          task: the data.

        Returns:
          The networks.
        """
        decay = 0.0 if network == "adam" else self.decay
        return self._again(params, masks, jnp.float32(decay), key, task)

    def _retrain(self, params: PyTree, mask: PyTree, decay: Any, key: jax.Array, task: Task) -> Any:
        s = self.setting
        tx = optax.adam(self.rate(s.retrain_rate, s.retrain))

        def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
            return cross_entropy(params, x, y) + 0.5 * decay * squares(params)

        def step(net: Any, rows: jax.Array) -> Any:
            params, state = net
            grads = jax.grad(loss)(params, task.inputs[rows], task.targets[rows])
            # Adam leaves alone what never has a gradient.
            updates, state = tx.update(an.pruning.apply_mask(grads, mask), state)
            return (optax.apply_updates(params, updates), state), None

        epochs = jax.vmap(lambda n: self._rows(jax.random.fold_in(key, n)))(jnp.arange(s.retrain))
        rows = epochs.reshape(-1, s.batch_size)
        return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

    def _measure(self, params: PyTree, task: Task) -> dict[str, jax.Array]:
        logits = models.mlp(params, task.check_inputs)
        right = jnp.argmax(logits, -1) == task.check_targets
        nll = post.metrics.negative_log_likelihood(logits, task.check_targets, from_logits=True)
        return {"accuracy": jnp.mean(right.astype(jnp.float32)), "nll": nll}


def squares(params: PyTree) -> jax.Array:
    """The squared Euclidean norm of all parameters."""
    return jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)]))


# Compiled once for all seeds.
course = functools.cache(Course)
