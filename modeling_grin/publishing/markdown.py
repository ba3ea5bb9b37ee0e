"""Escape text of files for a model card, so that no name ends its Markdown, HTML or Python.

The template's environment escapes every value except `Markup`.
"""

import html
import re
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

SPECIAL = r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])"  # in the Markdown of GitHub and the Hub; x86_64 needs no escape


def one_line(value: Any) -> str:
    """Remove line ends, and characters that hide text or turn it around."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def escape(value: Any) -> Markup:
    """Escape text for a paragraph or heading; leave `Markup` as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(re.sub(SPECIAL, r"\\\g<0>", one_line(value)), quote=False))


def code(value: Any) -> Markup:
    """Make a code span."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return Markup(f"{ticks}{blank}{text}{blank}{ticks}")


def cell(value: Any) -> Markup:
    """Escape a table cell, which a bar would end even in a code span."""
    return Markup(re.sub(r"(?<!\\)\|", r"\\|", escape(value)))


def python_string(value: Any) -> Markup:
    """Make a Python string literal on one line, which cannot end a block of code."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return Markup('"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + '"').replace("`", r"\x60")


def render(template: Path, **values: Any) -> str:
    """Render a template of a Markdown file; `| python` makes a Python string of a value, `| shell` an argument."""
    environment = Environment(autoescape=True, finalize=escape)
    environment.filters |= {"python": python_string, "shell": lambda value: Markup(quote(one_line(value)))}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
