"""Statistics over seeds: comparisons, intervals, modality, hazard, survival.

Every wrapper takes plain arrays, refuses missing values, and returns a NamedTuple of plain numbers
and arrays. ``research/controls.py`` measures the power and the size of each.
"""

from adaptivenet.emergence.statistics.comparisons import (
    Alternative,
    Comparison,
    Equivalence,
    Test,
    Trend,
    equivalence,
    holm,
    page_trend,
    paired,
)
from adaptivenet.emergence.statistics.hazard import Hazard, hazard
from adaptivenet.emergence.statistics.intervals import Interval, bca, student
from adaptivenet.emergence.statistics.modality import Dip, Mixture, dip, mixture, modes
from adaptivenet.emergence.statistics.survival import (
    LogRank,
    Survival,
    kaplan_meier,
    log_rank,
    restricted_mean,
)

__all__ = [
    "Alternative",
    "Comparison",
    "Dip",
    "Equivalence",
    "Hazard",
    "Interval",
    "LogRank",
    "Mixture",
    "Survival",
    "Test",
    "Trend",
    "bca",
    "dip",
    "equivalence",
    "hazard",
    "holm",
    "kaplan_meier",
    "log_rank",
    "mixture",
    "modes",
    "page_trend",
    "paired",
    "restricted_mean",
    "student",
]
