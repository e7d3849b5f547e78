"""Typed reading of nested config dataclasses from mappings and from text, with errors that suggest the right field."""

import ast
import contextlib
import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from emollama_jax.errors import UserError

BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def build(group: type, data: Any, where: str) -> Any:
    """Make the dataclass `group` from a mapping, checking types field by field; missing fields have their defaults.

    Args:
        where: path of `group`, for messages.

    Raises:
        UserError: a field is unknown, of the wrong type, or refused by the dataclass with a ValueError.
    """
    if not isinstance(data, Mapping):
        raise _wrong_type(where, group, data)
    hints = get_type_hints(group)
    for name in data:
        if name not in hints:
            raise _no_such_field(where, name, group)
    values = {name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return group(**values)
    except ValueError as error:  # starts with the field
        raise UserError(f"{where}.{error}") from error


def field_type(group: type, path: str, where: str) -> Any:
    """Find the type of the field with this dotted path below `group`. Raises UserError when there is none."""
    flag, names = f"{where}.{path}", path.split(".")
    for i, name in enumerate(names):
        hint = get_type_hints(group).get(name)
        if hint is None:
            raise _no_such_field(where, ".".join(names[i:]), group)
        where = f"{where}.{name}"
        if not dataclasses.is_dataclass(hint):
            if names[i + 1 :]:
                raise UserError(f"{flag}: {where} has no fields; write {where}=VALUE")
            return hint
        group = hint
    raise UserError(f"{flag}: a group; set its fields one by one: {', '.join(get_type_hints(group))}")


def parse_value(hint: Any, text: str, where: str) -> Any:
    """Read a value of the type `hint` from the text of a command line.

    A tuple is written as in Python, without a bracket also one item alone or, of words, WORD,WORD.

    Raises:
        UserError: it is of another type.
    """
    if hint is str:
        return text
    if hint is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if hint == tuple[str, ...] and text[0] not in "([\"'":
        return tuple(text.split(",")) if not re.search(r"\s", text) else (text,)
    try:
        value = float(text) if hint is float else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise _wrong_type(where, hint, text) from error
    if get_origin(hint) is tuple:
        return _read(hint, value if isinstance(value, tuple | list) else (value,), where)
    if type(value) is not hint:
        raise _wrong_type(where, hint, text)
    return value


def _read(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint`; lists become tuples and whole numbers floats where the type asks for it."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(hint, types.UnionType):
        for alternative in get_args(hint):
            with contextlib.suppress(UserError):
                return _read(alternative, value, where)
    elif get_origin(hint) is tuple and isinstance(value, list | tuple):
        hints = get_args(hint)
        hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
        if len(hints) == len(value):
            return tuple(_read(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(hints, value, strict=True)))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise _wrong_type(where, hint, value)


def _wrong_type(where: str, hint: Any, value: Any) -> UserError:
    return UserError(f"{where}: expected {hint.__name__ if isinstance(hint, type) else hint}, not {value!r}")


def _no_such_field(where: str, name: str, group: type) -> UserError:
    paths = field_paths(group)
    near = [path for path in paths if path.endswith(f".{name}")] or difflib.get_close_matches(name, paths, n=1)
    remedy = (
        f"did you mean {' or '.join(f'{where}.{path}' for path in near)}?"
        if near
        else f"{where} has {', '.join(get_type_hints(group))}"
    )
    return UserError(f"{where}.{name}: no such field; {remedy}")


def field_paths(group: type) -> list[str]:
    """List the dotted paths of all groups and fields below `group`."""
    paths = []
    for name, hint in get_type_hints(group).items():
        below = field_paths(hint) if dataclasses.is_dataclass(hint) else []
        paths += [name, *(f"{name}.{path}" for path in below)]
    return paths
