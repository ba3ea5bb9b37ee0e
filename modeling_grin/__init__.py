"""GRIN-MoE for transformers. Importing this package makes the Auto classes know model type `grinmoe`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto import tokenization_auto

from .balance_grinmoe import load_balancing_loss
from .configuration_grinmoe import GrinMoeConfig
from .kernels import register_kernels
from .modeling_grinmoe import (
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    GrinMoePreTrainedModel,
)
from .routing_grinmoe import (
    ROUTER_ESTIMATORS,
    Mixture,
    RouterEstimator,
    Routing,
    RoutingNoise,
    draw_noise,
    route,
    router_estimator,
)
from .tokenization_grinmoe import GrinMoeTokenizer

register_kernels()
AutoConfig.register(GrinMoeConfig.model_type, GrinMoeConfig, exist_ok=True)
AutoModel.register(GrinMoeConfig, GrinMoeModel, exist_ok=True)
AutoModelForCausalLM.register(GrinMoeConfig, GrinMoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GrinMoeConfig, GrinMoeForSequenceClassification, exist_ok=True)
AutoTokenizer.register(GrinMoeConfig, GrinMoeTokenizer, exist_ok=True)
# The release's tokenizer_config.json names LlamaTokenizer, which gives other ids than its tokenizer.json. transformers
# keeps a list of model types whose files name the wrong class; only these two lines make it use ours.
tokenization_auto.TOKENIZER_MAPPING_NAMES[GrinMoeConfig.model_type] = GrinMoeTokenizer.__name__
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(GrinMoeConfig.model_type)

__version__ = "0.1.0"

__all__ = [
    "ROUTER_ESTIMATORS",
    "GrinMoeConfig",
    "GrinMoeForCausalLM",
    "GrinMoeForSequenceClassification",
    "GrinMoeModel",
    "GrinMoePreTrainedModel",
    "GrinMoeTokenizer",
    "Mixture",
    "RouterEstimator",
    "Routing",
    "RoutingNoise",
    "draw_noise",
    "load_balancing_loss",
    "route",
    "router_estimator",
]
