"""`grin-moe with`, `chat` and `serve`: Python tools that have never heard of GRIN-MoE."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.request import urlopen

import typer

ANY = {"allow_extra_args": True, "ignore_unknown_options": True}  # typer's settings of a command that hands them on
Model = Annotated[str, typer.Argument(help="folder of a checkpoint, or its name on the Hub")]
SITE = Path(__file__).resolve().parents[1] / "grin_moe_serving" / "site"


def find_tool(name: str) -> str:
    """Return the path of a command: this environment's, even where it is not activated, or else PATH's."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        raise ValueError(f"the command must be installed; got {name}, which is in no folder of PATH")
    return path


def register_in_children() -> None:
    """Let every Python process that starts from here register GRIN-MoE by itself."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))


def run_with(command: list[str]) -> None:
    """Become `command`, with GRIN-MoE registered in it and in its child processes."""
    path = find_tool(command[0])
    register_in_children()
    os.execv(path, [path, *command[1:]])


def with_(context: typer.Context) -> None:
    """Run a Python command line with GRIN-MoE registered, in its child processes as well; nothing is installed.

    Example: grin-moe with -- lm_eval --model hf --model_args pretrained=GRIN-MoE --tasks hellaswag
    """
    if not context.args:
        raise ValueError("`grin-moe with` must be given a command; do `grin-moe with -- lm_eval --help`")
    run_with(context.args)


def chat(
    context: typer.Context,
    model: Model,
    port: Annotated[int, typer.Option(help="port of this machine, on which the model is served meanwhile")] = 8000,
) -> None:
    """Chat in the terminal by transformers' own `chat`, which gets all other arguments; a server runs meanwhile.

    Example: grin-moe chat GRIN-MoE max_new_tokens=500
    """
    transformers, address = find_tool("transformers"), f"http://localhost:{port}"
    register_in_children()
    server = subprocess.Popen([transformers, "serve", model, "--port", str(port)])
    try:
        while server.poll() is None:
            with suppress(OSError):  # it does not answer yet
                urlopen(f"{address}/health").close()
                raise typer.Exit(subprocess.run([transformers, "chat", model, address, *context.args]).returncode)
            time.sleep(0.2)
        raise ValueError("`transformers serve` must run for a chat; it ended: see above")
    finally:
        server.terminate()
        server.wait()


def serve(context: typer.Context, model: Model) -> None:
    """Serve the model over HTTP as OpenAI does, by transformers' own `serve`, which gets all other arguments.

    Example: grin-moe serve GRIN-MoE --port 8000
    """
    run_with(["transformers", "serve", model, *context.args])
