"""`grin-moe card`: a model card from what a training run leaves."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .terminal import Json, print_json, show


def card(
    folder: Annotated[Path, Argument(help="model or LoRA adapter, such as a recipe's output_dir")],
    run: Annotated[Path | None, Option(help="folder of the training run, if FOLDER lacks its files")] = None,
    evaluation: Annotated[Path | None, Option(help="results.json of recipes/evaluate.py")] = None,
    base_evaluation: Annotated[Path | None, Option(help="results.json of the base model, to compare with")] = None,
    repo_id: Annotated[str | None, Option(help="the model's name on the Hub, for the snippets")] = None,
    base_model: Annotated[
        str | None, Option(help="the base model's name on the Hub, if the run does not tell")
    ] = None,
    license: Annotated[str | None, Option(help="license, as the Hub names it; GRIN-MoE's is mit")] = None,
    language: Annotated[list[str] | None, Option(help="ISO 639 code, such as en; may be repeated")] = None,
    force: Annotated[bool, Option("--force", help="overwrite an existing card")] = False,
    as_json: Json = False,
) -> None:
    """Write a model card, README.md with pictures, from the files of a training run.

    Example: grin-moe card output/sft_tiny --repo-id me/grin-tiny --license mit --language en
    """
    options: dict[str, Any] = dict(locals())
    from modeling_grin.publishing.card import write_card

    del options["as_json"]
    written = write_card(**options | {"language": language or []})
    if as_json:
        print_json(written)
    else:
        show([("wrote", ", ".join([written.path, *written.figures])), *(("note", note) for note in written.notes)])
