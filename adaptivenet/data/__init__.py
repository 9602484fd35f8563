"""Data sets with pinned content: `load(name)`, and pure functions that prepare them."""

from adaptivenet.data.dataset import (
    Dataset,
    Examples,
    flatten,
    map_inputs,
    normalise,
    split,
    standardise,
)
from adaptivenet.data.digest import digest_arrays, digest_bytes
from adaptivenet.data.ecg import Electrocardiogram
from adaptivenet.data.errors import (
    CorruptDataError,
    DataError,
    DownloadError,
    MissingDataError,
    UnknownDatasetError,
)
from adaptivenet.data.idx import decode_idx, encode_idx
from adaptivenet.data.loaders import load
from adaptivenet.data.mnist1d import generate_mnist1d
from adaptivenet.data.ragged import Events, EventStream, Waveforms
from adaptivenet.data.registry import Entry, File, describe, names
from adaptivenet.data.storage import cache_folder, fetch, locate, verify
from adaptivenet.data.text import Text, split_text

__all__ = [
    "CorruptDataError",
    "DataError",
    "Dataset",
    "DownloadError",
    "Electrocardiogram",
    "Entry",
    "EventStream",
    "Events",
    "Examples",
    "File",
    "MissingDataError",
    "Text",
    "UnknownDatasetError",
    "Waveforms",
    "cache_folder",
    "decode_idx",
    "describe",
    "digest_arrays",
    "digest_bytes",
    "encode_idx",
    "fetch",
    "flatten",
    "generate_mnist1d",
    "load",
    "locate",
    "map_inputs",
    "names",
    "normalise",
    "split",
    "split_text",
    "standardise",
    "verify",
]
