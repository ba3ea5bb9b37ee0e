"""One checkpoint into another: open, change, write, check, rename."""

import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from modeling_grin import GrinMoeForCausalLM, __version__
from modeling_grin.analysis import expert_load
from modeling_grin.files import describe_links

from . import adapters, checks, experts
from .checkpoint import Checkpoint
from .configs import phimoe_config, phimoe_notes
from .forms import FUSED, HUB, model_class_of
from .headers import (
    ADAPTER_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    read_generation_config,
    read_json,
)
from .sources import open_checkpoint
from .tensors import ConversionError, FileTensor
from .writing import Progress, check_destination, check_space, fingerprint, outputs, staged, write_safetensors

FOLDERS = ("hub", "fused", "phimoe")
TARGETS = (*FOLDERS, "gguf", "adapter")
MAX_SHARD_SIZE = "5GB"
SHARD_SIZE = re.compile(r"[1-9]\d*(\.\d+)?([KMGT]B)?")
CALIBRATION_ROW = 2048  # tokens of a text in one forward pass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Files that a checkpoint has beside its weights and config. Remote code is left: the release's no longer imports.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)


@dataclass
class Report:
    """What a conversion did.

    Args:
        parameters, nbytes: of the weights that were written.
        difference: of the logits before and after, relative to the largest; None where they were not computed.
        left: files of the source that were not carried over, weights and config aside.
        notes: what a user should know, in sentences.
    """

    source: str
    form: str
    destination: str
    target: str
    parameters: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    difference: float | None = None
    carried: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    base: str | Path | None = None,
    config: str | Path | None = None,
    weights_only: bool = False,
    num_experts: int | None = None,
    top_k: int | None = None,
    noise: float | None = None,
    seed: int | None = None,
    calibration: str | Path | None = None,
    check: bool | None = None,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Convert a checkpoint, streaming: a few MB of its weights are in memory at a time.

    Args:
        source: a folder; its form is found out.
        destination: the folder to make (for `gguf`, the file); it must not be there, or be empty.
        to: `hub` (the released layout), `fused` (experts stacked), `phimoe` (the released layout for transformers'
            own Phimoe classes) or `gguf`; `adapter` makes a LoRA adapter one of single experts' matrices.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own. For `gguf`, its file type.
        max_shard_size: of a file of weights, as in `save_pretrained`; 5GB by default.
        base: the folder of an adapter's base model, instead of what its config names.
        config: a folder with the config.json of a checkpoint that has none.
        weights_only: read pickled sources (`pytorch_model.bin`, DCP) through torch's restricted unpickler.
        num_experts: make a model of so many experts per layer: copies, of a model with one expert; or the most loaded
            ones on the `calibration` text, of a model with more.
        top_k, noise, seed: of the copies: experts per token (by default 2), relative standard deviation of the noise
            on the copies (0), and seed of noise and routers (0).
        calibration: a text file to measure routing on: expert load, near-ties, size of router logits.
        check: compare the logits of source and result, in float64; by default for up to `checks.SMALL` parameters.
            Where they differ nothing is written.
        resume: go on with a conversion that was interrupted.
        progress: called with the bytes written since the last call and those in all, from any thread.

    Raises:
        ConversionError: names the file, tensor, field or argument at fault. Nothing has been written then.
    """
    started = time.monotonic()
    source, destination = Path(source).resolve(), Path(destination).resolve()
    is_adapter = (source / ADAPTER_CONFIG_FILE).is_file()
    check_arguments(source, destination, to, dtype, max_shard_size, calibration)
    needed = {
        "max_shard_size": (max_shard_size, to in FOLDERS, "the result is one file"),
        "dtype": (dtype, to != "adapter", "an adapter's numbers are kept"),
        "check": (check, to != "adapter", "an adapter is no model"),
        "num_experts": (num_experts, to != "adapter", "an adapter is no model: merge it first, by to='hub'"),
        "base": (base, is_adapter, "the source is no adapter"),
        "config": (config, not is_adapter, "the base of an adapter has a config"),
        "top_k": (top_k, num_experts is not None, "it is about copies of experts: give num_experts"),
        "noise": (noise, num_experts is not None, "it is about copies of experts: give num_experts"),
        "seed": (seed, num_experts is not None, "it is about copies of experts: give num_experts"),
        "calibration": (calibration, num_experts is not None or to == "gguf", "nothing is measured: give num_experts"),
    }
    for name, (value, has_effect, reason) in needed.items():
        if value is not None and not has_effect:
            raise ConversionError(f"{name}={value} would have no effect: {reason}")

    if is_adapter and to != "adapter":
        base = adapters.find_base(source, base)
    # In whose folders the tokenizer may be; an adapter's and that of --config are the newer ones.
    beside = [Path(path) for path in ((base, source) if is_adapter else (source, config)) if path is not None]
    inputs = [Path(path).resolve() for path in (source, base, config, calibration) if path is not None]
    for path in inputs:
        if path.is_dir() and (problem := describe_links(path)):
            raise ConversionError(problem)
    for folder in beside:
        check_settings(folder)
    plan = {"source": [(str(path), fingerprint(path)) for path in inputs], "to": to, "dtype": dtype,
            "max_shard_size": max_shard_size, "num_experts": num_experts, "top_k": top_k, "noise": noise,
            "seed": seed, "version": __version__}  # fmt: skip
    if to == "adapter":
        with staged(destination, plan, resume) as result:
            adapters.export_adapter(source, Path(base) if base else None, result)
        return Report(str(source), "adapter", str(destination), to, seconds=time.monotonic() - started)

    opened = open_source(source, base, config, weights_only, dtype)
    report = Report(str(source), opened.form, str(destination), to)
    checkpoint = change_experts(opened, num_experts, top_k, noise, seed, calibration, report)
    report.parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if check is None:
        check = report.parameters <= checks.SMALL
    with staged(destination, plan, resume) as result:
        if to == "gguf":
            write_gguf(checkpoint, result, dtype or "f16", calibration, progress, report)
        else:
            write_folder(checkpoint, beside, result, to, dtype, max_shard_size or MAX_SHARD_SIZE, progress, report)
        if check:
            if opened.config.num_local_experts == 1 < checkpoint.config.num_local_experts and not noise:
                difference = checks.compare_copies(opened, checkpoint)
                report.notes.append(
                    f"the same logits as the one expert's, but for near-ties: these change them by {difference:.2g} "
                    f"(relative) at router_jitter_noise={checkpoint.config.router_jitter_noise}"
                )
            report.difference = prove(checkpoint, result, to, dtype)
            if to == "gguf" and calibration is None:
                rate = checks.near_tie_rate(checkpoint)
                report.notes.append(f"near-ties on random tokens, for want of a text: {rate:.2%} of (token, layer)")
    report.seconds = time.monotonic() - started
    return report


def check_arguments(
    source: Path,
    destination: Path,
    to: str,
    dtype: str | None,
    max_shard_size: int | str | None,
    calibration: str | Path | None,
) -> None:
    """Raise ConversionError for arguments that are wrong whatever the checkpoint is."""
    if to not in TARGETS:
        raise ConversionError(f"to={to!r} is unknown: use one of {', '.join(TARGETS)}")
    check_destination(destination, source, is_file=to == "gguf")
    if to in FOLDERS and dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if to == "gguf" and destination.suffix != ".gguf":
        raise ConversionError(f"{destination}: GGUF is one file, give it a name that ends with .gguf")
    if max_shard_size is not None and not SHARD_SIZE.fullmatch(str(max_shard_size)):
        raise ConversionError(f"max_shard_size={max_shard_size!r} is no size: give one such as 500MB or 5GB")
    if calibration is not None and not Path(calibration).is_file():
        raise ConversionError(f"calibration={calibration} is not a file: give a text file")


def check_settings(folder: Path) -> None:
    """Raise ConversionError for JSON beside the weights that nobody could read, before it is copied."""
    for path in sorted(folder.glob("*.json")):
        if path.name == GENERATION_CONFIG_FILE:
            read_generation_config(path)
        elif path.name in CARRIED and path.name != "tokenizer.json":  # which may be large, and only `tokenizers` reads
            read_json(path, MAX_HEADER_BYTES)


def open_source(
    source: Path, base: str | Path | None, config: str | Path | None, weights_only: bool, dtype: str | None
) -> Checkpoint:
    """The checkpoint in a folder, an adapter merged into its base."""
    if not (source / ADAPTER_CONFIG_FILE).is_file():
        return open_checkpoint(source, config=Path(config) if config else None, weights_only=weights_only)
    base_checkpoint = open_checkpoint(Path(base or ""), weights_only=weights_only)
    return adapters.merge_adapter(source, base_checkpoint, DTYPES.get(dtype or ""))


def change_experts(
    checkpoint: Checkpoint,
    num_experts: int | None,
    top_k: int | None,
    noise: float | None,
    seed: int | None,
    calibration: str | Path | None,
    report: Report,
) -> Checkpoint:
    """The checkpoint with `num_experts` experts in each layer."""
    present = checkpoint.config.num_local_experts
    if num_experts is None:
        return checkpoint
    if present == 1:
        if calibration is not None and report.target != "gguf":
            raise ConversionError(f"calibration={calibration} would have no effect: there is but one expert to copy")
        top_k, noise, seed = top_k or 2, noise or 0.0, seed or 0
        report.notes.append(
            f"{num_experts} copies of the one expert, top-{top_k}: down projections divided by {top_k}, routers drawn "
            f"with seed {seed}"
        )
        return experts.upcycle(checkpoint, num_experts, top_k=top_k, noise=noise, seed=seed)
    for name, value in (("top_k", top_k), ("noise", noise), ("seed", seed)):
        if value is not None:
            raise ConversionError(
                f"{name}={value} would have no effect: of {present} experts some are kept, not copied"
            )
    if calibration is None:
        raise ConversionError(
            f"which {num_experts} of the {present} experts to keep is decided by their load on a text: give one with "
            "--calibration FILE"
        )
    rows = calibration_rows(checkpoint, Path(calibration))
    load = expert_load(checks.load_model(checkpoint), [{"input_ids": row[None]} for row in rows])
    pruned = experts.prune(checkpoint, load, num_experts)
    kept = load.topk(num_experts, dim=1).values.sum(dim=1)
    report.notes.append(
        f"kept {num_experts} of {present} experts per layer, which had {kept.min():.1%} to {kept.max():.1%} of a "
        "layer's load"
    )
    return pruned


def calibration_rows(checkpoint: Checkpoint, path: Path) -> list[torch.Tensor]:
    """The token ids of a text, in rows that the model has positions for.

    Raises:
        ConversionError: there is no tokenizer beside the checkpoint, or it is another model's; or the text is empty.
    """
    config = checkpoint.config
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not a text in UTF-8: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, config=config)
    except Exception as error:  # of any type: `tokenizers` raises nothing more special
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(f"{checkpoint.path} has no tokenizer to read {path} with: {reason}") from error
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    if len(ids) == 0:
        raise ConversionError(f"{path} is empty: give a text like those that the model is for")
    if ids.max() >= config.vocab_size:
        raise ConversionError(
            f"{checkpoint.path}: the tokenizer gives id {ids.max()}, the model has vocab_size={config.vocab_size}: it "
            "is another model's tokenizer"
        )
    return list(ids.split(min(CALIBRATION_ROW, config.max_position_embeddings)))


def write_folder(
    checkpoint: Checkpoint,
    beside: Sequence[Path],
    folder: Path,
    to: str,
    dtype: str | None,
    max_shard_size: int | str,
    progress: Progress,
    report: Report,
) -> None:
    """Write weights, config and what belongs to them. What is there of an interrupted conversion is kept."""
    model_class = model_class_of(checkpoint.tensors)
    config = config_for(checkpoint, to, dtype)
    groups = (FUSED if to == "fused" else HUB).groups(checkpoint.config, model_class)
    made = outputs(groups, checkpoint.tensors, DTYPES.get(dtype or ""))
    report.nbytes = sum(output.nbytes for output in made.values())
    if to == "phimoe":
        report.notes += phimoe_notes(checkpoint.config)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    carry_files(checkpoint, beside, folder, to, report)  # first, because these files may be found wrong
    check_space(folder, report.nbytes)
    write_safetensors(made, folder, max_shard_size, progress)


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    file_type: str,
    calibration: str | Path | None,
    progress: Progress,
    report: Report,
) -> None:
    """Write a GGUF file for llama.cpp, with the tokenizer in it."""
    try:
        from . import gguf_export
    except ImportError as error:
        raise ConversionError("writing GGUF needs the gguf package: pip install 'grin-moe[gguf]'") from error

    measured = None
    if calibration is not None:
        rows = calibration_rows(checkpoint, Path(calibration))
        measured = gguf_export.calibrate(checks.load_model(checkpoint), rows)
    written = gguf_export.export_gguf(checkpoint, path, file_type=file_type, calibration=measured, progress=progress)
    report.nbytes = path.stat().st_size
    report.notes += written.lines()


def config_for(checkpoint: Checkpoint, to: str, dtype: str | None) -> dict[str, Any]:
    """The config.json of the result."""
    config = checkpoint.config.__class__.from_dict(checkpoint.config.to_dict())
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if dtype or config.dtype not in stored:
        config.dtype = DTYPES[dtype] if dtype else checkpoint.dtype
    model_class = model_class_of(checkpoint.tensors)
    if to == "phimoe":
        values = phimoe_config(config)
        if model_class is not GrinMoeForCausalLM:
            values["architectures"] = [checks.STOCK_CLASSES[model_class].__name__]
        return values
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [model_class.__name__]}


def carry_files(checkpoint: Checkpoint, beside: Sequence[Path], folder: Path, to: str, report: Report) -> None:
    """Copy what lies beside the weights, in the folders `beside`; of files of the same name, the last one's."""
    converted = {tensor.path.name for tensor in checkpoint.tensors.values() if isinstance(tensor, FileTensor)}
    converted |= {"config.json", INDEX_FILE}
    carried, left = set(), set()
    for path in (path for source in beside for path in source.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in CARRIED):
            shutil.copyfile(path, folder / path.name)
            carried.add(path.name)
        elif path.name not in converted:
            left.add(path.name)
    report.carried, report.left = sorted(carried), sorted(left)
    settings = folder / "tokenizer_config.json"
    if to == "phimoe" and settings.is_file():
        # Ours is not known to stock transformers, nor is the release's LlamaTokenizer what its tokenizer.json says.
        values = {**read_json(settings), "tokenizer_class": "PreTrainedTokenizerFast"}
        values.pop("auto_map", None)
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def prove(checkpoint: Checkpoint, result: Path, to: str, dtype: str | None) -> float:
    """Compare the logits of source and result; the relative difference."""
    input_ids = checks.probe(checkpoint)
    if to == "gguf":
        return checks.compare_gguf(checkpoint, result, input_ids, is_exact=dtype == "f32")
    rounded_to = DTYPES.get(dtype or "", checkpoint.dtype)
    before = checks.compute_source(checkpoint, rounded_to, input_ids)
    model_class = model_class_of(checkpoint.tensors)
    return checks.compare(before, checks.compute_result(result, to, model_class, rounded_to, input_ids))
