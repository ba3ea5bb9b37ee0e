"""What training GRIN-MoE needs of `transformers.Trainer`: steps that the model knows of, and whole checkpoints.

A mixin over Trainer's hooks, so that it fits `trl`'s trainers too (`trl_trainers.py`). The model does the rest:
routing noise and load-balance loss are functions of the optimizer step (`GrinMoePreTrainedModel.begin_step`).
"""

import hashlib
import inspect
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..balance_grinmoe import count_experts, counted_tokens
from ..compat_grinmoe import is_spread_over_ranks
from ..configuration_grinmoe import GrinMoeConfig
from ..loading_grinmoe import check_names
from ..saving_grinmoe import give_umasks_mode
from .checkpoints import (
    OPTIMIZER_FOLDER,
    STAGING_FOLDER,
    find_non_finite,
    find_problems,
    has_only_the_model,
    last_complete_checkpoint,
)
from .checks import (
    check_dataset,
    check_dataset_ids,
    check_generators,
    check_optimizer_state,
    check_preference_routing,
    check_scheduler_state,
    check_sequence_length,
    check_token_ids,
    check_vocabulary,
    load_saved,
)
from .pipeline import LOSS_INPUTS, PipelineTrainerMixin
from .sharded import load_optimizer, load_weights, save_optimizer, save_weights

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Arguments that every rank has to be given alike; folders, ports, log levels and the like may be its own.
COMMON_ARGUMENTS = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm",
    "label_smoothing_factor", "train_sampling_strategy", "dataloader_drop_last", "average_tokens_across_devices",
    "bf16", "fp16", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
)  # fmt: skip

# trl's trainers whose loss is of one forward pass; all others compare passes, of one model or of two.
ONE_PASS = {"SFTTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer", "TPOTrainer"}
# Those whose batches hold all tokens that get a gradient; all others make some of them in the step.
COUNTED = ONE_PASS | {"DPOTrainer", "KTOTrainer"}


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
    - trl's trainers that compare forward passes (DPO, KTO, GRPO, RLOO, distillation, ...) need passes that route
      alike: `router_sampling=False` and `input_jitter_noise=0`. Those that make tokens in the step have no
      load-balance loss.

    It takes the trainer's own arguments, and these:

    Args:
        exact_balance: count the experts of all micro-batches before the first backward pass, so that gradient
            accumulation gives the load-balance loss of the whole batch exactly; otherwise each micro-batch knows those
            up to itself. Costs one more forward pass for each micro-batch; for language models.
        distributed_checkpoint: save the optimizer so that a run on any other layout can resume, too; by default where
            the model is spread over ranks, and otherwise as `Trainer` does.

    Raises:
        ValueError: an empty dataset, token ids without an embedding, noise in passes that are compared; from `train`,
            a step without labels, a sequence that is too long, context or sequence parallelism, and the checkpoints
            above.
    """

    label_smoother: Any  # Trainer's, or None

    def __init__(self, *given, exact_balance: bool = False, distributed_checkpoint: bool | None = None, **keywords):
        self.exact_balance = exact_balance
        self._uncounted: list[dict[str, Any]] = []  # the step's batches, where their experts are yet to be counted
        self._first_step: int | None = None  # of the run, which may be resumed
        self._staging: str | None = None  # stands in for the run's folder while a checkpoint is written
        self._trl_name = trl_name(type(self))
        arguments = self._name_arguments(given, keywords)
        model, args = arguments.get("model"), arguments.get("args")
        if self._trl_name is not None and model is not None:
            check_trl_trainer(self._trl_name, model, args, exact_balance)
        train_dataset = arguments.get("train_dataset")
        if hasattr(train_dataset, "__len__"):
            check_dataset(train_dataset, (), "train_dataset")
        with allow_resuming(model, args):
            super().__init__(*given, **keywords)
        if hasattr(self, "aux_loss_enabled"):
            # trl would add Mixtral's loss of each micro-batch to the one that acts inside the model.
            config = self._grin_model.config
            config.router_aux_loss_coef = getattr(self, "router_aux_loss_coef", config.router_aux_loss_coef)
            config.output_router_logits = self.aux_loss_enabled = False
        if self.label_smoother is not None and self._grin_model.get_output_embeddings() is not None:
            self.label_smoother = partial(smoothed_next_token_loss, self.label_smoother)
        self.is_sharded = is_spread_over_ranks(self)
        self.distributed_checkpoint = self.is_sharded if distributed_checkpoint is None else distributed_checkpoint
        if self.is_sharded and self._grin_model.config.distributed_config.dp_replicate_size == 1:
            # Gradients are reduced after each micro-batch: before that a rank of FSDP2 holds the whole model's.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self._check_support()
        self._check_reference()
        self._check_ids()

    def _name_arguments(self, given: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the trainer that the mixin stands before, by their names there."""
        classes = type(self).__mro__
        behind = classes[classes.index(GrinMoeTrainerMixin) + 1 :]
        signatures = (inspect.signature(cls.__init__) for cls in behind)  # type: ignore[misc]
        signature = next(signature for signature in signatures if "model" in signature.parameters)
        named = signature.bind_partial(self, *given, **keywords).arguments
        return named | named.get("kwargs", {})

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

    def _check_reference(self) -> None:
        """Raise ValueError if the reference, which trl loads from the model's folder, routes by another rule."""
        config, reference = self._grin_model.config, getattr(getattr(self, "ref_model", None), "config", None)
        for field in ("router_estimator", "router_jitter_noise"):
            ours, theirs = getattr(config, field), getattr(reference, field, None)
            if theirs is not None and ours != theirs:
                raise ValueError(
                    f"the reference model has {field}={theirs} and the model has {field}={ours}, so that equal "
                    "weights route differently: load both with one value, and give the reference as ref_model"
                )

    def _check_ids(self) -> None:
        """Raise ValueError for a tokenizer or tokenized data with ids that the model has no embedding for."""
        config, tokenizer = self._grin_model.config, self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            check_vocabulary(tokenizer, config)
        check_dataset_ids(self.train_dataset, config, "train_dataset")
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, dataset in held_out.items():
            check_dataset_ids(dataset, config, f"eval_dataset {name}".rstrip())

    # ---- Steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of the next optimizer step, announced to the model."""
        if self.state.global_step >= self.state.max_steps:  # resumed at the end, where Trainer takes one step more
            self.control.should_training_stop = True
            return [], None
        if self._first_step is None:
            self._first_step = self.state.global_step
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = self._check_window(batches, num_items_in_batch)
        # All ranks, not only those with data of their own, are the group: tensor-parallel ranks count the same tokens
        # again, in the counts as in `num_tokens`, and the ratio is what matters.
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

    @property
    def _grin_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _check_window(
        self, batches: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None
    ) -> int | None:
        """The tokens of a step's batches over all ranks, None where they are yet to be made; raises, on all ranks
        alike, where they cannot be used."""
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "context and sequence parallelism split the rows that routing noise is a function of: use data or "
                "tensor parallelism"
            )
        config = self._grin_model.config
        num_virtual, num_embedded = count_virtual_tokens(self._grin_model)
        num_tokens, longest, ids = 0, 0, [0]
        for batch in batches:
            for prefix in self._token_prefixes(batch):
                input_ids, positions = batch[f"{prefix}input_ids"], batch.get(f"{prefix}position_ids")
                batch_size, length = input_ids.shape
                mask = batch.get(f"{prefix}attention_mask")
                counted = counted_tokens(mask, batch_size, length, input_ids.device)
                num_tokens += int(counted.sum()) + batch_size * num_embedded
                # Rows may be several sequences one after the other, each with positions from 0.
                length = length if positions is None else int(positions.max()) + 1
                longest = max(longest, length + num_virtual)
                ids += [int(input_ids.min()), int(input_ids.max())] if input_ids.numel() else []
        num_labels = 1 if num_items_in_batch is None or not batches else int(num_items_in_batch)
        is_first = self.state.global_step == self._first_step
        settings = self._common_settings() if is_first else {}
        fingerprint = int.from_bytes(hashlib.sha256(repr(settings).encode()).digest()[:7])
        of_rank = torch.tensor(
            [num_tokens, longest, num_labels, min(ids), max(ids), fingerprint],
            dtype=torch.int64,
            device=self.args.device,
        )
        of_ranks = self.accelerator.gather(of_rank[None])  # [ranks, 6]

        if (of_ranks[:, 5] != of_ranks[0, 5]).any():
            raise_on_differences(gather_object([settings]))
        check_sequence_length(int(of_ranks[:, 1].max()), config, "the length of a sequence")
        step = self.state.global_step + 1
        check_token_ids(int(of_ranks[:, 3].min()), int(of_ranks[:, 4].max()), config, f"input_ids of step {step}")
        # trl divides by at least one label, so that such a step has a finite loss: an error only where a run starts.
        if of_ranks[:, 2].min() == 0 and (is_first or self._trl_name is None):
            raise ValueError(
                f"step {step}: all labels of the batch are masked (-100), so there is nothing to learn; look at the "
                "label masks and at how sequences are cut"
            )
        return int(of_ranks[:, 0].sum()) if self._trl_name is None or self._trl_name in COUNTED else None

    def _common_settings(self) -> dict[str, str]:
        """What all ranks must have in common: the step, arguments and the fields of GRIN-MoE's config.

        Fields of every config say where it is from: a rank that has saved the model has its `architectures`.
        """
        config = self._grin_model.config
        return (
            {"step": str(self.state.global_step), "steps of the run": str(self.state.max_steps)}
            | {name: str(getattr(self.args, name)) for name in COMMON_ARGUMENTS}
            | {f"config.{name}": str(getattr(config, name)) for name in GrinMoeConfig.__annotations__}
        )

    def _token_prefixes(self, batch: Any) -> list[str]:
        """What stands before `input_ids` and `attention_mask` of a batch's tokens that get a gradient."""
        keys = batch if isinstance(batch, Mapping) else {}
        prefixes = [prefix for prefix in ("", "chosen_", "rejected_") if f"{prefix}input_ids" in keys]
        if not prefixes and self._trl_name is None:  # else prompts, which trl's online trainers complete
            raise ValueError("GrinMoeTrainerMixin counts tokens: batches have to be mappings with input_ids")
        return prefixes

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        if self._uncounted:
            self._grin_model.begin_step(**self._announced, expert_counts=self._count_experts(self._uncounted))
            self._uncounted = []
        return super().training_step(model, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradients' norm, before the optimizer uses them; raises, on all ranks alike, if it is not finite.

        float16's loss scale finds the steps that overflow by such norms, and leaves them out.
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
        return norm

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
            resume_from_checkpoint, incomplete = last_complete_checkpoint(self.args.output_dir, self._find_problems)
            for path, problems in incomplete.items():
                logger.warning(f"{path} is not a complete checkpoint and is passed over: {', '.join(problems)}")
                os.utime(path, (0, 0))  # half deleted by a killed run, it would be the newest, which rotation keeps
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from")
        elif resume_from_checkpoint and (problems := self._find_problems(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint: {', '.join(problems)}; "
                "train(resume_from_checkpoint=True) takes the newest complete one"
            )
        if resume_from_checkpoint and not hasattr(self.train_dataset, "__len__"):
            logger.warning("train_dataset has no length: resuming is exact within its first pass only")
        if resume_from_checkpoint and has_only_the_model(resume_from_checkpoint):
            logger.warning(f"{resume_from_checkpoint} has the model only: optimizer and learning rate start anew")
        self._first_step = None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_weights()
            return result
        finally:  # a run that fails leaves the model as it was, too
            self._micro_batches = []
            self._grin_model.begin_step(None)
            self._grin_model.get_decoder().routing_observer = None

    def _find_problems(self, checkpoint: str | os.PathLike) -> list[str]:
        """`find_problems`, and weights that are not finite, found by all ranks together."""
        problems = find_problems(checkpoint)
        if not problems:
            name = find_non_finite(checkpoint, self.args.process_index, self.args.world_size)
            problems = [] if name is None else [f"{name} has values that are not finite"]
        return list(dict.fromkeys(chain(*gather_object([problems]))))

    def _check_weights(self) -> None:
        """Raise ValueError, on all ranks alike, if a weight that is trained is not finite on one of them."""
        is_ruined = torch.zeros((), dtype=torch.bool, device=self.args.device)
        for parameter in self._grin_model.parameters():
            if parameter.requires_grad:
                part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                is_ruined |= ~torch.isfinite(part.detach()).all().to(is_ruined.device)
        if self.accelerator.gather(is_ruined[None]).any():
            raise ValueError(
                f"after step {self.state.global_step} weights are not finite, and no checkpoint is written of them: "
                "resume from the last one, with a lower learning_rate"
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else the folder is about to be moved
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own save, into a folder that is then moved to the checkpoint's name by one rename."""
        self._check_weights()
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
        folder = output_dir or self.args.output_dir
        if not self.is_sharded:
            super()._save(output_dir, state_dict)
            return give_umasks_mode(Path(folder))  # peft's adapters among them
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
        folder, scheduler = os.path.join(checkpoint, OPTIMIZER_FOLDER), Path(checkpoint, SCHEDULER_NAME)
        if not os.path.isdir(folder):
            if self.is_sharded:
                raise ValueError(
                    f"{checkpoint} has no {OPTIMIZER_FOLDER}, which a run on several ranks needs to resume: write it "
                    "with distributed_checkpoint=True, or start from the checkpoint as a model"
                )
            if (path := Path(checkpoint, OPTIMIZER_NAME)).is_file() and not self.is_fsdp_enabled:
                check_optimizer_state(load_saved(path), self.optimizer.optimizer, path)
            check_scheduler_state(load_saved(scheduler), self.lr_scheduler, scheduler)
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self._grin_model, self.optimizer.optimizer, folder)
        state = load_saved(scheduler)
        check_scheduler_state(state, self.lr_scheduler, scheduler, same_groups=False)
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

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
            if (path := Path(checkpoint, f"rng_state{rank}.pth")).is_file():  # not in a checkpoint of other ranks
                check_generators(load_saved(path), path)
        super()._load_rng_state(checkpoint)

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
                check_names(model, files)
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


def raise_on_differences(settings_of_ranks: list[dict[str, str]]) -> None:
    """Raise ValueError with the settings in which ranks differ, and their values on two of them."""
    first = settings_of_ranks[0]
    for rank, settings in enumerate(settings_of_ranks):
        if names := [name for name in first if settings.get(name) != first[name]]:
            values = ", ".join(f"{name} ({first[name]} and {settings.get(name)})" for name in names[:5])
            raise ValueError(f"ranks 0 and {rank} differ in {values}: give all ranks the same arguments and model")


def trl_name(trainer_class: type) -> str | None:
    """The name of trl's trainer that a class is, or inherits from."""
    names = (cls.__name__ for cls in trainer_class.__mro__ if cls.__module__.partition(".")[0] == "trl")
    return next(names, None)


def check_trl_trainer(name: str, model: Any, args: Any, exact_balance: bool) -> None:
    """Raise ValueError for what trl's trainer `name` cannot do with a model, before it prepares data."""
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, **(getattr(args, "model_init_kwargs", None) or {}))
    else:
        config = model.config
    if hasattr(model, "pipeline") and name != "SFTTrainer":
        raise ValueError(
            f"a pipeline cannot do {name.removesuffix('Trainer')}, whose loss is not a language model's: "
            "train without a pipeline"
        )
    if name not in ONE_PASS:
        check_preference_routing(config, dropout_is_disabled=getattr(args, "disable_dropout", True))
    if exact_balance and (name not in COUNTED or name in ("CPOTrainer", "ORPOTrainer")):
        raise ValueError(f"exact_balance counts the experts of batches with input_ids, which {name}'s are not")
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = config.router_aux_loss_coef
    if coefficient > 0 and name not in COUNTED:
        raise ValueError(
            f"router_aux_loss_coef={coefficient} is a loss over the tokens of a step, and {name} makes some of them "
            "within the step: set router_aux_loss_coef=0"
        )


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
