"""`python -m adaptivenet.data`: list, verify and fetch the data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptivenet.data.errors import DataError, MissingDataError, UnknownDatasetError
from adaptivenet.data.loaders import load, shipped
from adaptivenet.data.registry import describe, names
from adaptivenet.data.storage import cache_folder, fetch, locate, verify

__all__ = ["main"]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _list(folder: Path | None) -> int:
    rows = [("name", "where", "size", "holds (train / test)", "licence")]
    for name in names():
        entry, found = describe(name), locate(name, folder=folder)
        paths = [path for path in found.values() if path is not None]
        if not entry.files:
            where, size = "generated", "-"
        elif not entry.folder:
            where, size = "in the package", _size(len(shipped(entry.files[0])))
        elif len(paths) == len(found):
            where = ", ".join(dict.fromkeys(str(path.parent) for path in paths))
            size = _size(sum(path.stat().st_size for path in paths))
        else:
            absent = (
                f"{len(found) - len(paths)} of {len(found)} files absent" if paths else "absent"
            )
            where = f"{absent} ({'can be fetched' if entry.mirrors else 'no mirror'})"
            size = "-"
        rows.append((name, where, size, entry.shape, entry.licence))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]).rstrip())
    print(f"\ncache: {cache_folder()}")
    print("present is not yet verified: python -m adaptivenet.data verify")
    return 0


def _verify(chosen: Sequence[str], folder: Path | None) -> int:
    failed = 0
    for name in chosen or names():
        entry = describe(name)
        try:
            paths = verify(name, folder=folder)
            if not entry.folder:
                load(name)
        except MissingDataError as error:
            if not chosen and not any(locate(name, folder=folder).values()):
                print(f"{name}: absent")
                continue
            failed += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr)
        except DataError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr)
        else:
            print(f"{name}: verified ({len(paths)} files)" if paths else f"{name}: verified")
    return 1 if failed else 0


def _fetch(chosen: Sequence[str], folder: Path | None, mirrors: Sequence[str]) -> int:
    failed = 0
    for name in chosen:
        entry = describe(name)
        addresses = [f"{mirror.rstrip('/')}/{entry.folder}" for mirror in mirrors]
        try:
            paths = fetch(
                name,
                folder=folder,
                mirrors=[*addresses, *entry.mirrors] if addresses else None,
                report=lambda line, name=name: print(f"{name}: {line}"),
            )
        except DataError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr)
        else:
            if not paths:
                print(f"{name}: needs no download")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0 when all went well, 1 when a data set failed, 2 for a wrong command line.

    >>> main(["verify", "mnist1d"])
    mnist1d: verified
    0
    """
    parser = argparse.ArgumentParser(
        prog="python -m adaptivenet.data", description="List, verify and fetch the data sets."
    )
    parser.set_defaults(folder=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    where = "folder to look in first; it holds one folder a data set"
    commands.add_parser("list", help="say what is present (the default)").add_argument(
        "--folder", type=Path, help=where
    )
    verifier = commands.add_parser("verify", help="compare every file with its pinned content")
    verifier.add_argument(
        "names", nargs="*", metavar="NAME", help="all that are present by default"
    )
    verifier.add_argument("--folder", type=Path, help=where)
    fetcher = commands.add_parser("fetch", help="download and verify what is missing")
    fetcher.add_argument("names", nargs="+", metavar="NAME")
    fetcher.add_argument("--folder", type=Path, help="where to put the files; default: the cache")
    fetcher.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="address of a folder laid out like the data folder, tried first; content is verified",
    )
    args = parser.parse_args(argv)
    try:
        for name in getattr(args, "names", ()):
            describe(name)
        if args.command == "verify":
            return _verify(args.names, args.folder)
        if args.command == "fetch":
            return _fetch(args.names, args.folder, args.mirror)
        return _list(args.folder)
    except UnknownDatasetError as error:
        print(error, file=sys.stderr)
        return 2
    except DataError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
