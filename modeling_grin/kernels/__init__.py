"""Faster ways to compute what the model says. They do not travel to the Hub with a checkpoint's code."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..modeling_grinmoe import GrinMoeExperts, GrinMoeForCausalLM, GrinMoePreTrainedModel
from .chunked_loss import loss_without_logits
from .cpu_experts import GRIN_EXPERTS, grinmoe_experts_forward, grinmoe_lora_forward


def register_kernels() -> None:
    """Make the package's kernels the models' defaults; importing the package does."""
    ALL_EXPERTS_FUNCTIONS.register(GRIN_EXPERTS, grinmoe_experts_forward)
    GrinMoeExperts.forward_with_lora = grinmoe_lora_forward
    GrinMoePreTrainedModel.default_experts_implementation = GRIN_EXPERTS
    GrinMoeForCausalLM.loss_without_logits = loss_without_logits  # type: ignore[method-assign, assignment]
