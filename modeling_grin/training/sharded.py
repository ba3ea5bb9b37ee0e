"""Checkpoints of models that are spread over ranks: each rank reads and writes its own part, in the released layout.

torch.distributed.checkpoint (DCP) does the work on safetensors; nothing is gathered, and no pickle is written or read.
Ours is the view of the fused experts under their released names: a checkpoint's tensors do not depend on the layout
that wrote them, so that any layout (one process, FSDP2, tensor and pipeline parallel) can resume from it.

transformers' own engine (`transformers.distributed.checkpoint`, 5.24) would not do: it writes fused experts, whose
names other readers do not know, and optimizers as pickles; and it reads only its own files, not those of one process.

Shapes: E num_local_experts, F intermediate_size, H hidden_size.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from ..layout_grinmoe import EXPERT_WEIGHTS
from ..modeling_grinmoe import GrinMoePreTrainedModel
from ..packed_grinmoe import load_packed, open_tensors, packed_layers
from ..safetensors_header import encode_header
from .checkpoints import FILE_LIST

MAX_SHARD_SIZE = "5GB"
SHARDS_FOLDER = ".shards"  # what each rank writes, until it has been put together
MAX_PART_BYTES = 2**29  # of a file that a rank writes


def split_experts(name: str, tensor: torch.Tensor, attribute: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of this rank's experts, as views, under their released names.

    Args:
        name: the name of a fused weight, or of a tensor of its shape, such as an optimizer's moment.
        tensor: `[E, rows, columns]`; a DTensor may be sharded over experts (FSDP) and within each (tensor parallel).
        attribute: the key of `EXPERT_WEIGHTS` that `name` contains.
    """
    before, _, after = name.rpartition(attribute)
    parts = EXPERT_WEIGHTS[attribute]
    first, local, mesh, placements = 0, tensor, None, []
    if isinstance(tensor, DTensor):
        _, (first, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        assert tensor.device_mesh.mesh_dim_names is not None
        # Each matrix is spread over the axes of the mesh that do not hand out experts.
        axes = {
            axis: Shard(placement.dim % 3 - 1) if hasattr(placement, "dim") else Replicate()
            for axis, placement in zip(tensor.device_mesh.mesh_dim_names, tensor.placements, strict=True)
            if getattr(placement, "dim", None) != 0
        }
        if axes:
            mesh, placements = tensor.device_mesh[tuple(axes)], list(axes.values())
    rows, columns = tensor.shape[1] // len(parts), tensor.shape[2]
    for index, matrices in enumerate(local):
        for part, matrix in zip(parts, matrices.chunk(len(parts)), strict=True):
            if mesh is not None:
                shape, stride = torch.Size((rows, columns)), (columns, 1)
                matrix = DTensor.from_local(matrix, mesh, placements, run_check=False, shape=shape, stride=stride)
            yield f"{before}{first + index}.{part}.weight{after}", matrix


def released_views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors`, parameters or an optimizer's moments, with the experts under their released names.

    Nothing is copied: writing to the views writes to the tensors.
    """
    views: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        attribute = next((key for key in EXPERT_WEIGHTS if f".experts.{key}" in name), None)
        if attribute is not None and tensor.dim() == 3:
            views.update(split_experts(name, tensor, attribute))
        else:
            views[name] = tensor
    return views


class PartsWriter(HuggingFaceStorageWriter):
    """torch's writer, with files of limited size: it holds a copy of each file in memory until it is written."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        sizes: dict[str, int] = {}  # rank after rank, so that one rank's own tensors lie in few files
        for item in (item for plan in plans for item in plan.items):
            assert item.tensor_data is not None, "there is nothing but tensors"
            size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            sizes[item.index.fqn] = max(size, sizes.get(item.index.fqn, 0))
        self.fqn_to_index_mapping, number, held = {}, 1, 0
        for name, size in sizes.items():
            if held and held + size > MAX_PART_BYTES:
                number, held = number + 1, 0
            self.fqn_to_index_mapping[name] = number
            held += size
        return super().prepare_global_plan(plans)


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write this rank's parts of `tensors` to safetensors files in `folder`; shared parts are written once."""
    writer = PartsWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    wait_for_everyone()


def check_stored(tensors: dict[str, torch.Tensor], reader: HuggingFaceStorageReader) -> None:
    """Raise ValueError unless the files have every part of each of `tensors`, in its shape."""
    found = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in found:
            raise ValueError(f"{reader.path} lacks {name}")
        stored = found[name]
        assert isinstance(stored, TensorStorageMetadata)
        if stored.size != tensor.shape:
            raise ValueError(f"{reader.path}: {name} must have shape {list(tensor.shape)}; got {list(stored.size)}")
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
            raise ValueError(f"{reader.path} must have every part of {name} once: files are missing, or too many")


def load_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill `tensors` from the safetensors files in `folder`: each rank reads its own parts, into its own dtypes.

    Raises:
        ValueError: the files lack a tensor or a part of one, or have it in another shape.
    """
    reader = HuggingFaceStorageReader(str(folder))
    check_stored(tensors, reader)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 still holds of the last layers after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's part of the parameters, and the selection biases, under their released names."""
    reshard(model)
    biases = {name: bias for name, bias in model.named_buffers() if name.endswith(".e_score_correction_bias")}
    return released_views({name: parameter.detach() for name, parameter in model.named_parameters()} | biases)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load a checkpoint in the released layout into a model whose parameters may be spread over ranks.

    Raises:
        ValueError: as `load_tensors`.
    """
    tensors = weights_of(model)
    if packed := packed_layers(model):
        device = next(iter(tensors.values())).device
        loaded = load_packed(model, open_tensors(Path(folder).glob("*.safetensors")), device)
        if missing := sorted(packed.keys() - loaded):
            raise ValueError(f"{folder} lacks {missing[0]}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in packed}
    load_tensors(tensors, Path(folder))


def add_format(path: Path) -> None:
    """Rewrite a safetensors file with the metadata that transformers before 4.48.2 (the release's) demands."""
    rewritten = path.with_suffix(".rewritten")
    with path.open("rb") as source, rewritten.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        target.write(encode_header(header))
        shutil.copyfileobj(source, target, 2**20)
    rewritten.replace(path)


def model_class_of(model: nn.Module) -> type[GrinMoePreTrainedModel]:
    """Return the model's class without the one that FSDP2 puts before it."""
    classes = (cls for cls in type(model).__mro__ if issubclass(cls, GrinMoePreTrainedModel))
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


def make_skeleton(model: GrinMoePreTrainedModel) -> GrinMoePreTrainedModel:
    """Make the whole model without its values."""
    with torch.device("meta"):
        return model_class_of(model)(model.config)


def save_weights(model: GrinMoePreTrainedModel, folder: str | Path) -> None:
    """Write a model whose parameters are spread over ranks in the released layout, with its config.

    Each rank writes its own part, and then puts some of the checkpoint's files together, a tensor at a time. All ranks
    must call it, and share the folder.

    Raises:
        ValueError: this rank does not see what the others have written.
    """
    folder = Path(folder)
    shards = folder / SHARDS_FOLDER
    config = copy.deepcopy(model.config)
    config.__dict__.pop("distributed_config", None)  # belongs to this run
    config.architectures = [model_class_of(model).__name__]
    whole = weights_of(make_skeleton(model))
    if is_main_process():  # an earlier save's: readers take a single file first, and torch whatever shards there are
        shutil.rmtree(shards, ignore_errors=True)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        config.save_pretrained(folder)  # now that no weights of another config are there
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    wait_for_everyone()
    save_tensors(weights_of(model), shards)
    check_stored(whole, HuggingFaceStorageReader(str(shards)))  # torch would fill with zeros what is missing
    files = split_torch_state_dict_into_shards(whole, max_shard_size=MAX_SHARD_SIZE).filename_to_tensors
    file_number = {name: number for number, names in enumerate(files.values(), start=1) for name in names}
    consolidate_safetensors_files_on_every_rank(str(shards), str(folder), file_number)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for path in sorted(folder.glob("model-*.safetensors"))[rank::num_ranks]:
        add_format(path)
    if is_main_process():
        shutil.rmtree(shards)
    wait_for_everyone()


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return this rank's part of the optimizer's moments, `state.{parameter}.{name}`, by released names.

    Raises:
        ValueError: the optimizer keeps something that is not a tensor.
    """
    reshard(model)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    moments: dict[str, Any] = {name: value for name, value in state.items() if name.startswith("state.")}
    if others := [name for name, value in moments.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {others[0]}, which is not a tensor: use AdamW, or save_only_model"
        )
    return released_views(moments)


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: str | Path) -> None:
    """Write the optimizer's moments, each rank its own part. The scheduler keeps the learning rates."""
    folder = Path(folder)
    save_tensors(moments_of(model, optimizer), folder)
    if is_main_process():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        (folder / FILE_LIST).write_text(json.dumps(files), encoding="utf-8")
    wait_for_everyone()


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: str | Path) -> None:
    """Read the files of `save_optimizer`, whatever layout wrote them.

    Raises:
        ValueError: as `load_tensors`, for another optimizer's files among others.
    """
    load_tensors(moments_of(model, optimizer), Path(folder))


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_everyone() -> None:
    if dist.is_initialized():
        dist.barrier()
