"""More experts or fewer: a dense model made a mixture by copying (upcycling), a mixture pruned by measured load.

Nothing is computed before it is asked for: a tensor that changes is one that reads what it is made of.
Shapes: L layers, E experts, K experts per token, H hidden_size, F intermediate_size.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from modeling_grin.routing_grinmoe import TOP_1_ESTIMATORS

from .checkpoint import Checkpoint
from .forms import HUB, model_class_of
from .tensors import ConversionError, StoredTensor

# Of a released name: what comes before the experts, the layer, the expert, the matrix.
EXPERT_NAME = re.compile(r"(.*\blayers\.(\d+)\.block_sparse_moe\.experts\.)(\d+)\.(w[123])\.weight")
ROUTER_NAME = re.compile(r".*\blayers\.(\d+)\.block_sparse_moe\.gate\.weight")

DOWN_PROJECTION = "w2"
# Router estimators by what the weights of a token's experts are in inference, near-ties aside: 1 each, or 1 in all.
# Of any other they depend on the router.
WEIGHT_OF_ONE_EACH = {"sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star", "sparsemixer"}
WEIGHT_OF_ONE_IN_ALL = {"gshard"}  # normalised, where there are several


def upcycle(
    checkpoint: Checkpoint, num_experts: int, *, top_k: int = 2, noise: float = 0.0, seed: int = 0
) -> Checkpoint:
    """A mixture of copies of the expert of a checkpoint that has one in each layer (arXiv 2212.05055).

    The weights of a token's `top_k` experts are not normalised but 1 each, so that down projections are divided by
    `top_k`: with `noise=0` the mixture computes what the dense model does, whatever its routers choose. What it adds
    is rounding (none of the weights, where `top_k` is a power of two), and near-ties, whose weights are below 1.

    Args:
        num_experts: E, at least 2.
        top_k: K, `num_experts_per_tok` of the result.
        noise: standard deviation of the Gaussian noise on every matrix of every copy, relative to that matrix's own.
        seed: of the noise and of the routers, which are drawn from N(0, `initializer_range`). Each matrix has a
            generator of its own, so that it does not matter which are read, and in which order.

    Raises:
        ConversionError: there are several experts already; E, K or `noise` are impossible; or the weights of the
            router estimator do not follow from K, so that no scale would account for them.
    """
    config = checkpoint.config
    present, estimator = config.num_local_experts, config.router_estimator
    if present != 1:
        raise ConversionError(f"{checkpoint.path} has num_local_experts={present}: only a single expert is copied")
    if num_experts < 2:
        raise ConversionError(f"num_experts={num_experts}: copies of the one expert are at least 2")
    if not 1 <= top_k <= (1 if estimator in TOP_1_ESTIMATORS else num_experts):
        raise ConversionError(f"top_k={top_k} is impossible for {num_experts} experts chosen by {estimator}")
    if not 0 <= noise < float("inf"):
        raise ConversionError(f"noise={noise} is no standard deviation: give 0 or a positive number")
    if estimator in WEIGHT_OF_ONE_EACH:
        divisor = top_k
    elif estimator in WEIGHT_OF_ONE_IN_ALL and top_k > 1:
        divisor = 1
    else:
        raise ConversionError(
            f"router_estimator={estimator!r} with top_k={top_k} weights an expert by its probability, which is the "
            "router's to learn: copies would not compute what the one expert does; set it to 'sparsemixer_v2'"
        )

    def copied(name: str) -> StoredTensor:
        if ROUTER_NAME.fullmatch(name):
            gate = checkpoint.tensors[name]
            shape, std = (num_experts, config.hidden_size), config.initializer_range
            return replace_load(gate, shape, lambda: (std * normal(shape, seed, name)).to(gate.dtype))
        if match := EXPERT_NAME.fullmatch(name):
            experts, _, _, part = match.groups()
            matrix = checkpoint.tensors[f"{experts}0.{part}.weight"]
            divided_by = divisor if part == DOWN_PROJECTION else 1
            if noise == 0 and divided_by == 1:
                return matrix
            return replace_load(matrix, matrix.shape, lambda: copy_matrix(matrix, divided_by, noise, seed, name))
        return checkpoint.tensors[name]

    return with_experts(checkpoint, num_experts, top_k, copied)


def copy_matrix(matrix: StoredTensor, divisor: int, noise: float, seed: int, name: str) -> torch.Tensor:
    """`(W + noise std(W) n) / divisor` in the dtype of W, computed in float32 or better; n is `normal`, [F, H]."""
    weight = matrix.read()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if noise > 0:
        wide = wide + noise * wide.std() * normal(matrix.shape, seed, name)
    return (wide / divisor).to(weight.dtype)


def normal(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """Standard normal numbers, float32, that are a function of seed and name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def prune(checkpoint: Checkpoint, load: torch.Tensor, num_experts: int) -> Checkpoint:
    """The checkpoint with the most loaded experts of each layer alone, in the order they had, and their routers' rows.

    Args:
        load: `[L, E]`, each expert's share of its layer's tokens, as `modeling_grin.analysis.expert_load` gives it.
            Of equals, those that come first are kept.
        num_experts: how many to keep in each layer.

    Raises:
        ConversionError: `num_experts` is not less than there are, or less than each token is sent to; `load` has
            another shape, or is not finite.
    """
    config = checkpoint.config
    present, top_k = config.num_local_experts, config.num_experts_per_tok
    if num_experts >= present:
        raise ConversionError(f"num_experts={num_experts}: {checkpoint.path} has {present}, pruning keeps fewer")
    if num_experts < top_k:
        raise ConversionError(f"num_experts={num_experts}: each token needs num_experts_per_tok={top_k} experts")
    if load.shape != (config.num_hidden_layers, present) or not load.isfinite().all():
        raise ConversionError(f"load must be {config.num_hidden_layers} x {present} finite numbers")
    most_loaded = load.sort(dim=1, descending=True, stable=True).indices[:, :num_experts]
    kept = most_loaded.sort(dim=1).values  # [L, num_experts], in their old order

    def chosen(name: str) -> StoredTensor:
        if match := ROUTER_NAME.fullmatch(name):
            gate, rows = checkpoint.tensors[name], kept[int(match[1])]
            return replace_load(gate, (num_experts, *gate.shape[1:]), lambda: gate.read()[rows])
        if match := EXPERT_NAME.fullmatch(name):
            experts, layer, expert, part = match.groups()
            return checkpoint.tensors[f"{experts}{kept[int(layer), int(expert)]}.{part}.weight"]
        return checkpoint.tensors[name]

    return with_experts(checkpoint, num_experts, top_k, chosen)


def with_experts(
    checkpoint: Checkpoint, num_experts: int, top_k: int, tensor_of: Callable[[str], StoredTensor]
) -> Checkpoint:
    """`checkpoint` with so many experts, its tensors being `tensor_of` their released names.

    Of form `experts`: the files in its path are another model's.
    """
    config = copy.deepcopy(checkpoint.config)
    config.num_local_experts, config.num_experts_per_tok = num_experts, top_k
    names = HUB.groups(config, model_class_of(checkpoint.tensors))
    return replace(
        checkpoint, form="experts", is_standard=False, config=config, tensors={name: tensor_of(name) for name in names}
    )


def replace_load(source: StoredTensor, shape: tuple[int, ...], load: Callable[[], torch.Tensor]) -> StoredTensor:
    """A tensor made of `source`, of its dtype."""
    return StoredTensor(shape, source.dtype, source.where, load)
