"""The figure of the study of scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

from research import scaling_fit, scaling_measures

RIVALS = {
    "law": ("the law", "#0072B2", "-"),
    "no_width": ("no width", "#D55E00", "--"),
    "power_law": ("power law", "#009E73", "-."),
    "interpolation": ("interpolation", "#CC79A7", ":"),
}


def draw(config: Any, outcome: Any) -> Any:
    """Draws the law over the data, the invariant, the held-out width, deviations and baselines.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3)
    error, density = outcome.curves["error"], outcome.curves["density"][0]
    mean = error.mean(0)
    found = scaling_measures.compare(config, mean, density)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.88, len(config.widths)))
    _curves(axes[0][0], config, error, density, found, colours)
    _invariant(axes[0][1], config, mean, density, found, colours)
    _held_out(axes[0][2], config, error, density, found)
    _deviations(axes[1][0], config, mean, density, found, colours)
    m = outcome.metrics
    fitted = {
        "the\nlaw": m["fit_law"],
        "no\nwidth": m["fit_no_width"],
        "power\nlaw": m["fit_power_law"],
        "errors\npermuted": m["fit_permuted"],
    }
    middle, held = config.widths[len(config.widths) // 2], config.held_out
    new = {
        f"law\n{middle}": m[f"left_out_{middle}"],
        f"law\n{held}": m["held_law"],
        f"no w.\n{held}": m["held_no_width"],
        f"power\n{held}": m["held_power_law"],
        f"interp.\n{held}": m["held_interpolation"],
    }
    _dots(axes[1][1], fitted, ["#0072B2", "#D55E00", "#009E73", "#555555"])
    axes[1][1].set_title("e  fitted widths, every seed")
    _dots(axes[1][2], new, ["#0072B2", *(colour for _, colour, _ in RIVALS.values())])
    axes[1][2].set_title("f  a width held out, every seed")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _label(config: Any, width: int) -> str:
    return f"width {width}" + (" (held out)" if width == config.held_out else "")


def _curves(axis: Any, config: Any, error: Any, density: Any, found: Any, colours: Any) -> None:
    grid = np.geomspace(density[:, -1].min(), 1, 200)
    for place, width in enumerate(config.widths):
        values, dense = 100 * error[:, place], error[:, place, 0].mean()
        mean = values.mean(0)
        spread = [mean - values.min(0), values.max(0) - mean]
        dots = {"fmt": "o", "ms": 2.5, "lw": 0.6, "color": colours[place]}
        if width == config.held_out:
            dots["mfc"] = "white"
        axis.errorbar(density[place], mean, spread, label=_label(config, width), **dots)
        dashes = "--" if width == config.held_out else "-"
        line = 100 * scaling_fit.law(found.constants, dense, grid, width)
        axis.plot(grid, line, dashes, color=colours[place], lw=1)
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="error (%)")
    _percent(axis)
    axis.set_title("a  errors (bars: all seeds), and the law")


def _invariant(axis: Any, config: Any, mean: Any, density: Any, found: Any, colours: Any) -> None:
    for place, width in enumerate(config.widths):
        shape = {"mfc": "white"} if width == config.held_out else {}
        at = width**found.constants.psi * density[place]
        axis.plot(at, 100 * mean[place], "o-", ms=2.5, lw=0.5, color=colours[place], **shape)
    psi = found.constants.psi
    axis.set(xscale="log", yscale="log", xlabel=f"width$^{{{psi:.2f}}}$ $\\times$ density")
    axis.set_ylabel("error (%)")
    _percent(axis)
    axis.set_title("b  the same over the invariant")


def _held_out(axis: Any, config: Any, error: Any, density: Any, found: Any) -> None:
    place = config.widths.index(config.held_out)
    values = 100 * error[:, place, 1:]
    mean = values.mean(0)
    spread = [mean - values.min(0), values.max(0) - mean]
    at = density[place, 1:]
    axis.errorbar(at, mean, spread, fmt="o", ms=2.5, lw=0.6, color="black", mfc="white")
    for name, (label, colour, dashes) in RIVALS.items():
        axis.plot(at, 100 * found.held[name], dashes, color=colour, lw=1, label=label)
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="error (%)")
    _percent(axis)
    axis.legend(loc="lower left", handlelength=1.8)
    axis.set_title(f"c  width {config.held_out}, predicted")


def _deviations(axis: Any, config: Any, mean: Any, density: Any, found: Any, colours: Any) -> None:
    axis.axhspan(-5, 5, color="black", alpha=0.07, lw=0)
    axis.axhline(0, color="grey", lw=0.6)
    for place, width in enumerate(config.widths):
        guess = scaling_fit.law(found.constants, mean[place, 0], density[place, 1:], width)
        shape = {"mfc": "white"} if width == config.held_out else {}
        off = 100 * (guess / mean[place, 1:] - 1)
        axis.plot(density[place, 1:], off, "o-", ms=2, color=colours[place], lw=0.8, **shape)
    axis.set(xscale="log", xlabel="density", ylabel="law / measured - 1 (%)")
    axis.set_title("d  where the law is off (band: ±5 %)")


def _dots(axis: Any, groups: Any, colours: Any) -> None:
    """Every seed a dot, the mean a bar; the line is what is claimed."""
    for place, values in enumerate(groups.values()):
        spread = np.linspace(-0.2, 0.2, len(values))
        axis.plot(place + spread, 100 * values, "o", ms=2, alpha=0.7, color=colours[place])
        axis.plot([place - 0.3, place + 0.3], [100 * np.mean(values)] * 2, color="black", lw=1)
    axis.axhline(5, color="grey", lw=0.8, ls=":")
    right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate("5 %", (1, 5), (2, 0), va="center", color="grey", fontsize=6, **right)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("mean relative error (%)")


def _percent(axis: Any) -> None:
    low, high = axis.get_ylim()
    grid = (1, 2, 3, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)
    ticks = [tick for tick in grid if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
