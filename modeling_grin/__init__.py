"""GRIN-MoE for transformers. Importing this package makes the Auto classes know model type `grinmoe`."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .balance_grinmoe import load_balancing_loss
from .configuration_grinmoe import GrinMoeConfig
from .modeling_grinmoe import (
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    GrinMoePreTrainedModel,
)
from .routing_grinmoe import ROUTER_ESTIMATORS, Routing, RoutingNoise, draw_noise, route

AutoConfig.register(GrinMoeConfig.model_type, GrinMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(GrinMoeConfig, GrinMoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GrinMoeConfig, GrinMoeForSequenceClassification, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "ROUTER_ESTIMATORS",
    "GrinMoeConfig",
    "GrinMoeForCausalLM",
    "GrinMoeForSequenceClassification",
    "GrinMoeModel",
    "GrinMoePreTrainedModel",
    "Routing",
    "RoutingNoise",
    "draw_noise",
    "load_balancing_loss",
    "route",
]
