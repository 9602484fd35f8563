"""S1: is the weight distribution that pruning leaves bimodal, and does learning make it so?

The founding note expects two modes in the weights of a network that compresses itself. A cut alone
leaves two humps of signed weights, so the claim must go beyond the cut (H1a). Under soft, ongoing
forgetting the log-magnitudes may split in two: beyond what the same forgetting does with the
gradient off, with shuffled importance, or as a decay of all weights alike (H1b)?

    python -m research.bimodality --config configs/bimodality/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptivenet as an
from adaptivenet.emergence import nulls, statistics, verdict
from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import rounds, study

HARD = ("truncation", "oneshot", "gradual", "random")
SOFT = ("learning", "brief", "labels", "shuffled", "no_learning", "decay", "l1")
BINS = np.linspace(-6, 1, 29)
TINY = 1e-12  # below it a weight is forgotten for good; log needs a floor


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """H1a: of hard pruning; H1b: of soft forgetting; H1c: of what the split buys."""

    h1a_oneshot: Hypothesis = study.BLANK
    h1a_gradual: Hypothesis = study.BLANK
    h1b_split: Hypothesis = study.BLANK
    h1b_no_learning: Hypothesis = study.BLANK
    h1b_shuffled: Hypothesis = study.BLANK
    h1b_decay: Hypothesis = study.BLANK
    h1b_critical: Hypothesis = study.BLANK
    h1b_task: Hypothesis = study.BLANK
    h1b_predicts: Hypothesis = study.BLANK
    h1c_buys: Hypothesis = study.BLANK
    h1c_l1: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Bimodality: what the cut forces, what forgetting forces, and what learning adds."""

    claims: Claims = Claims()
    """what is claimed"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers"""
    learning_rate: Annotated[float, Range(gt=0)] = 1e-3
    """Adam's, constant"""
    dense_steps: Annotated[int, Range(ge=1)] = 4000
    """training before the arms part"""
    rounds: Annotated[int, Range(ge=1)] = 20
    """events of an arm"""
    steps: Annotated[int, Range(ge=4)] = 100
    """steps of training a round (the arm `brief` has a quarter)"""
    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.7
    """share cut, and share that is softly forgotten, in each layer"""
    gains: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004, 0.01, 0.03, 0.1, 0.3, 0.8)
    """share that a forgotten weight loses a round, in ascending order"""
    reference_gain: float = 0.3
    """the gain at which arms are compared"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        if (
            list(self.gains) != sorted(set(self.gains))
            or not 0 < self.gains[0] < self.gains[-1] < 1
        ):
            raise ValueError(f"gains must ascend within (0, 1), not {self.gains}")
        if self.reference_gain not in self.gains:
            raise ValueError(f"reference_gain={self.reference_gain} is none of gains={self.gains}")


@partial(jax.jit, static_argnums=0)
def dense(config: Config, key: jax.Array, task: Any) -> Any:
    """One network, trained without any pruning."""
    of_init, of_batches = jax.random.split(key)
    params = an.models.mlp_init(of_init, (task.inputs.shape[1], *config.hidden, 10))
    adam = optax.adam(config.learning_rate)
    net = rounds.Net(params, adam.init(params))
    return rounds.train(net, of_batches, task, adam, config.dense_steps).params


@partial(jax.jit, static_argnums=(0, 1))
def hard(config: Config, arm: str, key: jax.Array, params: Any, task: Any) -> Any:
    """An arm of hard pruning: the parameters at its end."""
    p, whole = an.pruning, config.rounds * config.steps
    schedule = {
        "oneshot": p.constant,
        "random": p.constant,
        "gradual": partial(p.cubic, start=0, end=whole * 2 // 3),
    }
    adam = optax.adam(config.learning_rate)
    pruner = None
    if arm in schedule:
        score = p.random if arm == "random" else p.magnitude
        pruner = p.prune(
            schedule[arm](config.sparsity), score=score, allocation=p.Uniform(), every=None
        )
    tx = adam if pruner is None else optax.chain(adam, pruner)

    def one(net: Any, key: jax.Array) -> tuple[Any, None]:
        if pruner is not None:
            net = rounds.Net(*p.revise(pruner, *net))
        return rounds.train(net, key, task, tx, config.steps), None

    net = rounds.Net(params, tx.init(params))
    net = jax.lax.scan(one, net, jax.random.split(key, config.rounds))[0]
    if arm == "truncation":  # of the network that was trained as long, without being cut
        return nulls.truncation(net.params, config.sparsity, allocation=p.Uniform())[0]
    return net.params


def rate_of(kernel: jax.Array, mass: jax.Array) -> jax.Array:
    """The soft threshold that leaves a given sum of magnitudes (by bisection)."""

    def halve(_: int, ends: Any) -> Any:
        middle = (ends[0] + ends[1]) / 2
        more = jnp.sum(jnp.maximum(jnp.abs(kernel) - middle, 0)) > mass
        return jnp.where(more, middle, ends[0]), jnp.where(more, ends[1], middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(()), jnp.max(jnp.abs(kernel))))
    return (low + high) / 2


@partial(jax.jit, static_argnums=(0, 1))
def soft(config: Config, arm: str, gain: Any, key: jax.Array, params: Any, task: Any) -> Any:
    """An arm of soft forgetting: the lowest share loses a part each round, and goes on learning."""
    adam = optax.adam(config.learning_rate)
    steps = {"no_learning": 0, "brief": config.steps // 4}.get(arm, config.steps)

    def forget(params: Any, key: jax.Array) -> Any:
        def leaf(kernel: jax.Array) -> jax.Array:
            score = jnp.abs(kernel)
            if arm == "shuffled":
                score = nulls.shuffled(an.pruning.magnitude)({"w": kernel}, key=key)["w"]
            kept = an.selection.top_mask({"w": score}, round((1 - config.sparsity) * kernel.size))[
                "w"
            ]
            return jnp.where(kept, kernel, kernel * (1 - gain))

        forgot = rounds.map_kernels(leaf, params)
        if arm == "decay":  # all weights of a layer alike, by as much norm as forgetting takes
            return rounds.map_kernels(
                lambda w, f: nulls.scale({"w": w}, nulls.matched_decay({"w": w}, {"w": f}))["w"],
                params,
                forgot,
            )
        if arm == "l1":  # all by one amount, that takes as much of sum |w|
            return rounds.map_kernels(
                lambda w, f: nulls.soft_thresholded({"w": w}, rate_of(w, jnp.sum(jnp.abs(f))))["w"],
                params,
                forgot,
            )
        return forgot

    def one(net: Any, key: jax.Array) -> tuple[Any, None]:
        of_event, of_batches = jax.random.split(key)
        net = net._replace(params=forget(net.params, of_event))
        return rounds.train(net, of_batches, task, adam, steps), None

    net = rounds.Net(params, adam.init(params))
    return jax.lax.scan(one, net, jax.random.split(key, config.rounds))[0].params


@partial(jax.jit, static_argnums=0)
def accuracies(config: Config, params: Any, task: Any) -> tuple[Any, Any, Any]:
    """Accuracy, the same after a cut without fine-tuning, and the share of |w| it keeps."""
    cut, _ = nulls.truncation(params, config.sparsity, allocation=an.pruning.Uniform())
    mass = [sum(jnp.sum(jnp.abs(w)) for w in rounds.kernels(p)) for p in (cut, params)]
    return rounds.accuracy(params, task), rounds.accuracy(cut, task), mass[0] / mass[1]


def dips(params: Any, *, logs: bool) -> np.ndarray:
    """Dip statistic and p of each layer, ``[layers, 2]``: of signed survivors, or of log|w|."""
    found = []
    for kernel in rounds.kernels(params):
        values = np.asarray(kernel, np.float64).ravel()
        values = np.log(np.maximum(np.abs(values), TINY)) if logs else values[values != 0]
        found.append(statistics.dip(values)[:2])
    return np.array(found)


def critical(config: Config, dip: np.ndarray) -> float:
    """Log of the gain from which on both large layers reject one mode at 5 %.

    Between the last gain that does not reject and the first that does, the larger p of the two
    layers is interpolated, log against log. A gain beyond the grid's ends is put one step outside.
    """
    p = np.maximum(dip[:, :2, 1].max(1), 1e-3)
    inside = np.log(config.gains)
    if not np.any(p >= 0.05):
        return float(2 * inside[0] - inside[1])
    last = len(p) - 1 - int(np.argmax(p[::-1] >= 0.05))
    if last == len(p) - 1:
        return float(2 * inside[-1] - inside[-2])
    way = np.log(p[last] / 0.05) / np.log(p[last] / p[last + 1])
    return float(inside[last] + way * (inside[last + 1] - inside[last]))


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every arm on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    wrong = rounds.task(nulls.shuffle_labels(data, seed=1), config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    total, done = len(HARD) + len(SOFT) + 2, iter(range(1, 99))
    start = jax.vmap(partial(dense, config), (0, None))(keys, task)
    tick("dense", next(done) / total)
    start_wrong = jax.vmap(partial(dense, config), (0, None))(keys, wrong)
    tick("dense, labels shuffled", next(done) / total)

    def one(tree: Any, *place: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[place], tree)

    n, metrics, curves = range(len(seeds)), {}, {}
    measure = jax.vmap(partial(accuracies, config), (0, None))
    metrics["dense_accuracy"], metrics["dense_cut_accuracy"], metrics["dense_mass"] = measure(
        start, task
    )
    for arm in HARD:
        ends = jax.vmap(partial(hard, config, arm), (0, 0, None))(keys, start, task)
        dip = np.array([dips(one(ends, i), logs=False) for i in n])
        metrics[f"{arm}_dip"], curves[f"{arm}_dip"] = dip[:, :, 0].mean(1), dip
        metrics[f"{arm}_accuracy"] = measure(ends, task)[0]
        tick(arm, next(done) / total)
    gains, place = jnp.array(config.gains), config.gains.index(config.reference_gain)
    for arm in SOFT:
        begin, data_ = (start_wrong, wrong) if arm == "labels" else (start, task)
        over_seeds = jax.vmap(partial(soft, config, arm), (None, 0, 0, None))
        ends = jax.vmap(over_seeds, (0, None, None, None))(gains, keys, begin, data_)
        dip = np.array([[dips(one(ends, g, i), logs=True) for g in range(len(gains))] for i in n])
        values = jax.vmap(measure, (0, None))(ends, data_)
        for name, value in zip(("accuracy", "cut", "mass"), values, strict=True):
            curves[f"{arm}_{name}"] = np.asarray(value).T
        curves[f"{arm}_log_dip"] = dip
        metrics[f"{arm}_split"] = dip[:, place, :2, 0].mean(1)
        metrics[f"{arm}_critical"] = np.array([critical(config, d) for d in dip])
        if arm in ("learning", "no_learning"):
            first = np.asarray(rounds.kernels(ends)[0])
            curves[f"{arm}_modes"] = np.array(
                [[modes(first[g, i]) for g in range(len(gains))] for i in n]
            )
            curves[f"{arm}_histogram"] = np.array(
                [[histogram(first[g, i]) for g in range(len(gains))] for i in n]
            )
        tick(arm, next(done) / total)
    split = [dips(one(start, i), logs=True)[:2, 0].mean() for i in n]
    m = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    m["dense_split"] = np.array(split)
    for arm in ("oneshot", "gradual", "random"):
        m[f"{arm}_excess"] = m[f"{arm}_dip"] - m["truncation_dip"]
    m["split_excess"] = m["learning_split"] - m["dense_split"]
    for arm in ("no_learning", "shuffled", "decay", "l1", "labels"):
        m[f"beyond_{arm}"] = m["learning_split"] - m[f"{arm}_split"]
        m[f"critical_beyond_{arm}"] = m["learning_critical"] - m[f"{arm}_critical"]
    m["critical_shift"] = m["learning_critical"] - m["brief_critical"]
    m["dense_price"] = m["dense_accuracy"] - m["dense_cut_accuracy"]
    for arm in SOFT:
        lost = curves[f"{arm}_accuracy"] - curves[f"{arm}_cut"]
        m[f"{arm}_price"] = np.asarray(lost, np.float64)[:, place]
    m["split_buys"] = m["dense_price"] - m["learning_price"]
    m["buys_beyond_l1"] = m["l1_price"] - m["learning_price"]
    return study.Outcome(m, {name: np.asarray(value) for name, value in curves.items()})


def modes(kernel: np.ndarray) -> np.ndarray:
    """Up to four modes of log10|w|, nan where there are fewer."""
    found = statistics.modes(np.log10(np.maximum(np.abs(kernel.ravel()), TINY)))[-4:]
    return np.pad(found, (0, 4 - len(found)), constant_values=np.nan)


def histogram(kernel: np.ndarray) -> np.ndarray:
    """Share of the weights in each of `BINS` of log10|w|; what is smaller counts in the first."""
    values = np.log10(np.maximum(np.abs(kernel.ravel()), TINY))
    return np.histogram(np.clip(values, BINS[0], BINS[-1]), BINS)[0] / values.size


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, and the gates of emergence."""
    metrics = {**outcome.metrics, "prediction_gain": prediction_gain(outcome)}
    verdicts = verdict.judge(config.claims, metrics)
    gates = {"present": "h1b_split", "no_learning": "h1b_no_learning", "shuffled": "h1b_shuffled"}
    return study.Judgement(
        verdicts, verdict.emergence(verdicts, **gates, predictive="h1b_predicts")
    )


def prediction_gain(outcome: study.Outcome) -> np.ndarray:
    """Out of sample, what the dip adds to the kept share of |w| in predicting the cut's price.

    For each seed, both linear models are fitted on the other seeds (all gains), and the difference
    of their mean absolute errors on this seed is its number.
    """
    c = outcome.curves
    price = c["learning_accuracy"] - c["learning_cut"]
    mass, dip = c["learning_mass"], c["learning_log_dip"][:, :, :2, 0].mean(2)
    gain = []
    for seed in range(len(price)):
        others = np.arange(len(price)) != seed
        errors = []
        for inputs in ((mass,), (mass, dip)):
            design = np.stack([np.ones_like(mass), *inputs], -1)
            fit = np.linalg.lstsq(
                design[others].reshape(-1, design.shape[-1]), price[others].ravel(), rcond=None
            )[0]
            errors.append(np.mean(np.abs(design[seed] @ fit - price[seed])))
        gain.append(errors[0] - errors[1])
    return np.array(gain)


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Dips against their nulls, the bifurcation, critical gains, and what the split buys."""
    from research import bimodality_figure

    return bimodality_figure.draw(config, outcome)


if __name__ == "__main__":
    study.main(Config, run, judge, draw)
