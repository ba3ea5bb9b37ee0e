"""Choices of a router that rounding could turn.

Where two experts are all but equally good, or one is at the edge of the keep set, two right computations of the same
model may choose differently, and then differ by an expert's output. Tests that compare computations stay away from
there (`far_from_ties` in conftest.py), whatever the processor and its order of sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

from modeling_grin import routing_grinmoe

# Of a token's largest router logit. float32 moves logits of these models by less than 1e-6 (docs/parity.md).
MARGIN = 2e-6


@torch.no_grad()
def smallest_margin(router_logits, top_k, jitter_eps, noise, experts) -> float:
    """By how much a logit of `[T, E]` would have to change to change a choice, relative to its token's largest one."""
    z = router_logits.double()
    scores = z.expand(top_k, *z.shape) if noise is None else z + noise.gumbel
    available = torch.ones_like(z, dtype=torch.bool)
    margins = []
    for k in range(top_k):
        best = z.masked_fill(~available, -torch.inf).amax(dim=-1, keepdim=True)
        beyond = (best - z) - 2 * jitter_eps * torch.maximum(z.abs(), best)  # of the keep set
        margins.append(beyond.abs().masked_fill(~available | (z == best), torch.inf).amin(dim=-1))
        candidates = available if noise is None else available & (beyond <= 0)
        first, second = scores[k].masked_fill(~candidates, -torch.inf).topk(2, dim=-1).values.unbind(-1)
        margins.append(first - second)
        available = available.scatter(-1, experts[:, k : k + 1], False)
    return float((torch.stack(margins) / z.abs().amax(dim=-1)).min())


@contextmanager
def watch_choices() -> Iterator[Callable[[], float]]:
    """Afterwards, and meanwhile: the smallest margin of all choices in float32 that SparseMixer's kin made."""
    choose, smallest = routing_grinmoe.choose, float("inf")

    @wraps(choose)
    def watched(router_logits, top_k, jitter_eps, noise, *args):
        nonlocal smallest
        choices = choose(router_logits, top_k, jitter_eps, noise, *args)
        if isinstance(noise, routing_grinmoe.TokenKeys):
            keys = noise.keys
            noise = None if keys is None else routing_grinmoe.draw_noise(router_logits, top_k, keys=keys)
        if not torch.compiler.is_compiling() and router_logits.dtype == torch.float32 and router_logits.numel():
            smallest = min(smallest, smallest_margin(router_logits, top_k, jitter_eps, noise, choices.experts))
        return choices

    routing_grinmoe.choose = watched
    try:
        yield lambda: smallest
    finally:
        routing_grinmoe.choose = choose
