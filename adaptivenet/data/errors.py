"""The errors of the data sets: each names the set or the file and says what to do."""

from __future__ import annotations

__all__ = [
    "CorruptDataError",
    "DataError",
    "DownloadError",
    "MissingDataError",
    "UnknownDatasetError",
]


class DataError(Exception):
    """Base of every error of `adaptivenet.data`.

    >>> issubclass(CorruptDataError, DataError)
    True
    """


class UnknownDatasetError(DataError):
    """The name asked for is not in the table of data sets.

    >>> from adaptivenet.data import load
    >>> try:
    ...     load("minst")
    ... except UnknownDatasetError as error:
    ...     print(str(error).splitlines()[0])
    there is no data set called 'minst'; did you mean 'mnist'?
    """


class MissingDataError(DataError):
    """A file of the data set is in none of the folders and could not be had.

    >>> issubclass(MissingDataError, DataError)
    True
    """


class DownloadError(MissingDataError):
    """Every mirror failed, or what arrived was not the pinned content; nothing was kept.

    >>> issubclass(DownloadError, MissingDataError)
    True
    """


class CorruptDataError(DataError):
    """A file is truncated, altered, of the wrong format or that of another set.

    >>> from adaptivenet.data import decode_idx
    >>> try:
    ...     decode_idx(b"not an idx file", "labels.gz")
    ... except CorruptDataError as error:
    ...     print(error)
    labels.gz: not an idx file (the first two bytes are 0x6e6f, 0x0000 expected)
    """
