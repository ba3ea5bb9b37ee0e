"""Routing noise: a pure function of (seed, step, layer, token), so that nothing depends on how work was split.

Recomputation in activation checkpointing, the micro-batches of an accumulation window, data-, tensor- and pipeline-
parallel ranks and a resumed run all draw the same numbers, because no shared generator advances. Each token has a
64-bit key, which seeds a generator of its own: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose n-th number is a
hash of its seed plus n times a constant. Integers are exact on every device; the numbers are float32.

T = batch x sequence tokens, L layers. int64 arithmetic wraps around, as the generator wants.
"""

import torch

# Odd 64-bit constants, as the int64 with the same bits.
GOLDEN_RATIO, MIX_1, MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
FLOAT_BITS = 23  # of a uniform number: n + 1/2 is then exact in float32 for every n


def _xor_shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """A new tensor, `state ^ (state >>> bits)`; int64 shifts its sign in, which the mask takes out again."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1).bitwise_xor_(state)


def splitmix64(keys: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
    """The `n`-th number, n >= 1, of each key's generator, int64: SplitMix64 seeded with `key * GOLDEN_RATIO`."""
    state = (keys + n) * GOLDEN_RATIO
    return _xor_shift(_xor_shift(_xor_shift(state, 30).mul_(MIX_1), 27).mul_(MIX_2), 31)


def fold_in(keys: torch.Tensor, data: torch.Tensor | int) -> torch.Tensor:
    """Derive new keys, int64, from `keys` and `data`."""
    return splitmix64(keys, data + 1)


def uniform(keys: torch.Tensor, n: int) -> torch.Tensor:
    """The first `n` numbers of each key's generator, `[T]` -> `[T, n]`, float32, uniform in the open (0, 1)."""
    counter = torch.arange(1, (n + 1) // 2 + 1, device=keys.device)  # one hash makes two numbers
    bits = splitmix64(keys.unsqueeze(-1), counter).view(torch.int32)[:, :n]
    numbers = (bits >> (32 - FLOAT_BITS)).bitwise_and_((1 << FLOAT_BITS) - 1)
    return numbers.float().add_(0.5).mul_(2.0**-FLOAT_BITS)


def step_key(seed: int, step: int) -> torch.Tensor:
    """The key of an optimizer step, int64 scalar on the CPU."""
    return fold_in(fold_in(torch.zeros((), dtype=torch.int64), seed), step)


def random_key() -> torch.Tensor:
    """Draw a key from torch's CPU generator, int64 scalar. Used when no optimizer step is known."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)


def put_key(key: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `key`, an int64 scalar, on `device`. A GPU need not wait for its number, as it would for a copy."""
    if key.device.type == "cpu" != device.type and not torch.compiler.is_compiling():
        return torch.full((), int(key), dtype=torch.int64, device=device)
    return key.to(device)


def random_keys(num_tokens: int, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw keys, int64 `[num_tokens]`, from `generator`, by default the device's own."""
    return torch.empty(num_tokens, dtype=torch.int64, device=device).random_(generator=generator)


def token_keys(
    key: torch.Tensor, input_ids: torch.Tensor, counted: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Identify each token in a step by the ids of its sequence up to itself, however batched, packed or padded.

    Sequences with the same ids draw the same numbers in one step, and so do their common beginnings.

    Args:
        key: `step_key` or `random_key`, int64 scalar.
        input_ids: `[batch, sequence]`; any integers that tell the rows apart will do.
        counted: bool `[batch, sequence]`, False for padding.
        positions: `[batch, sequence]`, from 0 in each sequence; a row may be several of them.

    Returns:
        int64 `[T]`.
    """
    tokens = fold_in(fold_in(put_key(key, positions.device), positions), input_ids).masked_fill(~counted, 0)
    before = tokens.cumsum(dim=-1) - tokens
    index = torch.arange(positions.shape[-1], device=positions.device)
    start = torch.where(counted & (positions == 0), index, 0).cummax(dim=-1).values  # of the token's own sequence
    return (before + tokens - before.gather(-1, start)).reshape(-1)


def layer_keys(keys: torch.Tensor, layers: range) -> torch.Tensor:
    """Derive the keys of routing and of input jitter in every layer, `[T]` -> int64 `[L, 2, T]`."""
    layer = torch.arange(layers.start, layers.stop, device=keys.device)
    return split_keys(fold_in(keys, layer[:, None, None]))


def split_keys(keys: torch.Tensor) -> torch.Tensor:
    """Derive the keys of routing and of input jitter from a layer's, `[..., 1, T]` or `[T]` -> int64 `[..., 2, T]`."""
    return fold_in(keys, torch.arange(2, device=keys.device)[:, None])
