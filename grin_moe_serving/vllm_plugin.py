"""vLLM's plugin, the entry point `grin_moe` of the group `vllm.general_plugins`, which all processes of vLLM load."""

from functools import partial
from typing import Any

from .lazy import ARCHITECTURES, register

MODEL = "grin_moe_serving.vllm_model:GrinMoeForCausalLM"


class StopTokens:
    """vLLM's hooks on a new config: chats stop at the end of a turn, as `GrinMoeForCausalLM.generate` does."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Leave it as it is."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Add <|end|> to what `try_get_generation_config` returns, if that stops at <|endoftext|> alone."""
        model_config.try_get_generation_config = partial(add_end_of_turn, model_config.try_get_generation_config)


def add_end_of_turn(read: Any) -> dict[str, Any]:
    """The generation config that `read()` returns, with the released stop tokens."""
    from modeling_grin.generation_grinmoe import END_OF_TEXT_ID, END_OF_TURN_ID

    values = read()
    if values.get("eos_token_id") in (END_OF_TEXT_ID, [END_OF_TEXT_ID]):
        values["eos_token_id"] = [END_OF_TEXT_ID, END_OF_TURN_ID]
    return values


def register_with_vllm() -> None:
    """Register config, tokenizer and model; nothing of it is imported before a checkpoint asks for it."""
    from transformers.models.auto import configuration_auto
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register(configuration_auto)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
        MODELS_CONFIG_MAP[architecture] = StopTokens
