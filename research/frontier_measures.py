"""What is measured on the frontier, and what the literature reports."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import training
from research.frontier_arms import CONTROLS, SUBJECTS, Subject, read_rule
from research.results import mean_interval
from research.rounds import Task, density, kernels
from research.study import Table

if TYPE_CHECKING:
    from research.frontier import Config

PyTree = Any
Metrics = dict[str, np.ndarray]

TITLES = {"mlp": "founding MLP", "lenet300": "LeNet-300-100", "lenet5": "LeNet-5-Caffe"}
# Error in per cent and weights of the dense network over weights kept, as the papers (or, for the
# first three, the comparison of Molchanov et al.) print them: single networks, direct sparsity.
LITERATURE = {
    "lenet300": [
        ("Han et al. 2015", 1.59, 12),
        ("Dynamic network surgery 2016", 1.99, 56),
        ("Soft weight sharing 2017", 1.94, 23),
        ("Sparse VD 2017", 1.92, 68),
        ("Bayesian compression 2017, whole units", 1.8, 9),
    ],
    "lenet5": [
        ("Han et al. 2015", 0.77, 12),
        ("Dynamic network surgery 2016", 0.91, 111),
        ("Soft weight sharing 2017", 0.97, 200),
        ("Sparse VD 2017", 0.75, 280),
        ("Bayesian compression 2017, group horseshoe", 1.0, 156),
    ],
}

SPARSEST = "Sparse VD 2017"  # the fewest weights of both networks' tables


class Measures:
    """Numbers of trained networks ``[seeds, sparsities, ...]``."""

    def __init__(self, subject: Subject, task: Task) -> None:
        self.subject, self.task = subject, task

    def of(self, params: PyTree) -> dict[str, np.ndarray]:
        """Accuracy on the check data, density, effective density, and norm: ``[seeds, each]``."""
        found: dict[str, Any] = {
            "accuracy": jax.jit(jax.vmap(partial(jax.lax.map, self._accuracy)))(params)
        }
        for name, measure in (
            ("density", density),
            ("effective", partial(effective_density, self.subject, self.task.inputs.shape[1:])),
            ("norm", norm),
        ):
            found[name] = jax.jit(jax.vmap(jax.vmap(measure)))(params)
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    def answers(self, params: PyTree) -> jax.Array:
        """Logits ``[seeds, examples, classes]`` of networks ``[seeds, ...]`` on training data."""
        inputs = self.task.inputs
        each = 1000

        def logits(params: PyTree) -> jax.Array:
            return jax.lax.map(lambda x: self.subject.apply(params, x), inputs, batch_size=each)

        return jax.jit(partial(jax.lax.map, logits))(params)

    def _accuracy(self, params: PyTree) -> jax.Array:
        def right(params: PyTree, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
            return {"right": jnp.argmax(self.subject.apply(params, x), -1) == y}

        evaluate = training.make_evaluate(right, batch_size=500)
        return evaluate(params, self.task.check_inputs, self.task.check_targets)["right"]


def norm(params: PyTree) -> jax.Array:
    """Euclidean norm of all weights."""
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(jnp.square(k)) for k in kernels(params)])))


def effective_density(subject: Subject, shape: tuple[int, ...], params: PyTree) -> jax.Array:
    """Share of the weights on a live path from a pixel to a class.

    All living weights are set to one and biases to zero; then a weight lies on a live path if, and
    only if, it carries flow from an image of ones to the outputs.

    Args:
      subject: the network; its activations pass positive numbers on.
      shape: of an input.
      params: its parameters.

    Returns:
      The share, of all weights.

    References:
      Vysogorets and Kempe, "Connectivity matters: neural network pruning through the lens of
      effective sparsity", arXiv:2107.02306.
    """
    living = {
        name: {"kernel": (layer["kernel"] != 0).astype(jnp.float32), "bias": 0 * layer["bias"]}
        for name, layer in params.items()
    }
    flow = jax.grad(lambda p: jnp.sum(subject.apply(p, jnp.ones(shape))))(living)
    carried = [k * f > 0 for k, f in zip(kernels(living), kernels(flow), strict=True)]
    total = jnp.stack([jnp.sum(c, dtype=jnp.float32) for c in carried])
    return jnp.sum(total) / float(sum(c.size for c in carried))


def measured(m: Metrics, what: str, name: str, rule: str, sparsity: float) -> Any:
    """One number a seed, or None where it was not measured."""
    return m.get(f"{what}/{name}/{rule}/{sparsity:g}")


def columns_of(config: Config, name: str, rule: str) -> tuple[float, ...]:
    """The sparsities at which a rule of a subject was run."""
    return (0.0,) if read_rule(rule).score == "dense" else getattr(config, name).sparsities


def gain(m: Metrics, name: str, rule: str, over: str, sparsities: Any) -> np.ndarray | None:
    """Accuracy of a rule less that of another, paired by seed, mean over sparsities."""
    pairs = [[measured(m, "accuracy", name, r, s) for s in sparsities] for r in (rule, over)]
    if any(values is None for row in pairs for values in row):
        return None
    left, right = (np.mean(np.stack(row), axis=0) for row in pairs)
    return left - right


def sparse_end(sparsities: tuple[float, ...]) -> list[float]:
    """Sparsities of at least 0.98, or the largest."""
    return [s for s in sparsities if s >= 0.98] or [max(sparsities)]


def claimed(config: Config, m: Metrics) -> Metrics:
    """The paired differences that the claims are about, where their arms were run."""
    end = sparse_end(config.mlp.sparsities)
    found = {
        "gain_score": gain(m, "mlp", "fisher_tempered", "magnitude", end),
        "gain_regrowth": gain(m, "mlp", "magnitude+gradient", "magnitude", end),
        "gain_both": gain(m, "mlp", "fisher_tempered+momentum", "magnitude", end),
        "gain_norm": gain(m, "mlp", "magnitude", "l2", [min(config.mlp.sparsities)]),
        "gain_teacher": gain(
            m, "mlp", "fisher_tempered+momentum*", "fisher_tempered+momentum", end
        ),
    }
    for name in LITERATURE:
        setting = getattr(config, name)
        if setting.rules:
            best, sparsity = setting.rules[-1], max(setting.sparsities)
            error = next(error for who, error, _ in LITERATURE[name] if who == SPARSEST)
            accuracy = measured(m, "accuracy", name, best, sparsity)
            found[f"lead_{name}"] = accuracy - (1 - error / 100)
    return {name: values for name, values in found.items() if values is not None}


def tables(config: Config, m: Metrics) -> list[Table]:
    """Accuracies of every subject, its targets, and its place beside the literature."""
    found = []
    for name in SUBJECTS:
        setting = getattr(config, name)
        if not setting.rules:
            continue
        found.append(_accuracies(config, m, name))
        if setting.targets:
            found.append(_targets(setting, m, name))
        if name in LITERATURE:
            found.append(_beside(setting, m, name))
    return found


def _percent(values: Any) -> str:
    found = mean_interval(100 * np.asarray(values))
    half = "" if found["ci_low"] is None else f" ± {(found['ci_high'] - found['ci_low']) / 2:.2f}"
    return f"{found['mean']:.2f}{half}"


def _accuracies(config: Config, m: Metrics, name: str) -> Table:
    setting = getattr(config, name)
    dense = [0.0] if "dense" in setting.rules else []
    columns = [*dense, *setting.sparsities]
    rows = []
    for rule in setting.rules:
        cells = [measured(m, "accuracy", name, rule, s) for s in columns]
        rows.append([rule, *("" if cell is None else _percent(cell) for cell in cells)])
    title = (
        f"{TITLES[name]}, {setting.epochs} epochs: accuracy in % on {config.measured_on} data, "
        f"last epoch, mean of {len(config.seeds)} seeds ± 95 % interval, by sparsity"
    )
    return Table(title, ["rule", *(f"{s:g}" for s in columns)], rows)


def _targets(setting: Any, m: Metrics, name: str) -> Table:
    best, rows = setting.rules[-1], []
    for sparsity, target in zip(setting.sparsities, setting.targets, strict=True):
        values = measured(m, "accuracy", name, best, sparsity)
        short = 100 * (target - float(np.mean(values)))
        word = "reached" if short <= 0 else f"missed by {short:.2f}"
        rows.append([f"{sparsity:g}", f"{100 * target:.2f}", _percent(values), word])
    title = f"{TITLES[name]}: targets, and what {best} reaches"
    return Table(title, ["sparsity", "target %", "reached %", ""], rows)


def _beside(setting: Any, m: Metrics, name: str) -> Table:
    rows = [[who, f"{error:g}", f"{ratio}", "-"] for who, error, ratio in LITERATURE[name]]
    for rule in setting.rules:
        if read_rule(rule).score in CONTROLS:
            continue
        for sparsity in setting.sparsities:
            values, direct, effective = (
                measured(m, what, name, rule, sparsity)
                for what in ("accuracy", "density", "effective")
            )
            shares = (float(np.mean(d)) for d in (direct, effective))
            ratios = [f"{1 / share:.0f}" if share else "none left" for share in shares]
            rows.append([f"ours, {rule}", _percent(1 - values), *ratios])
    title = f"{TITLES[name]} on MNIST: error, and weights of the dense network over weights kept"
    return Table(title, ["method", "error %", "direct", "effective"], rows)
