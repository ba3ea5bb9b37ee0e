"""Input jitter and choice of experts as Triton kernels, one launch each: on a GPU `routing_grinmoe.py` needs hundreds.

Its code is what they compute, and runs wherever they do not. Each draws its noise in registers, from the tokens' keys.
The environment variable `GRIN_GPU_KERNELS=0` switches them off. Shapes: T tokens, H hidden_size, E experts, K top-k.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

try:  # comes with torch on GPUs
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

IS_ON = os.environ.get("GRIN_GPU_KERNELS", "1") != "0"
TOKENS_PER_PROGRAM = 64  # of the choice of experts
PAIRS_PER_PROGRAM = 1024  # of elements of a row, to be jittered


def is_on() -> bool:
    """Whether GPU kernels are not switched off."""
    return IS_ON


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether there is Triton, and `tensor` where its kernels run."""
    return triton is not None and tensor.is_cuda


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels compute what follows from `tensor`; they do in float32, or less."""
    return is_on() and can_launch(tensor) and tensor.dtype != torch.float64


def jit(kernel: Callable) -> Any:
    """`triton.jit`, or nothing where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of the first argument, a tensor, without fusing products and sums, as torch does."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


# ---- Noise, as in noise_grinmoe.py ----


@jit
def number(key, n):
    """`splitmix64`; shifts are logical, on uint64."""
    state = ((key + n) * -7046029254386353131).to(tl.uint64, bitcast=True)
    state = ((state ^ (state >> 30)).to(tl.int64, bitcast=True) * -4658895280553007687).to(tl.uint64, bitcast=True)
    state = ((state ^ (state >> 27)).to(tl.int64, bitcast=True) * -7723592293110705685).to(tl.uint64, bitcast=True)
    return state ^ (state >> 31)


@jit
def to_uniform(bits):
    """The lowest 23 bits as a number in the open (0, 1)."""
    return ((bits & 0x7FFFFF).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@jit
def uniform(key, n):
    """The `n`-th number, n >= 0, of `uniform`: one hash makes two."""
    bits = number(key, (n // 2 + 1).to(tl.int64))
    return to_uniform(tl.where(n % 2 == 0, bits >> 9, bits >> 41))


@jit
def jitter_kernel(x, keys, out, hidden_size, scale, shift, PAIRS: tl.constexpr):
    """`out = x * (u * scale + shift)` of part of a row."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    bits = number(tl.load(keys + row), (pair + 1).to(tl.int64))
    draws = tl.interleave(to_uniform(bits >> 9), to_uniform(bits >> 41))
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    own = column < hidden_size
    value = tl.load(x + row * hidden_size + column, own).to(tl.float32) * (draws * scale + shift)
    tl.store(out + row * hidden_size + column, value.to(out.dtype.element_ty), own)


@torch.library.custom_op("grinmoe::jitter", mutates_args=())
def jitter(hidden_states: torch.Tensor, input_jitter_noise: float, keys: torch.Tensor) -> torch.Tensor:
    """`jitter_input`."""
    hidden_states = hidden_states.contiguous()
    output = torch.empty_like(hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    if num_tokens > 0:
        grid = num_tokens, triton.cdiv(hidden_size, 2 * PAIRS_PER_PROGRAM)
        factors = 2 * input_jitter_noise, 1 - input_jitter_noise
        launch(jitter_kernel, grid, hidden_states, keys, output, hidden_size, *factors, PAIRS=PAIRS_PER_PROGRAM)
    return output


@jitter.register_fake
def _(hidden_states, input_jitter_noise, keys):
    return hidden_states.new_empty(hidden_states.shape)


def _save_for_jitter(ctx, inputs, output):
    _, ctx.input_jitter_noise, keys = inputs
    ctx.save_for_backward(keys)


def _jitter_backward(ctx, grad_output):
    return jitter(grad_output, ctx.input_jitter_noise, *ctx.saved_tensors), None, None


jitter.register_autograd(_jitter_backward, setup_context=_save_for_jitter)


# ---- Choice of experts, as `choose` in routing_grinmoe.py ----


@jit
def load_logits(logits, token, expert, num_tokens, NUM_EXPERTS: tl.constexpr):
    """Finite logits `[tokens, experts]`, and which of them are -inf."""
    inside = (token < num_tokens)[:, None] & (expert < NUM_EXPERTS)[None, :]
    z = tl.load(logits + token[:, None] * NUM_EXPERTS + expert[None, :], inside, other=0.0).to(tl.float32)
    return tl.maximum(z, -3.4028234663852886e38), z == -float("inf")


@jit
def masked_softmax(z, available, limit):
    """Equation 2: the logits that are kept, and their softmax; `limit` is 2 r."""
    best = tl.max(tl.where(available, z, -float("inf")), 1)[:, None]
    distance = tl.div_rn(best - z, tl.maximum(tl.abs(z), best))
    masked = tl.where(available & ~(distance > limit), z, -float("inf"))
    exp = tl.exp(masked - best)
    return masked, exp / tl.sum(exp, 1)[:, None]


@jit
def choose_kernel(
    logits, keys, experts, probs, at_end, num_tokens, limit, end_probability, NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr, TOP_K: tl.constexpr, SAMPLE: tl.constexpr, EXCEPTION: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Algorithm 3 for `TOKENS` tokens; `COLUMNS` is the power of 2 that holds the experts."""
    token, expert = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    rows = token < num_tokens
    z, impossible = load_logits(logits, token, expert, num_tokens, NUM_EXPERTS)
    exists = (expert < NUM_EXPERTS)[None, :]
    available = exists & (token >= 0)[:, None]
    if SAMPLE:
        key = tl.load(keys + token, rows, other=0)
    for k in tl.static_range(TOP_K):
        masked, p = masked_softmax(z, available, limit)
        best = tl.argmax(masked, 1)
        chosen, end = best, best == best
        if SAMPLE:
            draws = uniform(key[:, None], k * (NUM_EXPERTS + 1) + expert[None, :])
            chosen = tl.argmax(tl.where(exists, masked - tl.log(-tl.log(draws)), -float("inf")), 1)
            end = uniform(key, k * (NUM_EXPERTS + 1) + NUM_EXPERTS + 0 * token.to(tl.int32)) < end_probability
            if EXCEPTION:
                end = end | (chosen == best)
        taken = expert[None, :] == chosen[:, None]
        tl.store(experts + token * TOP_K + k, chosen.to(tl.int64), rows)
        tl.store(probs + token * TOP_K + k, tl.sum(tl.where(taken & ~impossible, p, 0.0), 1), rows)
        tl.store(at_end + token * TOP_K + k, end, rows)
        available = available & ~taken


@jit
def choose_backward_kernel(
    logits, experts, grad_probs, grad_logits, num_tokens, limit, NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`dz = sum_k g_k p_D (onehot(D) - p)`; the K softmaxes are computed again."""
    token, expert = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    rows = token < num_tokens
    z, impossible = load_logits(logits, token, expert, num_tokens, NUM_EXPERTS)
    available = (expert < NUM_EXPERTS)[None, :] & (token >= 0)[:, None]
    grad = tl.zeros_like(z)
    for k in tl.static_range(TOP_K):
        _, p = masked_softmax(z, available, limit)
        chosen = tl.load(experts + token * TOP_K + k, rows, other=0)[:, None]
        taken = expert[None, :].to(tl.int64) == chosen
        g = tl.load(grad_probs + token * TOP_K + k, rows, other=0.0)[:, None]
        g *= tl.sum(tl.where(taken & ~impossible, p, 0.0), 1)[:, None]
        grad += g * (tl.where(taken, 1.0, 0.0) - p)
        available = available & ~taken
    place = grad_logits + token[:, None] * NUM_EXPERTS + expert[None, :]
    tl.store(place, grad.to(grad_logits.dtype.element_ty), rows[:, None] & (expert < NUM_EXPERTS)[None, :])


def _launch_by_tokens(kernel: Any, router_logits: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    num_tokens, num_experts = router_logits.shape
    if num_tokens > 0:
        launch(
            kernel,
            (triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),),
            router_logits,
            *arguments,
            NUM_EXPERTS=num_experts,
            COLUMNS=triton.next_power_of_2(num_experts),
            TOKENS=TOKENS_PER_PROGRAM,
            **constants,
        )


@torch.library.custom_op("grinmoe::choose", mutates_args=())
def choose(
    router_logits: torch.Tensor,
    keys: torch.Tensor | None,
    top_k: int,
    jitter_eps: float,
    end_probability: float,
    argmax_exception: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`choose` of logits `[T, E]` that may be -inf, with the draws of `keys` int64 `[T]`; None takes the best experts.

    Returns:
        `experts`, int64, `probs`, float32, and `at_end`, bool, all `[T, K]`; `probs` is 0 for a logit of -inf.
    """
    router_logits = router_logits.contiguous()
    choices = _empty_choices(router_logits, top_k)
    arguments = router_logits if keys is None else keys, *choices, len(router_logits), 2 * jitter_eps, end_probability
    constants = {"TOP_K": top_k, "SAMPLE": keys is not None, "EXCEPTION": argmax_exception}
    _launch_by_tokens(choose_kernel, router_logits, *arguments, **constants)
    return choices


def _empty_choices(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape, device = (len(router_logits), top_k), router_logits.device
    dtypes = torch.int64, torch.float32, torch.bool
    experts, probs, at_end = (torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes)
    return experts, probs, at_end


@choose.register_fake
def _(router_logits, keys, top_k, jitter_eps, end_probability, argmax_exception):
    return _empty_choices(router_logits, top_k)


@torch.library.custom_op("grinmoe::choose_backward", mutates_args=())
def choose_backward(
    router_logits: torch.Tensor, experts: torch.Tensor, grad_probs: torch.Tensor, jitter_eps: float
) -> torch.Tensor:
    """The gradient with respect to `router_logits`, `[T, E]`, of a gradient `[T, K]` with respect to `probs`."""
    router_logits = router_logits.contiguous()
    grad_logits = torch.empty_like(router_logits)
    arguments = experts, grad_probs.contiguous(), grad_logits, len(router_logits), 2 * jitter_eps
    _launch_by_tokens(choose_backward_kernel, router_logits, *arguments, TOP_K=experts.shape[1])
    return grad_logits


@choose_backward.register_fake
def _(router_logits, experts, grad_probs, jitter_eps):
    return router_logits.new_empty(router_logits.shape)


def _save_for_choice(ctx, inputs, output):
    router_logits, ctx.jitter_eps = inputs[0], inputs[3]
    experts, _, at_end = output
    ctx.save_for_backward(router_logits, experts)
    ctx.mark_non_differentiable(experts, at_end)


def _choose_backward(ctx, grad_experts, grad_probs, grad_at_end):
    router_logits, experts = ctx.saved_tensors
    return choose_backward(router_logits, experts, grad_probs, ctx.jitter_eps), None, None, None, None, None


choose.register_autograd(_choose_backward, setup_context=_save_for_choice)
