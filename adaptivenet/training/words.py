"""From a value of a YAML file to the words of a typed command line, which tyro checks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_MANY = (list, tuple, set, frozenset, Sequence)


class ConfigError(ValueError):
    """A mistake in a configuration, told in one message."""


def to_words(value: Any, hint: Any) -> list[str]:
    """Spells a value of a YAML file as one would type it on the command line.

    tyro reads text, so what would change its meaning on the way is refused here.

    Args:
        value: What YAML holds.
        hint: Type of the field.

    Returns:
        One word, or one for each item of a list.

    Raises:
        ConfigError: If the value cannot be of this type.

    >>> to_words([1, 2], tuple[int, ...]), to_words(0.5, float), to_words(None, int | None)
    (['1', '2'], ['0.5'], ['None'])
    """
    members = union_members(hint)
    allowed = set(members) - {type(None)}
    if value is None:
        if type(None) not in members:
            raise ConfigError("null is not allowed here")
        return ["None"]
    if isinstance(value, dict):
        raise ConfigError("a single value belongs here, not a section")
    if isinstance(value, list):
        if not takes_many(hint):
            raise ConfigError("a single value belongs here, not a list")
        text_only = item_types(hint) == {str}
        return [word for item in value for word in _item_words(item, text_only)]
    if allowed and all(_is_many(member) for member in allowed):
        raise ConfigError(f"a list belongs here, such as [{value}]")
    if allowed == {str}:
        if not isinstance(value, str):
            raise ConfigError('text belongs here; put it in "quotation marks"')
        if value == "None" and type(None) in members:
            raise ConfigError("the text None would be read as null")
    if allowed == {bool} and isinstance(value, str):
        raise ConfigError("true or false belongs here, without quotation marks")
    return [str(value)]


def check_words(value: Any, words: Sequence[str], hint: Any) -> None:
    """Has tyro check one value by itself, so that a mistake can be blamed on its key.

    Args:
        value: What YAML holds.
        words: From `to_words`.
        hint: Type of the field.

    Raises:
        ConfigError: With tyro's reason.
    """
    single = dataclasses.make_dataclass("Value", [("value", hint)])
    try:
        parsed = run_tyro(single, option("value", words, hint), "", "")
    except ConfigError as error:
        reason = str(error).removeprefix("Error parsing --value: ")
        raise ConfigError(reason.replace(" for argument '--value'", "")) from None
    if isinstance(value, list) and not isinstance(parsed.value, _MANY):  # pyright: ignore
        raise ConfigError("a list of one item would be read as a single value")


def option(key: str, words: Sequence[str], hint: Any) -> list[str]:
    """Spells an option with its words; "=" lets a single value begin with a dash."""
    if takes_many(hint):
        return [f"--{key}", *words]
    return [f"--{key}={words[0]}"]


def run_tyro(config: type[T], words: Sequence[str], prog: str, description: str | None) -> T:
    """Runs tyro, and turns its exit into an exception.

    Args:
        config: A dataclass.
        words: The command line.
        prog: Name of the program.
        description: Text for `--help`.

    Returns:
        An instance of `config`.

    Raises:
        ConfigError: With tyro's message, out of its box.
        SystemExit: With code 0 after `--help`.
    """
    import tyro

    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(
                config,
                args=list(words),
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise ConfigError(_unbox(caught.getvalue())) from None


def describe(hint: Any) -> str:
    """Names a type in words.

    >>> describe(int | None), describe(tuple[int, ...]), describe(typing.Literal["a", "b"])
    ('int or null', 'tuple[int, ...]', "'a' or 'b'")
    """
    names = []
    for member in union_members(hint):
        if typing.get_origin(member) is typing.Literal:
            names.append(" or ".join(map(repr, typing.get_args(member))))
        elif member is type(None):
            names.append("null")
        elif isinstance(member, type) and typing.get_origin(member) is None:
            names.append(member.__name__)
        else:
            names.append(str(member).replace("typing.", ""))
    return " or ".join(names)


def strip(hint: Any) -> Any:
    """Returns a type without its Annotated metadata."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def union_members(hint: Any) -> list[Any]:
    """Returns the members of a union, or the type alone."""
    hint = strip(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [strip(member) for member in typing.get_args(hint)]
    return [hint]


def takes_many(hint: Any) -> bool:
    """Tells whether a field may hold a list."""
    return any(_is_many(member) for member in union_members(hint))


def _is_many(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in _MANY


def item_types(hint: Any) -> set[Any]:
    """Types of the innermost items of a list."""
    found: set[Any] = set()
    for member in union_members(hint):
        if _is_many(member):
            parts = [part for part in typing.get_args(member) if part is not Ellipsis]
            found |= {inner for part in parts for inner in item_types(part)}
        elif member is not type(None) or not takes_many(hint):
            found.add(member)
    return found


def _item_words(item: Any, text_only: bool) -> list[str]:
    if isinstance(item, list):
        return [word for part in item for word in _item_words(part, text_only)]
    if isinstance(item, dict):
        raise ConfigError("a list may not hold sections")
    if text_only and not isinstance(item, str):
        raise ConfigError(f'item {item!r} must be text; put it in "quotation marks"')
    if isinstance(item, str) and item.startswith("-"):
        raise ConfigError(f"item {item!r} of a list may not begin with a dash")
    return [str(item)]


def _unbox(text: str) -> str:
    """The first paragraph of a message that tyro drew in a box, with or without line graphics."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip(" │╭╮╰╯") for line in text.splitlines()]
    lines = [line for line in lines if line]
    paragraph: list[str] = []
    for line in lines[1:]:  # the first line is the box's title
        if set(line) <= {"─", "-"}:
            if paragraph:
                break
            continue
        paragraph.append(line)
    return " ".join(paragraph) or " ".join(lines)
