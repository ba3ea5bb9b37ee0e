"""`grin-moe recipes`: the training scripts and their configs, to copy and edit."""

import ast
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .terminal import console, escape

recipes_app = typer.Typer(help="Training scripts and their configs, to copy and edit.", no_args_is_help=True)
RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # beside the package, in the checkout as in the wheel
WHAT = "# What:"  # the line of a config's header that `recipes ls` shows


def find_recipes() -> dict[str, Path]:
    """Scripts and configs by name, the file's without its suffix; scripts first."""
    return {path.stem: path for path in [*sorted(RECIPES.glob("*.py")), *sorted(RECIPES.rglob("*.yaml"))]}


def describe(path: Path) -> str:
    """Describe a recipe by the first sentence of a script's docstring, or the `# What:` line of a config."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return next((line[len(WHAT) :].strip() for line in text.splitlines() if line.startswith(WHAT)), "")


@recipes_app.command("ls")
def list_recipes() -> None:
    """List the training scripts and their configs.

    Example: grin-moe recipes ls
    """
    table = Table("name", "what it does", box=None)
    for name, path in find_recipes().items():
        table.add_row(name, escape(describe(path)))
    console.print(table)


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="a name that `grin-moe recipes ls` lists")],
    destination: Annotated[str, typer.Argument(help="file or folder; a new folder's name ends with /")] = ".",
) -> None:
    """Copy a training script or a config, to edit it. Nothing is overwritten.

    Example: grin-moe recipes cp sft_tiny my_sft.yaml
    """
    source = find_recipes().get(name.removesuffix(".py").removesuffix(".yaml"))
    if source is None:
        raise ValueError(f"There is no recipe {name!r}; `grin-moe recipes ls` lists them")
    target = Path(destination)
    if target.is_dir() or destination.endswith(("/", os.sep)):
        target /= source.name
    if target.exists():
        raise ValueError(f"{target} exists: give another name, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    console.print(f"copied to {escape(target)}")
