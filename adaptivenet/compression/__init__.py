"""Compression: what a network weighs once it is a file."""

from adaptivenet.compression.pack import PackError, load_packed, pack, save_packed, unpack

__all__ = ["PackError", "load_packed", "pack", "save_packed", "unpack"]
