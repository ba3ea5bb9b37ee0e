"""Change the number of experts: copy a single one (upcycling), or keep the most used ones (pruning).

Tensors that change are computed when they are read. L layers, E experts, K experts per token, H hidden_size.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from modeling_grin.routing_grinmoe import inference_rule

from .checkpoint import Checkpoint
from .forms import list_groups
from .tensors import ConversionError, StoredTensor

EXPERT_NAME = re.compile(r"(.*\blayers\.(\d+)\.block_sparse_moe\.experts\.)(\d+)\.(w[123])\.weight")
ROUTER_NAME = re.compile(r".*\blayers\.(\d+)\.block_sparse_moe\.gate\.weight")
WEIGHT_OF_ONE = {"sparsemixer_v2", "sparsemixer_v2_star"}  # inference rules with this for each of K experts


def upcycle(checkpoint: Checkpoint, num_experts: int, top_k: int) -> Checkpoint:
    """Copy the only expert of each layer (arXiv 2212.05055); draw routers from N(0, `initializer_range`).

    The weights of a token's experts are 1 each, so down projections are divided by K: the mixture computes what the
    dense model does, whatever its routers choose, except at near-ties, whose weights are below 1.
    """
    config = checkpoint.config
    if not 1 <= top_k <= num_experts or num_experts < 2 or inference_rule(config) not in WEIGHT_OF_ONE:
        raise ConversionError(
            f"upcycling needs num_experts >= 2, top_k from 1 to num_experts, and the rule of sparsemixer_v2; "
            f"got {num_experts}, {top_k}, {config.router_estimator}"
        )

    def make_copy(name: str) -> StoredTensor:
        if ROUTER_NAME.fullmatch(name):
            gate, shape = checkpoint.tensors[name], (num_experts, config.hidden_size)
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")  # whatever is read before

            def draw() -> torch.Tensor:
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                return (config.initializer_range * noise).to(gate.dtype)

            return replace(gate, shape=shape, read=draw)
        if match := EXPERT_NAME.fullmatch(name):
            experts, _, _, part = match.groups()
            matrix = checkpoint.tensors[f"{experts}0.{part}.weight"]
            return replace(matrix, read=lambda: matrix.read() / top_k) if part == "w2" else matrix
        return checkpoint.tensors[name]

    return with_experts(checkpoint, num_experts, top_k, make_copy)


def prune(checkpoint: Checkpoint, load: torch.Tensor, num_experts: int) -> Checkpoint:
    """Keep the most used experts of each layer, in their order, and their rows of the routers.

    Args:
        load: `[L, E]`, each expert's share of its layer's tokens. Of equals, the first are kept.
    """
    present, top_k = checkpoint.config.num_local_experts, checkpoint.config.num_experts_per_tok
    if not top_k <= num_experts < present:
        raise ConversionError(f"num_experts must be at least top_k={top_k} and less than {present}; got {num_experts}")
    kept = load.sort(dim=1, descending=True, stable=True).indices[:, :num_experts].sort(dim=1).values

    def choose(name: str) -> StoredTensor:
        if match := ROUTER_NAME.fullmatch(name):
            gate, rows = checkpoint.tensors[name], kept[int(match[1])]
            return replace(gate, shape=(num_experts, gate.shape[1]), read=lambda: gate.read()[rows])
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
    tensors = {name: tensor_of(name) for name in list_groups("hub", config, checkpoint.model_class)}
    return replace(checkpoint, form="experts", is_standard=False, config=config, tensors=tensors)
