"""A pipeline under Trainer's own loop.

The micro-batches of Trainer's accumulation window are the pipeline's: the schedule runs all of them, forward and
backward, when Trainer hands over the last. Optimizer, clipping, learning rate, logs and callbacks stay Trainer's.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import recursively_apply

from .pipeline import LossFunction, Pipeline

if TYPE_CHECKING:  # checked as a part of what it is mixed into
    from transformers import Trainer as _Base
else:
    _Base = object


class PipelineTrainerMixin(_Base):
    """Trainer's hooks for a model of `pipeline_model`; other models train as ever."""

    def __init__(self, *args, **kwargs):
        self._micro_batches: list[dict[str, Any]] = []  # the step's, so far
        super().__init__(*args, **kwargs)
        if self._pipeline is not None:
            self._check_pipeline()

    @property
    def _pipeline(self) -> Pipeline | None:
        return getattr(self.model, "pipeline", None)

    def _check_pipeline(self) -> None:
        """Raise ValueError for settings that a pipeline cannot do."""
        assert self._pipeline is not None
        args, schedule, pp_size = self.args, self._pipeline.schedule, self._pipeline.pp_size
        refused = {
            "exact_balance=True": getattr(self, "exact_balance", False),
            "average_tokens_across_devices=False": not args.average_tokens_across_devices,
            "fp16=True": args.fp16,
            "torch_compile=True": args.torch_compile,
            "label_smoothing_factor": args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "compute_metrics": self.compute_metrics is not None,
            "loss_type other than 'nll'": getattr(args, "loss_type", "nll") != "nll",
            "activation_offloading=True": getattr(args, "activation_offloading", False),
        }
        if names := [name for name, is_set in refused.items() if is_set]:
            raise ValueError(f"a pipeline cannot do {', '.join(names)}: change it, or train without a pipeline")
        if not schedule.admits(args.gradient_accumulation_steps, pp_size):
            raise ValueError(
                f"gradient_accumulation_steps, the number of micro-batches, must be {pp_size} or a multiple for "
                f"{schedule.name} on {pp_size} stages; got {args.gradient_accumulation_steps}"
            )

    def _pipeline_loss(self, num_items_in_batch: torch.Tensor) -> LossFunction:
        """Make Trainer's (and trl's) loss of a causal language model, from the number of the step's labels."""
        assert self._pipeline is not None
        model, dp_size = self._pipeline.model, self._pipeline.mesh["dp"].size()
        num_items = num_items_in_batch.clamp(min=1)  # as in trl, where a step may have no labels

        def loss_function(hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
            labels = inputs["labels"]
            settings = {"num_items_in_batch": num_items, "shift_labels": inputs.get("shift_labels")}
            computed = model.loss_without_logits(hidden_states, labels, **settings)
            if computed is not None:
                loss, _ = computed
            else:
                loss = model.loss_function(model.lm_head(hidden_states), labels, model.config.vocab_size, **settings)
            return loss * dp_size  # gradients are averaged

        return loss_function

    def get_batch_samples(self, *args, **kwargs):
        self._micro_batches = []  # else those of a step that ran out of memory would be in the next one
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        pipeline = self._pipeline
        if pipeline is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(self._prepare_inputs(inputs))
        if len(self._micro_batches) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        model.train()
        loss_function = self._pipeline_loss(num_items_in_batch)
        return pipeline.run(micro_batches, loss_function, self.accelerator.autocast, training=True)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        pipeline = self._pipeline
        if pipeline is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if "labels" not in inputs:
            raise ValueError("rows must have labels: a pipeline evaluates losses, and keeps no logits")
        inputs = self._prepare_inputs(inputs)
        loss_function = self._pipeline_loss(self._get_num_items_in_batch([inputs], self.args.device))
        with torch.no_grad():
            loss = pipeline.run([inputs], loss_function, self.accelerator.autocast, training=False)
        return loss, None, None

    def evaluation_loop(self, *args, **kwargs):
        if self.get_tp_size() > 1:
            self.gather_function = self._gather_rows  # Trainer takes accelerate's again for the next evaluation
        return super().evaluation_loop(*args, **kwargs)

    def _gather_rows(self, tensor: Any) -> Any:
        """Gather values by row, as accelerate's `gather_for_metrics` does, each row once where ranks share it."""
        state = self.accelerator.gradient_state

        def gather(rows: torch.Tensor) -> torch.Tensor:
            gathered = self.accelerator.gather(rows[None])[:: self.get_tp_size()].flatten(0, 1)
            return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

        return recursively_apply(gather, tensor)

    def _clip_grad_norm(self, model):
        if self._pipeline is None:
            return super()._clip_grad_norm(model)
        return self._pipeline.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if self._pipeline is None:
            return super()._get_grad_norm(model, grad_norm)
        return self._pipeline.clip_grad_norm(float("inf")) if grad_norm is None else grad_norm

    def _sync_replicated_trainable_parameters(self, model):
        if self._pipeline is None:  # else only data-parallel ranks have the same adapters
            return super()._sync_replicated_trainable_parameters(model)
        for parameter in self._pipeline.adapters():
            torch.distributed.broadcast(parameter.data, group_src=0, group=self._pipeline.mesh.get_group("dp"))
