"""The figure of S3."""

from __future__ import annotations

from typing import Any

import numpy as np

from research.lottery_arms import MEMBERS, PAIRS

COLOURS = {
    "rewound": "#0072B2",
    "original": "#56B4E9",
    "oneshot": "#009E73",
    "matched": "#7A7A00",
    "long": "#000000",
    "kept": "#CC79A7",
    "random": "#E69F00",
    "reinit": "#D55E00",
}
MARKS = {
    "rewound": "o",
    "original": "s",
    "oneshot": "^",
    "matched": "X",
    "long": "*",
    "kept": "P",
    "random": "v",
    "reinit": "D",
}


def draw(config: Any, outcome: Any) -> Any:
    """Draws accuracy by density, leads at the last one, barriers, lines, and overlap of masks.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3)
    spoken = {
        "rewound": f"ticket, back to step {config.rewind}",
        "original": "ticket, back to step 0",
        "kept": "rounds without going back",
        "oneshot": "one cut",
        "matched": "one cut, the ticket's layer sizes",
        "long": "one cut, as many steps in all",
        "random": "random mask",
        "reinit": "ticket, new initialization",
    }
    curves, density = outcome.curves, 100 * outcome.curves["density"][0]
    _accuracy(axes[0][0], curves, density, spoken)
    _leads(axes[0][1], outcome.metrics)
    axes[0][1].set_title(f"b  lead of the ticket at {density[-1]:.1f} %")
    axis = axes[0][2]
    for place, arm in enumerate(PAIRS):
        _line(axis, density, 100 * curves["barrier_error"][:, :, place], arm)
    axis.set(title="c  barrier between two children", ylabel="error barrier (points)")
    axis.set_ylim(bottom=0)
    top = curves["line"][:, :, :2].mean(0).max()
    for axis, arm, letter in ((axes[1][0], "original", "d"), (axes[1][1], "rewound", "e")):
        _between(axis, curves["line"][:, :, PAIRS.index(arm)], density)
        axis.set_title(f"{letter}  {spoken[arm]}")
        axis.set_ylim(0, 1.05 * top)
    axes[1][0].legend(loc="lower center", title="density", ncols=2, handlelength=1.4)
    axis = axes[1][2]
    for place, arm in enumerate(PAIRS[:2]):
        _line(axis, density, curves["overlap"][:, :, place, 0], arm)
        chance = curves["overlap"][:, :, place, 1].mean(0)
        axis.plot(density, chance, ":", color=COLOURS[arm])
    axis.plot([], [], ":", color="black", label="chance")
    axis.legend(loc="lower left")
    axis.set(title="f  two tickets of one start", ylabel="synapses in both / in either")
    axis.set_ylim(0, 1.02)
    for axis in (axes[0][0], axes[0][2], axes[1][2]):
        _densities(axis, density)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    return figure


def _accuracy(axis: Any, curves: Any, density: Any, spoken: Any) -> None:
    for arm in ("rewound", "original", "kept", "oneshot", "matched", "reinit", "random"):
        values = 100 * curves["accuracy"][:, :, MEMBERS.index(f"{arm} a")]
        _line(axis, density, values, arm, spoken[arm])
    last = 100 * curves["accuracy"][:, -1, MEMBERS.index("long a")]
    style = {"color": COLOURS["long"], "ls": "", "marker": "*", "ms": 6, "label": spoken["long"]}
    axis.errorbar(density[-1], last.mean(), _half(last), lw=1, zorder=9, **style)
    dense = 100 * curves["accuracy"][:, 0, MEMBERS.index("rewound a")].mean()
    axis.axhline(dense, color="grey", lw=1, ls=":", label="dense")
    axis.set(title="a  accuracy", ylabel="accuracy (%)")


def _leads(axis: Any, metrics: Any) -> None:
    """Every seed a dot, the mean a bar."""
    winning = 100 * metrics["winning_density"][0]
    arms = {
        "dense": f"dense,\n{winning:.0f} %",
        "original": "step\n0",
        "kept": "never\nback",
        "oneshot": "one\ncut",
        "matched": "equal\nlayers",
        "long": "as\nlong",
        "random": "rand.\nmask",
        "reinit": "new\ninit.",
    }
    for place, arm in enumerate(arms):
        values = 100 * metrics[f"beyond_{arm}"]
        spread = np.linspace(-0.15, 0.15, len(values))
        colour = COLOURS.get(arm, "grey")
        axis.plot(place + spread, values, "o", ms=1.5, alpha=0.6, color=colour)
        axis.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color="black", lw=1)
    axis.axhline(0, color="black", lw=0.5)
    axis.set_xticks(range(len(arms)), list(arms.values()))
    axis.tick_params(axis="x", labelsize=5.5)
    axis.set_ylabel("points of accuracy")


def _line(axis: Any, density: Any, values: Any, arm: str, label: str | None = None) -> None:
    """Mean over seeds, and its 95 % interval."""
    mean, half = values.mean(0), _half(values)
    style = {"color": COLOURS[arm], "marker": MARKS[arm], "ms": 2.5}
    axis.plot(density, mean, label=label, **style)
    axis.fill_between(density, mean - half, mean + half, color=COLOURS[arm], alpha=0.15, lw=0)


def _half(values: Any) -> Any:
    """Half of the interval over seeds, by Student's t."""
    from scipy import stats

    n = len(values)
    return stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)


def _between(axis: Any, lines: Any, density: Any) -> None:
    """The loss on the line between two children, at the first, a middle and the last density."""
    import matplotlib

    positions = np.linspace(0, 1, lines.shape[-1])
    shown = sorted({0, len(density) // 3, 2 * len(density) // 3, len(density) - 1})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(shown)))
    for place, shade in zip(shown, shades, strict=True):
        mean, half = lines[:, place].mean(0), _half(lines[:, place])
        axis.plot(positions, mean, ".-", ms=3, color=shade, label=f"{density[place]:.3g} %")
        axis.fill_between(positions, mean - half, mean + half, color=shade, alpha=0.15, lw=0)
    axis.set(xlabel="from one child to the other", ylabel="training loss")


def _densities(axis: Any, density: Any) -> None:
    """Density falls to the right."""
    ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1) if tick >= 0.95 * density[-1]]
    axis.set(xscale="log", xlabel="density (%)", xlim=(115, density[-1] / 1.15))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
