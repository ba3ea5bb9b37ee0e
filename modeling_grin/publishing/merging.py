"""A recipe's run from its trainer to its end: `run.json`, model, cards, and the model with the adapter merged."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import Trainer

from conversion import convert

from ..configuration_grinmoe import GrinMoeConfig
from ..training.arguments import FineTuningArguments, RecipeArguments
from ..training.run import end_training, exit_on_error, train_and_save
from .card import write_cards
from .record import record_run


def run_to_the_end(trainer: Trainer, arguments: RecipeArguments, method: str) -> None:
    """Train or resume, and leave run.json, model and card in output_dir, with LoRA in output_dir/merged as well.

    Args:
        method: for the card: pretraining, SFT, DPO or GRPO.
    """
    record_run(trainer, arguments, method)
    train_and_save(trainer)
    with exit_on_error():
        write_cards(trainer)
        if isinstance(arguments, FineTuningArguments) and arguments.lora_r and arguments.merge_adapter:
            save_merged(trainer, arguments)
            write_cards(trainer)
    end_training(trainer)


def save_merged(trainer: Trainer, arguments: FineTuningArguments) -> None:
    """Write the base model with the adapter of output_dir, and the tokenizer, to output_dir/merged.

    The main process reads the base's files, matrix by matrix: neither the layout of the run nor 4-bit weights matter.
    """
    adapter, name = Path(trainer.args.output_dir), str(arguments.model_name_or_path)
    made, folder = adapter.with_name(f"{adapter.name}-merged"), adapter / "merged"
    if trainer.is_world_process_zero():
        base = Path(name) if Path(name).is_dir() else Path(snapshot_download(name))
        convert(adapter, made, to="hub", base=base, dtype=arguments.dtype)
        GrinMoeConfig.from_pretrained(made, **arguments.config_overrides).save_pretrained(made)
        (made / "README.md").unlink(missing_ok=True)  # the adapter's card
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    trainer.accelerator.wait_for_everyone()
