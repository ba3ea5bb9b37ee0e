"""Change the number of experts: copy a single one (upcycling), or keep the most used ones (pruning).

Tensors that change are computed when they are read. L layers, E experts, K experts per token, H hidden_size.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

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

    def draw_router(name: str, gate: StoredTensor, rows: torch.Tensor) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")  # whatever is read before
        noise = torch.randn((num_experts, config.hidden_size), generator=torch.Generator().manual_seed(seed))
        return (config.initializer_range * noise).to(gate.dtype)

    copies = torch.zeros(config.num_hidden_layers, num_experts, dtype=torch.long)
    return with_experts(checkpoint, copies, top_k, draw_router, divisor=top_k)


def prune(checkpoint: Checkpoint, load: torch.Tensor, num_experts: int) -> Checkpoint:
    """Keep the most used experts of each layer, in their order, and their rows of the routers.

    Args:
        load: `[L, E]`, each expert's share of its layer's tokens. Of equals, the first are kept.
    """
    present, top_k = checkpoint.config.num_local_experts, checkpoint.config.num_experts_per_tok
    if not top_k <= num_experts < present:
        raise ConversionError(f"num_experts must be at least top_k={top_k} and less than {present}; got {num_experts}")
    kept = load.sort(dim=1, descending=True, stable=True).indices[:, :num_experts].sort(dim=1).values

    return with_experts(checkpoint, kept, top_k, lambda name, gate, rows: gate.read()[rows])


def with_experts(
    checkpoint: Checkpoint,
    kept: torch.Tensor,
    top_k: int,
    read_router: Callable[[str, StoredTensor, torch.Tensor], torch.Tensor],
    divisor: int = 1,
) -> Checkpoint:
    """Return a checkpoint of form `experts`: each layer has the experts `kept`, `[L, E]`, with divided w2."""
    config = copy.deepcopy(checkpoint.config)
    config.num_local_experts, config.num_experts_per_tok = kept.shape[1], top_k
    tensors = {}
    for name in list_groups("hub", config, checkpoint.model_class):
        if match := EXPERT_NAME.fullmatch(name):
            experts, layer, expert, part = match.groups()
            matrix = checkpoint.tensors[f"{experts}{kept[int(layer), int(expert)]}.{part}.weight"]
            if part == "w2" and divisor > 1:
                matrix = replace(matrix, read=partial(lambda stored: stored.read() / divisor, matrix))
            tensors[name] = matrix
            continue
        tensors[name] = tensor = checkpoint.tensors[name]
        if match := ROUTER_NAME.fullmatch(name):
            read = partial(read_router, name, tensor, kept[int(match[1])])
            tensors[name] = replace(tensor, shape=(kept.shape[1], config.hidden_size), read=read)
    return replace(checkpoint, form="experts", is_standard=False, config=config, tensors=tensors)
