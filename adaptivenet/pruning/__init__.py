"""Pruning: scores, schedules, allocations, structures, regrowth, and the transformation."""

from adaptivenet.pruning.allocations import Allocation, Global, Uniform
from adaptivenet.pruning.controller import AutoState, auto
from adaptivenet.pruning.demands import AtLeast, Demand, OfAlive, Sparsity
from adaptivenet.pruning.effective import effective_masks
from adaptivenet.pruning.event import Outcome, cut_and_wake
from adaptivenet.pruning.masks import apply_mask, full_mask, landing
from adaptivenet.pruning.record import Record
from adaptivenet.pruning.regrowth import AtRandom, Everything, Regrowth, at_random, everything
from adaptivenet.pruning.schedules import (
    Schedule,
    as_schedule,
    constant,
    cubic,
    linear,
    one_shot,
    percentile,
    polynomial,
    threshold,
)
from adaptivenet.pruning.scores import Score, magnitude, random
from adaptivenet.pruning.structures import Element, Structure
from adaptivenet.pruning.transformation import Pruner, PruneState, mask, prune, record, revise

__all__ = [
    "Allocation",
    "AtLeast",
    "AtRandom",
    "AutoState",
    "Demand",
    "Element",
    "Everything",
    "Global",
    "OfAlive",
    "Outcome",
    "PruneState",
    "Pruner",
    "Record",
    "Regrowth",
    "Schedule",
    "Score",
    "Sparsity",
    "Structure",
    "Uniform",
    "apply_mask",
    "as_schedule",
    "at_random",
    "auto",
    "constant",
    "cubic",
    "cut_and_wake",
    "effective_masks",
    "everything",
    "full_mask",
    "landing",
    "linear",
    "magnitude",
    "mask",
    "one_shot",
    "percentile",
    "polynomial",
    "prune",
    "random",
    "record",
    "revise",
    "threshold",
]
