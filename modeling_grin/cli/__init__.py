"""The `grin-moe` command."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from .card import card
from .checkpoints import convert, inspect
from .push import push
from .recipes import recipes_app
from .routing import routing
from .study import gradients, plan
from .terminal import errors

app = typer.Typer(
    help="Tools for gradient-informed mixture-of-experts models.", no_args_is_help=True, add_completion=False
)
for command in (convert, inspect, routing, gradients, plan, card, push):
    app.command()(command)
app.add_typer(recipes_app, name="recipes")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the whole traceback of an error")] = False,
) -> None:
    """Tools for gradient-informed mixture-of-experts models."""


def main() -> None:
    """Run the command; an error is one sentence and exit code 1, unless `--debug` asks for the traceback."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)
