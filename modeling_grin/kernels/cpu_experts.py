"""Experts on CPUs: one after the other in buffers that stay in the cache, with their own backward pass.

transformers' implementations hold every slot's input, gate, up, activation and output, forward and backward. Here the
experts take turns in the same few buffers. The forward pass keeps gate and up only; the backward pass recomputes the
activations from them. Where this does not apply (`uses_cpu_kernel`), the same name stands for transformers'
implementations.

Shapes: T tokens, K experts per token, T x K slots, E experts, H hidden_size, F intermediate_size.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, silu
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from ..layout_grinmoe import EXPERT_WEIGHTS
from ..lora_experts_grinmoe import Lora, lora_experts_forward
from ..modeling_grinmoe import GrinMoeExperts
from .gpu_experts import few_slots_experts, uses_few_slots_kernel

GRIN_EXPERTS = "grinmoe"  # the experts_implementation

# oneDNN compiles a kernel per shape (0.7 ms). Row counts are rounded up to a multiple, so that shapes repeat.
ROW_MULTIPLE = 8


class Segment(NamedTuple):
    """The slots of one expert."""

    expert: int
    tokens: torch.Tensor  # whose they are, int64
    rows: slice  # in buffers of all slots; the last ones may be padding, which is zero

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    def gather(self, source: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of `source` `[T, features]`, in `buffer`."""
        out = buffer[: self.num_rows]
        torch.index_select(source, 0, self.tokens, out=out[: len(self.tokens)])
        out[len(self.tokens) :].zero_()
        return out


def expert_order(top_k_index: torch.Tensor, num_experts: int) -> tuple[list[Segment], torch.Tensor]:
    """The segments of `top_k_index` `[T, K]`, and the row of each slot in buffers of all slots, `[T, K]`."""
    expert_of_slot = top_k_index.reshape(-1)
    order = expert_of_slot.argsort(stable=True)
    tokens = order // top_k_index.shape[-1]
    position = torch.empty_like(order)
    segments = []
    start = row = 0
    for expert, count in enumerate(torch.bincount(expert_of_slot, minlength=num_experts).tolist()):
        if count == 0:
            continue
        slots = slice(start, start + count)
        position[order[slots]] = torch.arange(row, row + count)
        num_rows = count if count < ROW_MULTIPLE else -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
        segments.append(Segment(expert, tokens[slots], slice(row, row + num_rows)))
        start, row = start + count, row + num_rows
    return segments, position.view_as(top_k_index)


def project(x, out, expert, weight, a, b) -> None:
    """`out = W x + B (A x)` of an expert, in the dtype of `x`: under autocast the tensors may have another one."""
    torch.mm(x, weight[expert].to(x.dtype).t(), out=out)
    if a is not None:
        out.addmm_(x @ a[expert].t().to(x.dtype), b[expert].t().to(x.dtype))


def pull_back(grad, out, expert, weight, a, b) -> None:
    """The gradient with respect to `x` of `project`."""
    torch.mm(grad, weight[expert].to(grad.dtype), out=out)
    if a is not None:
        out.addmm_(grad @ b[expert].to(grad.dtype), a[expert].to(grad.dtype))


def differentiate(grad, x, expert, tensors, gradients) -> None:
    """The gradients with respect to the W, A and B of `project` that have a place in `gradients`."""
    (_, a, b), (grad_weight, grad_a, grad_b) = tensors, gradients
    if grad_weight is not None:
        matmul_into(grad_weight[expert], grad.t(), x)
    if grad_a is not None:
        matmul_into(grad_a[expert], (grad @ b[expert].to(grad.dtype)).t(), x)
    if grad_b is not None:
        matmul_into(grad_b[expert], grad.t(), x @ a[expert].to(grad.dtype).t())


def matmul_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`out = a @ b`; a weight's gradient may have another dtype than autocast computes in."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


class ExpertsFunction(torch.autograd.Function):
    """The weighted sum of each token's experts, `[T, H]`, in the dtype of `hidden_states`.

    Arguments: `hidden_states` `[T, H]` and `top_k_weights` `[T, K]` of one dtype, `top_k_index` `[T, K]`,
    `gate_up_proj` `[E, 2F, H]` and `down_proj` `[E, H, F]` of any, whether a backward pass may follow, and the factors
    A `[E, r, in]` and B `[E, out, r]` of the LoRA on `gate_up_proj` and on `down_proj`, or None.
    """

    @staticmethod
    def forward(
        ctx, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, learning: bool,
        gate_up_a, gate_up_b, down_a, down_b,
    ):  # fmt: skip
        gate_up_tensors, down_tensors = (gate_up_proj, gate_up_a, gate_up_b), (down_proj, down_a, down_b)
        segments, position = expert_order(top_k_index, len(down_proj))
        hidden_size, intermediate_size = down_proj.shape[1:]
        longest = max((segment.num_rows for segment in segments), default=0)
        total = segments[-1].rows.stop if segments else 0
        inputs = hidden_states.new_empty(longest, hidden_size)
        activations = hidden_states.new_empty(longest, intermediate_size)
        gate_up = hidden_states.new_empty(total if learning else longest, 2 * intermediate_size)
        outputs = hidden_states.new_empty(total, hidden_size)
        for segment in segments:
            expert, _, rows = segment
            x = segment.gather(hidden_states, inputs)
            own_gate_up = gate_up[rows] if learning else gate_up[: len(x)]
            project(x, own_gate_up, expert, *gate_up_tensors)
            gate, up = own_gate_up.chunk(2, dim=-1)
            activation = torch.ops.aten.silu.out(gate, out=activations[: len(x)]).mul_(up)
            project(activation, outputs[rows], expert, *down_tensors)
        ctx.save_for_backward(hidden_states, top_k_weights, gate_up, *gate_up_tensors, *down_tensors)
        ctx.segments, ctx.position = segments, position
        return embedding_bag(position, outputs, mode="sum", per_sample_weights=top_k_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, top_k_weights, gate_up, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[index] for index in (3, 6, 7, 4, 8, 9)]
        grads = [torch.empty_like(t) if t is not None and n else None for t, n in zip(tensors, needs, strict=True)]
        gate_up_tensors, down_tensors, gate_up_grads, down_grads = tensors[:3], tensors[3:], grads[:3], grads[3:]
        num_experts, hidden_size, intermediate_size = down_tensors[0].shape
        longest = max((segment.num_rows for segment in ctx.segments), default=0)
        weights = gate_up.new_zeros(len(gate_up), 1)
        weights[ctx.position, 0] = top_k_weights
        grad_weights = torch.empty_like(weights)
        grad_inputs = gate_up.new_empty(len(gate_up), hidden_size)
        rows_of_hidden = gate_up.new_empty(longest, hidden_size)
        silus, activations, grad_activations = gate_up.new_empty(3, longest, intermediate_size).unbind()
        grad_gate_ups = gate_up.new_empty(longest, 2 * intermediate_size)

        for segment in ctx.segments:
            expert, _, rows = segment
            gate, up = gate_up[rows].chunk(2, dim=-1)
            silu_gate = torch.ops.aten.silu.out(gate, out=silus[: segment.num_rows])
            activation = torch.mul(silu_gate, up, out=activations[: segment.num_rows])
            # The output is weight * down(activation).
            grad = segment.gather(grad_output, rows_of_hidden)
            grad_activation = grad_activations[: segment.num_rows]
            pull_back(grad, grad_activation, expert, *down_tensors)
            grad_weights[rows, 0] = torch.mul(grad_activation, activation).sum(dim=-1)
            grad.mul_(weights[rows])
            differentiate(grad, activation, expert, down_tensors, down_grads)
            grad_activation.mul_(weights[rows])
            # activation = silu(gate) * up
            grad_gate_up = grad_gate_ups[: segment.num_rows]
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_activation, silu_gate, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_activation.mul_(up), gate, grad_input=grad_gate)
            # gate and up are gate_up_proj(input)
            pull_back(grad_gate_up, grad_inputs[rows], expert, *gate_up_tensors)
            if any(needs[:3]):
                x = segment.gather(hidden_states, rows_of_hidden)
                differentiate(grad_gate_up, x, expert, gate_up_tensors, gate_up_grads)

        for unused in set(range(num_experts)) - {segment.expert for segment in ctx.segments}:
            for gradient in filter(torch.is_tensor, grads):
                gradient[unused].zero_()
        grad_hidden_states = embedding_bag(ctx.position, grad_inputs, mode="sum")
        own = grad_hidden_states, None, grad_weights[ctx.position, 0], gate_up_grads[0], down_grads[0], None
        return *own, *gate_up_grads[1:], *down_grads[1:]


def compute_token(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj) -> torch.Tensor:
    """The same of a single token, `[1, H]`, without gradients: there is nothing to put in order."""
    outputs = []
    for expert in top_k_index[0].tolist():
        gate, up = torch.mm(hidden_states, gate_up_proj[expert].to(hidden_states.dtype).t()).chunk(2, dim=-1)
        outputs.append(torch.mm(silu(gate).mul_(up), down_proj[expert].to(hidden_states.dtype).t()))
    return torch.mm(top_k_weights, torch.cat(outputs))


def are_plain(experts: Any) -> bool:
    """Whether these are SwiGLU experts without dropout."""
    is_swiglu = isinstance(experts, GrinMoeExperts) and experts.config.hidden_act == "silu"
    return is_swiglu and not (experts.training and experts.dropout.p > 0)


def uses_cpu_kernel(experts: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether `grinmoe` computes by itself: plain experts on a CPU, not in `torch.compile`."""
    return hidden_states.device.type == "cpu" and are_plain(experts) and not torch.compiler.is_compiling()


def grinmoe_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`experts_implementation="grinmoe"`: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`, the best way for the device.

    On CPUs `ExpertsFunction`, in the dtype of `hidden_states`; on GPUs `few_slots_experts` for a few slots of
    inference; elsewhere transformers' `grouped_mm`, and `batched_mm` for a few slots, as in its `generate`, and ONNX.
    """
    if uses_cpu_kernel(self, hidden_states):
        is_learning = torch.is_grad_enabled()
        top_k_weights = top_k_weights.to(hidden_states.dtype)
        inputs = hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        is_single = len(hidden_states) == 1 and not is_learning
        return compute_token(*inputs) if is_single else ExpertsFunction.apply(*inputs, is_learning, *(None,) * 4)
    if are_plain(self) and uses_few_slots_kernel(self, hidden_states, top_k_index):
        weights = top_k_weights.to(hidden_states.dtype)
        return few_slots_experts(hidden_states, top_k_index, weights, self.gate_up_proj, self.down_proj)
    few = not torch.is_grad_enabled() and top_k_index.numel() <= self.num_experts
    batched = (few and hidden_states.device.type != "cpu") or torch.onnx.is_in_onnx_export()  # has no grouped_mm
    forward = batched_mm_experts_forward if batched else grouped_mm_experts_forward
    return forward(self, hidden_states, top_k_index, top_k_weights)


def grinmoe_lora_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, lora: Lora
) -> torch.Tensor:
    """`lora_experts_forward`; for `experts_implementation="grinmoe"` on CPUs by `ExpertsFunction`."""
    if self.config._experts_implementation != GRIN_EXPERTS or not uses_cpu_kernel(self, hidden_states):
        return lora_experts_forward(self, hidden_states, top_k_index, top_k_weights, lora)
    inputs = hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype), self.gate_up_proj, self.down_proj
    factors = [factor for name in EXPERT_WEIGHTS for factor in lora.get(name, (None, None))]
    return ExpertsFunction.apply(*inputs, torch.is_grad_enabled(), *factors)


# Given tokens in autocast's dtype, the kernel casts one expert at a time (`run_experts`).
grinmoe_experts_forward.casts_weights = uses_cpu_kernel  # type: ignore[attr-defined]
