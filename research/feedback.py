"""S2: does keeping a synapse make it stronger, or safer?

The founding note says that what is kept is reinforced. H2a: the same strong synapses grow more when
the others are pruned than in a twin that prunes nothing (same net, same batches). H2b: at equal
magnitude the hazard of being pruned falls with the age of retention, more than in a shadow that
only records the mask; and, by a randomised intervention, synapses just below the threshold that
are kept for some rounds survive longer after their release than those that are not.

    python -m research.feedback --config configs/feedback/smoke.yaml
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
from adaptivenet.emergence import statistics, trajectories
from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import rounds, study

OPTIMIZERS = ("adam", "sgd")
FUTURES = ("dense", "pruned", "random")
ARMS = ("real", "shadow")
RATIOS = np.array([0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])  # of log(|w| / threshold)


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """H2a: growth; H2b: hazard, observed and randomised; for both optimizers."""

    h2a_adam: Hypothesis = study.BLANK
    h2a_sgd: Hypothesis = study.BLANK
    h2b_observed_adam: Hypothesis = study.BLANK
    h2b_observed_sgd: Hypothesis = study.BLANK
    h2b_randomised_adam: Hypothesis = study.BLANK
    h2b_randomised_sgd: Hypothesis = study.BLANK
    h2b_matched_adam: Hypothesis = study.BLANK
    h2b_matched_sgd: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Feedback: twins, hazards and a randomised reprieve."""

    claims: Claims = Claims()
    """what is claimed"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers"""
    adam_rate: Annotated[float, Range(gt=0)] = 1e-3
    """Adam's learning rate"""
    sgd_rate: Annotated[float, Range(gt=0)] = 0.05
    """learning rate of SGD (momentum 0.9)"""
    sgd_decay: Annotated[float, Range(ge=0)] = 1e-4
    """weight decay of SGD"""
    dense_steps: Annotated[int, Range(ge=1)] = 2000
    """training before the futures part"""
    twin_steps: Annotated[int, Range(ge=1)] = 2000
    """training of each future"""
    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.7
    """share that is not kept, in each layer"""
    steps: Annotated[int, Range(ge=1)] = 50
    """steps of a round; the mask is chosen anew each round"""
    before: Annotated[int, Range(ge=2)] = 14
    """rounds in which the hazard is observed"""
    reprieve: Annotated[int, Range(ge=1)] = 5
    """rounds for which a random half of the synapses just below the threshold is kept"""
    after: Annotated[int, Range(ge=2)] = 8
    """rounds after the release"""
    window: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """how many stand just below the threshold, as a share of the layer"""
    sample: Annotated[int, Range(ge=10)] = 20000
    """synapses followed for the hazard, at most (the small network has fewer)"""
    zone: Annotated[float, Range(gt=0, le=1)] = 0.95
    """share of the shadow's deaths, nearest to the threshold, in whose range arms are compared"""


def optimizer(config: Config, name: str) -> optax.GradientTransformation:
    """One of the two optimizers."""
    if name == "adam":
        return optax.adam(config.adam_rate)
    decay = optax.add_decayed_weights(config.sgd_decay)
    return optax.chain(decay, optax.sgd(config.sgd_rate, momentum=0.9))


def kept(kernel: jax.Array, share: float) -> jax.Array:
    """The strongest share of a layer."""
    return an.selection.top_mask({"w": jnp.abs(kernel)}, round(share * kernel.size))["w"]


@partial(jax.jit, static_argnums=(0, 1))
def dense(config: Config, name: str, key: jax.Array, task: Any) -> Any:
    """One network, trained without any pruning."""
    of_init, of_batches = jax.random.split(key)
    params = an.models.mlp_init(of_init, (task.inputs.shape[1], *config.hidden, 10))
    tx = optimizer(config, name)
    net = rounds.Net(params, tx.init(params))
    return rounds.train(net, of_batches, task, tx, config.dense_steps).params


@partial(jax.jit, static_argnums=(0, 1, 2))
def twin(config: Config, name: str, future: str, key: jax.Array, params: Any, task: Any) -> Any:
    """A future of the network: growth of its strong synapses by layer, and accuracy."""
    p = an.pruning
    score = p.random if future == "random" else p.magnitude
    pruner = p.prune(config.sparsity, score=score, allocation=p.Uniform(), every=None)
    tx = optax.chain(optimizer(config, name), pruner)
    net = rounds.Net(params, tx.init(params))
    if future != "dense":
        net = rounds.Net(*p.revise(pruner, *net))
    strong = [kept(w, 1 - config.sparsity) for w in rounds.kernels(params)]
    if future == "random":  # those strong ones that chance has left
        strong = [s & (w != 0) for s, w in zip(strong, rounds.kernels(net.params), strict=True)]
    end = rounds.train(net, key, task, tx, config.twin_steps).params
    pairs = zip(strong, rounds.kernels(params), rounds.kernels(end), strict=True)
    sums = [(jnp.sum(jnp.abs(b), where=s), jnp.sum(jnp.abs(a), where=s)) for s, a, b in pairs]
    return jnp.stack([late / early - 1 for late, early in sums]), rounds.accuracy(end, task)


@partial(jax.jit, static_argnums=(0, 1, 2))
def watch(config: Config, name: str, arm: str, key: jax.Array, params: Any, task: Any) -> Any:
    """Rounds in which the mask is chosen anew by magnitude, and every weight goes on learning.

    In the arm "real" the forward pass sees the masked weights (straight-through gradients), in the
    arm "shadow" the dense ones: there the mask is only recorded.
    """
    tx, share = optimizer(config, name), 1 - config.sparsity
    first, release = config.before, config.before + config.reprieve
    empty = rounds.map_kernels(lambda w: jnp.zeros(w.shape, bool), params)
    empty = {layer: {"kernel": leaf["kernel"]} for layer, leaf in empty.items()}

    def on(function: Any, *trees: Any) -> Any:
        return {name: {"kernel": function(*(t[name]["kernel"] for t in trees))} for name in params}

    def one(carry: Any, at: Any) -> Any:
        net, state, near, forced, ratio_then, alive_then = carry
        number, key = at
        of_half, of_batches = jax.random.split(key)
        mask = on(lambda w: kept(w, share), net.params)
        ratio = on(
            lambda w, m: jnp.log(jnp.abs(w) / jnp.min(jnp.where(m, jnp.abs(w), jnp.inf))),
            net.params,
            mask,
        )
        wider = on(lambda w: kept(w, share + config.window), net.params)
        half = on(
            lambda w: jax.random.bernoulli(jax.random.fold_in(of_half, w.size), 0.5, w.shape),
            net.params,
        )
        now = number == first
        near = on(lambda old, w, m: jnp.where(now, w & ~m, old), near, wider, mask)
        forced = on(lambda old, n, h: jnp.where(now, n & h, old), forced, near, half)
        reprieved = (number >= first) & (number < release)
        mask = on(lambda m, f: m | (f & reprieved), mask, forced)
        state, frame = recorder.update(state, on(lambda w: w, net.params), mask, ratio)

        def share_alive(group: Any) -> jax.Array:
            alive, member = (
                jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(t)))) for t in (mask, group)
            )
            return jnp.mean(alive.astype(jnp.float32), where=member)

        spared = on(lambda n, f: n & ~f, near, forced)
        shares = jnp.stack([share_alive(forced), share_alive(spared)])
        ratio_then = on(lambda old, new: jnp.where(number == release, new, old), ratio_then, ratio)
        alive_then = on(lambda old, m: jnp.where(number == release + 1, m, old), alive_then, mask)

        def masked(params: Any) -> Any:
            if arm == "shadow":
                return params
            return rounds.map_kernels(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, mask)

        net = rounds.train(net, of_batches, task, tx, config.steps, masked=masked)
        return (net, state, near, forced, ratio_then, alive_then), (frame, shares)

    whole = release + config.after
    net = rounds.Net(params, tx.init(params))
    begin = on(lambda w: kept(w, share), params)
    recorder = recorder_of(config, params)
    zeros = on(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    carry = (net, recorder.init(begin), empty, empty, zeros, empty)
    keys = jax.random.split(key, whole)
    carry, (frames, shares) = jax.lax.scan(one, carry, (jnp.arange(whole), keys))
    net, _, near, forced, ratio_then, alive_then = carry
    flat = [
        jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)])
        for t in (near, forced, ratio_then, alive_then)
    ]
    final = rounds.map_kernels(
        lambda w, m: jnp.where(m, w, jnp.zeros_like(w)),
        net.params,
        on(lambda w: kept(w, share), net.params),
    )
    return frames, shares, flat, rounds.accuracy(net.params if arm == "shadow" else final, task)


def recorder_of(config: Config, params: Any) -> trajectories.Recorder:
    """Follows a sample of the synapses; the same one wherever shapes are the same."""
    kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
    return trajectories.Recorder(kernels, sample=config.sample, seed=0)


def observed(config: Config, paths: Any, seed: int) -> dict[str, dict[str, Any]]:
    """The hazard of one seed in both arms: coefficient of age, with and without frailty, and rates.

    Magnitudes are equal only where both arms have synapses at risk: in the range just above the
    threshold in which nearly all of the shadow's deaths lie. A layer in which fewer than five die
    says nothing of age there, and is left out.
    """
    last, rows = config.before - 1, {}  # before the reprieve begins
    for arm, path in paths.items():
        alive, died = path.alive[seed, :last], path.died[seed, 1 : last + 1]
        at, which = np.nonzero(alive)
        age, ratio = path.age[seed, :last][alive], path.score[seed, :last][alive]
        rows[arm] = (died[at, which], age, ratio, path.leaf[which], at, which)
    dead, _, ratio = rows["shadow"][:3]
    edge = np.quantile(ratio[dead], config.zone) if dead.any() else 0.0
    found = {}
    for arm, (dead, age, ratio, layer, at, which) in rows.items():
        inside = ratio <= edge
        deaths = np.bincount(layer[inside & dead], minlength=len(paths[arm].names))
        inside &= deaths[layer] >= 5
        covariates = {"age": np.log1p(age), "ratio": ratio, "layer": layer, "round": at}
        covariates = {name: value[inside] for name, value in covariates.items()}
        factors = ("layer",) if np.sum(deaths >= 5) > 1 else ()
        covariates = {k: v for k, v in covariates.items() if k != "layer" or factors}
        ages = [float("nan")] * 2
        if inside.sum() >= 50:
            fit = partial(statistics.hazard, splines={"ratio": 3}, factors=factors)
            ages[0] = fit(dead[inside], covariates).coefficients["age"]
            ages[1] = fit(dead[inside], covariates, frailty=which[inside]).coefficients["age"]
        rates, gap = by_magnitude(dead, age, ratio)
        found[arm] = {"age": ages[0], "frail": ages[1], "gap": gap, "rates": rates}
        found[arm]["hazard"] = dead.mean()
    return found


def by_magnitude(dead: Any, age: Any, ratio: Any) -> tuple[np.ndarray, float]:
    """Death rates of young and old in bins of magnitude, and by how much those of the old are less.

    Unlike a coefficient the difference of rates exists where nobody dies; bins are weighted by how
    well they tell young from old.
    """
    rates, gap, weight = np.full((2, len(RATIOS) - 1), np.nan), 0.0, 0.0
    for place in range(len(RATIOS) - 1):
        inside = (ratio >= RATIOS[place]) & (ratio < RATIOS[place + 1])
        young, old = (dead[inside & group] for group in (age <= 2, age >= 6))
        for row, group in enumerate((young, old)):
            if len(group) >= 20:
                rates[row, place] = group.mean()
        if len(young) and len(old):
            size = 1 / (1 / len(young) + 1 / len(old))
            gap, weight = gap + size * (young.mean() - old.mean()), weight + size
    return rates, gap / weight if weight else float("nan")


def matched(near: Any, forced: Any, ratio: Any, alive: Any) -> float:
    """Among those alive at the release: by how much the kept die less in the next round.

    Compared within tenths of the magnitude at the release; weighted by their size.
    """
    at = near & (ratio >= 0)
    edges = np.quantile(ratio[at], np.linspace(0, 1, 11)[1:-1]) if at.any() else np.zeros(9)
    bins, difference, weight = np.digitize(ratio, edges), 0.0, 0.0
    for bin_ in range(10):
        kept_, spared = (at & (bins == bin_) & group for group in (forced, ~forced))
        if kept_.any() and spared.any():
            size = 1 / (1 / kept_.sum() + 1 / spared.sum())
            difference += size * (alive[kept_].mean() - alive[spared].mean())
            weight += size
    return difference / weight if weight else float("nan")


def run(config: Config, data: Any, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains every future and arm on the seeds, and measures."""
    task = rounds.task(data, config.measured_on)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    total = len(OPTIMIZERS) * (2 + len(FUTURES) + len(ARMS))
    done, m, c = iter(range(1, 99)), {}, {}
    for name in OPTIMIZERS:
        start = jax.vmap(partial(dense, config, name), (0, None))(keys, task)
        m[f"accuracy_{name}"] = jax.vmap(rounds.accuracy, (0, None))(start, task)
        tick(f"{name}: dense", next(done) / total)
        for future in FUTURES:
            ends = jax.vmap(partial(twin, config, name, future), (0, 0, None))(keys, start, task)
            c[f"growth_{future}_{name}"] = np.asarray(ends[0], np.float64)
            m[f"growth_{future}_{name}"] = c[f"growth_{future}_{name}"].mean(1)
            m[f"accuracy_{future}_{name}"] = ends[1]
            tick(f"{name}: twin, {future}", next(done) / total)
        recorder, paths = recorder_of(config, jax.tree.map(lambda leaf: leaf[0], start)), {}
        for arm in ARMS:
            found = jax.vmap(partial(watch, config, name, arm), (0, 0, None))(keys, start, task)
            frames, shares, flat, accuracy = found
            paths[arm] = recorder.trajectory(frames, seeds=seeds)
            end = f"{arm}_{name}"
            m[f"accuracy_{end}"] = accuracy
            c[f"shares_{end}"] = np.asarray(shares, np.float64)
            lags = c[f"shares_{end}"][:, config.before + config.reprieve :]
            m[f"reprieve_{end}"] = (lags[..., 0] - lags[..., 1]).mean(1)
            m[f"matched_{end}"] = np.array(
                [matched(*(np.asarray(x[i]) for x in flat)) for i in range(len(seeds))]
            )
            tick(f"{name}: rounds, {arm}", next(done) / total)
        fits = [observed(config, paths, place) for place in range(len(seeds))]
        for arm in ARMS:
            end = f"{arm}_{name}"
            m[f"hazard_age_{end}"] = np.array([fit[arm]["age"] for fit in fits])
            m[f"hazard_frail_{end}"] = np.array([fit[arm]["frail"] for fit in fits])
            m[f"hazard_gap_{end}"] = np.array([fit[arm]["gap"] for fit in fits])
            m[f"hazard_{end}"] = np.array([fit[arm]["hazard"] for fit in fits])
            c[f"rates_{end}"] = np.array([fit[arm]["rates"] for fit in fits])
        tick(f"{name}: hazards", next(done) / total)
        m[f"twin_{name}"] = m[f"growth_pruned_{name}"] - m[f"growth_dense_{name}"]
        for what in ("hazard_age", "hazard_frail", "hazard_gap", "reprieve", "matched"):
            m[f"{what}_{name}"] = m[f"{what}_real_{name}"] - m[f"{what}_shadow_{name}"]
    return study.Outcome({k: np.asarray(v, np.float64) for k, v in m.items()}, c)


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Twins, hazards by magnitude for young and old, and the randomised reprieve."""
    from research import feedback_figure

    return feedback_figure.draw(config, outcome)


judge = study.judge

if __name__ == "__main__":
    study.main(Config, run, judge, draw)
