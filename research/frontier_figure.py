"""The figure of the frontier."""

from __future__ import annotations

from typing import Any

import numpy as np

from research.frontier_arms import CONTROLS, SUBJECTS, read_rule
from research.frontier_measures import (
    LITERATURE,
    TITLES,
    columns_of,
    gain,
    measured,
    sparse_end,
)
from research.results import mean_interval

# One colour a regrowth; scores that are not named stand in grey behind them.
COLOURS = {"": "#0072B2", "gradient": "#D55E00", "momentum": "#009E73", "random": "#E69F00"}
OTHER = "#56B4E9"
NAMED = {"magnitude": "-", "fisher_tempered": "--"}
WORST = 12.0  # per cent of error; above it rules are not worth a place on the axis


def draw(config: Any, outcome: Any) -> Any:
    """Draws a panel of error against density for each subject, and the gains of the first one.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    shown = [name for name in SUBJECTS if getattr(config, name).rules]
    figure, axes = plt.subplots(1, len(shown) + 1, squeeze=False)
    for place, name in enumerate(shown):
        _frontier(axes[0][place], config, outcome.metrics, name)
        axes[0][place].set_title(f"{'abc'[place]}  {TITLES[name]}")
    axes[0][0].set_ylabel("error (%)")
    _gains(axes[0][-1], config, outcome.metrics, shown[0])
    axes[0][-1].set_title(f"{'abcd'[len(shown)]}  gain over magnitude")
    return figure


def _frontier(axis: Any, config: Any, m: Any, name: str) -> None:
    best, seen, top = getattr(config, name).rules[-1], [], WORST
    for spelled in getattr(config, name).rules:
        rule, at = read_rule(spelled), columns_of(config, name, spelled)
        errors = [100 * (1 - measured(m, "accuracy", name, spelled, s)) for s in at]
        means = [float(np.mean(e)) for e in errors]
        seen += means
        if rule.score == "dense":
            axis.axhline(means[0], color="black", lw=0.7, ls=(0, (4, 2)))
            axis.annotate(
                "dense", (0, means[0]), (2, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=6,
            )  # fmt: skip
            continue
        kept = [100 * (1 - s) for s in at]
        style = _style(rule, spelled, best)
        if spelled == best:
            half = [_half(e) for e in errors]
            axis.errorbar(kept, means, half, fmt="none", ecolor=style["color"], lw=0.8, zorder=3)
            top = max(WORST, 1.5 * max(means))
        axis.plot(kept, means, **style)
    axis.plot([], [], color="0.75", lw=0.6, label="other rules")
    for _, error, ratio in LITERATURE.get(name, []):
        axis.plot(100 / ratio, error, "k+", ms=4, mew=0.9)
        seen.append(error)
    if name in LITERATURE:
        axis.plot([], [], "k+", ms=4, label="literature")
    axis.set(xscale="log", yscale="log", xlabel="weights kept (%)")
    axis.set_ylim(0.85 * min(seen), min(1.15 * max(seen), top))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=5)
    axis.legend(loc="upper right", fontsize=5, handlelength=1.8)


def _style(rule: Any, spelled: str, best: str) -> dict[str, Any]:
    if rule.score == "l2":
        return {"color": "black", "ls": ":", "lw": 1.1, "label": "l2: norm lost by decay"}
    if rule.score not in NAMED and spelled != best:
        return {"color": "0.75", "lw": 0.6, "zorder": 1}
    style = {"color": COLOURS.get(rule.regrowth, OTHER), "ls": NAMED.get(rule.score, "-.")}
    if rule.taught:
        style["ls"] = ":"
    wide = {"lw": 1.8, "zorder": 3} if spelled == best else {"lw": 1.1}
    return {**style, **wide, "label": spelled}


def _gains(axis: Any, config: Any, m: Any, name: str) -> None:
    """Rules by their paired gain over plain magnitude at the sparse end."""
    setting, found = getattr(config, name), []
    for spelled in setting.rules:
        if spelled == "magnitude" or read_rule(spelled).score in CONTROLS:
            continue
        values = gain(m, name, spelled, "magnitude", sparse_end(setting.sparsities))
        if values is not None:
            found.append((float(np.mean(values)), _half(values), spelled))
    found.sort()
    for place, (mean, half, spelled) in enumerate(found):
        colour = COLOURS.get(read_rule(spelled).regrowth, OTHER)
        axis.errorbar(100 * mean, place, xerr=100 * half, fmt="o", ms=2.5, lw=0.8, color=colour)
    axis.set_yticks(range(len(found)), [spelled for *_, spelled in found], fontsize=5)
    axis.axvline(0, color="black", lw=0.5)
    # Random and the rules at initialization lie far to the left; the rest is what is compared.
    axis.set_xscale("symlog", linthresh=2)
    axis.xaxis.set_major_formatter("{x:g}")
    least = min(sparse_end(setting.sparsities))
    axis.set_xlabel(f"points, mean over sparsities ≥ {least:g}")


def _half(values: Any) -> float:
    found = mean_interval(values)
    return 0.0 if found["ci_low"] is None else (found["ci_high"] - found["ci_low"]) / 2
