"""The figure of the main job: what was cut, when, where, and at what price."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette: distinct for colour-blind readers, and in grey.
_COLOURS = ("#000000", "#D55E00", "#E69F00", "#7FC8F8", "#0072B2", "#002B5C", "#009E73", "#CC79A7")


# The paper's full width and print size; the demo draws it too, so it needs matplotlib alone.
_STYLE: dict[Any, Any] = {
    "figure.figsize": (6.75, 5.9),
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7,
    "figure.titlesize": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
}


def save(document: Mapping[str, Any], *paths: Path) -> None:
    """Draws a results document and writes the figure, with nothing in it that depends on the day.

    Args:
      document: the results document of the main job.
      paths: the files; the suffix (png, pdf) says how.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure = draw(document)
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
            figure.savefig(path, dpi=200, metadata=metadata)
        plt.close(figure)


def draw(document: Mapping[str, Any]) -> Any:
    """Draws histograms of the layers, accuracy and sparsity over training, densities, curves.

    Args:
      document: the results document of the main job; nothing else is drawn.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    arms = list(document["metrics"])
    colour = {arm: _COLOURS[place % len(_COLOURS)] for place, arm in enumerate(arms)}
    history = {
        arm: {key: np.array(value, np.float64) for key, value in curves.items()}
        for arm, curves in document["history"].items()
    }
    figure, axes = plt.subplots(3, 3)
    _histograms(axes[0], document, colour)
    accuracy = _over_time(axes[1][0], history, colour, "validation_accuracy", lambda x: 100 * x)
    _zoom(axes[1][0], accuracy)
    axes[1][0].set_title("d  validation accuracy (%)")
    _over_time(axes[1][1], history, colour, "density", lambda x: 100 * (1 - x))
    axes[1][1].set_title("e  sparsity (%)")
    _per_layer(axes[1][2], document, colour)
    for axis, key, title in (
        (axes[2][0], "train_loss", "g  training loss (dropout on)"),
        (axes[2][1], "validation_loss", "h  validation loss"),
    ):
        _over_time(axis, history, colour, key, lambda x: x)
        axis.set_title(title)
        _log_ticks(axis, history, key)
    _trade(axes[2][2], document["metrics"], colour)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        columnspacing=1.2,
        handlelength=1.4,
    )
    shapes = list(document["layers"].values())
    sizes = "-".join(str(size) for size in (shapes[0][0], *(shape[1] for shape in shapes)))
    figure.suptitle(
        f"{document['data']['name']}, {sizes}, {len(document['seeds'])} seeds "
        "(lines: means; bands: range over seeds; a to c: one of them)"
    )
    return figure


def _histograms(axes: Any, document: Mapping[str, Any], colour: Mapping[str, str]) -> None:
    """Weights of each layer: dense, under the note's rule, and of the sparsest arm."""
    layers = list(document["layers"].items())
    for place, axis in enumerate(axes):
        if place >= len(layers):
            axis.set_visible(False)
            continue
        layer, shape = layers[place]
        histogram = document["histograms"][layer]
        for arm, network in histogram["networks"].items():
            axis.stairs(
                network["counts"],
                histogram["edges"],
                fill=arm == "dense",
                color=colour[arm],
                alpha=0.25 if arm == "dense" else 1.0,
                linewidth=0 if arm == "dense" else 1.0,
                label=f"{arm}: {network['zeros'] / np.prod(shape):.0%} zero",
            )
        highest = max(max(network["counts"]) for network in histogram["networks"].values())
        axis.set_yscale("log")
        axis.set_ylim(0.7, max(highest, 1) ** 1.5 * 2)  # room for the legend
        axis.set_title(f"{'abc'[place]}  {layer}: non-zero weights")
        axis.set_xlabel("weight")
        axis.set_ylabel("count" if place == 0 else "")
        axis.legend(loc="upper right", handlelength=1.2, borderaxespad=0.1)


def _over_time(axis: Any, history: Any, colour: Any, key: str, unit: Any) -> dict[str, np.ndarray]:
    """Mean over seeds and their range at each epoch; what was drawn, in its unit."""
    drawn = {}
    for arm, curves in history.items():
        values = drawn[arm] = unit(curves[key])
        epochs = np.arange(1, len(values) + 1)
        axis.plot(epochs, values.mean(1), color=colour[arm], label=arm)
        axis.fill_between(
            epochs, values.min(1), values.max(1), color=colour[arm], alpha=0.12, linewidth=0
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")
    return drawn


def _zoom(axis: Any, drawn: Mapping[str, np.ndarray]) -> None:
    """Leaves the first steep epochs out of the view; what matters happens in the last points."""
    end = min(float(np.min(values[-1])) for values in drawn.values())
    top = max(float(np.max(values)) for values in drawn.values())
    span = max(top - end, 1.0)
    axis.set_ylim(end - 1.5 * span, top + 0.2 * span)


def _log_ticks(axis: Any, history: Any, key: str) -> None:
    """A log axis with plain numbers, as losses rarely span a whole decade."""
    values = np.concatenate([curves[key].ravel() for curves in history.values()])
    low, high = np.nanmin(values), np.nanmax(values)
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    ticks = [step * 10.0**decade for decade in range(-6, 3) for step in steps]
    ticks = [tick for tick in ticks if low < tick < high]
    if len(ticks) < 2:
        return  # too short a span: a linear axis shows it
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def _per_layer(axis: Any, document: Mapping[str, Any], colour: Mapping[str, str]) -> None:
    layers = list(document["layers"])
    metrics = document["metrics"]
    pruned = [arm for arm in metrics if metrics[arm]["sparsity"]["mean"] > 0.001]
    width = 0.8 / max(len(pruned), 1)
    for place, arm in enumerate(pruned):
        densities = [100 * np.mean(document["layer_density"][arm][layer]) for layer in layers]
        where = np.arange(len(layers)) + (place - (len(pruned) - 1) / 2) * width
        axis.bar(where, densities, width, color=colour[arm])
    axis.set_yscale("log")
    axis.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_xticks(np.arange(len(layers)), layers)
    axis.set_title("f  density of each layer (%)")


def _trade(axis: Any, metrics: Mapping[str, Any], colour: Mapping[str, str]) -> None:
    """Test accuracy against the bytes of the file."""
    for arm, row in metrics.items():
        test, size = row["test_accuracy"], row["packed_bytes"]
        low, high = test["ci_low"], test["ci_high"]
        error = None
        if low is not None:
            error = [[100 * (test["mean"] - low)], [100 * (high - test["mean"])]]
        axis.errorbar(
            size["mean"] / 1000,
            100 * test["mean"],
            yerr=error,
            fmt="o",
            markersize=3,
            color=colour[arm],
            capsize=2,
        )
    axis.set_xscale("log")
    axis.margins(x=0.15)
    sizes = [row["packed_bytes"]["mean"] / 1000 for row in metrics.values()]
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if min(sizes) / 2 < t < 2 * max(sizes)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("file (kB)")
    axis.set_title("i  test accuracy (%, 95 % interval)")
