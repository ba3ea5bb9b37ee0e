"""Tiny models with the tensors of a released checkpoint, their inputs, and how far two results are apart."""

import torch
from checkpoints import FLEX_SIZES, released_config, released_tensors

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM


def tiny_model(attention=None, experts=None, *, seed=0, tensors=None, **overrides):
    """A float32 model in evaluation mode; it stops at no token."""
    sizes = FLEX_SIZES if attention == "flex_attention" else {}
    settings = {"torch_dtype": "float32", "eos_token_id": None, "pad_token_id": 0, **sizes, **overrides}
    config = released_config(**settings)
    model = GrinMoeForCausalLM(
        GrinMoeConfig.from_dict(config, attn_implementation=attention, experts_implementation=experts)
    )
    model.load_state_dict(tensors or released_tensors(config, seed), strict=not config["tie_word_embeddings"])
    return model.eval()


def random_ids(*shape, vocab_size=131):
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual, expected, tolerance=1e-5):
    assert relative_error(actual, expected) < tolerance
