"""Training: the trainer, its checkpoints, the routing callback and LoRA.

trl's trainers are in `modeling_grin.training.trl_trainers`: trl takes seconds to import.

Private names of other packages that this one overrides or calls, and the versions it was tried with:

- `transformers.Trainer`, 5.17 to 5.24: `_save`, `_save_checkpoint`, `_save_optimizer_and_scheduler`,
  `_get_output_dir`, `_push_from_checkpoint`, `_load_from_checkpoint`, `_load_optimizer_and_scheduler`,
  `_determine_best_metric`, `_load_best_model` (`resuming.py`); `_get_grad_norm`, `_prepare_inputs` (`trainer.py`).
- The same, 5.23 and 5.24: `_clip_grad_norm`, `_sync_replicated_trainable_parameters`, `_get_num_items_in_batch`; and a
  model's `_is_distributed_loading_by_transformers`, `_tp_size` (`pipeline_trainer.py`, `pipeline.py`).
- torch's `PipelineStage`, 2.13: `_setup_forward_recv_info`, `_setup_backward_recv_info`, `_get_recv_ops`
  (`pipeline.py`); and two functions of private modules, `consolidate_safetensors_files_on_every_rank` and
  `compute_local_shape_and_global_offset` (`sharded.py`).
- transformers 5.17 to 5.24: `_grouped_linear`; 5.23 and 5.24: `_AllReduceBackward` and `_AllReduceForward` (LoRA on
  fused experts).
"""

from ..lora import add_lora, merge_lora
from .callback import RoutingCallback
from .checkpoints import find_problems, last_complete_checkpoint
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
