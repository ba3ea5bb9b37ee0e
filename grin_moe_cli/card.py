"""`grin-moe card`: a model card from what a training run leaves."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .terminal import console, escape


def card(
    folder: Annotated[Path, typer.Argument(help="of a model or a LoRA adapter, such as a recipe's output_dir")],
    run: Annotated[
        Path | None,
        typer.Option(help="the run's folder, for what FOLDER lacks: a checkpoint, a merged or converted model"),
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="results of recipes/evaluate.py (JSON)")] = None,
    base_evaluation: Annotated[Path | None, typer.Option(help="the same of the base model, to stand beside")] = None,
    repo_id: Annotated[str | None, typer.Option(help="where the model will be on the Hub, for the snippets")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="name on the Hub of what it was trained from, where the run does not say")
    ] = None,
    license: Annotated[str | None, typer.Option(help="the Hub's name of it; GRIN-MoE's own is mit")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code, such as en; may be repeated")] = None,
    force: Annotated[bool, typer.Option("--force", help="write over a card that somebody wrote or edited")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="what was written, as JSON")] = False,
) -> None:
    """Write a model card, README.md with pictures, from what a training run left. An edited card is left alone.

    Example: grin-moe card output/sft_tiny --repo-id me/grin-tiny --license mit --language en
    """
    from modeling_grin.publishing.card import write_card

    written = write_card(
        folder,
        run=run,
        evaluation=evaluation,
        base_evaluation=base_evaluation,
        repo_id=repo_id,
        base_model=base_model,
        license=license,
        language=language or [],
        force=force,
    )
    if as_json:
        print(json.dumps(vars(written), indent=2))
        return
    console.print(f"wrote {escape(', '.join([written.path, *written.figures]))}")
    for note in written.notes:
        console.print(f"note: {escape(note)}", highlight=False)
