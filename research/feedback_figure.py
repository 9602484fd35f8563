"""The figure of S2."""

from __future__ import annotations

from typing import Any

import numpy as np

from research.feedback_measures import RATIOS

COLOURS = {"real": "#D55E00", "shadow": "#0072B2"}
SPOKEN = {"dense": "nothing", "pruned": "the others", "random": "at random"}
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD, weight decay"}


def draw(config: Any, outcome: Any) -> Any:
    """Draws a row for each optimizer: twins, hazards, the randomised reprieve.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3)
    for row, (name, spoken) in zip(axes, OPTIMIZERS.items(), strict=True):
        _twins(row[0], outcome.curves, name)
        row[0].set(ylabel=f"{spoken}\ngrowth of strong synapses (%)")
        _hazards(row[1], outcome.curves, name)
        _reprieve(row[2], config, outcome.curves, name)
    axes[0][0].set_title("a  the same synapses in three futures")
    axes[0][1].set_title("b  share that dies in a round")
    axes[0][2].set_title("c  randomised reprieve")
    axes[1][0].set_xlabel("what is pruned")
    axes[1][1].set_xlabel("log(|w| / threshold)")
    axes[1][2].set_xlabel("rounds since the release")
    axes[0][0].legend(loc="upper left", handletextpad=0.1)
    axes[0][1].legend(loc="upper right", handlelength=1.4)
    axes[0][2].legend(loc="center right", handlelength=1.4, bbox_to_anchor=(1.0, 0.72))
    return figure


def _twins(axis: Any, curves: Any, name: str) -> None:
    layers = curves[f"growth_dense_{name}"].shape[1]
    for layer in range(layers):
        for place, future in enumerate(SPOKEN):
            values = 100 * curves[f"growth_{future}_{name}"][:, layer]
            at = place + 0.22 * (layer - (layers - 1) / 2)
            spread = np.linspace(-0.06, 0.06, len(values))
            axis.plot(at + spread, values, "o", ms=2, alpha=0.5, color=f"C{layer}")
            axis.plot([at - 0.09, at + 0.09], [values.mean()] * 2, color="black", lw=1.2)
        axis.plot([], [], "o", ms=3, color=f"C{layer}", label=f"layer {layer + 1}")
    axis.axhline(0, color="black", lw=0.5)
    axis.set_xticks(range(len(SPOKEN)), list(SPOKEN.values()))


def _hazards(axis: Any, curves: Any, name: str) -> None:
    middle = np.sqrt(np.maximum(RATIOS[:-1], RATIOS[1] / 3) * RATIOS[1:])
    for arm, colour in COLOURS.items():
        rates = curves[f"rates_{arm}_{name}"]
        known = np.isfinite(rates).sum(0)
        mean = np.where(known > 0, np.nansum(rates, 0) / np.maximum(known, 1), np.nan)
        label = "masked" if arm == "real" else "shadow"
        for group, dashes, what in ((0, "-", "kept ≤ 2 rounds"), (1, "--", "kept ≥ 6")):
            axis.plot(
                middle,
                mean[group],
                dashes,
                color=colour,
                marker=".",
                ms=3,
                label=f"{label}, {what}",
            )
    axis.set(xscale="log", ylim=(0, 1))


def _reprieve(axis: Any, config: Any, curves: Any, name: str) -> None:
    for arm, colour in COLOURS.items():
        shares = curves[f"shares_{arm}_{name}"]
        lags = np.arange(shares.shape[1]) - config.before - config.reprieve
        seen = lags >= -config.reprieve
        label = "masked" if arm == "real" else "shadow"
        for group, dashes, what in ((0, "-", "reprieved"), (1, "--", "not")):
            values = shares[:, seen, group]
            axis.plot(lags[seen], values.mean(0), dashes, color=colour, label=f"{label}, {what}")
            axis.fill_between(
                lags[seen], values.min(0), values.max(0), color=colour, alpha=0.12, lw=0
            )
    axis.axvspan(-config.reprieve, -0.5, color="black", alpha=0.06, lw=0)
    axis.set(ylabel="share in the mask", ylim=(0, 1.02))
