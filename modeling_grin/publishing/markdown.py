"""Text from files in a model card: Markdown, HTML in it, and Python, none of which a name may end.

A card is rendered by an environment that escapes all it is given but `Markup`, so that nothing is forgotten.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

SPECIAL = re.compile(
    r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])"
)  # to Markdown, of GitHub and the Hub; x86_64 needs nothing
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(value: Any) -> str:
    """`value` without line ends, and without what hides text or turns it around."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def escape(value: Any) -> Markup:
    """`value` as text of a paragraph or heading; `Markup` as it is."""
    if isinstance(value, Markup):
        return value
    text = SPECIAL.sub(r"\\\g<0>", one_line(value))
    return Markup("".join(ENTITIES.get(character, character) for character in text))


def code(value: Any) -> Markup:
    """`value` as a code span."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return Markup(f"{ticks}{blank}{text}{blank}{ticks}")


def cell(value: Any) -> Markup:
    """`value` as a table's cell, which a bar would end even in a code span."""
    return Markup(re.sub(r"(?<!\\)\|", r"\\|", escape(value)))


def python_string(value: Any) -> Markup:
    """`value` as a string of Python source: on one line, and without what ends a block of code."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return Markup('"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + '"').replace("`", r"\x60")


def render(template: Path, **values: Any) -> str:
    """A template of a Markdown file; `| python` makes a value a string of Python."""
    environment = Environment(autoescape=True, finalize=escape)
    environment.filters["python"] = python_string
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
