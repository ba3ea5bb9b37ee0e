"""What a checkpoint is, whether its tensors are sound, and whether two checkpoints are equal, whatever their forms."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .forms import model_class_of
from .headers import read_gguf_header
from .sources import open_checkpoint
from .tensors import ConversionError, FileTensor, StoredTensor, is_finite
from .writing import Progress

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "sliding_window",
    "router_jitter_noise",
    "tie_word_embeddings",
)


@dataclass
class Inspection:
    """What is known of a checkpoint.

    Args:
        config: its sizes, and what else decides what it computes.
        parameters, active_parameters: in all, and those that one token uses.
        dtypes: of the weights: name -> parameters.
        files: of the weights: name -> bytes.
        checks: what has been found right, in words.
        problems: what has been found wrong, in sentences.
        difference: to the checkpoint it was compared with: released tensors that differ -> largest absolute
            difference; None where one is missing or has another shape, 0 where only dtype or signs of 0 differ.
    """

    path: str
    form: str
    model: str
    config: dict[str, Any]
    parameters: int
    active_parameters: int
    dtypes: dict[str, int]
    files: dict[str, int]
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    difference: dict[str, float | None] | None = None


def inspect(
    path: str | Path,
    *,
    verify: bool = False,
    against: str | Path | None = None,
    config: str | Path | None = None,
    weights_only: bool = False,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Say what a checkpoint is.

    Args:
        path: a folder in any form that `convert` reads, adapters aside, or a GGUF file.
        verify: read every tensor, and name those with NaN or infinite values.
        against: another checkpoint, in whatever form, to compare with bit by bit.
        config, weights_only: as for `convert`.

    Raises:
        ConversionError: it cannot be opened: damaged, incomplete, or not of this architecture.
    """
    path = Path(path)
    if path.is_file():
        return inspect_gguf(path)
    open_folder = partial(open_checkpoint, config=Path(config) if config else None, weights_only=weights_only)
    checkpoint = open_folder(path)
    found = describe(checkpoint)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    passes = verify + (against is not None)

    def advance(done: int) -> None:
        progress(done, passes * nbytes)

    if verify:
        verify_tensors(checkpoint, found, advance)
    if against is not None:
        compare(checkpoint, open_folder(Path(against)), found, advance)
    return found


def describe(checkpoint: Checkpoint) -> Inspection:
    """What the headers say."""
    config, tensors = checkpoint.config, checkpoint.tensors
    dtypes: Counter[str] = Counter()
    expert_parameters = 0
    for name, tensor in tensors.items():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += numel(tensor)
        expert_parameters += numel(tensor) if ".experts." in name else 0
    # Without LongRoPE's hundred numbers.
    rope = {key: value for key, value in (config.rope_parameters or {}).items() if not isinstance(value, list)}
    paths = {tensor.path for tensor in tensors.values() if isinstance(tensor, FileTensor)}
    return Inspection(
        path=str(checkpoint.path),
        form=checkpoint.form,
        model=model_class_of(tensors).__name__,
        config={name: getattr(config, name) for name in SIZES} | rope,
        parameters=dtypes.total(),
        active_parameters=active(
            dtypes.total(), expert_parameters, config.num_experts_per_tok, config.num_local_experts
        ),
        dtypes=dict(dtypes),
        files={path.name: path.stat().st_size for path in sorted(paths)},
        checks=["every tensor that the config asks for is there once, with its shape, and no other"],
    )


def numel(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape)


def active(parameters: int, expert_parameters: int, top_k: int, num_experts: int) -> int:
    """The parameters that one token uses: of the experts, `top_k`."""
    return parameters - expert_parameters * (num_experts - top_k) // num_experts


def verify_tensors(checkpoint: Checkpoint, found: Inspection, advance: Callable[[int], None]) -> None:
    """Read every tensor, and note those that hold what no weight should."""
    for tensor in checkpoint.tensors.values():
        bad = 0
        for chunk in tensor.chunks():
            if not is_finite(chunk):
                bad += int((~torch.isfinite(chunk)).sum())
            advance(chunk.nbytes)
        if bad:
            found.problems.append(f"{tensor.where} holds {bad} NaN or infinite values")
    if not found.problems:
        found.checks.append("every tensor is readable, and no value is NaN or infinite")


def compare(one: Checkpoint, other: Checkpoint, found: Inspection, advance: Callable[[int], None]) -> None:
    """Note the released tensors that differ from those of another checkpoint, by bits."""
    found.difference = {}
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is None or b is None or a.shape != b.shape:
            found.difference[name] = None
        elif a.dtype != b.dtype or not all(map(same_bits, a.chunks(), b.chunks())):
            found.difference[name] = (a.read().double() - b.read().double()).abs().max().item()
        advance(a.nbytes if a else 0)
    if not found.difference:
        found.checks.append(f"every tensor has the same dtype and bits as in {other.path} ({other.form})")
    else:
        found.problems.append(f"{len(found.difference)} tensor(s) differ from those in {other.path} ({other.form})")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def inspect_gguf(path: Path) -> Inspection:
    """What a GGUF file says of itself."""
    metadata, tensors = read_gguf_header(path)
    architecture = str(metadata.get("general.architecture"))
    types: Counter[str] = Counter()
    expert_parameters = 0
    for name, tensor in tensors.items():
        types[tensor.type.name] += math.prod(tensor.shape)
        expert_parameters += math.prod(tensor.shape) if "_exps." in name else 0
    top_k, num_experts = (metadata.get(f"{architecture}.expert{key}_count", 1) for key in ("_used", ""))
    if not 0 < top_k <= num_experts:
        raise ConversionError(f"{path}: {architecture}.expert_used_count={top_k} of {num_experts} experts")
    return Inspection(
        path=str(path),
        form="gguf",
        model=architecture,
        config={key: value for key, value in metadata.items() if not isinstance(value, list)},
        parameters=types.total(),
        active_parameters=active(types.total(), expert_parameters, top_k, num_experts),
        dtypes=dict(types),
        files={path.name: path.stat().st_size},
        checks=["the header agrees with the file"],
    )
