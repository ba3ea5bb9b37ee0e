"""Change the number of experts: copy a single one (upcycling), or keep the most used ones (pruning).

Tensors that change are computed when they are read. L layers, E experts, K experts per token, H hidden_size.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from .checkpoint import Checkpoint
from .forms import HUB, model_class_of
from .tensors import ConversionError, StoredTensor

EXPERT_NAME = re.compile(r"(.*\blayers\.(\d+)\.block_sparse_moe\.experts\.)(\d+)\.(w[123])\.weight")
ROUTER_NAME = re.compile(r".*\blayers\.(\d+)\.block_sparse_moe\.gate\.weight")
WEIGHT_OF_ONE = {"sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star"}  # for each of a token's K experts


def upcycle(checkpoint: Checkpoint, num_experts: int, top_k: int, noise: float, seed: int) -> Checkpoint:
    """Copy the only expert of each layer (arXiv 2212.05055), with Gaussian noise relative to each matrix.

    The weights of a token's experts are 1 each, so down projections are divided by K: without noise the mixture
    computes what the dense model does, whatever its routers choose, except at near-ties, whose weights are below 1.
    Routers are drawn from N(0, `initializer_range`). Each matrix has a random generator of its own.
    """
    config = checkpoint.config
    if not 1 <= top_k <= num_experts or num_experts < 2 or not 0 <= noise < float("inf"):
        raise ConversionError(
            f"upcycling needs at least 2 experts, a top-k up to their number and a noise of at least 0; got "
            f"num_experts={num_experts}, top_k={top_k}, noise={noise}"
        )
    if config.router_estimator not in WEIGHT_OF_ONE:
        raise ConversionError(
            f"router_estimator must be one of {', '.join(sorted(WEIGHT_OF_ONE))} for upcycling: they weight experts "
            f"by 1, so that copies compute what the one expert does; got {config.router_estimator}"
        )

    def normal(shape: tuple[int, ...], name: str) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")))

    def make_copy(name: str) -> StoredTensor:
        if ROUTER_NAME.fullmatch(name):
            gate, shape = checkpoint.tensors[name], (num_experts, config.hidden_size)
            return replace(
                gate, shape=shape, load=lambda: (config.initializer_range * normal(shape, name)).to(gate.dtype)
            )
        if not (match := EXPERT_NAME.fullmatch(name)):
            return checkpoint.tensors[name]
        experts, _, _, part = match.groups()
        matrix = checkpoint.tensors[f"{experts}0.{part}.weight"]

        def load_copy() -> torch.Tensor:
            weight = matrix.read()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if noise > 0:
                wide = wide + noise * wide.std() * normal(matrix.shape, name)
            return (wide / (top_k if part == "w2" else 1)).to(weight.dtype)

        return replace(matrix, load=load_copy)

    return with_experts(checkpoint, num_experts, top_k, make_copy)


def prune(checkpoint: Checkpoint, load: torch.Tensor, num_experts: int) -> Checkpoint:
    """Keep the most used experts of each layer, in their order, and their rows of the routers.

    Args:
        load: `[L, E]`, each expert's share of its layer's tokens. Of equals, the first are kept.
    """
    present, top_k = checkpoint.config.num_local_experts, checkpoint.config.num_experts_per_tok
    if not top_k <= num_experts < present:
        raise ConversionError(
            f"num_experts must be at least num_experts_per_tok={top_k} and less than the {present} of "
            f"{checkpoint.path}; got {num_experts}"
        )
    kept = load.sort(dim=1, descending=True, stable=True).indices[:, :num_experts].sort(dim=1).values

    def choose(name: str) -> StoredTensor:
        if match := ROUTER_NAME.fullmatch(name):
            gate, rows = checkpoint.tensors[name], kept[int(match[1])]
            return replace(gate, shape=(num_experts, gate.shape[1]), load=lambda: gate.read()[rows])
        if match := EXPERT_NAME.fullmatch(name):
            experts, layer, expert, part = match.groups()
            return checkpoint.tensors[f"{experts}{kept[int(layer), int(expert)]}.{part}.weight"]
        return checkpoint.tensors[name]

    return with_experts(checkpoint, num_experts, top_k, choose)


def with_experts(
    checkpoint: Checkpoint, num_experts: int, top_k: int, tensor_of: Callable[[str], StoredTensor]
) -> Checkpoint:
    """Return a checkpoint of form `experts`, made of `tensor_of` its released names."""
    config = copy.deepcopy(checkpoint.config)
    config.num_local_experts, config.num_experts_per_tok = num_experts, top_k
    names = HUB.groups(config, model_class_of(checkpoint.tensors))
    tensors = {name: tensor_of(name) for name in names}
    return replace(checkpoint, form="experts", is_standard=False, config=config, tensors=tensors)
