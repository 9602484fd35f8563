"""Emergence: what a network does while it compresses itself, and whether a null does it as well."""

from adaptivenet.emergence import nulls, statistics, trajectories, verdict

__all__ = ["nulls", "statistics", "trajectories", "verdict"]
