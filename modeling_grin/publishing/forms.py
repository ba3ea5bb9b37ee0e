"""Check JSON that others may have written against a declared form."""

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Form = type | dict[str, Any] | list[Any] | Callable[[Any], bool]
"""A type; {name: form}, with `name?` if the value may be missing or null; [form of each element]; or a test."""


def read_json(path: Path, form: Form) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is no JSON or not of `form`; the message names file and field.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), form, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def parse_json(text: str, form: Form, where: str) -> Any:
    """Parse text as `read_json` does; the message names `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    check_form(value, form, where)
    return value


def check_form(value: Any, form: Form, where: str, field: str = "") -> None:
    """Raise ValueError unless `value` is of `form`."""
    if isinstance(form, dict):
        check_form(value, dict, where, field)
        for key, expected in form.items():
            name = key.removesuffix("?")
            if key == name and name not in value:
                raise ValueError(f"{where} lacks {field}{name}")
            if value.get(name) is not None or key == name:
                check_form(value[name], expected, where, f"{field}{name}.")
    elif isinstance(form, list):
        check_form(value, list, where, field)
        for index, element in enumerate(value):
            check_form(element, form[0], where, f"{field}{index}.")
    elif isinstance(form, type):
        if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
            raise ValueError(f"{where} has {label(field)}{reprlib.repr(value)}, which must be a {form.__name__}")
    elif not form(value):
        raise ValueError(f"{where} has {label(field)}{reprlib.repr(value)}, which must be {form.__doc__}")


def label(field: str) -> str:
    return f"{field.removesuffix('.')}=" if field else ""


def number(value: Any) -> bool:
    """a finite number"""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)
    )


def loss(value: Any) -> bool:
    """a number"""
    return isinstance(value, float) or number(value)
