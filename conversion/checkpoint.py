"""A checkpoint in memory, whatever its form on disk: a config and the released tensors."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_grin import GrinMoeConfig

from .tensors import StoredTensor


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
    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor as it is."""
        return functools.reduce(torch.promote_types, {tensor.dtype for tensor in self.tensors.values()})
