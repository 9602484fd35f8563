"""The figure of the study of continual learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from research.study import Outcome

if TYPE_CHECKING:
    from research.continual import Config


def draw(config: Config, outcome: Outcome) -> Any:
    """Accuracy over tasks, what is left of each task at the end, and the matrix of some rows.

    Args:
      config: the study's.
      outcome: curves by row.

    Returns:
      A figure.
    """
    import matplotlib.pyplot as plt

    rows = [row for row in config.rows if f"average/{row}" in outcome.curves]
    shown = [row for row in rows if f"matrix/{row}" in outcome.curves]
    best = sorted(shown, key=lambda row: -np.mean(outcome.metrics[f"average/{row}"]))[:2]
    figure, axes = plt.subplots(2, 3)
    numbers = 1 + np.arange(config.tasks)
    panels = (
        ("average", "all tasks so far", "tasks learnt", rows),
        ("last5", "last five tasks", "tasks learnt", rows),
        ("learnt", "each task, just learnt", "task", rows),
        ("last", "each task, after all", "task", list(config.rows)),
    )
    for ax, (name, title, label, among) in zip(axes.flat, panels, strict=False):
        for place, row in enumerate(among):
            values = 100 * outcome.curves[f"{name}/{row}"]
            style = ("-", "--", ":")[place // 7 % 3]
            ax.plot(numbers, values.mean(0), style, label=row, linewidth=1)
        ax.set(title=title, xlabel=label, ylabel="accuracy in %")
    axes[1, 0].legend(fontsize=5, ncols=2, loc="best")
    for ax, row in zip((axes[1, 1], axes[1, 2]), best, strict=False):
        matrix = 100 * outcome.curves[f"matrix/{row}"].mean(0)
        matrix = matrix.reshape(config.tasks, config.tasks)
        image = ax.imshow(np.where(matrix < 0, np.nan, matrix), vmax=100, cmap="viridis")
        figure.colorbar(image, ax=ax, shrink=0.8)
        ax.set(title=row, xlabel="tested on task", ylabel="after task")
    for ax in list(axes.flat)[len(panels) + len(best) :]:
        ax.axis("off")
    return figure
