"""Describe a checkpoint, verify its tensors, and compare two checkpoints of any forms."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from .adapters import ADAPTER_FILE, read_adapter
from .checkpoint import Checkpoint, open_checkpoint
from .headers import ADAPTER_CONFIG_FILE, read_adapter_config
from .pickles import find_dcp_folder, find_pickles
from .summary import COMPLETE, FIELDS, Inspection
from .tensors import ConversionError, StoredTensor, is_finite
from .writing import Progress

VERIFIED = "every tensor is readable, and no value is NaN or infinite"


def inspect(
    path: str | Path,
    *,
    verify: bool = False,
    against: str | Path | None = None,
    config: str | Path | None = None,
    weights_only: bool = False,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Describe a checkpoint.

    Args:
        path: a folder in any form that `convert` reads, or a GGUF file.
        verify: read every tensor, and report NaN and infinite values.
        against: another checkpoint, of any form, to compare with bit by bit.
        config, weights_only: as for `convert`.

    Raises:
        ConversionError: it cannot be opened: damaged, incomplete, or not of this architecture.
    """
    path = Path(path)
    is_adapter = (path / ADAPTER_CONFIG_FILE).is_file()
    if against is not None and (path.is_file() or is_adapter):
        raise ConversionError(f"{path} can be inspected but not be compared: give two checkpoints in folders")
    if path.suffix == ".gguf":
        return inspect_gguf(path, verify, progress)
    open_folder = partial(open_checkpoint, config=Path(config) if config else None, weights_only=weights_only)
    if is_adapter:
        tensors: Mapping[str, StoredTensor] = read_adapter(path)
        found = describe_adapter(path, tensors)
    else:
        checkpoint = open_folder(path)
        tensors, found = checkpoint.tensors, describe(checkpoint)
    total = sum(tensor.nbytes for tensor in tensors.values()) * (verify + (against is not None))

    def advance(done: int) -> None:
        progress(done, total)

    if verify:
        verify_tensors(tensors.values(), found, advance)
    if against is not None:
        compare(checkpoint, open_folder(Path(against)), found, advance)
    return found


def count(tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, str, int]]:
    """Yield what `Inspection.of_weights` takes."""
    for name, tensor in tensors.items():
        yield name, str(tensor.dtype).removeprefix("torch."), math.prod(tensor.shape)


def describe(checkpoint: Checkpoint) -> Inspection:
    """Describe an opened checkpoint by its headers."""
    config, tensors, path = checkpoint.config, checkpoint.tensors, checkpoint.path
    files = {tensor.path for tensor in tensors.values() if tensor.path is not None}
    files = files or {*find_pickles(path)} or set((find_dcp_folder(path) or Path()).glob("*.distcp"))
    return Inspection.of_weights(
        count(tensors),
        config.num_experts_per_tok,
        config.num_local_experts,
        path=str(path),
        form=checkpoint.form,
        model=checkpoint.model_class.__name__,
        config={name: getattr(config, name) for name in FIELDS},
        files={file.name: file.stat().st_size for file in sorted(files)},
        checks=[COMPLETE],
    )


def describe_adapter(path: Path, tensors: Mapping[str, StoredTensor]) -> Inspection:
    config = read_adapter_config(path)
    return Inspection.of_weights(
        count(tensors),
        1,
        1,
        path=str(path),
        form="adapter",
        model=f"LoRA for {config['base_model_name_or_path']}",
        config={name: value for name, value in config.items() if value not in (None, [], {}, False)},
        files={ADAPTER_FILE: (path / ADAPTER_FILE).stat().st_size},
        checks=["the config and the header of the weights are sound"],
    )


def verify_tensors(tensors: Iterable[StoredTensor], found: Inspection, advance: Callable[[int], None]) -> None:
    """Read every tensor, and note NaN and infinite values."""
    for tensor in tensors:
        bad = 0
        for chunk in tensor.chunks():
            if not is_finite(chunk):
                bad += int((~torch.isfinite(chunk)).sum())
            advance(chunk.nbytes)
        if bad:
            found.problems.append(f"{tensor.where} holds {bad} NaN or infinite values")
    if not found.problems:
        found.checks.append(VERIFIED)


def compare(one: Checkpoint, other: Checkpoint, found: Inspection, advance: Callable[[int], None]) -> None:
    """Record in `found` the released tensors that differ between two checkpoints, bit by bit."""
    found.difference = {}
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is None or b is None or a.shape != b.shape:
            found.difference[name] = None
        elif a.dtype != b.dtype or not all(
            torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
            for ours, theirs in zip(a.chunks(), b.chunks(), strict=True)
        ):
            largest = (a.read().double() - b.read().double()).abs().max().item()
            found.difference[name] = largest if math.isfinite(largest) else None
        advance(a.nbytes if a else 0)
    which = f"{other.path} ({other.form})"
    for name in FIELDS:
        if (ours := getattr(one.config, name)) != (theirs := getattr(other.config, name)):
            found.problems.append(f"config: {name} is {ours}, and {theirs} in {which}")
    if found.difference:
        found.problems.append(f"{len(found.difference)} tensor(s) differ from those in {which}")
    else:
        found.checks.append(f"every tensor has the same dtype and bits as in {which}")


def inspect_gguf(path: Path, verify: bool, progress: Progress) -> Inspection:
    """Return what a GGUF file says about itself; with `verify`, check that its dequantised values are finite."""
    try:
        from .gguf_reader import find_damage, read_gguf
    except ImportError as error:
        raise ConversionError(f"{path} needs the gguf package: pip install 'grin-moe[gguf]'") from error

    metadata, tensors = read_gguf(path)
    architecture = str(metadata.get("general.architecture"))
    top_k, num_experts = (metadata.get(f"{architecture}.expert{key}_count", 0) for key in ("_used", ""))
    if not (type(top_k) is type(num_experts) is int and 0 <= top_k <= num_experts):
        got = f"got {top_k!r:.50} and {num_experts!r:.50}"
        raise ConversionError(f"{path}: expert_used_count and expert_count must be counts of experts; {got}")
    found = Inspection.of_weights(
        ((tensor.name, tensor.tensor_type.name, int(tensor.n_elements)) for tensor in tensors),
        top_k or 1,
        num_experts or 1,
        path=str(path),
        form="gguf",
        model=architecture,
        config={key: value for key, value in metadata.items() if not isinstance(value, list)},
        files={path.name: path.stat().st_size},
        checks=["the header agrees with the file"],
    )
    if verify:
        found.problems += [f"{name} in {path} holds NaN or infinite values" for name in find_damage(tensors, progress)]
        found.checks += [] if found.problems else [VERIFIED]
    return found
