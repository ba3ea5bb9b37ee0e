"""Regular expressions of adapter configs, tried in a process that can be stopped.

Anybody may have written them. Matching `((.|.)*)*!` never ends, and Python cannot interrupt it. peft matches an
adapter's expressions against every module's name; a process with a time limit does so first.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

SECONDS = 20
"""For all expressions and names of an adapter. Harmless ones take milliseconds."""

# A field -> the expression that peft makes of each of its patterns, and how it is matched.
FORMS = {
    "target_modules": ("fullmatch", "{}"),
    "exclude_modules": ("fullmatch", "{}"),
    "feedforward_modules": ("fullmatch", "{}"),
    "modules_to_save": ("match", r"(^|.*\.){}($|\..*)"),
    "layers_pattern": ("match", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
    "rank_pattern": ("match", r"(.*\.)?({})$"),
    "alpha_pattern": ("match", r"(.*\.)?({})$"),
}
LISTS_OF_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # where they are no text

MATCH_ALL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for number, (how, expression) in enumerate(expressions):
    print(number, flush=True)
    try:
        match = getattr(re.compile(expression), how)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(str(error))
    for name in names:
        match(name)
"""


def adaptable_names(model: nn.Module) -> list[str]:
    """The names that a peft config is matched against."""
    return [name for name, _ in (*model.named_modules(), *model.named_parameters())]


def check_patterns(config: Mapping[str, Any], names: Iterable[str], source: Any) -> None:
    """Raise ValueError, with `source`, field and expression, where an expression of a peft config is invalid, or not
    matched against the `names` of modules and parameters in `SECONDS`."""
    tried, expressions = [], []
    for field, (how, form) in FORMS.items():
        value: Any = config.get(field)
        is_list = isinstance(value, list | dict) and field not in LISTS_OF_NAMES
        for pattern in value if is_list else [value]:
            if isinstance(pattern, str) and not re.fullmatch(r"[\w.]*", pattern):  # else nothing is repeated in it
                tried.append((field, pattern))
                expressions.append((how, form.format(pattern)))
    if not tried:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH_ALL],
            input=json.dumps([expressions, list(names)]).encode(),
            capture_output=True,
            timeout=SECONDS,
        )
        output, reason = done.stdout, f"is no regular expression: {done.stderr.decode(errors='replace').strip()}"
        if done.returncode == 0:
            return
    except subprocess.TimeoutExpired as error:
        output, reason = error.stdout or b"0", f"was not matched against the model's names in {SECONDS} seconds"
    field, pattern = tried[int(output.split()[-1])]
    shown = repr(pattern if len(pattern) <= 100 else pattern[:100] + "...")
    raise ValueError(f"{source}: {shown} in {field} {reason}; list the modules by name, or do not use this adapter")
