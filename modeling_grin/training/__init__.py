"""Training: the trainer, its checkpoints, the routing callback and LoRA.

trl's trainers are in `modeling_grin.training.trl_trainers`: trl takes seconds to import.
"""

from .callback import RoutingCallback
from .checkpoints import find_problems, last_complete_checkpoint
from .lora import add_lora, merge_lora
from .trainer import GrinMoeTrainer, GrinMoeTrainerMixin

__all__ = [
    "GrinMoeTrainer",
    "GrinMoeTrainerMixin",
    "RoutingCallback",
    "add_lora",
    "find_problems",
    "last_complete_checkpoint",
    "merge_lora",
]
