"""Opening a checkpoint: its form is found out from what lies in the folder."""

from collections.abc import Mapping
from pathlib import Path

from .checkpoint import Checkpoint
from .forms import released_tensors
from .headers import ADAPTER_CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, find_tensors, read_config, read_json
from .pickles import find_dcp_folder, find_pickles, read_dcp, read_pickles
from .tensors import ConversionError, StoredTensor


def open_checkpoint(path: Path, *, config: Path | None = None, weights_only: bool = False) -> Checkpoint:
    """Read and check what a checkpoint's files say of themselves; tensors are read later.

    Args:
        path: a folder with safetensors files in any form, or with a sharded training checkpoint.
        config: another folder to take the config from: sharded checkpoints have none.
        weights_only: read pickled files (`pytorch_model.bin`, DCP), which are refused otherwise, through torch's
            restricted unpickler, which makes tensors and runs nothing.

    Raises:
        ConversionError: what is wrong, and where; or the folder holds an adapter, which is opened with its base
            (`adapters.py`).
    """
    if not path.is_dir():
        hint = "give the folder of a checkpoint; `hf download OWNER/NAME --local-dir FOLDER` fetches one from the Hub"
        raise ConversionError(f"{path} is not a folder: {hint}")
    if (path / ADAPTER_CONFIG_FILE).is_file() and not (path / "config.json").is_file():
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
    if not (config_folder / "config.json").is_file():
        raise ConversionError(f"{config_folder} has no config.json: give the folder of one with --config")
    model_config = read_config(config_folder)
    layout, _, tensors = released_tensors(found, model_config, str(path))
    is_standard = not form and config is None and any((path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
    is_standard &= layout.name != "stock" and any(
        name in found for name in ("model.embed_tokens.weight", "embed_tokens.weight")
    )
    if not form:
        is_phimoe = layout.name == "hub" and read_json(config_folder / "config.json").get("model_type") == "phimoe"
        form = "phimoe" if is_phimoe else layout.name
    return Checkpoint(path, form, model_config, tensors, is_standard)
