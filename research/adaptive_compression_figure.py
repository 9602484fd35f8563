"""The figure of the main job: what was cut, when, where, and at what price."""

from __future__ import annotations

from typing import Any

import numpy as np

# Okabe and Ito's palette: distinct for colour-blind readers, and in grey.
_COLOURS = ("#000000", "#D55E00", "#E69F00", "#7FC8F8", "#0072B2", "#002B5C", "#009E73", "#CC79A7")


def draw(config: Any, data_name: str, results: Any) -> Any:
    """Draws histograms of the layers, accuracy and sparsity over training, densities, curves.

    Args:
      config: the study's config.
      data_name: name of the data set, for the title.
      results: rows of the table, with histories of shape [epochs, seeds].

    Returns:
      A matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = {r.name: _COLOURS[i % len(_COLOURS)] for i, r in enumerate(results)}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(3, 3, figsize=(13, 10), layout="constrained")
        _histograms(axes[0], results, colour)
        _over_time(
            axes[1][0], results, colour, "validation_accuracy", "validation accuracy (%)", 100
        )
        _over_time(axes[1][1], results, colour, "density", "sparsity (%)", -100)
        _per_layer(axes[1][2], results, colour)
        _over_time(axes[2][0], results, colour, "train_loss", "training loss (dropout on)", 1)
        _over_time(axes[2][1], results, colour, "validation_loss", "validation loss", 1)
        _trade(axes[2][2], results, colour)
        for axis in (axes[2][0], axes[2][1]):
            axis.set_yscale("log")
        _zoom(axes[1][0], results)
        handles, labels = axes[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        members = len(config.seeds)
        figure.suptitle(
            f"A network that compresses itself: {data_name}, "
            f"{'-'.join(map(str, _sizes(results[0].params)))}, {members} seeds "
            "(lines: means; bands: range over seeds)"
        )
    return figure


def _sizes(params: Any) -> list[int]:
    kernels = [layer["kernel"] for layer in params.values()]
    return [kernels[0].shape[-2], *(kernel.shape[-1] for kernel in kernels)]


def _histograms(axes: Any, results: Any, colour: Any) -> None:
    """Weights of each layer: dense, under the note's rule, and after the strongest arm."""
    shown = [r for r in results if r.name in ("dense", "note")]
    pruned = [r for r in results if r.name not in ("dense", "note")]
    if pruned:
        shown.append(max(pruned, key=lambda r: r.row["sparsity"]["mean"]))
    layers = list(results[0].params)
    for place, axis in enumerate(axes):
        if place >= len(layers):
            axis.set_visible(False)
            continue
        layer = layers[place]
        weights = {r.name: np.asarray(r.params[layer]["kernel"])[0].ravel() for r in shown}
        limit = max(float(np.quantile(np.abs(w), 0.9995)) for w in weights.values())
        bins = np.linspace(-limit, limit, 81)
        for r in shown:
            values = weights[r.name]
            alive = values[values != 0]
            zeros = values.size - alive.size
            axis.hist(
                alive,
                bins=bins,
                histtype="stepfilled" if r.name == "dense" else "step",
                color=colour[r.name],
                alpha=0.25 if r.name == "dense" else 1.0,
                linewidth=1.4,
                label=f"{r.name}: {zeros / values.size:.0%} zero",
            )
        axis.set_yscale("log")
        axis.set_ylim(0.7, axis.get_ylim()[1] * 6)  # room for the legend
        axis.set_title(f"{layer}: non-zero weights of one network")
        axis.set_xlabel("weight")
        axis.set_ylabel("count (log)" if place == 0 else "")
        axis.legend(frameon=False, loc="upper right", fontsize=8)


def _over_time(axis: Any, results: Any, colour: Any, key: str, label: str, scale: float) -> None:
    for r in results:
        values = np.asarray(r.history[key], np.float64)
        values = 100 * (1 - values) if scale < 0 else scale * values
        epochs = np.arange(1, len(values) + 1)
        axis.plot(epochs, values.mean(1), color=colour[r.name], label=r.name, linewidth=1.3)
        axis.fill_between(
            epochs, values.min(1), values.max(1), color=colour[r.name], alpha=0.12, linewidth=0
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")
    axis.set_title(label)


def _zoom(axis: Any, results: Any) -> None:
    """Leaves the first steep epochs out of the view; what matters happens in the last points."""
    ends = [100 * float(np.min(r.history["validation_accuracy"][-1])) for r in results]
    tops = [100 * float(np.max(r.history["validation_accuracy"])) for r in results]
    span = max(max(tops) - min(ends), 1.0)
    axis.set_ylim(min(ends) - 1.5 * span, max(tops) + 0.2 * span)


def _per_layer(axis: Any, results: Any, colour: Any) -> None:
    layers = list(results[0].params)
    pruned = [r for r in results if r.row["sparsity"]["mean"] > 0.001]
    width = 0.8 / max(len(pruned), 1)
    for place, r in enumerate(pruned):
        densities = [
            100 * np.count_nonzero(r.params[layer]["kernel"]) / r.params[layer]["kernel"].size
            for layer in layers
        ]
        where = np.arange(len(layers)) + (place - (len(pruned) - 1) / 2) * width
        axis.bar(where, densities, width, color=colour[r.name])
    axis.set_yscale("log")
    axis.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_xticks(np.arange(len(layers)), layers)
    axis.set_title("density of each layer at the end (%, log)")


def _trade(axis: Any, results: Any, colour: Any) -> None:
    """Test accuracy against the bytes of the file."""
    for r in results:
        test, size = r.row["test_accuracy"], r.row["packed_bytes"]
        low, high = test["ci_low"], test["ci_high"]
        error = None
        if low is not None:
            error = [[100 * (test["mean"] - low)], [100 * (high - test["mean"])]]
        axis.errorbar(
            size["mean"] / 1000,
            100 * test["mean"],
            yerr=error,
            fmt="o",
            color=colour[r.name],
            capsize=3,
        )
    axis.set_xscale("log")
    axis.margins(x=0.15)
    sizes = [r.row["packed_bytes"]["mean"] / 1000 for r in results]
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if min(sizes) / 2 < t < 2 * max(sizes)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("file (kB, log)")
    axis.set_title("test accuracy (%, 95 % interval) against file size")
