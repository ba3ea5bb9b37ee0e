"""Where the supported versions of transformers differ, all in one file; each entry says when it can go."""

from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# The name of a cache in transformers' signatures and outputs. "cache" alone when 5.24 is the oldest version.
CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"


def either_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it was given. `cache` alone when 5.40 is the oldest version."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def cache_name(cache: Any) -> str:
    """The name of `cache` as an argument of the attention. `CACHE` for all when 5.24 is the oldest version.

    Before, continuous batching's was another argument, `cache`, and neither the mask's nor in the outputs.
    """
    return "cache" if isinstance(cache, PagedAttentionCache) else CACHE
