"""Find the files of a data set, verify them, and fetch those that are missing."""

from __future__ import annotations

import gzip
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from adaptivenet.data.content import Content, check
from adaptivenet.data.errors import CorruptDataError, DataError, DownloadError, MissingDataError
from adaptivenet.data.registry import Entry, File, describe

__all__ = ["cache_folder", "fetch", "locate", "verify"]

DATA_VARIABLE = "ADAPTIVENET_DATA"
CACHE_VARIABLE = "ADAPTIVENET_CACHE"
_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    label: str
    folder: Path


def cache_folder() -> Path:
    """Return the folder for downloads: ADAPTIVENET_CACHE, else the XDG cache folder.

    Returns:
        The folder; it need not exist yet.

    >>> isinstance(cache_folder(), Path)
    True
    """
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adaptivenet"


def _places(folder: str | os.PathLike[str] | None) -> list[_Place]:
    places = []
    if folder is not None:
        places.append(_Place("folder=", Path(folder).expanduser()))
    data = os.environ.get(DATA_VARIABLE)
    if data:
        path = Path(data).expanduser()
        if not path.is_dir():
            raise DataError(
                f"{DATA_VARIABLE} is set to {data!r}, which is not a folder: "
                "set it to the folder that holds the data sets, or unset it"
            )
        places.append(_Place(DATA_VARIABLE, path))
    places.append(_Place("cache", cache_folder()))
    return places


def _candidates(entry: Entry, file: File, place: Path) -> list[Path]:
    stored = [file.stored] if file.kind == "npz" else [file.stored, file.name]
    return [place / entry.folder / name for name in stored]


def _find(entry: Entry, file: File, folder: str | os.PathLike[str] | None) -> Path | None:
    for place in _places(folder):
        for path in _candidates(entry, file, place.folder):
            if path.is_file():
                return path
    return None


def locate(name: str, *, folder: str | os.PathLike[str] | None = None) -> dict[str, Path | None]:
    """Say where the files of a data set lie, without reading them.

    Looks in `folder`, then in the folder of the variable ADAPTIVENET_DATA, then in the cache.

    Args:
        name: one of `names()`.
        folder: folder to look in first; it holds one folder a data set.

    Returns:
        File name -> path, or None where it was not found. Empty for sets that need no file.

    Raises:
        UnknownDatasetError: no data set has this name.
        DataError: ADAPTIVENET_DATA is set to something that is not a folder.

    >>> locate("digits")
    {}
    """
    entry = describe(name)
    if not entry.folder:
        return {}
    return {file.name: _find(entry, file, folder) for file in entry.files}


def read(
    entry: Entry,
    file: File,
    *,
    folder: str | os.PathLike[str] | None = None,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Content:
    """Return the verified content of one file, downloading it if it is nowhere.

    >>> from adaptivenet.data.registry import describe
    >>> entry = describe("cifar10_jpeg")
    >>> try:
    ...     _ = read(entry, File("absent.npz", "npz", "0" * 64, 1))
    ... except MissingDataError as error:
    ...     print(str(error).splitlines()[0])
    CIFAR-10 (JPEG copy): the file cifar10_jpeg/absent.npz was not found
    """
    path = _find(entry, file, folder)
    if path is not None:
        return read_path(entry, file, path)
    bases = entry.mirrors if mirrors is None else tuple(mirrors)
    if download and bases:
        target = Path(folder).expanduser() if folder is not None else cache_folder()
        return _download(entry, file, target, bases, _missing(entry, file, folder))[0]
    raise MissingDataError(_missing(entry, file, folder))


def read_path(entry: Entry, file: File, path: Path) -> Content:
    """Return the verified content of one file on disk; errors name it and say what to do.

    >>> from adaptivenet.data.registry import describe
    >>> entry = describe("tinyshakespeare")
    >>> try:
    ...     _ = read_path(entry, entry.files[0], Path("no_such_file"))
    ... except DataError as error:
    ...     print("no_such_file" in str(error))
    True
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return check(file, raw, str(path))
    except CorruptDataError as error:
        raise CorruptDataError(f"{error}\n{_repair(entry, path)}") from error


def _repair(entry: Entry, path: Path) -> str:
    place = path.parent.parent
    if entry.mirrors:
        return (
            "It was left as it is. To replace it by a verified download: "
            f"python -m adaptivenet.data fetch {entry.name} --folder {place}"
        )
    return f"It was left as it is. Copy it anew from where you got it, or make it: {entry.obtain}"


def _missing(entry: Entry, file: File, folder: str | os.PathLike[str] | None) -> str:
    lines = [f"{entry.title}: the file {entry.folder}/{file.stored} was not found"]
    places = _places(folder)
    lines += [f"  looked in {place.folder} ({place.label})" for place in places]
    if not os.environ.get(DATA_VARIABLE):
        lines.append(f"  the variable {DATA_VARIABLE} is not set")
    if entry.mirrors:
        lines.append(f"To fetch it, with a network: python -m adaptivenet.data fetch {entry.name}")
    else:
        lines.append(f"It has no public mirror. To make it: {entry.obtain}")
        lines.append(f"  source: {entry.source}")
    lines.append(f"If you have it: export {DATA_VARIABLE}=<folder that holds {entry.folder}/>")
    return "\n".join(lines)


def fetch(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    mirrors: Sequence[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Download the files of a data set that are missing, and verify all of them.

    A corrupt file in `folder` (or, without it, in the cache) is replaced; what does not verify
    is never kept.

    Args:
        name: one of `names()`.
        folder: where to put them; by default the cache, unless they are found elsewhere.
        mirrors: addresses to try instead of those in the table.
        report: called with one line a file.

    Returns:
        Paths of all files; empty for sets that need none.

    Raises:
        UnknownDatasetError: no data set has this name.
        DownloadError: no mirror delivered the pinned content.
        MissingDataError: the set has no mirror.
        CorruptDataError: a file found outside the folder to write to is corrupt.

    >>> fetch("mnist1d")
    []
    """
    entry, say = describe(name), report or _log.info
    bases = entry.mirrors if mirrors is None else tuple(mirrors)
    target = Path(folder).expanduser() if folder is not None else cache_folder()
    paths: list[Path] = []
    for file in entry.files if entry.folder else ():
        found = _find(entry, file, None) if folder is None else None
        if folder is not None:
            found = next((p for p in _candidates(entry, file, target) if p.is_file()), None)
        if found is not None:
            try:
                read_path(entry, file, found)
            except CorruptDataError as error:
                if found not in _candidates(entry, file, target) or not bases:
                    raise
                say(f"replacing a corrupt file: {str(error).splitlines()[0]}")
            else:
                say(f"present and verified: {found}")
                paths.append(found)
                continue
        if not bases:
            raise MissingDataError(_missing(entry, file, folder))
        path = _download(entry, file, target, bases, _missing(entry, file, folder))[1]
        say(f"fetched and verified: {path}")
        paths.append(path)
    return paths


def _download(
    entry: Entry, file: File, target: Path, mirrors: Sequence[str], missing: str
) -> tuple[Content, Path]:
    """Try the mirrors in order; write only what verifies."""
    from adaptivenet.data.download import FAILURES, get

    reasons = []
    remote = file.name if file.kind == "npz" else entry.remote.format(name=file.name)
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{remote}"
        _log.info("fetching %s", url)
        try:
            raw = get(url, limit=file.size + 1_048_576)
            content = check(file, raw, url)
        except (*FAILURES, CorruptDataError) as error:
            reasons.append(f"  {error if url in str(error) else f'{url}: {error}'}")
            continue
        if file.kind != "npz" and raw[:2] != b"\x1f\x8b":
            raw = gzip.compress(raw, mtime=0)
        path = target / entry.folder / file.stored
        write_atomic(path, raw)
        return content, path
    listing = "\n".join(reasons)
    raise DownloadError(f"{missing}\nthe download failed, nothing was kept:\n{listing}")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, whenever the process dies.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder) / "sub" / "a", b"1")
    ...     [path.name for path in (Path(folder) / "sub").iterdir()]
    ['a']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; "
            f"choose another folder with --folder or the variable {CACHE_VARIABLE}"
        ) from error


def verify(name: str, *, folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """Read every file of a data set and compare it with its pinned content; never downloads.

    Args:
        name: one of `names()`.
        folder: folder to look in first.

    Returns:
        Paths of the files, all verified; empty for sets that need none.

    Raises:
        UnknownDatasetError: no data set has this name.
        MissingDataError: a file was not found.
        CorruptDataError: a file is truncated, altered or mislabelled.

    >>> verify("digits")
    []
    """
    entry = describe(name)
    paths = []
    for file in entry.files if entry.folder else ():
        path = _find(entry, file, folder)
        if path is None:
            raise MissingDataError(_missing(entry, file, folder))
        read_path(entry, file, path)
        paths.append(path)
    return paths
