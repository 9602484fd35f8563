"""Memory consolidation: rules that learn the next task without forgetting the last."""

from __future__ import annotations

from adaptivenet.consolidation import (
    changepoint,
    drift,
    functional,
    hat,
    lifelong,
    memory_aware,
    metrics,
    ownership,
    packnet,
    piggyback,
    sleep,
    variational,
)
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.cascade import CascadeState, cascade, diffuse, memory_trace
from adaptivenet.consolidation.elastic import (
    ElasticState,
    ProximalState,
    RootMeanSquare,
    SeparateElasticState,
    elastic,
    merge,
    penalty,
    proximal,
)
from adaptivenet.consolidation.kronecker_elastic import (
    StructuredState,
    structured_conditional,
    structured_elastic,
    structured_penalty,
    structured_proximal,
)
from adaptivenet.consolidation.metaplastic import binarize, by_precision, metaplastic
from adaptivenet.consolidation.path_integral import PathIntegralState, path_integral
from adaptivenet.posterior.mesu import bgd, mesu

__all__ = [
    "CascadeState",
    "ElasticState",
    "PathIntegralState",
    "ProximalState",
    "RootMeanSquare",
    "SeparateElasticState",
    "StructuredState",
    "bgd",
    "binarize",
    "by_precision",
    "cascade",
    "changepoint",
    "consolidate",
    "diffuse",
    "drift",
    "elastic",
    "functional",
    "hat",
    "lifelong",
    "memory_aware",
    "memory_trace",
    "merge",
    "mesu",
    "metaplastic",
    "metrics",
    "ownership",
    "packnet",
    "path_integral",
    "penalty",
    "piggyback",
    "proximal",
    "sleep",
    "structured_conditional",
    "structured_elastic",
    "structured_penalty",
    "structured_proximal",
    "variational",
]
