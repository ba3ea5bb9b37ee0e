"""The `grin-moe` command."""

import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from .card import card
from .checkpoints import convert, inspect
from .doctor import doctor
from .push import push
from .recipes import recipes_app
from .routing import routing
from .serving import ANY, chat, serve, with_
from .study import gradients, plan
from .terminal import errors, escape, is_plain

app = typer.Typer(
    help="Tools for gradient-informed mixture-of-experts models.", no_args_is_help=True, add_completion=False
)
for command in (convert, inspect, routing, gradients, plan, card, push, doctor):
    app.command()(command)
app.command("with", context_settings=ANY)(with_)
app.command(context_settings=ANY)(chat)
app.command(context_settings=ANY)(serve)
app.add_typer(recipes_app, name="recipes")


def show_version(asked: bool) -> None:
    if asked:
        print(*(f"{name} {version(name)}" for name in ("grin-moe", "transformers", "torch")), sep="\n")
        raise typer.Exit


@app.callback()
def options(
    version_asked: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="show versions")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the whole traceback of an error")] = False,
) -> None:
    """Tools for gradient-informed mixture-of-experts models."""


def main() -> None:
    """Run the command; an error is one sentence and exit code 1, unless `--debug` asks for the traceback."""
    try:
        for argument in sys.argv[1:]:  # typer's own errors quote them as they are
            if not all(map(is_plain, argument)):
                raise ValueError(f"the argument {argument} has control characters: rename what it names")
        app()
    except Exception as error:
        said = traceback.format_exc() if "--debug" in sys.argv else error
        errors.print(f"[red]error:[/red] {escape(said)}", highlight=False)
        sys.exit(1)
