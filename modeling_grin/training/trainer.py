"""What training GRIN-MoE needs of `transformers.Trainer`: steps that the model knows of, and whole checkpoints.

A mixin over Trainer's hooks, so that it fits `trl`'s trainers too (`trl_trainers.py`). The model does the rest:
routing noise and load-balance loss are functions of the optimizer step (`GrinMoePreTrainedModel.begin_step`).
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import LoadStateDictConfig
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..balance_grinmoe import count_experts, counted_tokens
from ..checkpoint_grinmoe import check_tensors
from .checkpoints import OPTIMIZER_FOLDER, STAGING_FOLDER, find_problems, has_only_the_model, last_complete_checkpoint
from .checks import check_dataset, check_sequence_length
from .pipeline import LOSS_INPUTS, PipelineTrainerMixin
from .sharded import load_optimizer, load_weights, save_optimizer, save_weights

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class GrinMoeTrainerMixin(PipelineTrainerMixin):
    """Put before `Trainer` or a subclass of it: `class MyTrainer(GrinMoeTrainerMixin, Trainer)`.

    - Each optimizer step is announced to the model, with the number of its tokens over all micro-batches and ranks:
      routing noise does not depend on how a batch was split, and the load-balance loss is that of the whole step.
    - A checkpoint gets its name when it is complete. `train(resume_from_checkpoint=True)` takes the newest complete
      one and names the others; an incomplete one is refused, as is one that lacks tensors of the model. Several
      machines need a folder that all of them share, or (not with `distributed_checkpoint`) `save_on_each_node`.
    - A model that `from_pretrained(distributed_config=...)` has spread over ranks (FSDP2, tensor parallelism) is saved
      by all of them, in the released layout, and so is the optimizer: any other layout resumes from it (`sharded.py`).
    - Batches without labels and sequences beyond the model's context are errors.

    It takes the trainer's own arguments, and these:

    Args:
        exact_balance: count the experts of all micro-batches before the first backward pass, so that gradient
            accumulation gives the load-balance loss of the whole batch exactly; otherwise each micro-batch knows those
            up to itself. Costs one more forward pass for each micro-batch; for language models.
        distributed_checkpoint: save the optimizer so that a run on any other layout can resume, too; by default where
            the model is spread over ranks, and otherwise as `Trainer` does.

    Raises:
        ValueError: an empty dataset; from `train`, a step without labels, a sequence that is too long, context or
            sequence parallelism, and the checkpoints above.
    """

    # Whether a step whose labels are all masked has a finite loss. If so, one is an error only where a run starts.
    steps_without_labels_are_finite = False

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others,
        exact_balance: bool = False,
        distributed_checkpoint: bool | None = None,
        **kwargs,
    ):
        self.exact_balance = exact_balance
        self._uncounted: list[dict[str, Any]] = []  # the step's batches, where their experts are yet to be counted
        self._staging: str | None = None  # stands in for the run's folder while a checkpoint is written
        train_dataset = kwargs.get("train_dataset")
        if hasattr(train_dataset, "__len__"):
            check_dataset(train_dataset, (), "train_dataset")
        with allow_resuming(model, args):
            super().__init__(model, args, *others, **kwargs)
        if self.label_smoother is not None and self._grin_model.get_output_embeddings() is not None:
            self.label_smoother = partial(smoothed_next_token_loss, self.label_smoother)
        self.is_sharded = self.is_distributed_loading_by_transformers
        self.distributed_checkpoint = self.is_sharded if distributed_checkpoint is None else distributed_checkpoint
        if self.is_sharded and self._grin_model.config.distributed_config.dp_replicate_size == 1:
            # Gradients are reduced after each micro-batch: before that a rank of FSDP2 holds the whole model's.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self._check_support()

    def _check_support(self) -> None:
        """Raise ValueError for what cannot be right with this model, or is not known to be."""
        model = self._grin_model
        if self.is_deepspeed_enabled:
            raise ValueError("GrinMoeTrainerMixin does not know DeepSpeed's loss scale and checkpoints: use FSDP")
        if self.exact_balance and model.get_output_embeddings() is None:
            raise ValueError(f"exact_balance counts for language models, and {type(model).__name__} is none")
        if self.is_sharded and isinstance(model, PeftModel):
            raise ValueError(
                "an adapter on a model that is spread over ranks cannot be saved: use DDP, or train it whole"
            )
        if self.distributed_checkpoint and self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True with a checkpoint that every rank writes a part of: set it to False, and let "
                "the machines share output_dir"
            )
        if self.get_tp_size() > 1 and not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False with tensor parallelism would multiply the loss by tp_size: set "
                "it to True"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        for field in ("expert_dropout", "attention_dropout"):
            if getattr(plugin, "activation_checkpointing", False) and (rate := getattr(model.config, field)) > 0:
                raise ValueError(
                    f"FSDP's activation_checkpointing draws dropout again when it recomputes ({field}={rate}): "
                    "use the trainer's activation_checkpointing argument instead, or set the dropout to 0"
                )

    # ---- Steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of the next optimizer step, announced to the model."""
        if self.state.global_step >= self.state.max_steps:  # resumed at the end, where Trainer takes one step more
            self.control.should_training_stop = True
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = self._check_window(batches, num_items_in_batch)
        # All ranks, not only those with data of their own, are the group: tensor-parallel ranks count the same tokens
        # again, in the counts as in `num_tokens`, and the ratio is what matters.
        scaler = self.accelerator.scaler
        self._step = {
            "step": self.state.global_step,
            "seed": self.args.seed,
            "num_tokens": num_tokens,
            "gradient_scale": 1.0 if scaler is None else scaler.get_scale(),
        }
        self._grin_model.begin_step(**self._step)
        exact = self.exact_balance and self._grin_model.config.router_aux_loss_coef > 0
        self._uncounted = batches if exact and len(batches) > 1 else []
        return batches, num_items_in_batch

    @property
    def _grin_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _check_window(self, batches: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None) -> int:
        """The tokens of a step's batches over all ranks; raises, on all of them alike, where they cannot be used."""
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "context and sequence parallelism split the rows that routing noise is a function of: use data or "
                "tensor parallelism"
            )
        num_virtual, num_embedded = count_virtual_tokens(self._grin_model)
        longest = 0
        num_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for batch in batches:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError("GrinMoeTrainerMixin counts tokens: batches have to be mappings with input_ids")
            input_ids, positions = batch["input_ids"], batch.get("position_ids")
            batch_size, length = input_ids.shape
            counted = counted_tokens(batch.get("attention_mask"), batch_size, length, input_ids.device)
            num_tokens += counted.sum().to(num_tokens.device) + batch_size * num_embedded
            # Rows may be several sequences one after the other, each with positions from 0.
            length = length if positions is None else int(positions.max()) + 1
            longest = max(longest, length + num_virtual)
        num_labels = 1 if num_items_in_batch is None or not batches else int(num_items_in_batch)
        of_rank = torch.tensor([num_tokens, longest, num_labels], device=self.args.device)
        of_ranks = self.accelerator.gather(of_rank[None])  # [ranks, 3]

        check_sequence_length(int(of_ranks[:, 1].max()), self._grin_model.config, "the length of a sequence")
        is_first = self.state.global_step == self._initial_global_step
        if of_ranks[:, 2].min() == 0 and (is_first or not self.steps_without_labels_are_finite):
            raise ValueError(
                f"step {self.state.global_step + 1}: all labels of the batch are masked (-100), so there is nothing "
                "to learn; look at the label masks and at how sequences are cut"
            )
        return int(of_ranks[:, 0].sum())

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        if self._uncounted:
            self._grin_model.begin_step(**self._step, expert_counts=self._count_experts(self._uncounted))
            self._uncounted = []
        return super().training_step(model, *args, **kwargs)

    @torch.no_grad()
    def _count_experts(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """How often the step's forward passes, over all ranks, will choose each expert, int64 `[layers, experts]`."""
        model, device = self._grin_model, self.args.device
        config = model.config
        num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
        total = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        model.train()
        # Dropout and the like are drawn from the generators: restored, the passes with a gradient draw the same.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for batch in batches:
                inputs = self._prepare_inputs({key: batch[key] for key in batch if key not in LOSS_INPUTS})
                outputs = model(**inputs, use_cache=False, logits_to_keep=1, output_selected_experts=True)
                batch_size, length = inputs["input_ids"].shape
                counted = counted_tokens(inputs.get("attention_mask"), batch_size, length, device)
                num_embedded = len(outputs["selected_experts"][0]) // batch_size - length  # peft's virtual tokens
                counted = nn.functional.pad(counted, (num_embedded, 0), value=True).reshape(-1)
                for layer, experts in enumerate(outputs["selected_experts"]):
                    total[layer] += count_experts(experts, counted.to(experts.device), num_experts).to(device)
        return self.accelerator.gather(total[None]).sum(dim=0)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write none: `grin-moe card` does, from what the run leaves. trl would write over it at every checkpoint."""

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`.

        Raises:
            ValueError: there is nothing to resume from, or it is incomplete. Others as for the class.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, incomplete = last_complete_checkpoint(self.args.output_dir)
            for path, problems in incomplete.items():
                logger.warning(f"{path} is not a complete checkpoint and is passed over: {', '.join(problems)}")
                os.utime(path, (0, 0))  # half deleted by a killed run, it would be the newest, which rotation keeps
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from")
        elif resume_from_checkpoint and (problems := find_problems(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint: {', '.join(problems)}; "
                "train(resume_from_checkpoint=True) takes the newest complete one"
            )
        if resume_from_checkpoint and not hasattr(self.train_dataset, "__len__"):
            logger.warning("train_dataset has no length: resuming is exact within its first pass only")
        if resume_from_checkpoint and has_only_the_model(resume_from_checkpoint):
            logger.warning(f"{resume_from_checkpoint} has the model only: optimizer and learning rate start anew")
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:  # a run that fails leaves the model as it was, too
            self._micro_batches = []
            self._grin_model.begin_step(None)
            self._grin_model.get_decoder().routing_observer = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else the folder is about to be moved
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own save, into a folder that is then moved to the checkpoint's name by one rename."""
        run_dir = self._get_output_dir(trial)
        staging = os.path.join(run_dir, STAGING_FOLDER)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, checkpoint = os.path.join(staging, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed; nothing could resume from it
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

        # What Trainer could not do there: see the run's other checkpoints.
        if self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            if os.path.isdir(checkpoint):  # of an earlier run: saved again, or incomplete
                os.rename(checkpoint, os.path.join(staging, "replaced"))
            os.rename(written, checkpoint)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.is_sharded:
            return super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        save_weights(self._grin_model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.distributed_checkpoint:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(self._grin_model, self.optimizer.optimizer, os.path.join(output_dir, OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_tensors(resume_from_checkpoint)
        # Trainer reads several files with strict=False, and warns of what each of them lacks.
        is_in_parts = os.path.isfile(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_INDEX_NAME))
        if self.is_sharded or (is_in_parts and not isinstance(self._grin_model, PeftModel)):
            load_weights(self._grin_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or has_only_the_model(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = os.path.join(checkpoint, OPTIMIZER_FOLDER)
        if not os.path.isdir(folder):
            if self.is_sharded:
                raise ValueError(
                    f"{checkpoint} has no {OPTIMIZER_FOLDER}, which a run on several ranks needs to resume: write it "
                    "with distributed_checkpoint=True, or start from the checkpoint as a model"
                )
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self._grin_model, self.optimizer.optimizer, folder)
        state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        num_groups, num_saved = len(self.optimizer.param_groups), len(state["_last_lr"])
        if num_groups != num_saved:  # Trainer makes parameter groups by device mesh, too, and layouts have other ones
            if len(set(state["_last_lr"])) > 1:
                raise ValueError(
                    f"{checkpoint} has parameter groups with different learning rates: resume on the layout it is of"
                )
            state = {
                key: value[:1] * num_groups if isinstance(value, list) and len(value) == num_saved else value
                for key, value in state.items()
            }
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # else the best step is lost where save_steps is a multiple of eval_steps
        return is_best

    def _load_best_model(self) -> None:
        checkpoint, step = str(self.state.best_model_checkpoint), self.state.best_global_step
        if not checkpoint.endswith(f"{PREFIX_CHECKPOINT_DIR}-{step}"):
            raise ValueError(
                f"the best step was {step}, and of it there is no checkpoint: {checkpoint} is the nearest"
            )
        self._check_tensors(checkpoint)
        if self.is_sharded:
            return load_weights(self._grin_model, checkpoint)
        super()._load_best_model()
        # Trainer knows the default adapter's place only.
        for adapter, path in self._find_adapters(checkpoint).items():
            if path.parent != Path(checkpoint):
                set_peft_model_state_dict(self._grin_model, load_file(path), adapter_name=adapter)

    def _find_adapters(self, checkpoint: str) -> dict[str, Path]:
        """The adapters in a checkpoint and their files; none if the model has none."""
        model, folder = self._grin_model, Path(checkpoint)
        if not isinstance(model, PeftModel):
            return {}
        adapters = {path.parent.name: path for path in folder.glob(f"*/{ADAPTER_WEIGHTS}")}
        if (folder / ADAPTER_WEIGHTS).is_file():
            adapters["default" if adapters else model.active_adapters[0]] = folder / ADAPTER_WEIGHTS
        return adapters

    def _check_tensors(self, checkpoint: str) -> None:
        """Raise ValueError unless a checkpoint has exactly the tensors of the model, or of its adapters."""
        model, folder = self._grin_model, Path(checkpoint)
        if not isinstance(model, PeftModel):
            if self._pipeline is not None:  # a rank of it has a part only
                with torch.device("meta"):
                    model = type(model)._from_config(model.config)
            if files := sorted(str(path) for path in folder.glob("*.safetensors")):  # else FSDP's own, strict anyway
                check_tensors(model, files, LoadStateDictConfig(), heads_may_be_new=False)
            return
        adapters = self._find_adapters(checkpoint)
        if not adapters:
            raise ValueError(f"{checkpoint} has no {ADAPTER_WEIGHTS}, and the model to load it into has adapters")
        for adapter, path in adapters.items():
            with safe_open(path, framework="pt") as tensors:
                found = set(tensors.keys())
            if differing := sorted(found ^ set(get_peft_model_state_dict(model, adapter_name=adapter))):
                raise ValueError(
                    f"{path} and the adapter {adapter!r} of the model differ in {len(differing)} tensor(s): "
                    f"{', '.join(differing[:5])}"
                )


def count_virtual_tokens(model: nn.Module) -> tuple[int, int]:
    """How many tokens of its own peft puts before every row: all, and those that pass through the layers.

    The others, of prefix tuning and the like, are keys and values in the cache.
    """
    if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
        return 0, 0
    config = model.active_peft_config
    is_cached = config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
    return config.num_virtual_tokens, 0 if is_cached else config.num_virtual_tokens


def smoothed_next_token_loss(
    smoother: LabelSmoother, outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, **kwargs
) -> torch.Tensor:
    """Trainer's `smoother`, whose labels are shifted whatever Trainer takes the model for.

    Trainer goes by the class's name, which `torch.compile` hides; and it does not know of peft's virtual tokens, whose
    logits come before those of `labels` `[batch, sequence]`.
    """
    logits = outputs["logits"][:, -labels.shape[1] :]
    return smoother({"logits": logits}, labels, **{**kwargs, "shift_labels": True})


@contextmanager
def allow_resuming(model: Any, args: TrainingArguments | None) -> Iterator[None]:
    """While a trainer is built: it would refuse to save the optimizer of a model that is spread over ranks, which it
    cannot do itself."""
    if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    save_only_model, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = save_only_model


class GrinMoeTrainer(GrinMoeTrainerMixin, Trainer):
    """`transformers.Trainer` with `GrinMoeTrainerMixin`."""
