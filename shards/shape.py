"""JSON that somebody else may have written: read, and compared with what it should look like.

In: bytes or values, and a shape. Out: values, or what is wrong with them, in words. Invariants: whatever the bytes are,
nothing but ValueError is raised; a value that fits can be formatted, compared and written as UTF-8.

A shape is one of: `str`, `int` (whole, not negative), `float` (any finite number), `bool`, `dict`; None; a tuple of
alternatives; [shape] for a list of such, [shape, shape] for one of two; {"key": shape} for an object with at least these keys, {str: shape} for one with any.
"""

import json
from math import isfinite
from typing import Any

LARGEST = 2**53  # JSON's numbers are exact up to here
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or not in UTF-8, or too deeply nested.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def misfit(value: object, shape: Any, where: str = "it") -> str | None:
    """What is wrong with a value, None if it has the shape; `where` names it."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, where) for one in shape]
        return None if None in found else found[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        if len(shape) > 1 and len(value) != len(shape):
            return f"{where} has {len(value)} entries instead of {len(shape)}"
        entries = ((f"{where}[{number}]", entry, shape[0]) for number, entry in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        if missing := [key for key in shape if key is not str and key not in value]:
            return f"{where} has no {missing[0]!r}"
        if str in shape and not all(map(_is_text, value)):
            return f"{where} has a name that is no text"
        entries = ((f"{where}.{str(key)[:40]}", entry, shape.get(key, shape.get(str))) for key, entry in value.items())
        entries = (entry for entry in entries if entry[2] is not None)
    else:
        return None if _is_a(value, shape) else f"{where} is not {NAMES.get(shape, 'null')}"
    return next((problem for name, entry, part in entries if (problem := misfit(entry, part, name))), None)


def _is_a(value: object, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is str:
        return _is_text(value)
    if kind is int:
        return type(value) is int and 0 <= value <= LARGEST
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST**8 and isfinite(value)  # pyright: ignore
    return isinstance(value, kind)


def _is_text(value: object) -> bool:
    """Text that UTF-8 can hold: JSON can name halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
