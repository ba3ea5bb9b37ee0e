"""Differences between the supported versions of transformers; each entry says when it can go.

Modules that transformers may load by themselves import this one first, so that an unsupported version ends in one
sentence.
"""

from typing import Any

import transformers

if not (5, 17) <= (TRANSFORMERS := tuple(int(part) for part in transformers.__version__.split(".")[:2])) < (6,):
    raise ImportError(
        f"transformers must be 5.17 or later, and below 6, for GRIN-MoE; got {transformers.__version__}; "
        "do pip install 'transformers>=5.17,<6'"
    )

from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

# The name of a cache in transformers' signatures and outputs. "cache" alone when 5.24 is the oldest version.
CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"

# Whether caches take their window from `config.get_text_config(decoder=True)`, and not from each layer's config. Goes
# when 5.19 is the oldest version.
CACHES_READ_TEXT_CONFIG = TRANSFORMERS < (5, 19)


def either_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it was given. `cache` alone when 5.40 is the oldest version."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def rename_cache_for_peft(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a forward pass in `generate`, the cache by its old name: peft 0.21 looks for no other.

    Virtual tokens would enter again with every new token, or not at all. Goes when peft knows `cache`.
    """
    if CACHE in inputs:
        inputs["past_key_values"] = inputs.pop(CACHE)
    return inputs


def cache_name(cache: Any) -> str:
    """The name of `cache` as an argument of the attention. `CACHE` for all when 5.24 is the oldest version.

    Before, continuous batching's was another argument, `cache`, and neither the mask's nor in the outputs.
    """
    return "cache" if isinstance(cache, PagedAttentionCache) else CACHE


def require_layouts() -> None:
    """Raise ValueError where transformers cannot spread a model over ranks. Goes when 5.23 is the oldest version."""
    if TRANSFORMERS < (5, 23):
        raise ValueError(
            "transformers must be 5.23 or later for FSDP2, tensor and pipeline parallelism; got "
            f"{transformers.__version__}; do pip install 'transformers>=5.23,<6', or use DDP"
        )


def is_spread_over_ranks(trainer: Any) -> bool:
    """Whether a trainer's model was spread over ranks by `from_pretrained`. Goes when 5.19 is the oldest version."""
    return getattr(trainer, "is_distributed_loading_by_transformers", False)
