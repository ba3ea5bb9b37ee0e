"""What every form of a checkpoint is read as: a config and the released tensors."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_grin import GrinMoeConfig

from .tensors import StoredTensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened: its headers have been read and checked, its tensors have not been read.

    Args:
        path: the folder (or file) it was opened from; tokenizer and generation settings lie beside its weights.
        form: `hub`, `fused`, `phimoe`, `stock` (transformers' Phimoe as it spells its own modules), `dcp` or `pickle`;
            `adapter` of a model that an adapter has been merged into, `experts` of one with other experts than in
            `path`.
        config: as this library understands it, whatever the file's model type.
        tensors: every tensor that the model needs, by its released name, in the model's order, and no other. Experts
            are `model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight` [F, H] (gate), `w3` [F, H] (up) and `w2`
            [H, F] (down).
        is_standard: whether transformers' `from_pretrained` reads the folder as it lies.
    """

    path: Path
    form: str
    config: GrinMoeConfig
    tensors: Mapping[str, StoredTensor]
    is_standard: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The one that holds every tensor as it is."""
        return functools.reduce(torch.promote_types, {tensor.dtype for tensor in self.tensors.values()})
