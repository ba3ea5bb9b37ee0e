"""Translate our config into the config.json of transformers' Phimoe."""

from typing import Any

from transformers import PhimoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_grin import GrinMoeConfig
from modeling_grin.routing_grinmoe import inference_rule

from .tensors import ConversionError

# transformers' name, which says what `sliding_window` means, and the one that vLLM and SGLang know the model by.
PHIMOE_ARCHITECTURES = ("PhimoeForCausalLM", "PhiMoEForCausalLM")
FIXED_JITTER = 0.01

# The readers of phimoe that have faults, and the way around them.
ENGINES = {
    "transformers": "Import modeling_grin, and load the checkpoint as it is",
    "vllm": "Serve the checkpoint as it is: vLLM reads it where grin-moe is installed",
    "sglang": "Serve it with vLLM, which reads it as it is where grin-moe is installed",
}


def phimoe_config(config: GrinMoeConfig) -> dict[str, Any]:
    """Return the config.json with which transformers' `PhimoeForCausalLM` computes the same model.

    RoPE is spelt as in the releases (`rope_theta`, `rope_scaling`), which transformers 4 also reads. Settings of
    training keep our names: `GrinMoeConfig.from_dict` reads an equal config back, except for `architectures`.

    Three differences remain. transformers' LongRoPE keeps its short factors beyond `original_max_position_embeddings`.
    The attention factor of a LongRoPE without `short_mscale` and `long_mscale` is written as both. A `pad_token_id`
    beyond the vocabulary becomes None, because Phimoe cannot be built with it.

    Raises:
        ConversionError: Phimoe does not have it: another top-k than 2, another rule of inference, output scales,
            RoPE other than default and LongRoPE, quantised weights.
    """
    rope = dict(config.rope_parameters or {})
    rope_type, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    top_k, estimator, rate = config.num_experts_per_tok, config.router_estimator, config.router_bias_update_rate
    is_quantized = getattr(config, "quantization_config", None) is not None
    for field, phimoe_has, is_other in (
        (f"num_experts_per_tok={top_k}", "top-2", top_k != 2),
        (f"router_estimator={estimator!r}", "sparsemixer_v2's inference", inference_rule(config) != "sparsemixer_v2"),
        ("moe_output_scale=True", "no output scales", config.moe_output_scale),
        (f"router_bias_update_rate={rate}", "no selection biases", rate > 0),
        (f"rope_type={rope_type!r}", "default and longrope", rope_type not in ("default", "longrope")),
        ("quantization_config", "plain weights", is_quantized),
    ):
        if is_other:
            raise ConversionError(f"{field} cannot become phimoe, which has {phimoe_has}: convert to another form")

    values = config.to_dict()
    values.pop("auto_map", None)
    del values["rope_parameters"]
    values |= {"model_type": PhimoeConfig.model_type, "architectures": list(PHIMOE_ARCHITECTURES)}
    values |= {"rope_theta": float(theta), "rope_scaling": None}
    if rope_type == "longrope":
        rope.pop("type", None)
        if rope.get("long_mscale") is None:
            _, factor = ROPE_INIT_FUNCTIONS["longrope"](config)
            rope |= {"short_mscale": factor, "long_mscale": factor}
        values["rope_scaling"] = {"rope_type": rope_type, **rope}
    if config.sliding_window is not None:
        values["sliding_window"] = config.sliding_window + 1  # transformers counts a query's own key
    for field in ("router_jitter_noise", "input_jitter_noise", "router_aux_loss_coef"):
        values[field] = float(values[field])  # the only type that PhimoeConfig takes
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        values["pad_token_id"] = None
    return values


def phimoe_notes(config: GrinMoeConfig, engine: str | None = None) -> list[str]:
    """Say where readers of a phimoe checkpoint compute something else: vLLM 0.32.0 (run), SGLang's `phimoe.py` of
    November 2026 (read), transformers 5; `engine` leaves out the others."""
    window, rope = config.sliding_window, config.rope_parameters or {}
    is_windowed = window is not None and window + 1 < config.max_position_embeddings
    both = "vLLM and SGLang"
    notes = (
        (both, config.router_jitter_noise != FIXED_JITTER,
         f"compute with router_jitter_noise={FIXED_JITTER}, not {config.router_jitter_noise}"),
        ("SGLang", is_windowed, f"has no sliding window: right up to {(window or 0) + 1} tokens only"),
        (both, config.lm_head_bias, "leave out the head's bias: their log-probabilities are others"),
        (both, not config.lm_head_bias, "build a bias of the head and will not find it"),
        ("vLLM", not config.attention_bias, "builds biases of the attention and will not find them"),
        ("vLLM", config.tie_word_embeddings, "builds a head of its own and will not find it: the embeddings are tied"),
        ("transformers", rope.get("rope_type") == "longrope", "keeps LongRoPE's short factors: right up to "
         f"{rope.get('original_max_position_embeddings')} tokens only"),
    )  # fmt: skip
    return [f"{readers} {text}" for readers, is_so, text in notes if is_so and (engine or "") in readers.lower()]


def check_engine(config: GrinMoeConfig, engine: str) -> None:
    """Raise ConversionError if `engine`, one of `ENGINES`, would compute another function from a phimoe checkpoint."""
    if engine not in ENGINES:
        raise ConversionError(f"for must be one of {', '.join(ENGINES)}; got {engine!r}")
    if notes := phimoe_notes(config, engine):
        raise ConversionError(f"phimoe is another function for {engine}: {'; '.join(notes)}. {ENGINES[engine]}")
