"""Experts of a few tokens on a GPU, where reading the matrices takes the time: each chosen one is read once, in place.

transformers' `batched_mm` copies the matrices of every slot first, and reads the copies. Here a program has a block of
one expert's rows, and multiplies them with the inputs of all its slots.

Shapes: T tokens, K experts per token, T x K slots, E experts, H hidden_size, F intermediate_size.
"""

from typing import Any

import torch

from .. import gpu_kernels_grinmoe as gpu
from ..gpu_kernels_grinmoe import jit, launch, tl

MAX_SLOTS = 64
MIN_SLOTS = 16  # rows of a tensor core's tile
BLOCK_ROWS, BLOCK_COLUMNS = 32, 128  # of a matrix


@jit
def few_slots_kernel(
    inputs, experts, weights, matrices, outputs, num_slots, num_rows, num_columns, SLOTS: tl.constexpr,
    TOP_K: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one expert's matrix times its slots' inputs.

    `GATED`: inputs are the tokens' `[T, H]`, and the result `[T x K, F]` is `silu(w1 x) * (w3 x)`, w1 above w3 in the
    matrix. Otherwise they are the slots', `[T x K, F]`, and the result `[T x K, H]` is multiplied with `weights`.
    """
    expert = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    own = tl.load(experts + slot, slot < num_slots, other=-1) == expert
    if tl.sum(own.to(tl.int32)) > 0:
        source = slot // TOP_K if GATED else slot
        is_row = row < num_rows
        matrix = matrices + expert.to(tl.int64) * num_rows * num_columns * (2 if GATED else 1)
        first = tl.zeros((SLOTS, ROWS), dtype=tl.float32)
        second = tl.zeros((SLOTS, ROWS), dtype=tl.float32)
        for start in range(0, num_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_column = column < num_columns
            x = tl.load(
                inputs + source[:, None] * num_columns + column[None, :], own[:, None] & is_column[None, :], other=0.0
            )
            place = matrix + row[None, :] * num_columns + column[:, None]
            inside = is_row[None, :] & is_column[:, None]
            first = tl.dot(x, tl.load(place, inside, other=0.0), first, input_precision="ieee")
            if GATED:
                up = tl.load(place + num_rows * num_columns, inside, other=0.0)
                second = tl.dot(x, up, second, input_precision="ieee")
        if GATED:
            first = first * tl.sigmoid(first) * second
        else:
            first = first * tl.load(weights + slot, own, other=0.0).to(tl.float32)[:, None]
        place = outputs + slot[:, None] * num_rows + row[None, :]
        tl.store(place, first.to(outputs.dtype.element_ty), own[:, None] & is_row[None, :])


@torch.library.custom_op("grinmoe::few_slots_experts", mutates_args=())
def few_slots_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, `[T, H]`; arguments as in `ExpertsFunction`, without gradients."""
    (num_tokens, top_k), (num_experts, hidden_size, intermediate_size) = top_k_index.shape, down_proj.shape
    num_slots = num_tokens * top_k
    activations = hidden_states.new_empty(num_slots, intermediate_size)
    outputs = hidden_states.new_empty(num_slots, hidden_size)
    slots = max(MIN_SLOTS, gpu.triton.next_power_of_2(num_slots))
    sizes = {"SLOTS": slots, "TOP_K": top_k, "ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS}
    routing = top_k_index.contiguous(), top_k_weights.contiguous()
    for inputs, matrices, out, is_gated in (
        (hidden_states.contiguous(), gate_up_proj, activations, True),
        (activations, down_proj, outputs, False),
    ):
        grid = num_experts, gpu.triton.cdiv(out.shape[1], BLOCK_ROWS)
        arguments = inputs, *routing, matrices, out, num_slots, out.shape[1], inputs.shape[1]
        launch(few_slots_kernel, grid, *arguments, GATED=is_gated, **sizes)
    return outputs.view(num_tokens, top_k, hidden_size).sum(dim=1)


@few_slots_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    return torch.empty_like(hidden_states)


def uses_few_slots_kernel(experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> bool:
    """Whether SwiGLU `experts` without dropout compute by `few_slots_experts`: plain weights, and no gradients."""
    weights = experts.gate_up_proj, experts.down_proj
    return (
        gpu.use_kernels(hidden_states)
        and not torch.is_grad_enabled()
        and 0 < top_k_index.numel() <= MAX_SLOTS
        and all(isinstance(w, torch.Tensor) and w.is_contiguous() and w.dtype == hidden_states.dtype for w in weights)
        and not any(hasattr(w, "to_local") for w in weights)
    )
