"""A checkpoint in memory, whatever its form on disk: a config and the released tensors."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_grin import GrinMoeConfig
from modeling_grin.modeling_grinmoe import GrinMoePreTrainedModel

from .forms import model_class_of, released_tensors
from .headers import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, find_tensors, read_config, read_json
from .pickles import find_dcp_folder, find_pickles, read_dcp, read_pickles
from .tensors import ConversionError, StoredTensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its headers have been read and checked, its tensors have not been read.

    Args:
        path: the folder it was opened from, with tokenizer and generation settings beside the weights.
        form: `hub`, `fused`, `phimoe`, `dcp` or `pickle`; `adapter` after an adapter was merged into it, `experts`
            after the number of experts was changed.
        config: as this library understands it, whatever the file's model type.
        tensors: every tensor that the model needs, by its released name, in the model's order, and no other. Experts
            are `model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight` [F, H] (gate), `w3` [F, H] (up) and `w2`
            [H, F] (down).
        is_standard: whether transformers' `from_pretrained` reads the folder as it is.
    """

    path: Path
    form: str
    config: GrinMoeConfig
    tensors: Mapping[str, StoredTensor]
    is_standard: bool = False

    @property
    def model_class(self) -> type[GrinMoePreTrainedModel]:
        return model_class_of(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor as it is."""
        return functools.reduce(torch.promote_types, {tensor.dtype for tensor in self.tensors.values()})


def open_checkpoint(path: Path, *, config: Path | None = None, weights_only: bool = False) -> Checkpoint:
    """Read and check the headers of a checkpoint; tensors are read later.

    Args:
        path: a folder with safetensors files in any form, or with a sharded training checkpoint.
        config: another folder to take the config from: sharded checkpoints have none.
        weights_only: read pickles (`pytorch_model.bin`, DCP), which are refused otherwise, without running code.

    Raises:
        ConversionError: says what is wrong and where. A folder with an adapter is opened with its base
            (`adapters.py`).
    """
    if not path.is_dir():
        raise ConversionError(
            f"{path} is not a folder: `hf download OWNER/NAME --local-dir FOLDER` fetches a checkpoint"
        )
    if (path / ADAPTER_CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file():
        raise ConversionError(f"{path} holds an adapter, which needs its base model: give it with --base FOLDER")
    found: Mapping[str, StoredTensor]
    dcp_folder, pickles = find_dcp_folder(path), find_pickles(path)
    if dcp_folder is not None:
        form, found = "dcp", read_dcp(dcp_folder, weights_only=weights_only)
    elif pickles and weights_only:
        form, found = "pickle", read_pickles(pickles)
    else:
        form, found = "", find_tensors(path)
    config_folder = config or path
    if not (config_folder / CONFIG_FILE).is_file():
        raise ConversionError(f"{config_folder} has no config.json: give the folder of one with --config")
    model_config = read_config(config_folder)
    layout, tensors = released_tensors(found, model_config, str(path))
    if form:
        return Checkpoint(path, form, model_config, tensors)
    if layout == "hub" and read_json(config_folder / CONFIG_FILE).get("model_type") == "phimoe":
        layout = "phimoe"
    has_standard_names = "model.embed_tokens.weight" in found or "embed_tokens.weight" in found
    has_standard_files = (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()
    is_standard = config is None and has_standard_names and has_standard_files
    return Checkpoint(path, layout, model_config, tensors, is_standard)
