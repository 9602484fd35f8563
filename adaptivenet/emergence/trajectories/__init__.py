"""Trajectories: what became of every synapse, as data that a scan stacks.

A :class:`Recorder` says which synapses to follow (all, or a seeded sample) and turns each mask into
a :class:`Frame`; frames stacked over rounds make a :class:`Trajectory`, which saves compactly and
reads back as arrays, a data frame or retention spells. A round is one call of ``update``: an
event, a chunk of steps, whatever the study counts.

What a mask does not show is not seen: a synapse that is cut and woken within one event is alive in
the masks before and after it, and neither died nor was born.
"""

from adaptivenet.emergence.trajectories.history import (
    Spells,
    Trajectory,
    TrajectoryError,
    load,
)
from adaptivenet.emergence.trajectories.recorder import Frame, Recorder, RecorderState

__all__ = ["Frame", "Recorder", "RecorderState", "Spells", "Trajectory", "TrajectoryError", "load"]
