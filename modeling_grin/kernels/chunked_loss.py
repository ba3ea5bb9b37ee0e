"""Cross-entropy of a language model's head in chunks of tokens, so that the logits of a whole batch are never held.

The forward pass computes each chunk's gradients while its logits exist; the backward pass only scales them, as Liger
Kernel does on GPUs (arXiv 2410.10989). torch 2.13's `nn.functional.linear_cross_entropy` is no replacement: it returns
a bfloat16 loss for bfloat16 (2 to 3 digits), and multiplies in float32 on CPUs, at a quarter of the speed.

Tensor parallelism deals out the head's rows; each rank then has the logits of its part of the vocabulary alone.

Shapes: T tokens, V vocab_size (a rank's part of it), H hidden_size.
"""

from functools import partial
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..experts_grinmoe import autocast_dtype

# The weight's gradient is summed over chunks in the computation's dtype: larger ones round it less often.
CHUNK_TOKENS = 1024
IGNORED = -100  # the label of a token that has no loss


def can_chunk(model: PreTrainedModel) -> bool:
    """Whether the loss of a causal language model is the plain cross-entropy of a plain `lm_head`.

    float16 may not hold the gradients without the scale that comes in the backward pass. `torch.compile` fuses by
    itself. DataParallel gathers outputs of tensors only.
    """
    head = model.lm_head
    by_fsdp = isinstance(head, FSDPModule)  # which has two hooks of its own
    by_tp = isinstance(head.weight, DTensor) and head.weight.placements == (Shard(0),)  # which puts in a `forward`
    return (
        model.loss_function is ForCausalLMLoss
        and (type(head).__bases__[-1] if by_fsdp else type(head)) is nn.Linear
        and (by_tp or type(head.weight) is nn.Parameter)
        and len(head._forward_hooks) == len(head._forward_pre_hooks) == int(by_fsdp)
        and ("forward" in vars(head)) == by_tp
        and (autocast_dtype(head.weight.device.type) or head.weight.dtype) != torch.float16
        and not torch.compiler.is_compiling()
        and not getattr(model, "_is_replica", False)
    )


class SkippedLogits:
    """Placeholder for logits that were not computed: using it raises, and says how to get them."""

    def __repr__(self) -> str:
        return "SkippedLogits()"

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError(
            "logits were not computed: with labels, a forward pass in training returns the loss alone; call the model "
            "with skip_logits=False for logits"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __array__ = _raise
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __neg__ = _raise
    __torch_function__: Any = classmethod(_raise)  # type: ignore[arg-type]


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over tokens of the cross-entropy of `hidden_states @ weight.T + bias`, over `num_items`.

    Arguments: `hidden_states` `[T, H]`, `weight` `[V, H]`, `bias` `[V]` or None, `labels` int64 `[T]`, `num_items`,
    and whether a backward pass may follow: one. With a `group`, `weight` and `bias` are this rank's rows from `first`.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, num_items, learning: bool, group=None, first: int = 0):
        dtype = hidden_states.dtype
        matrix = weight.to(dtype)
        tokens = (labels != IGNORED).nonzero().squeeze(-1)
        logits_buffer = hidden_states.new_empty(min(len(tokens), CHUNK_TOKENS), len(weight))
        # Softmax in float32; for float32 logits in their place.
        probs_buffer = logits_buffer.to(torch.promote_types(dtype, torch.float32))
        loss = probs_buffer.new_zeros(())
        grad_hidden_states = torch.zeros_like(hidden_states) if learning else None
        grad_weight = torch.zeros_like(matrix) if learning and ctx.needs_input_grad[1] else None
        grad_bias = loss.new_zeros(len(weight)) if learning and bias is not None else None
        for index in tokens.split(CHUNK_TOKENS):
            inputs, targets = hidden_states[index], labels[index, None]
            logits, probs = logits_buffer[: len(index)], probs_buffer[: len(index)]
            if bias is None:
                torch.mm(inputs, matrix.t(), out=logits)
            else:
                torch.addmm(bias.to(dtype), inputs, matrix.t(), out=logits)
            probs.copy_(logits)
            if group is None:
                torch.log_softmax(probs, dim=-1, out=probs)
                here = 1.0
            else:
                own = probs.logsumexp(-1)
                parts = own.new_empty(dist.get_world_size(group), len(own))
                dist.all_gather_into_tensor(parts, own[None], group=group)
                probs -= parts.logsumexp(0)[:, None]
                targets = targets - first
                here = ((targets >= 0) & (targets < len(weight))).to(probs.dtype)
                targets = targets.clamp(0, len(weight) - 1)
            loss -= (probs.gather(-1, targets) * here).sum()
            if grad_hidden_states is None:
                continue
            # d loss / d logits = softmax(logits) - onehot(target)
            probs.exp_().scatter_add_(-1, targets, probs.new_full(targets.shape, -1.0) * here)
            grad_logits = logits.copy_(probs.div_(num_items))
            grad_hidden_states[index] = grad_logits @ matrix
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), inputs)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=grad_bias.dtype)
        if group is not None:
            for total in (loss, grad_hidden_states) if learning else (loss,):
                dist.all_reduce(total, group=group)
        ctx.gradients = grad_hidden_states, grad_weight, grad_bias
        return loss / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss has one backward pass; for another one, do the forward pass again")
        gradients, ctx.gradients = ctx.gradients, None  # in place, and so that they become .grad without a copy
        grad_hidden_states, grad_weight, grad_bias = (g if g is None else g.mul_(grad_loss) for g in gradients)
        return grad_hidden_states, grad_weight, grad_bias, *(None,) * 5


def chunked_causal_lm_loss(
    hidden_states: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss` of `head(hidden_states)`, `[batch, sequence, H]`: a float32 or float64 scalar.

    Args:
        labels: int64 `[batch, sequence]`, -100 where a token has none; `shift_labels` are shifted already.
        num_items_in_batch: divisor of the summed losses; by default the number of labels.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(targets.device)
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).to(
        autocast_dtype(head.weight.device.type) or head.weight.dtype
    )
    settings: tuple[Any, ...] = (targets, num_items_in_batch, torch.is_grad_enabled())
    weight: Any = head.weight
    bias: Any = head.bias
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        settings += mesh.get_group(), mesh.get_local_rank() * ceil(len(weight) / mesh.size())
        weight, bias = weight.to_local(), bias if bias is None else bias.to_local()
    return LinearCrossEntropy.apply(tokens, weight, bias, *settings)


def loss_without_logits(
    model: PreTrainedModel, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs
) -> tuple[torch.Tensor, SkippedLogits] | None:
    """The loss of a causal language model and a placeholder for its logits; None if it has to compute them."""
    if not can_chunk(model):
        return None
    head = model.lm_head
    before = vars(head).get("forward")
    head.forward = partial(chunked_causal_lm_loss, head=head, labels=labels, **kwargs)  # between the hooks of FSDP2
    try:
        return head(hidden_states), SkippedLogits()
    finally:
        del head.forward
        if before is not None:
            head.forward = before
