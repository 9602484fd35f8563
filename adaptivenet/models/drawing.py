"""A drawing of which axes of which parameters are one unit."""

from __future__ import annotations

from typing import Any

from adaptivenet.pruning.coupling import Coupling


def draw_coupling(coupling: Coupling, axes: Any = None) -> Any:
    """Draws a coupling: parameters by groups of units, with the axis that holds them.

    Each column is a group of units that stand and fall together; each row a parameter with its
    shape. A mark says which axis of the parameter has a slice for each of the units: filled where
    the units may be taken out, hollow where they have to stay.

    Args:
        coupling: What `pruning.couple` found.
        axes: Axes of matplotlib to draw in; a new figure by default.

    Returns:
        The figure.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (4, 3, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 4)))
    >>> type(draw_coupling(coupling)).__name__
    'Figure'
    """
    from matplotlib.figure import Figure

    groups = [*coupling.free, *(group for group in coupling.groups if group.why)]
    free = len(coupling.free)
    rows = {path: place for place, path in enumerate(coupling.paths)}
    if axes is None:
        longest = max(map(len, coupling.paths), default=0)
        size = (1.4 + 0.085 * longest + 0.34 * len(groups), 0.9 + 0.24 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(
            "above: units of a group\nmark: axis that holds them (filled: they may go)",
            x=0.01, ha="left", fontsize=8,
        )  # fmt: skip
        axes = figure.subplots()
    else:
        figure = axes.figure
    for place in range(0, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
    for column, group in enumerate(groups):
        places = [rows[path] for path, _ in group.members]
        colour = "#0072B2" if column < free else "0.55"
        axes.plot([column] * 2, [min(places), max(places)], color=colour, linewidth=1, zorder=1)
        for path, axis in group.members:
            face = colour if column < free else "white"
            axes.scatter(column, rows[path], s=90, c=face, edgecolors=colour, zorder=2)
            axes.text(
                column, rows[path], f"{axis}", ha="center", va="center_baseline", fontsize=7,
                color="white" if column < free else "0.35", zorder=3,
            )  # fmt: skip
    shapes = [" x ".join(map(str, node.aval.shape)) for node in coupling.leaves]
    labels = [f"{path}  {shape}" for path, shape in zip(coupling.paths, shapes, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xticks(range(len(groups)), [group.count for group in groups], fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure
