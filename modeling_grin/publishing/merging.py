"""Merge the adapter that a recipe has trained into the files of its base model."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import Trainer

from conversion import convert

from ..configuration_grinmoe import GrinMoeConfig
from ..training.arguments import FineTuningArguments
from ..training.run import exit_on_error


def save_merged(trainer: Trainer, arguments: FineTuningArguments) -> None:
    """Write the base model with the adapter of output_dir, and the tokenizer, to output_dir/merged.

    The main process reads the base's files, matrix by matrix: neither the layout of the run nor 4-bit weights matter.
    A merge that is refused ends the run with a sentence that says why.
    """
    adapter, name = Path(trainer.args.output_dir), str(arguments.model_name_or_path)
    made, folder = adapter.with_name(f"{adapter.name}-merged"), adapter / "merged"
    with exit_on_error():
        if trainer.is_world_process_zero():
            base = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
            convert(adapter, made, to="hub", base=base, dtype=arguments.dtype)
            GrinMoeConfig.from_pretrained(made, **arguments.config_overrides).save_pretrained(made)
            (made / "README.md").unlink(missing_ok=True)  # the adapter's card
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    trainer.accelerator.wait_for_everyone()
