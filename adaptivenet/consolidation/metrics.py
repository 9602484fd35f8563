"""How well a sequence of tasks was learnt: kept, forgotten, and what can still be learnt.

Most functions read the accuracy matrix ``R[t, k]``: the accuracy on task k after task t was learnt,
nan where it was not measured. It has the shape [T, T], or [T, K] where more tasks are tested than
were learnt (or fewer: then what needs the others says so); leading axes, such as seeds, are kept.
These functions are numpy in float64, for numbers that were measured: outside of jit. Accuracies may
be shares or percent, and whatever else a matrix holds (a calibration error, of
:func:`calibration_matrix`) can be averaged in the same way.

A rule that forgets on purpose looks good on the tasks learnt last and bad on all, and one that
learns nothing new looks the other way round: report :func:`average_accuracy` and
:func:`last_five` together, as :func:`summary` does.

Others look within a task (:func:`stability_gap`, :func:`plasticity`) and into the network
(:func:`dormant_fraction`, :func:`effective_rank`); those on activations and features are jnp, safe
under jit and vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptivenet.consolidation._metric_curves import (
    Gap,
    measured,
    min_accuracy,
    plasticity,
    plasticity_in_steps,
    stability_gap,
    steps_to,
    windowed_forgetting,
    worst_case_accuracy,
)
from adaptivenet.consolidation._metric_network import (
    dormant_fraction,
    dormant_score,
    effective_rank,
    srank,
)
from adaptivenet.posterior.metrics import expected_calibration_error

Floats = np.ndarray | np.floating

__all__ = [
    "Gap",
    "average_accuracy",
    "average_curve",
    "backward_transfer",
    "calibration_matrix",
    "dormant_fraction",
    "dormant_score",
    "effective_rank",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "last_five",
    "last_five_curve",
    "learning_accuracy",
    "min_accuracy",
    "plasticity",
    "plasticity_in_steps",
    "srank",
    "stability_gap",
    "steps_to",
    "summary",
    "windowed_forgetting",
    "worst_case_accuracy",
]

_FIVE = 5


def average_accuracy(matrix: Any) -> Floats:
    """Mean accuracy on all tasks that were learnt, after the last of them: ACC.

    Args:
      matrix: [..., T, K].

    Returns:
      [...], the mean of the first T columns of the last row.

    Raises:
      ValueError: the matrix has another shape, or an entry that is needed is missing.

    References:
      Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017,
      equation 2.

    >>> float(average_accuracy([[1.0, np.nan], [0.5, 1.0]]))
    0.75
    """
    table = _learnt(matrix)
    return np.mean(_whole(table[..., -1, :], "after the last task", row=len_tasks(table) - 1), -1)


def last_five(matrix: Any, *, tasks: int = _FIVE) -> Floats:
    """Mean accuracy on the five tasks learnt last, the newest included.

    Args:
      matrix: [..., T, K].
      tasks: how many instead of five; all where there are fewer.

    Returns:
      [...].

    Raises:
      ValueError: the matrix has another shape, an entry that is needed is missing, or ``tasks``
        is below 1.

    >>> float(last_five([[1.0, np.nan, np.nan], [0.5, 1.0, np.nan], [0.0, 0.5, 1.0]], tasks=2))
    0.75
    """
    table = _learnt(matrix)
    first = max(len_tasks(table) - _at_least_one(tasks), 0)
    row = len_tasks(table) - 1
    return np.mean(_whole(table[..., -1, first:], "after the last task", row=row, column=first), -1)


def average_curve(matrix: Any) -> np.ndarray:
    """:func:`average_accuracy` after every task: over the tasks learnt until then.

    Args:
      matrix: [..., T, K].

    Returns:
      [..., T]; nan after tasks where a learnt one was not measured.

    Raises:
      ValueError: the matrix has another shape.

    >>> average_curve([[1.0, np.nan], [0.5, 1.0]]).tolist()
    [1.0, 0.75]
    """
    return last_five_curve(matrix, tasks=len_tasks(_learnt(matrix)))


def last_five_curve(matrix: Any, *, tasks: int = _FIVE) -> np.ndarray:
    """:func:`last_five` after every task; after few tasks the mean is over these.

    Args:
      matrix: [..., T, K].
      tasks: how many instead of five.

    Returns:
      [..., T]; nan after tasks where one of them was not measured.

    Raises:
      ValueError: the matrix has another shape, or ``tasks`` is below 1.

    >>> last_five_curve([[1.0, 0.0], [0.5, 1.0]], tasks=1).tolist()
    [1.0, 1.0]
    """
    table, tasks = _learnt(matrix), _at_least_one(tasks)
    rows = range(len_tasks(table))
    means = [np.mean(table[..., t, max(t + 1 - tasks, 0) : t + 1], axis=-1) for t in rows]
    return np.stack(means, axis=-1)


def forgetting(matrix: Any) -> Floats:
    """Mean over earlier tasks of the best accuracy ever had before the end, minus the final one.

    Args:
      matrix: [..., T, K] with T >= 2; the lower triangle is needed. What was measured above it
        (before a task was learnt) takes part in the best, as in the paper.

    Returns:
      [...]; negative where tasks went on improving.

    Raises:
      ValueError: the matrix has another shape, or an entry that is needed is missing.

    References:
      Chaudhry et al., "Riemannian walk for incremental learning: understanding forgetting and
      intransigence", ECCV 2018, arXiv:1801.10112, equation 3: the forgetting measure.

    >>> float(forgetting([[0.75, np.nan, np.nan], [1.0, 1.0, np.nan], [0.5, 0.75, 1.0]]))
    0.375
    """
    table = _lower(matrix, "forgetting")
    before = np.where(np.isnan(table[..., :-1, :-1]), -np.inf, table[..., :-1, :-1])
    return np.mean(before.max(axis=-2) - table[..., -1, :-1], axis=-1)


def backward_transfer(matrix: Any) -> Floats:
    """BWT: how much the accuracy on earlier tasks changed since each was learnt.

    Args:
      matrix: [..., T, K] with T >= 2; the diagonal and the last row are needed.

    Returns:
      [...]; negative where tasks were forgotten.

    Raises:
      ValueError: the matrix has another shape, or an entry that is needed is missing.

    References:
      Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017,
      equation 3.

    >>> float(backward_transfer([[1.0, np.nan], [0.25, 1.0]]))
    -0.75
    """
    table = _several(_learnt(matrix), "backward transfer")
    last = _whole(table[..., -1, :-1], "after the last task", row=len_tasks(table) - 1)
    return np.mean(last - _diagonal(table)[..., :-1], axis=-1)


def forward_transfer(matrix: Any, baseline: Any) -> Floats:
    """FWT: how much better than an untrained network a task is done just before it is learnt.

    Args:
      matrix: [..., T, K] with T >= 2; the first diagonal above the main one is needed.
      baseline: [T] or [..., T] (or longer), accuracies of networks that were only initialised.

    Returns:
      [...].

    Raises:
      ValueError: the matrix or the baseline has another shape, or an entry that is needed is
        missing.

    References:
      Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017,
      equation 4.

    >>> float(forward_transfer([[1.0, 0.5], [1.0, 1.0]], [0.1, 0.25]))
    0.25
    """
    table = _several(_learnt(matrix), "forward transfer")
    count = len_tasks(table)
    base = _per_task(baseline, count, "baseline")[..., 1:]
    _whole(base, "in baseline=, the accuracies of an untrained network", column=1)
    above = np.diagonal(table, offset=1, axis1=-2, axis2=-1)
    if np.isnan(above).any():
        k = int(np.argwhere(np.isnan(above))[0][-1]) + 1
        raise ValueError(
            f"forward transfer needs R[{k - 1}, {k}], the accuracy on task {k} before it is "
            "learnt, which was not measured (nan): test every task one task early."
        )
    return np.mean(above - base, axis=-1)


def learning_accuracy(matrix: Any) -> Floats:
    """LA: mean accuracy on each task right after it was learnt, the mean of the diagonal.

    Args:
      matrix: [..., T, K].

    Returns:
      [...].

    Raises:
      ValueError: the matrix has another shape, or an entry that is needed is missing.

    References:
      Riemer et al., "Learning to learn without forgetting by maximizing transfer and minimizing
      interference", ICLR 2019.

    >>> float(learning_accuracy([[1.0, np.nan], [0.0, 0.5]]))
    0.75
    """
    return np.mean(_diagonal(_learnt(matrix)), axis=-1)


def intransigence(matrix: Any, reference: Any) -> np.ndarray:
    """How far the accuracy right after learning stays below that of a reference.

    Args:
      matrix: [..., T, K]; the diagonal is needed.
      reference: [T] or [..., T] (or longer), accuracies on each task of networks that nothing held
        back: in the paper, trained on all tasks up to it at once; a network of its own for each
        task is usual, too.

    Returns:
      [..., T]; negative where earlier tasks helped. (The paper reports the last.)

    Raises:
      ValueError: the matrix or the reference has another shape, or an entry is missing.

    References:
      Chaudhry et al., "Riemannian walk for incremental learning: understanding forgetting and
      intransigence", ECCV 2018, arXiv:1801.10112, equation 4: the intransigence measure.

    >>> intransigence([[0.75, np.nan], [0.0, 0.5]], [1.0, 1.0]).tolist()
    [0.25, 0.5]
    """
    diagonal = _diagonal(_learnt(matrix))
    best = _per_task(reference, diagonal.shape[-1], "reference")
    return _whole(best, "in reference=") - diagonal


def summary(matrix: Any, *, baseline: Any = None, reference: Any = None) -> dict[str, Any]:
    """The numbers to print of one matrix (or of several, with leading axes).

    Args:
      matrix: [..., T, K].
      baseline: as for :func:`forward_transfer`; without one it is left out.
      reference: as for :func:`intransigence`; without one it is left out.

    Returns:
      ``tasks`` (T) and, as floats (arrays where there are leading axes), ``average_accuracy``,
      ``last_five``, ``learning_accuracy``, ``backward_transfer``, ``forgetting``, and where asked
      for ``forward_transfer`` and ``intransigence`` (mean over tasks). Of the last four to six what
      needs entries that were not measured, or two tasks where there is one, is nan.

    Raises:
      ValueError: the matrix has another shape, or its last row was not measured.

    >>> summary([[1.0, np.nan], [0.5, 1.0]])["forgetting"]
    0.5
    """
    table = _learnt(matrix)
    missing = np.full(table.shape[:-2], np.nan)

    def attempt(function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except _MissingError:
            return missing

    found: dict[str, Any] = {
        "average_accuracy": average_accuracy(table),
        "last_five": last_five(table),
        "learning_accuracy": attempt(learning_accuracy, table),
        "backward_transfer": attempt(backward_transfer, table),
        "forgetting": attempt(forgetting, table),
    }
    if baseline is not None:
        found["forward_transfer"] = attempt(forward_transfer, table, baseline)
    if reference is not None:
        found["intransigence"] = attempt(lambda *a: intransigence(*a).mean(-1), table, reference)
    numbers = {name: float(x) if np.ndim(x) == 0 else x for name, x in found.items()}
    return {"tasks": len_tasks(table), **numbers}


def calibration_matrix(
    predictions: Sequence[Sequence[Any]], labels: Sequence[Any], **options: Any
) -> np.ndarray:
    """Calibration over time: the expected calibration error on each task after each task.

    Args:
      predictions: ``predictions[t][k]``: probabilities [n, classes] on task k after task t, or
        None where there are none.
      labels: integers [n] for each of the K tasks.
      **options: of :func:`adaptivenet.posterior.metrics.expected_calibration_error`:
        ``from_logits``, ``bins``, ``binning``.

    Returns:
      float64 [T, K], nan where nothing was predicted; :func:`average_curve` and the like read it.

    Raises:
      ValueError: a row has another length than ``labels``, or predictions are malformed.

    >>> found = calibration_matrix([[[[0.25, 0.75]], None]], [[1], [0]])
    >>> found.tolist()
    [[0.25, nan]]
    """
    found = np.full((len(predictions), len(labels)), np.nan)
    for t, row in enumerate(predictions):
        if len(row) != len(labels):
            raise ValueError(
                f"predictions[{t}] has {len(row)} entries beside labels of {len(labels)} tasks; "
                "give None for tasks that were not tested."
            )
        for k, each in enumerate(row):
            if each is not None:
                values = jnp.asarray(each), jnp.asarray(labels[k])
                found[t, k] = float(expected_calibration_error(*values, **options))
    return found


class _MissingError(ValueError):
    """An entry that is needed was not measured, or there are too few tasks."""


def len_tasks(table: np.ndarray) -> int:
    """How many tasks were learnt."""
    return table.shape[-2]


def _learnt(matrix: Any) -> np.ndarray:
    """[..., T, T], the tasks that were learnt; float64."""
    table = measured(matrix, "the accuracy matrix")
    if table.ndim < 2 or 0 in table.shape[-2:]:
        raise ValueError(
            f"the accuracy matrix must have shape [T, K] (tasks learnt, tasks tested), possibly "
            f"with leading axes, not {table.shape}."
        )
    if np.isinf(table).any():
        raise ValueError("the accuracy matrix holds inf; use nan for what was not measured.")
    rows, columns = table.shape[-2:]
    if columns < rows:  # tasks that were never tested are missing entries
        width = [(0, 0)] * (table.ndim - 1) + [(0, rows - columns)]
        table = np.pad(table, width, constant_values=np.nan)
    return table[..., :rows]


def _several(table: np.ndarray, what: str) -> np.ndarray:
    if len_tasks(table) < 2:
        raise _MissingError(f"{what} needs two tasks or more, and there is one.")
    return table


def _lower(matrix: Any, what: str) -> np.ndarray:
    table = _several(_learnt(matrix), what)
    below = np.tril(np.ones(table.shape[-2:], bool))
    gone = np.argwhere(np.isnan(table) & below)
    if len(gone):
        t, k = gone[0][-2:]
        raise _MissingError(
            f"{what} needs R[{t}, {k}], the accuracy on task {k} after task {t}, which was not "
            f"measured (nan; {len(gone)} such entries): test all tasks learnt so far after each."
        )
    return table


def _diagonal(table: np.ndarray) -> np.ndarray:
    diagonal = np.diagonal(table, axis1=-2, axis2=-1)
    return _whole(diagonal, "right after each was learnt")


def _whole(values: np.ndarray, when: str, *, row: int | None = None, column: int = 0) -> np.ndarray:
    gone = np.argwhere(np.isnan(values))
    if len(gone):
        k = int(gone[0][-1]) + column
        where = "" if row is None else f" (R[{row}, {k}])"
        raise _MissingError(f"the accuracy on task {k} {when}{where} was not measured: it is nan.")
    return values


def _per_task(values: Any, count: int, name: str) -> np.ndarray:
    array = measured(values, f"{name}=")
    if array.ndim < 1 or array.shape[-1] < count:
        raise ValueError(f"{name}= needs a number for each of {count} tasks, not {array.shape}.")
    return array[..., :count]


def _at_least_one(tasks: int) -> int:
    if isinstance(tasks, bool) or not isinstance(tasks, int | np.integer) or tasks < 1:
        raise ValueError(f"tasks must be a number of tasks >= 1, not {tasks!r}.")
    return int(tasks)
