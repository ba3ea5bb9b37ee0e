"""Saving over an older checkpoint: a folder holds the old one, the new one, or none that loads, never some of each.

transformers overwrites config and shards one after the other while the old index still names them all. Killed
meanwhile, such a folder loads without a word. Here the new files are made in a folder inside, and moved when they are
complete: for the time of the moves nothing loads.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import PreTrainedModel

UNFINISHED = ".incomplete"  # the folder that new files are made in; a killed save leaves it, the next one removes it


class AtomicSavingMixin(PreTrainedModel):
    """Models whose `save_pretrained` never leaves a mixture of an old and a new checkpoint."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """As in transformers, but over an older checkpoint the folder never loads as a mixture of both.

        The old files stay, and need their disk space, until the new ones are complete.
        """
        settings = {
            "is_main_process": is_main_process,
            "state_dict": state_dict,
            "push_to_hub": push_to_hub,
            "max_shard_size": max_shard_size,
            "variant": variant,
            **kwargs,
        }
        folder, suffix = Path(save_directory), f".{variant}" if variant else ""
        is_writer = self.should_save_on_this_rank(is_main_process) and not folder.is_file()
        layout = getattr(self.config, "distributed_config", None)
        if push_to_hub:
            settings.setdefault("repo_id", os.fspath(save_directory).split(os.path.sep)[-1])
        if kwargs.get("distributed_checkpoint"):  # all ranks write, and readers take whatever shards they find
            made = folder / UNFINISHED
            if is_writer:
                shutil.rmtree(made, ignore_errors=True)
            self.barrier_after_gathered_checkpoint_save(layout)
            super().save_pretrained(made, **settings)
            if is_writer:
                unreadable = folder / "incomplete.safetensors"  # an empty one, at which readers fail
                unreadable.touch()
                replace_files(made, folder, ["config.json"], shard=re.compile(r"(?!incomplete).*\.safetensors"))
                unreadable.unlink()
                made.rmdir()
        else:
            is_adapter = getattr(self, "_hf_peft_config_loaded", False)
            weights = "adapter_model.safetensors" if is_adapter else f"model{suffix}.safetensors"
            index = None if is_adapter else f"model.safetensors.index{suffix}.json"
            with replacing_checkpoint(folder, weights, index) if is_writer else nullcontext(folder) as made:
                super().save_pretrained(made, **settings)
        self.barrier_after_gathered_checkpoint_save(layout)


@contextmanager
def replacing_checkpoint(folder: Path, weights: str, index: str | None) -> Iterator[Path]:
    """The folder to save a checkpoint to; at the end its files take the place of those in `folder`.

    Where `folder` has no weights yet, it is that folder itself: nothing in it loads too early. Written weights are
    moved even if something is raised afterwards (while they are pushed, say).

    Args:
        weights: name of the file of weights, or, with `-00001-of-00002` before its suffix, of its shards.
        index: name of the shards' index, if there may be one.
    """
    last = [name for name in (index, weights) if name]  # a reader needs one of them
    made = folder / UNFINISHED
    shutil.rmtree(made, ignore_errors=True)
    if not any((folder / name).exists() for name in last):
        yield folder
        give_umasks_mode(folder)
        return
    try:
        yield made
    finally:
        give_umasks_mode(made)
        if any((made / name).exists() for name in last):
            replace_files(
                made, folder, last, shard=re.compile(rf"{Path(weights).stem}-\d{{5}}-of-\d{{5}}\.safetensors")
            )
        shutil.rmtree(made, ignore_errors=True)


def replace_files(made: Path, folder: Path, last: list[str], shard: re.Pattern) -> None:
    """Move all files of `made` to `folder`, where nothing is left of the old weights: neither shards nor the `last`
    files, with which a reader begins."""
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name in last)
    for name in last:  # readers take a single file first, so it goes after the index
        (folder / name).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if shard.fullmatch(path.name):
            path.unlink()
    for name in names:
        if (made / name).is_dir():  # what a distributed save has pushed
            shutil.rmtree(folder / name, ignore_errors=True)
        (made / name).replace(folder / name)


def give_umasks_mode(folder: Path) -> None:
    """Give a folder's safetensors files the mode of a new file: safetensors makes them for their owner alone."""
    files = [path for path in folder.glob("*.safetensors") if stat.S_IMODE(path.stat().st_mode) == 0o600]
    if files:
        new = folder / UNFINISHED  # a name that the next save removes, should this one be killed here
        new.mkdir(exist_ok=True)
        mode = new.stat().st_mode & 0o666
        new.rmdir()
        for path in files:
            path.chmod(mode)
