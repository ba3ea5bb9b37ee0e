"""The rooms of the house: which package may import which, and that no two modules import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_grin", "conversion", "grin_moe_cli", "grin_moe_serving", "recipes")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}

# A room -> the rooms that it must not know.
OUTER = ("conversion", "grin_moe_cli", "grin_moe_serving", "recipes", "modeling_grin.publishing")
STUDIES = ("modeling_grin.analysis", "modeling_grin.planning")
FORBIDDEN = {
    "modeling_grin.training": OUTER,
    "modeling_grin.kernels": (*OUTER, *STUDIES, "modeling_grin.training"),
    "modeling_grin.analysis": (*OUTER, "modeling_grin.planning", "modeling_grin.training"),
    "modeling_grin.planning": (*OUTER, "modeling_grin.analysis", "modeling_grin.training"),
    "modeling_grin.publishing": ("grin_moe_cli", "recipes"),
    "conversion": (*OUTER[1:], "modeling_grin.analysis", "modeling_grin.planning.plan", "modeling_grin.training"),
    "grin_moe_serving": ("conversion", "grin_moe_cli", "recipes", *STUDIES, "modeling_grin.training"),
    "recipes": ("grin_moe_cli", "grin_moe_serving"),
}


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, wherever in its code."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return found & FILES.keys()


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_know_the_rooms_above(room):
    arrows = [
        f"{module} -> {imported}"
        for module in FILES
        if is_in(module, room)
        for imported in imports(module)
        if any(is_in(imported, other) for other in FORBIDDEN[room])
    ]
    assert not arrows


def test_no_modules_import_each_other():
    TopologicalSorter({module: imports(module) - {module} for module in FILES}).prepare()
