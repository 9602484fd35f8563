"""Pruning: scores, schedules, allocations, structures, regrowth, and the transformation."""

from adaptivenet.moments import reset_moments
from adaptivenet.pruning import condensed, layerwise, lottery, reparametrise, signals
from adaptivenet.pruning.activations import input_grams, input_norms, wanda
from adaptivenet.pruning.allocations import Allocation, Fixed, Global, PerPath, Uniform
from adaptivenet.pruning.budgets import Budget
from adaptivenet.pruning.combinators import lamp, mix, normalise, product
from adaptivenet.pruning.controller import AutoState, auto
from adaptivenet.pruning.coupled import Coupled
from adaptivenet.pruning.coupling import Coupling, Group, couple
from adaptivenet.pruning.cycles import ac_dc, cyclic, rates, sawtooth
from adaptivenet.pruning.demands import AtLeast, Demand, OfAlive, Sparsity
from adaptivenet.pruning.effective import effective_masks
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from adaptivenet.pruning.event import Outcome, cut_and_wake
from adaptivenet.pruning.initial import fixed, grasp, snip, synflow
from adaptivenet.pruning.linkprediction import ByLinkPrediction, by_link_prediction, link_scores
from adaptivenet.pruning.masks import apply_mask, full_mask, landing
from adaptivenet.pruning.record import PruneState, Record, layered
from adaptivenet.pruning.regrowth import (
    AtRandom,
    ByGradient,
    ByMomentum,
    Everything,
    Homeostatic,
    Regrowth,
    at_random,
    by_gradient,
    by_momentum,
    cosine_fraction,
    everything,
    homeostatic,
)
from adaptivenet.pruning.rowwise import FanIn, NofM
from adaptivenet.pruning.saliency import (
    fisher_tempered,
    movement,
    obd,
    ordinal,
    saliency,
    snr,
    taylor,
)
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
from adaptivenet.pruning.shrink import Costs, ShrinkReport, Shrunk, shrink
from adaptivenet.pruning.signals import SignalState, with_signals
from adaptivenet.pruning.structures import Block, ByPath, Element, Structure, Unit
from adaptivenet.pruning.transformation import Pruner, mask, prune, record, revise
from adaptivenet.pruning.units import (
    choose_units,
    removable_groups,
    unit_mask,
    unit_scores,
    zero_units,
)

__all__ = [
    "Allocation",
    "AtLeast",
    "AtRandom",
    "AutoState",
    "Block",
    "Budget",
    "ByGradient",
    "ByLinkPrediction",
    "ByMomentum",
    "ByPath",
    "Costs",
    "Coupled",
    "Coupling",
    "Demand",
    "Element",
    "ErdosRenyiKernel",
    "Everything",
    "FanIn",
    "Fixed",
    "Global",
    "Group",
    "Homeostatic",
    "NofM",
    "OfAlive",
    "Outcome",
    "PerPath",
    "PruneState",
    "Pruner",
    "Record",
    "Regrowth",
    "Schedule",
    "Score",
    "ShrinkReport",
    "Shrunk",
    "SignalState",
    "Sparsity",
    "Structure",
    "Uniform",
    "Unit",
    "ac_dc",
    "apply_mask",
    "as_schedule",
    "at_random",
    "auto",
    "by_gradient",
    "by_link_prediction",
    "by_momentum",
    "choose_units",
    "condensed",
    "constant",
    "cosine_fraction",
    "couple",
    "cubic",
    "cut_and_wake",
    "cyclic",
    "effective_masks",
    "everything",
    "fisher_tempered",
    "fixed",
    "full_mask",
    "grasp",
    "homeostatic",
    "input_grams",
    "input_norms",
    "lamp",
    "landing",
    "layered",
    "layerwise",
    "linear",
    "link_scores",
    "lottery",
    "magnitude",
    "mask",
    "mix",
    "movement",
    "normalise",
    "obd",
    "one_shot",
    "ordinal",
    "percentile",
    "polynomial",
    "product",
    "prune",
    "random",
    "rates",
    "record",
    "removable_groups",
    "reparametrise",
    "reset_moments",
    "revise",
    "saliency",
    "sawtooth",
    "shrink",
    "signals",
    "snip",
    "snr",
    "synflow",
    "taylor",
    "threshold",
    "unit_mask",
    "unit_scores",
    "wanda",
    "with_signals",
    "zero_units",
]
