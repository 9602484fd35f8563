"""Typed configurations: a frozen dataclass, a YAML file, and overrides on the command line.

Every value of the file is turned into the words that one would type after `--field.sub`, and tyro
checks them like any command line, so a mistake in either place gets the same kind of message.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from adaptivenet.training.words import (
    ConfigError,
    check_words,
    describe,
    item_types,
    option,
    run_tyro,
    strip,
    to_words,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Declares the range of a field: `density: Annotated[float, Range(gt=0, le=1)] = 1.0`.

    Items of a list or tuple are checked one by one; `None` passes. nan passes no bound. The bounds
    of the `annotated-types` package (`Ge`, `Interval`, ...) are understood too.

    Args:
        ge: Smallest value allowed.
        gt: Bound that values must exceed.
        le: Largest value allowed.
        lt: Bound that values must stay below.

    >>> Range(ge=0, lt=1).describe()
    'at least 0 and below 1'
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def describe(self) -> str:
        """Spells the range in words."""
        return " and ".join(f"{_WORDS[name][0]} {bound}" for name, bound in _bounds(self))


_WORDS: dict[str, tuple[str, Any]] = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("above", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("below", lambda value, bound: value < bound),
}


_HELP = (
    "A YAML file may hold any of the options: --config path.yaml; options given here win over it."
)


class _Field(NamedTuple):
    """A field that holds a value; `key` is dotted, `hint` keeps Annotated metadata."""

    key: str
    hint: Any


def load_config(
    config: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """Reads a configuration from `--config path.yaml` and overrides such as `--field.sub value`.

    Overrides win over the file, the file over the defaults. Fields may be bool, int, float, str,
    `Path`, `Literal`, enums, optional ones of these, lists and tuples, and nested dataclasses. A
    mistake (unknown key, wrong type, value out of range, key given twice) ends the program with
    exit code 2 and a message that names the file, the key and the value, and the nearest key.

    Args:
        config: A dataclass, normally frozen. Ranges are declared with `Range`, or checked in
            `__post_init__`, which raises ValueError.
        argv: Words of the command line without the program's name; by default `sys.argv[1:]`.
        prog: Name of the program in messages and help.
        description: What the program does, for `--help`; by default the dataclass's docstring.

    Returns:
        The configuration.

    Raises:
        SystemExit: With code 2 after a mistake; with code 0 after `--help`.
        TypeError: If `config` is not a dataclass type.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     epochs: int = 10
    ...     seeds: tuple[int, ...] = (0, 1)
    >>> load_config(Config, ["--epochs", "3", "--seeds", "5", "6"])
    Config(epochs=3, seeds=(5, 6))
    """
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise TypeError(f"load_config() takes a dataclass type, got {config!r}")
    prog = prog or Path(sys.argv[0]).name
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        path, overrides = _take_path(words)
        known = {field.key: field for field in _fields(config)}
        from_file = _file_words(path, known, config) if path is not None else {}
        given = _given_keys(overrides, known)
        typed = [word for key, part in from_file.items() if key not in given for word in part]
        about = f"{description or config.__doc__ or ''}\n\n{_HELP}"
        origin = {key: str(path) for key in from_file if key not in given}
        instance = _parse(config, [*typed, *overrides], prog, about, known, origin)
        _check_ranges(instance, known, origin)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return instance


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    r"""Writes a configuration as YAML that `load_config` reads back equal.

    Args:
        config: A dataclass instance.
        path: The file, replaced atomically; its folder is made when needed.

    Raises:
        TypeError: If `config` is not a dataclass instance, or a value has no YAML form.
        ValueError: If the file would not load back equal; names the fields.

    >>> import dataclasses, pathlib, tempfile
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     rate: float = 1e-3
    ...     name: str | None = None
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "config.yaml"
    >>> save_config(Config(), path)
    >>> path.read_text()
    'rate: 0.001\nname: null\n'
    >>> load_config(Config, ["--config", str(path)]) == Config()
    True
    """
    path = Path(path)
    text = yaml.safe_dump(_values(config), sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of this process alone: two that start on one folder must not take each other's file.
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    try:
        known = {field.key: field for field in _fields(type(config))}
        part = _file_words(beside, known, type(config))
        words = [word for words in part.values() for word in words]
        back = _parse(type(config), words, path.name, None, known, {})
        here, there = _leaves(config), _leaves(back)
        wrong = [key for key in here if not _same(here[key], there[key])]
        if wrong:
            raise ConfigError(f"these fields would not load back equal: {', '.join(wrong)}")
    except ConfigError as error:
        beside.unlink()
        raise ValueError(f"cannot save {type(config).__name__} to {path}: {error}") from None
    beside.replace(path)


def config_hash(config: Any) -> str:
    """Returns a short name for the values of a configuration.

    The same values give the same hash in any process, whatever the order of the fields; any changed
    value, and any added or renamed field, changes it.

    Args:
        config: A dataclass instance.

    Returns:
        The first 12 hexadecimal digits of the SHA-256 of the values as canonical JSON.

    Raises:
        TypeError: If `config` is not a dataclass instance, or a value has no JSON form.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     epochs: int = 10
    >>> config_hash(Config()), config_hash(Config(epochs=11))
    ('d54d5ba4cb5a', '832e65b146aa')
    """
    text = json.dumps(_values(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def _take_path(words: list[str]) -> tuple[Path | None, list[str]]:
    """Takes `--config path` out of the words."""
    rest: list[str] = []
    paths: list[str] = []
    queue = iter(words)
    for word in queue:
        if word == "--config":
            paths.append(next(queue, ""))
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(paths) > 1:
        raise ConfigError(f"--config is given {len(paths)} times; give one file")
    if paths and (not paths[0] or paths[0].startswith("--")):
        raise ConfigError("--config needs the path of a YAML file")
    return (Path(paths[0]) if paths else None), rest


def _given_keys(words: Sequence[str], known: dict[str, _Field]) -> set[str]:
    """Keys that the command line sets; raises on one that there is not."""
    given = set()
    for word in words:
        # Anything else that starts with a dash is a value, such as -3 or -inf.
        if not re.match(r"--[A-Za-z_]", word) or word == "--help":
            continue
        key = word[2:].split("=", 1)[0].replace("-", "_")
        if key not in known:
            raise ConfigError(f"unknown option --{key}{_nearest(key, known, '--')}")
        given.add(key)
    return given


def _file_words(path: Path, known: dict[str, _Field], config: type) -> dict[str, list[str]]:
    """The words that each key of the file stands for, each checked by itself."""
    values = _read_yaml(path)
    words: dict[str, list[str]] = {}
    for key, value in _flatten(values, "", path, config):
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(key, known)}")
        hint = known[key].hint
        try:
            spelled = to_words(value, hint)
            check_words(value, spelled, hint)
        except ConfigError as error:
            raise ConfigError(
                f"{path}: {key} must be {describe(hint)}, got {value!r} ({error})"
            ) from None
        words[key] = option(key, spelled, hint)
    return words


def _flatten(
    values: dict[Any, Any], prefix: str, path: Path, config: type
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; descends where the dataclass does."""
    hints = typing.get_type_hints(config)
    names = {field.name for field in dataclasses.fields(config) if field.init}
    for name, value in values.items():
        key = f"{prefix}{name}"
        section = strip(hints[name]) if name in names else None
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} must hold keys and values, got {value!r}")
            yield from _flatten(value, f"{key}.", path, section)
        else:
            yield key, value


def _fields(config: type, prefix: str = "") -> Iterator[_Field]:
    """All fields that hold values, with dotted keys."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        hint = hints[field.name]
        section = strip(hint)
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            yield from _fields(section, f"{prefix}{field.name}.")
        else:
            yield _Field(prefix + field.name, hint)


def _parse(
    config: type[T],
    words: Sequence[str],
    prog: str,
    description: str | None,
    known: dict[str, _Field],
    origin: dict[str, str],
) -> T:
    try:
        return run_tyro(config, words, prog, description)
    except ConfigError as error:
        raise ConfigError(_blame(str(error), config.__name__, known, origin)) from None


def _blame(message: str, name: str, known: dict[str, _Field], origin: dict[str, str]) -> str:
    """Adds to the message of a `__post_init__` the keys that it speaks of, and where they stand."""
    found = re.match(r"Error parsing ([\w.]+): (.*)", message)
    if found is None:
        return message
    section, reason = found.groups()
    prefix = "" if section == name else f"{section}."
    inside = [key for key in known if key.startswith(prefix)]
    spoken = [key for key in inside if _speaks_of(reason, key.rsplit(".", 1)[-1])]
    places = [f"{origin[key]}: {key}" if key in origin else f"--{key}" for key in spoken]
    if not places:  # of nothing by name: the files that it read
        places = sorted({origin[key] for key in inside if key in origin})
    return f"{', '.join(places) or section}: {reason}"


def _speaks_of(reason: str, name: str) -> bool:
    """Whether a message names a key, or one item of a key in the plural (`row` of `rows`)."""
    one = name[:-1] if name.endswith("s") else name
    return re.search(rf"\b({name}|{one})\b", reason) is not None


def _check_ranges(config: Any, known: dict[str, _Field], origin: dict[str, str]) -> None:
    for key, value in _leaves(config).items():
        for bound in _metadata(known[key].hint):
            items = value if isinstance(value, list | tuple) else [value]
            for item in items:
                if item is None or all(_WORDS[name][1](item, b) for name, b in _bounds(bound)):
                    continue
                where = f"{origin[key]}: {key}" if key in origin else f"--{key}"
                words = " and ".join(f"{_WORDS[name][0]} {b}" for name, b in _bounds(bound))
                raise ConfigError(f"{where} must be {words}, got {item!r}")


def _bounds(metadata: Any) -> list[tuple[str, Any]]:
    return [
        (name, getattr(metadata, name))
        for name in _WORDS
        if getattr(metadata, name, None) is not None
    ]


def _metadata(hint: Any) -> list[Any]:
    """All range metadata in a hint, also of the items of a list and of options."""
    own = [item for item in getattr(hint, "__metadata__", ()) if _bounds(item)]
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return own
    parts = inner[:1] if typing.get_origin(hint) is typing.Annotated else inner
    return own + [item for part in parts for item in _metadata(part)]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.init:
            continue
        if dataclasses.is_dataclass(value):
            leaves.update(_leaves(value, f"{prefix}{field.name}."))
        else:
            leaves[prefix + field.name] = value
    return leaves


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)  # nan is the same as nan here


def _values(config: Any) -> dict[str, Any]:
    """The values of a configuration as what YAML and JSON can hold."""
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"a configuration is a dataclass instance, got {config!r}")
    hints = typing.get_type_hints(type(config), include_extras=True)
    values = {}
    for field in dataclasses.fields(config):
        if field.init:
            value = getattr(config, field.name)
            nested = dataclasses.is_dataclass(value)
            hint = hints[field.name]
            values[field.name] = _values(value) if nested else _value(value, hint, field.name)
    return values


def _value(value: Any, hint: Any, name: str) -> Any:
    if isinstance(value, list | tuple):
        return [_value(item, hint, name) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int) and not isinstance(value, bool):
        # Where a float is declared, 1 and 1.0 are one value and must have one hash.
        kinds = item_types(hint)
        return float(value) if float in kinds and int not in kinds else int(value)
    for kind in (bool, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(f"{name}: {type(value).__name__} has no form in a configuration file")


def _nearest(key: str, known: dict[str, _Field], dashes: str = "") -> str:
    # First the right name in the wrong section, then a similar name.
    tail = key.rsplit(".", 1)[-1]
    matches = [name for name in known if name.rsplit(".", 1)[-1] == tail][:1]
    matches = matches or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {dashes}{matches[0]}?" if matches else ""
    return f"{hint} (known: {', '.join(dashes + name for name in sorted(known))})"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        values = yaml.load(text, _loader(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, got a {type(values).__name__}")
    return values


def _loader(path: Path) -> Any:
    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: dict[str, int] = {}
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if key in seen:
                    raise ConfigError(
                        f"{path}: key {key!r} is given twice, in lines {seen[key]} and {line}"
                    )
                seen[key] = line
            return super().construct_mapping(node, deep)

    return Loader


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = sorted(item.name for item in path.parent.glob("*.yaml"))
    return f" (there are {', '.join(names)})" if names else ""
