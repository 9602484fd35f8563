"""Networks to compress: Flax NNX modules around pure functions on plain parameter dicts."""

from __future__ import annotations

from adaptivenet.models.functional import functional
from adaptivenet.models.mlp import MLP, mlp, mlp_init

__all__ = ["MLP", "functional", "mlp", "mlp_init"]
