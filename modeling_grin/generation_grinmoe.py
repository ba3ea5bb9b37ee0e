"""`generate` for GRIN-MoE: the released stop tokens and window, and LongRoPE's change of factors."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .checks_grinmoe import refuse_empty
from .compat_grinmoe import CACHE, either_cache, rename_cache_for_peft
from .configuration_grinmoe import VisibleWindowConfig
from .masks_grinmoe import create_mask

END_OF_TEXT_ID, END_OF_TURN_ID = 32000, 32007  # <|endoftext|> and <|end|> of the released tokenizer

RECORD: ContextVar[Callable[[ModelOutput, int], None]] = ContextVar("RECORD", default=lambda *step: None)
"""Called by a running `generate` with a step's outputs and its number of rejected tokens; each thread has its own."""


class GrinMoeGenerationMixin(GenerationMixin):
    """transformers' generation, with what differs for GRIN-MoE."""

    def generate(self, *args, **kwargs):
        """As in transformers, and with `return_dict_in_generate=True` the routing of each step on request.

        `output_router_logits=True` returns `router_logits`, `output_selected_experts=True` `selected_experts`: as with
        `hidden_states`, a tuple of steps, the first one over the whole prompt, of tuples of layers `[T, E]`, `[T, K]`.
        """
        wanted = [name for name in ("router_logits", "selected_experts") if kwargs.get(f"output_{name}")]
        steps: list[dict[str, tuple[torch.Tensor, ...]]] = []

        def record(outputs: ModelOutput, rejected: int) -> None:  # copies: the next compiled step overwrites them
            steps.append({name: tuple(x[: len(x) - rejected].clone() for x in outputs[name]) for name in wanted})

        token = RECORD.set(record)
        try:
            output = super().generate(*args, **kwargs)
        finally:
            RECORD.reset(token)
        if isinstance(output, ModelOutput):
            for name in wanted:
                output[name] = tuple(step[name] for step in steps)
        return output

    def _update_model_kwargs_for_generation(self, outputs, *args, num_new_tokens=1, **kwargs):
        """As in transformers, which calls it after each step, `num_new_tokens` of whose logits have been accepted."""
        RECORD.get()(outputs, outputs.logits.shape[1] - num_new_tokens)
        return super()._update_model_kwargs_for_generation(outputs, *args, num_new_tokens=num_new_tokens, **kwargs)

    def _prepare_model_inputs(self, *args, **kwargs):
        """As in transformers, which reads the last column of empty inputs before any forward pass."""
        inputs, *others = super()._prepare_model_inputs(*args, **kwargs)
        refuse_empty(inputs)
        return inputs, *others

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        cache=None,
        **kwargs,
    ):
        """As in transformers; as in its Phimoe, all keys are computed again where LongRoPE changes its factors.

        The positions decide: left padding has none of its own. Keys stay if some tokens of the cache are unknown:
        between the chunks of a prompt, and where `generate` gets a cache with the new tokens alone. A prompt of
        `inputs_embeds` is the whole prompt, or replaces the part that `input_ids` has of it.
        """
        kwargs.pop("tokenizer", None)  # `generate` hands on what only its stopping criteria read
        cache = either_cache(past_key_values, cache)
        past_length = 0 if cache is None else cache.get_seq_length()
        positions = kwargs.get("position_ids")
        rope: dict[str, Any] = dict(self.config.rope_parameters or {})
        if rope["rope_type"] == "longrope" and past_length and next_sequence_length is not None:
            length, limit = past_length + next_sequence_length, rope["original_max_position_embeddings"]
            reached = torch.arange(length)[None] if positions is None else positions
            is_whole = inputs_embeds is not None or input_ids.shape[1] == length
            if is_whole and reached[:, :past_length].max() < limit <= reached.max():
                cache = next_sequence_length = None
                past_length = 0
        if inputs_embeds is not None and positions is not None:
            new_length = positions.shape[-1] - inputs_embeds.shape[1]
            if new_length > 0 and past_length == 0:  # no cache, or one that is computed again
                new_embeds = self.get_input_embeddings()(input_ids[:, -new_length:])
                inputs_embeds, is_first_iteration = torch.cat([inputs_embeds, new_embeds], dim=1), True
            elif new_length <= 0:  # the whole prompt, or a chunk, which transformers 5.17 calls no first iteration
                if positions.shape[-1] == 0:
                    raise ValueError("prefill_chunk_size divides input_ids: give them beside inputs_embeds")
                is_first_iteration = True
                inputs_embeds = inputs_embeds[:, past_length : past_length + positions.shape[-1]]
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        return rename_cache_for_peft(inputs)

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache=None, **kwargs
    ):
        """`generate` prepares the masks of compiled caches itself; they need the released window as well."""
        cache = either_cache(past_key_values, cache)
        return create_mask(config, inputs_embeds, attention_mask, cache, position_ids)

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, whose paged cache and masks take their window from `config.get_text_config()`."""
        manager = super().init_continuous_batching(*args, **kwargs)
        config, create = self.config, manager._create_batch_processor

        def create_with_released_window():
            config.get_text_config = lambda: VisibleWindowConfig(config)
            try:
                return create()
            finally:
                del config.get_text_config

        manager._create_batch_processor = create_with_released_window
        return manager

    def _prepare_static_cache(self, *args, **kwargs) -> Cache:
        """As in transformers, which offloads no sliding layers by default, and fails if every layer is one."""
        cache = super()._prepare_static_cache(*args, **kwargs)
        cache.only_non_sliding = False
        return cache

    def adjust_generation_fn(self, *args, **kwargs):
        """Read the generation config; if it stops at <|endoftext|> alone, also stop at the end of a chat turn."""
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config.eos_token_id in (END_OF_TEXT_ID, [END_OF_TEXT_ID]):
            self.generation_config.eos_token_id = [END_OF_TEXT_ID, END_OF_TURN_ID]
