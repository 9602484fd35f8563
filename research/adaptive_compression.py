"""The main job: a network that compresses itself while it learns, on real images.

The founding design note (PASAIA-LAB / J. A. Fontán Varela, 2025) trains an MLP and zeroes small
weights after each epoch. Here its rule runs beside a dense network, a percentile rule, scheduled
global magnitude pruning, and a closed loop that is told a tolerance and finds the sparsity by
itself; same seeds, same initial weights, same batches. Choices are made on validation data; test
data are touched once, at the end.

    python -m research.adaptive_compression --config configs/adaptive_compression/digits.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptivenet as an
from adaptivenet import compression, models, training
from adaptivenet.training import Range
from research import study
from research.results import config_text
from research.rounds import density

ArmName = Literal["dense", "note", "percentile", "scheduled", "auto"]
Share = Annotated[float, Range(ge=0, lt=1)]
HISTORY = ("validation_accuracy", "validation_loss", "train_loss", "density")
BINS = 80  # of the histograms


@dataclass(frozen=True)
class Auto:
    """The closed loop: states a tolerance, never a sparsity."""

    tolerance: Annotated[float, Range(ge=0)] = 0.005
    """how far the monitored value may lie above its best (0.005 of error: half a point)"""
    monitor: Literal["error", "loss"] = "error"
    """what is monitored on the validation data: error rate or cross entropy"""
    rate: Annotated[float, Range(gt=0, lt=1)] = 0.3
    """largest relative step of the density"""
    patience: Annotated[int, Range(ge=1)] = 2
    """epochs in a row beyond the tolerance before it steps back"""
    start: Share = 0.1
    """share of the training before which the network stays dense"""
    end: Annotated[float, Range(gt=0, le=1)] = 0.7
    """share of the training after which it only steps back"""


@dataclass(frozen=True)
class Config:
    """An MLP that compresses itself while it learns."""

    data: Literal["digits", "mnist1d", "mnist", "fashion_mnist"] = "digits"
    """data set (never replaced by another one)"""
    standardise: bool = True
    """inputs to zero mean and unit variance (one mean and one deviation, of the training data)"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """one network a seed in each arm"""
    arms: tuple[ArmName, ...] = ("dense", "note", "percentile", "scheduled", "auto")
    """which rules to run"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the hidden layers (the founding MLP: 128, 64)"""
    dropout: Share = 0.3
    """rate after the first layer"""
    dropout_power: Annotated[float, Range(ge=0)] = 0.5
    """the rate is multiplied by density to this power, as sparse nets overfit less (0: constant)"""
    epochs: Annotated[int, Range(ge=1)] = 60
    """passes over the training data"""
    batch_size: Annotated[int, Range(ge=1)] = 32
    """examples a step"""
    learning_rate: Annotated[float, Range(gt=0)] = 2e-3
    """peak of Adam's rate; linear warm-up, then a cosine to zero"""
    warmup_steps: Annotated[int, Range(ge=0)] = 20
    """steps of linear warm-up"""
    validation: Annotated[int, Range(ge=1)] = 287
    """training examples set apart for every choice"""
    threshold: Annotated[float, Range(ge=0)] = 0.05
    """the note's rule: weights below it are zeroed after each epoch, and go on learning"""
    percentile: Annotated[float, Range(ge=0, lt=100)] = 7.0
    """percentile rule: per cent of the living synapses cut before each epoch, until prune_end"""
    sparsities: tuple[Share, ...] = (0.7, 0.9, 0.95)
    """final sparsities of the scheduled arm"""
    every: Annotated[int, Range(ge=1)] | None = None
    """steps between the scheduled arm's events, in the step; null: one event an epoch, between"""
    prune_start: Share = 0.1
    """share of the training at which the schedules begin"""
    prune_end: Annotated[float, Range(gt=0, le=1)] = 0.65
    """share of the training at which they end"""
    auto: Auto = field(default_factory=Auto)
    """the closed loop"""
    patience: Annotated[int, Range(ge=1)] | None = None
    """early stopping: epochs without a better validation loss (after prune_end); null for none"""
    population: Literal["auto", "vmap", "map"] = "auto"
    """how the seeds of an arm run together"""
    output: str = "runs"
    """root of the run folders (not part of the hash)"""

    def __post_init__(self) -> None:
        """Checks what spans several fields."""
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, not {self.seeds}")
        if self.prune_end <= self.prune_start:
            raise ValueError(f"prune_end={self.prune_end} comes before the start of the schedule")
        if self.auto.end <= self.auto.start:
            raise ValueError(f"auto.end={self.auto.end} comes before auto.start")


class Arm(NamedTuple):
    """A rule: its pruner for a setting (possibly traced), and when its events happen."""

    pruner: Callable[[Any], an.pruning.Pruner] | None = None
    settings: tuple[float, ...] = (0.0,)
    when: Literal["before", "in step", "after"] = "before"


class Result(NamedTuple):
    """One row of the table: an arm at one setting, over seeds."""

    name: str
    params: Any
    history: dict[str, np.ndarray]
    row: dict[str, Any]


def arms(config: Config, steps: int) -> dict[str, Arm]:
    """The rules; ``steps`` is the length of the training."""
    p = an.pruning
    start, end = round(config.prune_start * steps), round(config.prune_end * steps)
    loop = config.auto

    def scheduled(sparsity: Any) -> Any:
        return p.prune(p.cubic(final=sparsity, start=start, end=end), every=config.every)

    def percentile(_: Any) -> Any:
        return p.prune(p.percentile(config.percentile, start=start, end=end), every=None)

    def note(_: Any) -> Any:
        return p.prune(p.threshold(config.threshold), regrow=p.everything(), every=None)

    def auto(_: Any) -> Any:
        schedule = p.auto(
            loop.tolerance,
            monitor=f"validation_{loop.monitor}",
            rate=loop.rate,
            patience=loop.patience,
            start=round(loop.start * steps),
            end=round(loop.end * steps),
        )
        return p.prune(schedule, every=None)

    return {
        "dense": Arm(),
        "note": Arm(note, when="after"),
        "percentile": Arm(percentile),
        "scheduled": Arm(scheduled, config.sparsities, "in step" if config.every else "before"),
        "auto": Arm(auto),
    }


def layer_density(params: Any) -> jax.Array:
    """Share of the elements of each kernel that are not zero."""
    return jnp.stack([jnp.mean((p["kernel"] != 0).astype(jnp.float32)) for p in params.values()])


def train_arm(config: Config, name: str, arm: Arm, data: Any, folder: Path, bar: Any) -> Any:
    """Trains all seeds of an arm, at all its settings, as one population."""
    sizes = (data.train_inputs.shape[1], *config.hidden, len(data.classes))
    steps = len(data.train_inputs) // config.batch_size * config.epochs
    members = [(setting, seed) for setting in arm.settings for seed in config.seeds]
    settings = jnp.asarray([setting for setting, _ in members], jnp.float32)
    keys = jnp.stack([jax.random.key_data(jax.random.key(seed)) for _, seed in members])
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup_steps, steps - 1), steps
    )

    def optimizer(setting: Any) -> optax.GradientTransformation:
        adam = optax.adam(rate)
        return adam if arm.pruner is None else optax.chain(adam, arm.pruner(setting))

    def loss(params: Any, inputs: Any, targets: Any, key: Any) -> Any:
        drop = config.dropout
        if config.dropout_power > 0:
            drop = drop * density(params) ** config.dropout_power
        logits = models.mlp(params, inputs, key=key, dropout=drop)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets)), {}

    def per_example(params: Any, inputs: Any, targets: Any) -> Any:
        logits = models.mlp(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return {"loss": losses, "accuracy": (jnp.argmax(logits, -1) == targets).astype(jnp.float32)}

    def init(key: Any, setting: Any) -> Any:
        return training.init_state(lambda k: models.mlp_init(k, sizes), optimizer(setting), key)

    def epoch(state: Any, setting: Any, inputs: Any, targets: Any) -> Any:
        run = training.make_epoch(loss, optimizer(setting), batch_size=config.batch_size)
        return run(state, inputs, targets)

    def event(state: Any, setting: Any, signals: Any) -> Any:
        assert arm.pruner is not None
        pruner = arm.pruner(setting)
        params, opt_state = an.pruning.revise(pruner, state.params, state.opt_state, **signals)
        return state._replace(params=params, opt_state=opt_state)

    method = config.population
    if method == "auto" and arm.when == "in step":
        method = "map"  # vmap would pay for an event in every step

    def over(function: Any, axes: Any) -> Any:
        return training.over_population(function, axes, method=method)

    evaluate = over(training.make_evaluate(per_example, batch_size=1000), (0, None, None))
    train = over(epoch, (0, 0, None, None))
    revise = over(event, (0, 0, 0))

    def before(state: Any, number: int, last: Any) -> Any:
        if arm.pruner is None or arm.when != "before" or last is None:
            return state
        signals = {"validation_loss": last["loss"], "validation_error": 1.0 - last["accuracy"]}
        return revise(state, settings, signals)

    def after(state: Any, number: int) -> Any:
        if arm.pruner is None or arm.when != "after":
            return state
        return revise(state, settings, {})

    stopping = None
    if config.patience is not None:
        first = 0 if arm.pruner is None else int(config.prune_end * config.epochs) + 1
        stopping = training.EarlyStopping(config.patience, start_epoch=first, min_epochs=first + 1)
    fit = training.fit(
        over(init, (0, 0))(keys, settings),
        epoch=lambda state, x, y: train(state, settings, x, y),
        evaluate=evaluate,
        data=tuple(map(jnp.asarray, (data.train_inputs, data.train_targets, *data.validation))),
        epochs=config.epochs,
        before_epoch=before,
        after_epoch=after,
        extra_metrics=lambda state: {
            "density": jax.vmap(density)(state.params),
            "layer_density": jax.vmap(layer_density)(state.params),
        },
        early_stopping=stopping,
        tracker=training.JsonlTracker(folder / "metrics.jsonl"),
        checkpoints=training.Checkpoints(folder / "checkpoints" / name, fingerprint=folder.name),
        progress=bar,
        name=name,
    )
    params = fit.state.params if fit.best is None else fit.best.params
    return members, params, fit.history, evaluate


def measure(
    config: Config, name: str, arm: Arm, trained: Any, data: Any, folder: Path
) -> list[Result]:
    """Test accuracy, counts and bytes of the networks that were chosen; test data, once."""
    members, params, history, evaluate = trained
    test = evaluate(params, jnp.asarray(data.test_inputs), jnp.asarray(data.test_targets))
    check = evaluate(params, *map(jnp.asarray, data.validation))
    rows = []
    for setting in arm.settings:
        places = [i for i, member in enumerate(members) if member[0] == setting]
        label = f"{name} {setting:.1%}" if len(arm.settings) > 1 else name
        one: dict[str, list[float]] = {}
        for place in places:
            net = jax.tree.map(lambda leaf: np.asarray(leaf[place]), params)  # noqa: B023
            for key, value in weigh(net, folder / "networks", label, members[place][1]).items():
                one.setdefault(key, []).append(value)
        one["test_accuracy"] = [float(test["accuracy"][place]) for place in places]
        one["validation_accuracy"] = [float(check["accuracy"][place]) for place in places]
        one["seconds"] = [float(np.sum(history["seconds"])) / len(members)] * len(places)
        chosen = {key: value[:, places] for key, value in history.items() if np.ndim(value) > 1}
        chosen["seconds"] = history["seconds"] * len(places) / len(members)
        nets = jax.tree.map(lambda leaf: np.asarray(leaf)[np.array(places)], params)  # noqa: B023
        row = {key: study.mean_interval(value) for key, value in one.items()}
        rows.append(Result(label, nets, chosen, row))
    return rows


def weigh(net: Any, folder: Path, label: str, seed: int) -> dict[str, float]:
    """Counts, and bytes of files written and read back."""
    stem = f"{label.replace(' ', '_').replace('%', '')}_seed{seed}"
    dense = compression.save_packed(folder / f"{stem}.dense.adnt", net, zeros=True)
    packed = compression.save_packed(folder / f"{stem}.adnt", net)
    masks = [jnp.asarray(layer["kernel"] != 0) for layer in net.values()]
    live = sum(int(mask.sum()) for mask in an.pruning.effective_masks(masks))
    weights = sum(mask.size for mask in masks)
    return {
        "parameters": an.trees.size(net),
        "nonzero": sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(net)),
        "dense_bytes": dense,
        "packed_bytes": packed,
        "sparsity": 1 - sum(int(mask.sum()) for mask in masks) / weights,
        "effective_sparsity": 1 - live / weights,
    }


def histograms(results: list[Result]) -> dict[str, Any]:
    """Non-zero weights of the first seed's networks: dense, note, and the sparsest other arm."""
    shown = [result for result in results if result.name in ("dense", "note")]
    others = [result for result in results if result.name not in ("dense", "note")]
    if others:
        shown.append(max(others, key=lambda result: result.row["sparsity"]["mean"]))
    found = {}
    for layer in results[0].params:
        weights = {r.name: np.asarray(r.params[layer]["kernel"][0]).ravel() for r in shown}
        limit = max(float(np.quantile(np.abs(values), 0.9995)) for values in weights.values())
        edges = [float(f"{edge:.6g}") for edge in np.linspace(-limit, limit, BINS + 1)]
        networks = {}
        for name, values in weights.items():
            alive = values[values != 0]
            networks[name] = {
                "counts": np.histogram(alive, edges)[0].tolist(),
                "zeros": values.size - alive.size,
            }
        found[layer] = {"edges": edges, "networks": networks}
    return found


def to_document(config: Config, digest: str, data: Any, results: list[Result]) -> dict[str, Any]:
    """What the results file holds: all that the table and the figure need, rounded."""

    def plain(**curves: Any) -> dict[str, Any]:
        return study.Outcome({}, curves).rounded().to_json()["curves"]

    layers = {name: layer["kernel"] for name, layer in results[0].params.items()}
    return {
        "study": "adaptive_compression",
        "config_hash": digest,
        "config": config_text(config),
        "data": {"name": data.name, "sha256": data.sha256},
        "seeds": list(config.seeds),
        "verdict": None,
        "chosen": "early-stopped" if config.patience is not None else "last-epoch",
        "layers": {name: list(kernel.shape[1:]) for name, kernel in layers.items()},
        "metrics": {result.name: result.row for result in results},
        # [epochs, seeds] each
        "history": {
            result.name: plain(**{key: result.history[key] for key in HISTORY})
            for result in results
        },
        # share of the weights that are not zero in the networks of the table, one number a seed
        "layer_density": {
            result.name: plain(
                **{
                    name: np.mean(np.asarray(result.params[name]["kernel"]) != 0, axis=(1, 2))
                    for name in layers
                }
            )
            for result in results
        },
        "histograms": histograms(results),
        "seconds": float(sum(np.sum(result.history["seconds"]) for result in results)),
    }


def table(document: dict[str, Any]) -> None:
    """The note's table, over seeds, from the results document."""

    def percent(item: dict[str, Any]) -> str:
        if item["ci_low"] is None:
            return f"{100 * item['mean']:.2f}"
        return f"{100 * item['mean']:.2f} ± {50 * (item['ci_high'] - item['ci_low']):.2f}"

    rows = [
        [
            name,
            percent(row["test_accuracy"]),
            f"{row['parameters']['mean']:,.0f}",
            f"{row['nonzero']['mean']:,.0f}",
            f"{row['dense_bytes']['mean']:,.0f}",
            f"{row['packed_bytes']['mean']:,.0f}",
            percent(row["sparsity"]),
            percent(row["effective_sparsity"]),
            f"{row['seconds']['mean']:.1f}",
        ]
        for name, row in document["metrics"].items()
    ]
    study.print_table(
        f"{document['data']['name']}: {len(document['seeds'])} seeds, mean ± 95 % interval, "
        f"{document['chosen']} weights",
        [
            "model",
            "test %",
            "parameters",
            "non-zero",
            "dense bytes",
            "file bytes",
            "sparsity %",
            "effective %",
            "seconds",
        ],
        rows,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the job: reads the config, trains each arm, prints the table, draws the figure."""
    config = training.load_config(
        Config, argv, prog="research.adaptive_compression", description=Config.__doc__
    )
    try:
        loaded = an.data.load(config.data)
    except an.data.DataError as error:
        sys.exit(f"research.adaptive_compression: {error}")
    flat = an.data.flatten(loaded)
    if config.standardise:
        flat = an.data.standardise(flat)
    elif flat.maximum is not None:
        flat = an.data.normalise(flat)
    if config.validation + config.batch_size > len(flat.train_inputs):
        sys.exit(
            f"validation={config.validation} leaves fewer than one batch of {config.batch_size} "
            f"of the {len(flat.train_inputs)} training examples of {config.data}; lower it."
        )
    data = an.data.split(flat, config.validation, seed=0)
    folder, digest = study.open_run("adaptive_compression", config)
    print(f"{data!r}\nrun folder: {folder}", flush=True)
    steps = len(data.train_inputs) // config.batch_size * config.epochs
    results: list[Result] = []
    chosen = {name: arm for name, arm in arms(config, steps).items() if name in config.arms}
    try:
        for name, arm in chosen.items():
            trained = train_arm(config, name, arm, data, folder, training.Progress())
            results += measure(config, name, arm, trained, data, folder)
    except training.Interrupted as stop:
        sys.exit(f"\n{stop}")
    except training.CheckpointError as error:
        sys.exit(f"research.adaptive_compression: {error}")
    path = study.write_results(folder, to_document(config, digest, data, results))
    # Printed and drawn is what the file holds, so that the file alone rebuilds both.
    document = study.read_results(path)
    table(document)
    from research import adaptive_compression_figure

    adaptive_compression_figure.save(document, folder / "figure.png", folder / "figure.pdf")
    print(f"results: {path}\nfigure:  {folder / 'figure.png'} (and .pdf)")


if __name__ == "__main__":
    main()
