"""Null models: what a claim of emergence must beat, as transformations and data maps."""

from adaptivenet.emergence.nulls.controls import (
    matched_decay,
    scale,
    soft_threshold,
    soft_thresholded,
    uniform_decay,
)
from adaptivenet.emergence.nulls.datasets import shuffle_labels, shuffle_pixels
from adaptivenet.emergence.nulls.graphs import Rewired, rewire
from adaptivenet.emergence.nulls.masks import random_mask, truncation
from adaptivenet.emergence.nulls.rules import no_learning, shadow, shuffled

__all__ = [
    "Rewired",
    "matched_decay",
    "no_learning",
    "random_mask",
    "rewire",
    "scale",
    "shadow",
    "shuffle_labels",
    "shuffle_pixels",
    "shuffled",
    "soft_threshold",
    "soft_thresholded",
    "truncation",
    "uniform_decay",
]
