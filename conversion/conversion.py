"""Convert one checkpoint into another: open, change, write, check, rename."""

import itertools
import json
import math
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from modeling_grin import GrinMoeForCausalLM, __version__
from modeling_grin.files import describe_links, write_whole

from . import adapters, verify
from .checkpoint import Checkpoint, open_checkpoint
from .experts import prune, upcycle
from .forms import list_groups
from .headers import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    read_generation_config,
    read_json,
)
from .phimoe_config import check_engine, phimoe_config, phimoe_notes
from .tensors import ConversionError
from .writing import Progress, check_destination, check_space, fingerprint, outputs, staged, write_safetensors

FOLDERS = ("hub", "fused", "phimoe")
TARGETS = (*FOLDERS, "gguf")
MAX_SHARD_SIZE = "5GB"
SHARD_SIZE = re.compile(r"[1-9]\d*(\.\d+)?([KMGT]B)?")
CALIBRATION_ROW = 2048  # tokens of a text in one forward pass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Files that are copied from beside the weights. Remote code is skipped: the release's no longer imports.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass
class Request:
    """A request to convert a checkpoint: source, destination and options.

    Args:
        source: a folder; its form is detected.
        destination: the folder to make (for `gguf`, the file); it must be absent or empty.
        to: `hub` (the released layout), `fused` (experts stacked), `phimoe` (the released layout for transformers'
            own Phimoe classes) or `gguf`.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own. For `gguf`, its file type.
        max_shard_size: of a file of weights, as in `save_pretrained`; 5GB by default.
        base: the folder of an adapter's base model, instead of the one its config names.
        config: a folder with the config.json of a checkpoint that has none.
        weights_only: read pickled sources (`pytorch_model.bin`, DCP) without running code.
        num_experts: experts per layer of the result: copies of a model's single expert, or the most used ones on the
            `calibration` text.
        top_k: experts per token of copies; 2 by default.
        calibration: a text file to measure routing on: expert load, near-ties, size of router logits.
        check: compare the logits of source and result, in float64; by default for up to `verify.SMALL` parameters.
            If they differ, nothing is written.
        resume: continue an interrupted conversion.
        engine: who will read `phimoe` (`transformers`, `vllm`, `sglang`): refused if it would compute something else.
        progress: called with the bytes written since the last call and those in all.
    """

    source: Path
    destination: Path
    to: str
    dtype: str | None = None
    max_shard_size: int | str | None = None
    base: Path | None = None
    config: Path | None = None
    weights_only: bool = False
    num_experts: int | None = None
    top_k: int | None = None
    calibration: Path | None = None
    check: bool | None = None
    resume: bool = False
    engine: str | None = None
    progress: Progress = lambda done, total: None

    def __post_init__(self) -> None:
        self.source, self.destination = self.source.resolve(), self.destination.resolve()
        for name in ("base", "config", "calibration"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, Path(path))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.dtype or "")

    @property
    def is_adapter(self) -> bool:
        return (self.source / ADAPTER_CONFIG_FILE).is_file()

    @property
    def companion_folders(self) -> list[Path]:
        """The folders whose tokenizer and other files are copied; of files of the same name, the last one's."""
        folders = (self.base, self.source) if self.is_adapter else (self.source, self.config)
        return [path for path in folders if path is not None]

    def plan(self) -> dict[str, Any]:
        """Return everything that the result depends on."""
        inputs = (self.source, self.base, self.config, self.calibration)
        files = [(str(path.resolve()), fingerprint(path)) for path in inputs if path is not None]
        names = ("to", "dtype", "max_shard_size", "num_experts", "top_k")
        return {"source": files, **{name: getattr(self, name) for name in names}, "version": __version__}

    def check_arguments(self) -> None:
        """Raise ConversionError for arguments that are wrong or would have no effect, whatever the checkpoint is."""
        if self.to not in TARGETS:
            raise ConversionError(f"to must be one of {', '.join(TARGETS)}; got {self.to!r}")
        check_destination(self.destination, self.source)
        if self.to in FOLDERS and self.dtype is not None and self.dtype not in DTYPES:
            raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.to == "gguf" and (self.destination.suffix != ".gguf" or self.destination.is_dir()):
            raise ConversionError(f"{self.destination}: GGUF is one file, give it a new name that ends with .gguf")
        if self.max_shard_size is not None and not SHARD_SIZE.fullmatch(str(self.max_shard_size)):
            raise ConversionError(f"max_shard_size must be a size such as 500MB or 5GB; got {self.max_shard_size!r}")
        changes = self.num_experts is not None
        for name, has_effect, reason in (
            ("max_shard_size", self.to in FOLDERS, "the result is one file"),
            ("base", self.is_adapter, "the source is not an adapter"),
            ("config", not self.is_adapter, "the base of an adapter has a config"),
            ("top_k", changes, "it is about copies of experts: give num_experts"),
            ("engine", self.to == "phimoe", "it is about readers of phimoe"),
            ("calibration", changes or self.to == "gguf", "nothing is measured: give num_experts"),
        ):
            if getattr(self, name) is not None and not has_effect:
                raise ConversionError(f"{name}={getattr(self, name)} would have no effect: {reason}")
        for path in (self.source, self.base, self.config):
            if path is not None and path.is_dir() and (problem := describe_links(path)):
                raise ConversionError(problem)
        for folder in self.companion_folders:
            check_settings(folder)


@dataclass
class Report:
    """The result of a conversion.

    Args:
        parameters, nbytes: of the weights that were written.
        difference: of the logits before and after, relative to the largest; None if they were not computed.
        copied, skipped: files of the source that were copied and not copied, weights and config aside.
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
    copied: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(source: str | Path, destination: str | Path, *, to: str, **options: Any) -> Report:
    """Convert a checkpoint, streaming: only a few MB of its weights are in memory at a time.

    Args:
        source, destination, to, options: see `Request`.

    Raises:
        ConversionError: names the file, tensor, field or argument at fault. Nothing has been written then.
    """
    started = time.monotonic()
    request = Request(Path(source), Path(destination), to, **options)
    if request.is_adapter:
        request.base = adapters.find_base(request.source, request.base)
    request.check_arguments()
    checkpoint = open_checkpoint(
        request.base or request.source, config=request.config, weights_only=request.weights_only
    )
    if request.base is not None:
        checkpoint = adapters.merge_adapter(request.source, checkpoint, request.torch_dtype)
    report = Report(str(request.source), checkpoint.form, str(request.destination), to)
    checkpoint = change_experts(checkpoint, request, report)
    report.parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    with staged(request.destination, request.plan(), request.resume) as result:
        (write_gguf if to == "gguf" else write_folder)(checkpoint, request, result, report)
        if request.check or (request.check is None and report.parameters <= verify.SMALL):
            report.difference = compare_logits(checkpoint, request, result, report)
    if to == "gguf":
        from .ollama import write_modelfile

        report.notes[:0] = write_modelfile(checkpoint, request.destination)
    report.seconds = time.monotonic() - started
    return report


def check_settings(folder: Path) -> None:
    """Raise ConversionError for JSON beside the weights that nobody could read, before it is copied."""
    for path in sorted(folder.glob("*.json")):
        if path.name == GENERATION_CONFIG_FILE:
            read_generation_config(path)
        elif path.name in COMPANIONS and path.name != "tokenizer.json":  # large perhaps; only `tokenizers` reads it
            read_json(path, MAX_INDEX_BYTES)


def change_experts(checkpoint: Checkpoint, request: Request, report: Report) -> Checkpoint:
    """Give each layer `request.num_experts` experts."""
    wanted, present = request.num_experts, checkpoint.config.num_local_experts
    if wanted is None:
        return checkpoint
    if present == 1:
        return upcycle(checkpoint, wanted, request.top_k or 2)
    if request.calibration is None or request.top_k is not None:
        raise ConversionError(f"the {wanted} most used of {present} experts need --calibration, and no --top-k")
    load = calibrate(checkpoint, request.calibration).load
    kept = load.topk(min(wanted, present), dim=1).values.sum(dim=1)
    report.notes.append(f"the experts that are kept had {kept.min():.1%} to {kept.max():.1%} of a layer's load")
    return prune(checkpoint, load, wanted)


def calibrate(checkpoint: Checkpoint, path: Path) -> verify.Calibration:
    """Measure the model's routing on a text, in rows that it has positions for."""
    config = checkpoint.config
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not a text file in UTF-8: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, config=config)
    except Exception as error:  # of any type: `tokenizers` raises nothing more special
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(f"{checkpoint.path} has no tokenizer to read {path} with: {reason}") from error
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    if len(ids) == 0:
        raise ConversionError(f"{path} is empty: give a text like those that the model is for")
    if ids.max() >= config.vocab_size:
        raise ConversionError(f"{checkpoint.path}: the tokenizer has id {ids.max()}; vocab_size={config.vocab_size}")
    rows = list(ids.split(min(CALIBRATION_ROW, config.max_position_embeddings)))
    return verify.calibrate(verify.load_model(checkpoint), rows)


def write_folder(checkpoint: Checkpoint, request: Request, folder: Path, report: Report) -> None:
    """Write weights, config and the files that belong to them; finished files of an interrupted run are kept."""
    config = config_for(checkpoint, request.to, request.torch_dtype)
    groups = list_groups(request.to, checkpoint.config, checkpoint.model_class)
    made = outputs(groups, checkpoint.tensors, request.torch_dtype)
    report.nbytes = sum(tensor.nbytes for tensor, _ in made.values())
    if request.engine is not None:
        check_engine(checkpoint.config, request.engine)
    elif request.to == "phimoe":
        report.notes += phimoe_notes(checkpoint.config)
    folder.mkdir(exist_ok=True)
    write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_companions(checkpoint, request, folder, report)  # first, because these files may be found wrong
    check_space(folder, report.nbytes)
    write_safetensors(made, folder, request.max_shard_size or MAX_SHARD_SIZE, request.progress)


def write_gguf(checkpoint: Checkpoint, request: Request, path: Path, report: Report) -> None:
    """Write a GGUF file for llama.cpp, with the tokenizer in it."""
    try:
        from .gguf_export import export_gguf
    except ImportError as error:
        raise ConversionError("writing GGUF needs the gguf package: pip install 'grin-moe[gguf]'") from error

    measured = calibrate(checkpoint, request.calibration) if request.calibration is not None else None
    written = export_gguf(
        checkpoint, path, file_type=request.dtype or "f16", calibration=measured, progress=request.progress
    )
    report.nbytes = path.stat().st_size
    report.notes += written.lines()


def config_for(checkpoint: Checkpoint, to: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the config.json of the result."""
    config = checkpoint.config.__class__.from_dict(checkpoint.config.to_dict())
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if dtype or config.dtype not in stored:
        config.dtype = dtype or checkpoint.dtype
    model_class = checkpoint.model_class
    if to == "phimoe":
        values = phimoe_config(config)
        if model_class is not GrinMoeForCausalLM:
            values["architectures"] = [verify.STOCK_CLASSES[model_class].__name__]
        return values
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [model_class.__name__]}


def copy_companions(checkpoint: Checkpoint, request: Request, folder: Path, report: Report) -> None:
    """Copy the files beside the weights."""
    converted = {tensor.path.name for tensor in checkpoint.tensors.values() if tensor.path is not None}
    converted |= {CONFIG_FILE, INDEX_FILE}
    copied, skipped = set(), set()
    for path in itertools.chain.from_iterable(map(Path.iterdir, request.companion_folders)):
        if path.is_file() and any(path.match(pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, folder / path.name)
            copied.add(path.name)
        elif path.name not in converted:
            skipped.add(path.name)
    report.copied, report.skipped = sorted(copied), sorted(skipped)
    settings = folder / "tokenizer_config.json"
    if request.to == "phimoe" and settings.is_file():
        # Stock transformers does not know ours, and the release's LlamaTokenizer is not what its tokenizer.json says.
        values = {**read_json(settings), "tokenizer_class": "PreTrainedTokenizerFast"}
        values.pop("auto_map", None)
        write_whole(settings, json.dumps(values, indent=2) + "\n")


def compare_logits(checkpoint: Checkpoint, request: Request, result: Path, report: Report) -> float:
    """Return the relative difference between the logits of source and result; raise ConversionError if it is large."""
    if request.to in FOLDERS:
        return verify.compare_folder(checkpoint, result, request.to, request.torch_dtype)
    from .gguf_simulate import compare_gguf

    input_ids = verify.random_tokens(checkpoint.config)
    if request.calibration is None:
        rate = verify.calibrate(verify.load_model(checkpoint), list(input_ids)).near_tie_rate
        report.notes.append(f"near-ties on random tokens, because no text was given: {rate:.2%} of (token, layer)")
    return compare_gguf(checkpoint, result, input_ids, is_exact=request.dtype == "f32")
