"""Training: compiled epochs, populations, records, checkpoints that resume bit for bit, configs."""

from __future__ import annotations

from adaptivenet.training.checkpoint import CheckpointError, Checkpoints
from adaptivenet.training.config import Range, config_hash, load_config, save_config
from adaptivenet.training.epoch import make_epoch, make_evaluate
from adaptivenet.training.interrupt import Interrupted
from adaptivenet.training.loop import Best, Fit, fit
from adaptivenet.training.mesh import data_mesh, shard_population
from adaptivenet.training.population import default_method, over_population
from adaptivenet.training.progress import Progress
from adaptivenet.training.state import TrainState, init_state
from adaptivenet.training.stopping import EarlyStopping, StoppingState
from adaptivenet.training.tracking import JsonlTracker, Tracker, read_jsonl

__all__ = [
    "Best",
    "CheckpointError",
    "Checkpoints",
    "EarlyStopping",
    "Fit",
    "Interrupted",
    "JsonlTracker",
    "Progress",
    "Range",
    "StoppingState",
    "Tracker",
    "TrainState",
    "config_hash",
    "data_mesh",
    "default_method",
    "fit",
    "init_state",
    "load_config",
    "make_epoch",
    "make_evaluate",
    "over_population",
    "read_jsonl",
    "save_config",
    "shard_population",
]
