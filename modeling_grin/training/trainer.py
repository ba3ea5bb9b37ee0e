"""Extend `transformers.Trainer` for GRIN-MoE: steps that the model knows of, and whole checkpoints.

A mixin over Trainer's hooks, so that it fits trl's trainers (`trl_trainers.py`). The model does the rest: routing
noise and load-balance loss are functions of the optimizer step (`GrinMoePreTrainedModel.begin_step`).
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, PeftType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from ..balance_grinmoe import count_experts, counted_tokens
from ..compat_grinmoe import is_spread_over_ranks
from ..configuration_grinmoe import GrinMoeConfig
from .data_checks import check_rows, check_sequence_length, check_token_ids, check_vocabulary
from .pipeline import LOSS_INPUTS
from .pipeline_trainer import PipelineTrainerMixin
from .resuming import ResumingTrainerMixin
from .trl_rules import COUNTED, allow_resuming, check_reference, check_trl_trainer, trl_name

# Arguments that every rank must be given alike; folders, ports, log levels and the like may differ.
COMMON_ARGUMENTS = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm",
    "label_smoothing_factor", "train_sampling_strategy", "dataloader_drop_last", "average_tokens_across_devices",
    "bf16", "fp16", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
)  # fmt: skip


class GrinMoeTrainerMixin(ResumingTrainerMixin, PipelineTrainerMixin):
    """Put before `Trainer` or a subclass of it: `class MyTrainer(GrinMoeTrainerMixin, Trainer)`.

    - The model is told of each optimizer step and of its tokens over all micro-batches and ranks: routing noise does
      not depend on how a batch was split, and the load-balance loss covers the whole step.
    - A checkpoint gets its name when it is complete. `train(resume_from_checkpoint=True)` takes the newest complete
      one and names the others; an incomplete one is refused, as is one that lacks tensors of the model. Several
      machines need a folder that all of them share, or (not with `distributed_checkpoint`) `save_on_each_node`.
    - All ranks save a model that `from_pretrained(distributed_config=...)` has spread over them (FSDP2, tensor
      parallelism), in the released layout, and its optimizer: any other layout resumes from it (`sharded.py`).
    - Batches without labels and sequences beyond the model's context are errors.
    - trl's trainers that compare forward passes (DPO, KTO, GRPO, RLOO, distillation, ...) need passes that route
      alike: `router_sampling=False` and `input_jitter_noise=0`. Those that make tokens in the step have no
      load-balance loss.

    It takes the trainer's own arguments, and these:

    Args:
        exact_balance: count the experts of all micro-batches before the first backward pass, so that gradient
            accumulation gives the load-balance loss of the whole batch exactly; otherwise each micro-batch knows the
            choices up to itself. Costs one more forward pass for each micro-batch; for language models.
        distributed_checkpoint: save the optimizer so that a run on any other layout can resume. By default it is on
            where the model is spread over ranks, and off otherwise, when `Trainer` saves the optimizer.

    Raises:
        ValueError: a tokenizer or rows with ids without an embedding, noise in passes that are compared, settings that
            would be wrong in silence; from `train`, a step without labels, ids without an embedding, a sequence that
            is too long, and the checkpoints above.
    """

    label_smoother: Any  # Trainer's, or None

    def __init__(self, *given, exact_balance: bool = False, distributed_checkpoint: bool | None = None, **keywords):
        self.exact_balance = exact_balance
        self._uncounted: list[dict[str, Any]] = []  # the step's batches, while their experts are to be counted
        self._first_step: int | None = None  # of the run, which may be resumed
        self._trl_name = trl_name(type(self))
        arguments = self._name_arguments(given, keywords)
        model, args = arguments.get("model"), arguments.get("args")
        if self._trl_name is not None and model is not None:
            check_trl_trainer(self._trl_name, model, args, exact_balance)
        with allow_resuming(model, args):
            super().__init__(*given, **keywords)
        config = self._grin_model.config
        if hasattr(self, "aux_loss_enabled"):
            # trl would add Mixtral's loss of each micro-batch to the one that acts inside the model.
            config.router_aux_loss_coef = getattr(self, "router_aux_loss_coef", config.router_aux_loss_coef)
            config.output_router_logits = self.aux_loss_enabled = False
        if self.label_smoother is not None and self._grin_model.get_output_embeddings() is not None:
            self.label_smoother = partial(smoothed_next_token_loss, self.label_smoother)
        # Adapters are whole on every rank, whatever the layout of the model below them.
        self.is_sharded = is_spread_over_ranks(self) and not isinstance(self.model, PeftModel)
        if distributed_checkpoint is None:
            distributed_checkpoint = self.is_sharded or self._pipeline is not None
        self.distributed_checkpoint = distributed_checkpoint
        if self.is_sharded and config.distributed_config.dp_replicate_size == 1:
            # Gradients are reduced after each micro-batch: until then a rank of FSDP2 holds the whole model's.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self._check_support()
        check_reference(config, getattr(getattr(self, "ref_model", None), "config", None))
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            check_vocabulary(self.processing_class, config)
        check_rows(self.train_dataset, config, "train_dataset")
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, rows in held_out.items():
            check_rows(rows, config, f"eval_dataset {name}".rstrip())

    def _name_arguments(self, given: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
        """The trainer's own arguments, by the names that the class behind the mixin gives them."""
        classes = type(self).__mro__
        behind = classes[classes.index(GrinMoeTrainerMixin) + 1 :]
        signatures = (inspect.signature(cls.__init__) for cls in behind)  # type: ignore[misc]
        signature = next(signature for signature in signatures if "model" in signature.parameters)
        named = signature.bind_partial(self, *given, **keywords).arguments
        return named | named.get("kwargs", {})

    def _check_support(self) -> None:
        """Raise ValueError for settings that cannot be right with this model, or are not known to be."""
        model, args = self._grin_model, self.args
        learnt = (parameter for parameter in model.parameters() if parameter.requires_grad)
        has_spread_adapters = isinstance(model, PeftModel) and any(isinstance(part, DTensor) for part in learnt)
        recomputes = getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "activation_checkpointing", False)
        drops = model.config.expert_dropout or model.config.attention_dropout
        multiplies = self.get_tp_size() > 1 and not args.average_tokens_across_devices
        has_head = model.get_output_embeddings() is not None
        for is_refused, reason in (
            (self.get_cp_size() * self.get_sp_size() > 1,
             "context or sequence parallelism, which split rows: routing noise is a function of whole rows"),
            (self.is_deepspeed_enabled, "DeepSpeed, whose loss scale and checkpoints differ: use FSDP"),
            (self.exact_balance and not has_head, f"exact_balance with {type(model).__name__}, no language model"),
            (has_spread_adapters, "adapters spread over ranks: make them with add_lora, without modules_to_save"),
            (self.distributed_checkpoint and args.save_on_each_node,
             "save_on_each_node where every rank writes a part of a checkpoint: let the machines share output_dir"),
            (multiplies, "average_tokens_across_devices=False with tensor parallelism: set it to True"),
            (drops and recomputes,
             "dropout with FSDP's activation_checkpointing, which draws it again: set the trainer's argument"),
        ):  # fmt: skip
            if is_refused:
                raise ValueError(f"GrinMoeTrainerMixin cannot use {reason}")

    # ---- Steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Take the batches of the next optimizer step, and announce the step to the model."""
        if self.state.global_step >= self.state.max_steps:  # resumed at the end, where Trainer takes one step more
            self.control.should_training_stop = True
            return [], None
        if self._first_step is None:
            self._first_step = self.state.global_step
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = self._check_window(batches, num_items_in_batch)
        # Tensor-parallel ranks count the same tokens again, in the experts' counts as in `num_tokens`: their ratio is
        # right.
        scaler = self.accelerator.scaler
        self._announced = {
            "step": self.state.global_step,
            "seed": self.args.seed,
            "num_tokens": num_tokens,
            "gradient_scale": 1.0 if scaler is None else scaler.get_scale(),
        }
        self._grin_model.begin_step(**self._announced)
        exact = self.exact_balance and self._grin_model.config.router_aux_loss_coef > 0
        self._uncounted = batches if exact and len(batches) > 1 else []
        return batches, num_items_in_batch

    def _check_window(
        self, batches: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None
    ) -> int | None:
        """Count the tokens of a step's batches over all ranks; None if the step makes some of them.

        Raises ValueError on all ranks alike for batches that cannot be used.
        """
        config, device = self._grin_model.config, self.args.device
        num_virtual, num_embedded = count_virtual_tokens(self._grin_model)
        num_tokens: Any = 0
        lengths: list[Any] = [0]
        ids: list[Any] = [0]
        for batch in batches:
            keys = batch if isinstance(batch, Mapping) else {}
            prefixes = [prefix for prefix in ("", "chosen_", "rejected_") if f"{prefix}input_ids" in keys]
            if not prefixes and self._trl_name is None:  # else prompts, which trl's online trainers complete
                raise ValueError("batches must be mappings with input_ids: GrinMoeTrainerMixin counts their tokens")
            for prefix in prefixes:
                input_ids, positions = batch[f"{prefix}input_ids"], batch.get(f"{prefix}position_ids")
                batch_size, length = input_ids.shape
                mask = batch.get(f"{prefix}attention_mask")
                counted = counted_tokens(mask, batch_size, length, input_ids.device)
                num_tokens = num_tokens + counted.sum() + batch_size * num_embedded
                # Rows may be several sequences one after the other, each with positions from 0.
                length = length if positions is None else positions.max() + 1
                lengths.append(length + num_virtual)
                ids += input_ids.aminmax() if input_ids.numel() else []
        num_labels = 1 if num_items_in_batch is None or not batches else num_items_in_batch
        step, is_first = self.state.global_step + 1, self.state.global_step == self._first_step
        if is_first:
            check_common(gather_object([self._common_settings()]))
        longest = put_numbers(lengths, device).amax()
        of_rank = torch.stack([*put_numbers([num_tokens, num_labels], device), longest,
                               *put_numbers(ids, device).aminmax()])  # fmt: skip
        # [5, ranks]; the host waits for a GPU here alone.
        all_tokens, all_labels, all_lengths, smallest, largest = self.accelerator.gather(of_rank[None]).cpu().T
        check_sequence_length(int(all_lengths.max()), config, "the length of a sequence")
        check_token_ids(int(smallest.min()), int(largest.max()), config, f"input_ids of step {step}")
        # trl divides by at least one label, so that such a step has a finite loss: an error only where a run starts.
        if all_labels.min() == 0 and (is_first or self._trl_name is None):
            raise ValueError(
                f"step {step}: all labels of the batch are masked (-100), so there is nothing to learn; look at the "
                "label masks and at how sequences are cut"
            )
        return int(all_tokens.sum()) if self._trl_name is None or self._trl_name in COUNTED else None

    def _common_settings(self) -> dict[str, Any]:
        """Return what all ranks must have in common: the step, arguments and the fields of GRIN-MoE's own config.

        Fields that every config has may differ: a rank that has saved the model knows its `architectures`.
        """
        config = self._grin_model.config
        return (
            {"step": self.state.global_step, "steps of the run": self.state.max_steps}
            | {name: getattr(self.args, name) for name in COMMON_ARGUMENTS}
            | {f"config.{name}": getattr(config, name) for name in GrinMoeConfig.__annotations__}
        )

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        if self._uncounted:
            self._grin_model.begin_step(**self._announced, expert_counts=self._count_experts(self._uncounted))
            self._uncounted = []
        return super().training_step(model, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradients' norm before the optimizer uses them; raise on all ranks alike if it is not finite.

        Under float16's loss scale such a norm is no error: the scaler leaves the step out.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise ValueError(
                f"step {self.state.global_step + 1}: the norm of the gradients is {float(norm)}, and the step would "
                "ruin every weight: look at its batch and loss, lower learning_rate, and resume from the last "
                "checkpoint"
            )
        if not isinstance(self.model, PeftModel):  # adapters' files have no selection biases
            self._grin_model.end_step()
        return norm

    @torch.no_grad()
    def _count_experts(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Count how often the step's passes will choose each expert, on all ranks, int64 `[layers, experts]`."""
        model, device = self._grin_model, self.args.device
        config = model.config
        num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
        total = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        model.train()
        # Dropout draws from the generators: restored, the passes with a gradient draw the same numbers.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for batch in batches:
                inputs = self._prepare_inputs({key: batch[key] for key in batch if key not in LOSS_INPUTS})
                outputs = model(**inputs, use_cache=False, logits_to_keep=1, output_selected_experts=True)
                batch_size, length = inputs["input_ids"].shape
                counted = counted_tokens(inputs.get("attention_mask"), batch_size, length, device)
                num_embedded = len(outputs["selected_experts"][0]) // batch_size - length  # peft's virtual tokens
                counted = nn.functional.pad(counted, (num_embedded, 0), value=True).reshape(-1)
                experts = torch.stack([experts.to(device) for experts in outputs["selected_experts"]])
                total += count_experts(experts, counted, num_experts)
        return self.accelerator.gather(total[None]).sum(dim=0)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card: `grin-moe card` does, and trl would write over it at every checkpoint."""

    def train(self, *args, **kwargs):
        self._first_step = None
        try:
            return super().train(*args, **kwargs)
        finally:  # a run that fails leaves the model as it was, too
            self._micro_batches = []
            self._grin_model.begin_step(None)
            self._grin_model.get_decoder().routing_observer = None


def count_virtual_tokens(model: nn.Module) -> tuple[int, int]:
    """Count the tokens that peft puts before every row: all of them, and those that pass through the layers.

    Those of prefix tuning and the like are keys and values in the cache, and pass through no layer.
    """
    if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
        return 0, 0
    config = model.active_peft_config
    is_cached = config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
    return config.num_virtual_tokens, 0 if is_cached else config.num_virtual_tokens


def put_numbers(numbers: list[torch.Tensor | int], device: torch.device) -> torch.Tensor:
    """Return integers as an int64 tensor on `device`; those that are there already are not waited for."""
    return torch.stack([
        number.to(device, torch.int64)
        if isinstance(number, torch.Tensor)
        else torch.full((), number, dtype=torch.int64, device=device)
        for number in numbers
    ])  # fmt: skip


def smoothed_next_token_loss(
    smoother: LabelSmoother, outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, **kwargs
) -> torch.Tensor:
    """Call Trainer's `smoother` with labels shifted, whatever class Trainer takes the model for.

    Trainer goes by the class's name, which `torch.compile` hides. It also does not know of peft's virtual tokens,
    whose logits come before those of `labels` `[batch, sequence]`.
    """
    logits = outputs["logits"][:, -labels.shape[1] :]
    return smoother({"logits": logits}, labels, **{**kwargs, "shift_labels": True})


def check_common(settings_of_ranks: list[dict[str, Any]]) -> None:
    """Raise ValueError naming the settings in which two ranks differ, and both values."""
    first = settings_of_ranks[0]
    for rank, settings in enumerate(settings_of_ranks):
        if names := [name for name in first if settings[name] != first[name]]:
            values = ", ".join(f"{name} ({first[name]} and {settings[name]})" for name in names[:5])
            raise ValueError(f"ranks 0 and {rank} differ in {values}: give all ranks the same arguments and model")


class GrinMoeTrainer(GrinMoeTrainerMixin, Trainer):
    """`transformers.Trainer` with `GrinMoeTrainerMixin`."""
