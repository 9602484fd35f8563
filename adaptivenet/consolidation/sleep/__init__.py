"""Sleep: what consolidates memories offline, and a phase made of it."""

from adaptivenet.consolidation.sleep import buffer, generative, mixtures, noise, rehearsal, vae
from adaptivenet.consolidation.sleep.buffer import Buffer, Drawn
from adaptivenet.consolidation.sleep.downscaling import downscale, homeostatic, norms
from adaptivenet.consolidation.sleep.generative import balanced, replayed
from adaptivenet.consolidation.sleep.mixtures import Mixtures
from adaptivenet.consolidation.sleep.noise import (
    SleepReport,
    layer_scales,
    sleep_replay,
    windows,
)
from adaptivenet.consolidation.sleep.phase import Part, Replayed, keyless, replay, sleep
from adaptivenet.consolidation.sleep.reactivation import (
    prune_unused,
    pruning_of_unused,
    reactivation,
    reactivations,
)
from adaptivenet.consolidation.sleep.rehearsal import (
    AgemState,
    Remembered,
    agem,
    cross_entropy,
    der_loss,
    distillation,
    mix,
    project,
)

__all__ = [
    "AgemState",
    "Buffer",
    "Drawn",
    "Mixtures",
    "Part",
    "Remembered",
    "Replayed",
    "SleepReport",
    "agem",
    "balanced",
    "buffer",
    "cross_entropy",
    "der_loss",
    "distillation",
    "downscale",
    "generative",
    "homeostatic",
    "keyless",
    "layer_scales",
    "mix",
    "mixtures",
    "noise",
    "norms",
    "project",
    "prune_unused",
    "pruning_of_unused",
    "reactivation",
    "reactivations",
    "rehearsal",
    "replay",
    "replayed",
    "sleep",
    "sleep_replay",
    "vae",
    "windows",
]
