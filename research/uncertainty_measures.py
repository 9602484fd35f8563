"""What is measured of beliefs: calibration, detection of foreign inputs, paired differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import adaptivenet as an
from adaptivenet import models
from research.results import mean_interval
from research.study import Table
from research.uncertainty_arms import TITLES, Belief, read_row
from research.uncertainty_data import SETS, Lessons

if TYPE_CHECKING:
    from research.uncertainty import Config

PyTree = Any
Metrics = dict[str, np.ndarray]
post = an.posterior

REGIMES = {"once": "one-shot", "retrained": "trained again"}
CONTROL = "l2:magnitude"
WAYS = {"mean": "mean of the belief", "drawn": "average over draws", "linearised": "linearised"}


class Predictions:
    """Calibration and detection of one data set, on its first examples and as many foreign ones."""

    def __init__(self, config: Config, data: Lessons, name: str) -> None:
        self.name, self.shown = name, config.shown
        task = data.tasks[name]
        self.own = task.check_inputs[: self.shown]
        self.targets = task.check_targets[: self.shown]
        self.held, self.held_targets = data.held_out[name]
        self.foreign = data.foreign[name][: self.shown]
        self.draws = config.draws
        self._drawn = jax.jit(self._members)
        self._linearised = jax.jit(_linearised)
        self._numbers = jax.jit(self._measure)

    def of(self, network: str, belief: Belief, key: jax.Array) -> dict[str, float]:
        """All numbers of a network's belief."""
        inputs = (self.held, self.own, self.foreign)
        found: dict[str, dict[str, jax.Array]] = {}
        logits = [models.mlp(belief.params, x) for x in inputs]
        found["mean"] = self._numbers(logits)
        if belief.fisher is None:
            members = [self._drawn(belief, x, key) for x in inputs]
            mixed = [post.metrics.mixture_log_probabilities(m, from_logits=True) for m in members]
            scores = [post.metrics.mutual_information(m, from_logits=True) for m in members[1:]]
            own, foreign = scores
            information = {"auroc_information": post.metrics.auroc(foreign, own)}
            found["drawn"] = {**self._numbers(mixed), **information}
        else:
            found["linearised"] = self._numbers([self._linearised(belief, x) for x in inputs])
        return {
            f"{what}/{self.name}/{network}/{way}": float(value)
            for way, numbers in found.items()
            for what, value in numbers.items()
        }

    def _members(self, belief: Belief, inputs: jax.Array, key: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return models.mlp(post.sample(key, belief.posterior, belief.params), inputs)

        return jax.lax.map(one, jax.random.split(key, self.draws))

    def _measure(self, logits: list[jax.Array]) -> dict[str, jax.Array]:
        held, own, foreign = logits
        m, given = post.metrics, {"from_logits": True}
        by_mass: Any = {"binning": "mass", **given}
        heat = post.calibration.fit_temperature(held, self.held_targets)
        entropies = [m.predictive_entropy(x, from_logits=True) for x in (foreign, own)]
        return {
            "dense_accuracy": jnp.mean((own.argmax(-1) == self.targets).astype(jnp.float32)),
            "dense_nll": m.negative_log_likelihood(own, self.targets, **given),
            "brier": m.brier(own, self.targets, **given),
            "ece": m.expected_calibration_error(own, self.targets, **given),
            "ece_adaptive": m.expected_calibration_error(own, self.targets, **by_mass),
            "ece_classwise": m.classwise_calibration_error(own, self.targets, **given),
            "temperature": heat,
            "nll_scaled": m.negative_log_likelihood(own / heat, self.targets, **given),
            "ece_scaled": m.expected_calibration_error(own / heat, self.targets, **given),
            "auroc": m.auroc(*entropies),
            "aupr": m.average_precision(*entropies),
        }


def _linearised(belief: Belief, inputs: jax.Array) -> jax.Array:
    found = post.linearised(
        belief.posterior, models.mlp, inputs, params=belief.params, batch_size=25
    )
    return jnp.log(post.probabilities(found))


# --- claims --------------------------------------------------------------------------------------


def sparse_end(config: Config) -> list[float]:
    """The sparsities that claims are about, or the largest."""
    return [s for s in config.sparsities if s >= config.claimed_from] or [max(config.sparsities)]


def gain(
    m: Metrics, config: Config, name: str, regime: str, row: str, over: str, at: Any = None
) -> np.ndarray | None:
    """Accuracy of a row less that of another, paired by seed, mean over sparsities.

    Args:
      m: what was measured.
      config: the study's.
      name: of the data set.
      regime: "once" or "retrained".
      row: network:score.
      over: another.
      at: sparsities; those that claims are about by default.

    Returns:
      A number a seed; None where a row was not run.
    """
    parts = []
    for sparsity in sparse_end(config) if at is None else at:
        pair = [m.get(f"accuracy/{name}/{regime}/{r}/{sparsity:g}") for r in (row, over)]
        if pair[0] is None or pair[1] is None:
            return None
        parts.append(pair[0] - pair[1])
    return np.mean(np.stack(parts), axis=0)


def claimed(config: Config, m: Metrics) -> Metrics:
    """The paired differences that the claims are about, where their rows were run."""
    shown = [name for name in SETS if getattr(config, name).epochs]
    found = {
        f"lead_{name}_{regime}": gain(m, config, name, regime, "ivon:snr", CONTROL)
        for name in shown
        for regime in REGIMES
    }

    def everywhere(row: str, over: str, regimes: Any = REGIMES, sets: Any = shown) -> Any:
        parts = [gain(m, config, n, r, row, over) for n in sets for r in regimes]
        known = [part for part in parts if part is not None]
        return np.mean(np.stack(known), axis=0) if len(known) == len(parts) else None

    found["gain_scoring"] = everywhere("ivon:snr", "ivon:magnitude")
    for name in shown:
        knowing = everywhere("ivon:magnitude", "noise:magnitude", sets=[name])
        found[f"gain_knowing_{name}"] = knowing
    found["gain_widths"] = everywhere("ivon:snr", "ivon:shuffled")
    found["gain_prior"] = everywhere(CONTROL, "adam:magnitude", ("once",))
    found["gain_criterion"] = everywhere("l2:snr", CONTROL)
    return {name: values for name, values in found.items() if values is not None}


# --- tables --------------------------------------------------------------------------------------


def title_of(row: str) -> str:
    """A row in words."""
    network, score = read_row(row)
    words = {"snr": "SNR", "shuffled": "SNR, widths shuffled", "obd": "OBD"}.get(score, score)
    if score in ("snr", "shuffled") and network in ("adam", "l2"):
        words = words.replace("SNR", "Laplace SNR")
    return f"{TITLES[network]}: {words.replace('_', '-')}"


def tables(config: Config, m: Metrics) -> list[Table]:
    """Accuracies, paired differences, targets and predictions."""
    found = []
    for name in (n for n in SETS if getattr(config, n).epochs):
        for regime in REGIMES:
            found.append(_accuracies(config, m, name, regime))
            found.append(_differences(config, m, name, regime))
        if name == "mnist":
            found.append(_targets(config, m))
        found.append(_predictions(m, name))
    return found


def _percent(values: Any, sign: bool = False) -> str:
    found = mean_interval(100 * np.asarray(values))
    half = "" if found["ci_low"] is None else f" ± {(found['ci_high'] - found['ci_low']) / 2:.2f}"
    return f"{found['mean']:{'+' if sign else ''}.2f}{half}"


def _accuracies(config: Config, m: Metrics, name: str, regime: str) -> Table:
    rows = []
    for row in config.rows:
        cells = [m[f"accuracy/{name}/{regime}/{row}/{s:g}"] for s in config.sparsities]
        rows.append([title_of(row), *map(_percent, cells)])
    title = (
        f"{SETS[name]}, {REGIMES[regime]}: accuracy in % on {config.measured_on} data, mean of "
        f"{len(config.seeds)} seeds ± 95 % interval, by sparsity"
    )
    return Table(title, ["", *(f"{s:g}" for s in config.sparsities)], rows)


def _differences(config: Config, m: Metrics, name: str, regime: str) -> Table:
    rows, end = [], sparse_end(config)
    for row in (r for r in config.rows if r != CONTROL):
        cells = [gain(m, config, name, regime, row, CONTROL, [s]) for s in config.sparsities]
        mean = gain(m, config, name, regime, row, CONTROL)
        rows.append([title_of(row), *(_percent(c, sign=True) for c in (*cells, mean))])
    title = (
        f"{SETS[name]}, {REGIMES[regime]}: points above the magnitude of the network with the "
        "matched L2 penalty, paired by seed ± 95 % interval"
    )
    mean = f"mean from {min(end):g}"
    return Table(title, ["", *(f"{s:g}" for s in config.sparsities), mean], rows)


def _targets(config: Config, m: Metrics) -> Table:
    rows = []
    for row in config.rows:
        cells = []
        dense = m[f"full_accuracy/mnist/{read_row(row).network}"]
        for sparsity, target in zip((0.9, 0.95), config.targets, strict=True):
            values = m.get(f"accuracy/mnist/retrained/{row}/{sparsity:g}")
            if values is None:
                cells += ["", ""]
                continue
            short = float(np.mean(dense - values)) - target
            word = "reached" if short <= 0 else f"missed by {100 * short:.2f}"
            cells += [_percent(dense - values), word]
        rows.append([title_of(row), _percent(dense), *cells])
    at_90, at_95 = (f"(at most {100 * target:.1f})" for target in config.targets)
    columns = ["", "dense %", f"points lost at 90 % {at_90}", "", f"at 95 % {at_95}", ""]
    title = f"MNIST, trained again for {config.mnist.retrain} epochs: targets"
    if config.target_error and "field:snr" in config.rows:
        error = 1 - m["accuracy/mnist/once/field:snr/0.98"]
        short = float(np.mean(error)) - config.target_error
        word = "reached" if short <= 0 else f"missed by {100 * short:.2f}"
        what = (
            f"error of mean field SNR at 98 %, one-shot (at most {100 * config.target_error:.2f})"
        )
        rows.append([what, "", _percent(error), word, "", ""])
    return Table(title, columns, rows)


def _predictions(m: Metrics, name: str) -> Table:
    rows = []
    for key in (k for k in m if k.startswith(f"dense_nll/{name}/")):
        _, _, network, way = key.split("/")
        values = [m[f"{w}/{name}/{network}/{way}"] for w in _SHOWN]
        cells = [f"{mean_interval(v)['mean']:.4f}" for v in values]
        information = m.get(f"auroc_information/{name}/{network}/{way}")
        last = "" if information is None else f"{mean_interval(information)['mean']:.4f}"
        rows.append([f"{TITLES[network]}: {WAYS[way]}", *cells, last])
    columns = ["NLL", "Brier", "ECE", "adaptive", "class-wise", "temperature", "NLL scaled"]
    columns += ["ECE scaled", "AUROC", "AUPR", "AUROC by information"]
    title = f"{SETS[name]}: predictions before any cut, and foreign inputs"
    return Table(title, ["", *columns], rows)


# fmt: off
_SHOWN = (
    "dense_nll", "brier", "ece", "ece_adaptive", "ece_classwise", "temperature", "nll_scaled",
    "ece_scaled", "auroc", "aupr",
)
# fmt: on
