"""Networks to compress: Flax NNX modules around pure functions on plain parameter dicts."""

from __future__ import annotations

from adaptivenet.models.drawing import draw_coupling
from adaptivenet.models.functional import functional
from adaptivenet.models.lenet import LENET_300_100, LeNet5, lenet5, lenet5_init
from adaptivenet.models.mlp import MLP, mlp, mlp_init
from adaptivenet.models.recurrent import lstm, lstm_init
from adaptivenet.models.resnet import resnet, resnet_init
from adaptivenet.models.shrinking import ShrunkModule, TracedModule, shrink
from adaptivenet.models.transformer import transformer, transformer_init

__all__ = [
    "LENET_300_100",
    "MLP",
    "LeNet5",
    "ShrunkModule",
    "TracedModule",
    "draw_coupling",
    "functional",
    "lenet5",
    "lenet5_init",
    "lstm",
    "lstm_init",
    "mlp",
    "mlp_init",
    "resnet",
    "resnet_init",
    "shrink",
    "transformer",
    "transformer_init",
]
