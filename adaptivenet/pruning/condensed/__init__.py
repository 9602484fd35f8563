"""Sparse layers: pruned kernels stored and multiplied without zeros, and which of them pays."""

from adaptivenet.pruning.condensed.bcsr import BCSRLayer, pack_bcsr
from adaptivenet.pruning.condensed.blocks import BlockLayer, pack_blocks
from adaptivenet.pruning.condensed.choice import (
    Choice,
    Measure,
    Measured,
    choose,
    interleaved,
    propose,
)
from adaptivenet.pruning.condensed.layers import (
    DenseLayer,
    FanInLayer,
    Layer,
    apply,
    pack_dense,
    pack_fan_in,
    stored_bytes,
    unpack,
)
from adaptivenet.pruning.condensed.nofm import NofMLayer, pack_nofm

__all__ = [
    "BCSRLayer",
    "BlockLayer",
    "Choice",
    "DenseLayer",
    "FanInLayer",
    "Layer",
    "Measure",
    "Measured",
    "NofMLayer",
    "apply",
    "choose",
    "interleaved",
    "pack_bcsr",
    "pack_blocks",
    "pack_dense",
    "pack_fan_in",
    "pack_nofm",
    "propose",
    "stored_bytes",
    "unpack",
]
