"""Read the JSON files, configs and indexes of a checkpoint. Anybody may have written them.

Every function checks what it reads and raises `ConversionError` for anything else. Nothing is unpickled or fetched, no
name leads out of its folder, and time and memory are bounded by the size of the file.
"""

import dataclasses
import json
import re
import textwrap
from inspect import getattr_static
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from modeling_grin import GrinMoeConfig
from modeling_grin.planning.parameters import count_parameters
from modeling_grin.safetensors_header import unique_keys

from .tensors import ConversionError, StoredTensor, read_tensors

CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}

# Parsed JSON takes up to 30 times the memory of its text. A config has a few kB, a tokenizer's config with many added
# tokens 1 MB, an index of all the release's tensors 0.3 MB.
MAX_CONFIG_BYTES = 2_000_000
MAX_INDEX_BYTES = 20_000_000
MAX_PARAMETERS = 10**14
MAX_COUNTS = {"num_labels": 10**5, "max_position_embeddings": 10**9, "sliding_window": 10**9}  # labels have names
# How to run a model is not part of the model, and transformers accepts a Hub repository here, whose code it would run.
RUNTIME_FIELDS = {"attn_implementation", "experts_implementation", "transformers_weights"}


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file (UTF-8) that has no key twice, of which only one can be meant."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ConversionError(f"{path} is missing, or not a file")
    if path.stat().st_size > max_bytes:
        raise ConversionError(f"{path} must have at most {max_bytes} bytes; got {path.stat().st_size}")
    try:
        parsed = json.loads(path.read_bytes().decode(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} does not hold JSON that can be read ({error}): fetch it again") from error
    if not isinstance(parsed, dict):
        raise ConversionError(f"{path} must hold a JSON object; got a JSON {type(parsed).__name__}")
    return parsed


# ---- Weights


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder without reading them, from its index or its only safetensors file."""
    safetensors = sorted(path.glob("*.safetensors"))
    index = path / INDEX_FILE
    if not index.exists():
        chosen = [file for file in safetensors if file.name == WEIGHTS_FILE] or safetensors
        if len(chosen) == 1:
            return read_tensors(chosen[0])
        if chosen:
            names = ", ".join(file.name for file in chosen[:5])
            raise ConversionError(f"{path} has {len(chosen)} weight files ({names}) and no {INDEX_FILE}: fetch that")
        if any(file.suffix in PICKLE_SUFFIXES for file in path.iterdir()):
            raise ConversionError(f"{path} has its weights in pickles, which can run code: --weights-only runs none")
        raise ConversionError(f"{path} has no weights: no {INDEX_FILE}, {WEIGHTS_FILE} or other safetensors file")

    listed = read_json(index, MAX_INDEX_BYTES)
    weight_map = listed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(listed.get("metadata", {}), dict):
        raise ConversionError(f"{index} has no weight_map from tensors to files, or metadata that is no object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", file):
            raise ConversionError(
                f"{index} puts {name!r:.120} in {file!r:.120}, not a safetensors file in its own folder"
            )
    places = {name: path / file for name, file in weight_map.items()}
    if path / WEIGHTS_FILE in set(safetensors) - set(places.values()):
        raise ConversionError(f"{path} has both a {WEIGHTS_FILE} and an {INDEX_FILE} of other files: remove one")
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(places.values()):
        for name, tensor in read_tensors(file).items():
            if places.get(name) != file:
                elsewhere = f"puts it in {places[name].name}" if name in places else "does not list it"
                raise ConversionError(f"{file} holds tensor {name!r:.120}, but {INDEX_FILE} {elsewhere}")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise ConversionError(f"{file} lacks tensor {name!r:.120}, which {INDEX_FILE} puts there")
    return tensors


# ---- Configs


def explain(error: Exception) -> str:
    """Return what an error of transformers' says, on one line that is short enough to read."""
    return f"{type(error).__name__}: {''.join(filter(str.isprintable, textwrap.shorten(str(error), 500)))}"


def read_generation_config(path: Path) -> dict[str, Any]:
    """Return the fields of a generation_config.json; raise ConversionError unless transformers accepts them."""
    values = read_json(path)
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # of any type: transformers' code meets values that it never expects
        raise ConversionError(f"{path} is not usable: {explain(error)}") from error
    return values


def read_config(folder: Path) -> GrinMoeConfig:
    """Return the model's config from the folder's config.json (`grinmoe` or `phimoe`), without runtime settings."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    values = {name: value for name, value in values.items() if name.removeprefix("_") not in RUNTIME_FIELDS}
    if values.get("quantization_config") is not None:
        raise ConversionError(f"{path} has a quantization_config: dequantize the model, save it, and convert that")
    for name, most in MAX_COUNTS.items():
        if isinstance(values.get(name), (int, float)) and values[name] > most:
            raise ConversionError(f"{path}: {name} must be at most {most}; got {values[name]!r:.120}")
    # transformers sets unknown fields as attributes, even over the methods and plans of its class.
    known = {field.name for field in dataclasses.fields(GrinMoeConfig)} | {"model_type"}
    for name in values.keys() - known:
        if not isinstance(getattr_static(GrinMoeConfig, name, property()), property):
            raise ConversionError(f"{path}: {name!r:.120} is not a field but part of the config's class: remove it")
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if not isinstance(vars(torch).get(str(dtype)), torch.dtype):
        raise ConversionError(f"{path}: dtype must be one of torch's, such as 'bfloat16'; got {dtype!r:.120}")
    try:
        json.dumps(values, allow_nan=False)
        config = GrinMoeConfig.from_dict(values)
        json.dumps(config.to_dict())  # it can be copied and written
    except Exception as error:  # of any type, as above
        raise ConversionError(f"{path} is not a usable config: {explain(error)}") from error
    if count_parameters(config)[0] > MAX_PARAMETERS:
        raise ConversionError(f"{path} has sizes that make more than {MAX_PARAMETERS:.0e} parameters: no model has")
    return config


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a LoRA's adapter_config.json; peft checks most of them when it loads the adapter."""
    path = folder / ADAPTER_CONFIG_FILE
    values = read_json(path)
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    if kind != "LORA":
        raise ConversionError(f"{path}: peft_type must be 'LORA', other adapters cannot be merged; got {kind!r:.120}")
    if not isinstance(base, (str, type(None))):
        raise ConversionError(f"{path}: base_model_name_or_path must be a name or null; got {base!r:.120}")
    return {**values, "base_model_name_or_path": base}
