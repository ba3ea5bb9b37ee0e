"""The life of a run's checkpoints: written whole, checked before a run resumes from them, rotated when old."""

import os
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..compat_grinmoe import is_spread_over_ranks
from ..loading_grinmoe import check_names
from ..saving_grinmoe import give_umasks_mode
from .checkpoints import (
    OPTIMIZER_FOLDER,
    STAGING_FOLDER,
    check_optimizer_state,
    find_non_finite,
    find_problems,
    has_only_the_model,
    last_complete_checkpoint,
    load_scheduler_state,
)
from .sharded import load_optimizer, load_weights, make_skeleton, save_optimizer, save_weights

if TYPE_CHECKING:  # checked as a part of what it is mixed into
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class ResumingTrainerMixin(_Base):
    """Trainer's hooks around checkpoints."""

    is_sharded: bool  # the model is spread over ranks
    distributed_checkpoint: bool  # every rank writes its part of the optimizer
    _staging: str | None = None  # stands in for the run's folder while a checkpoint is written

    @property
    def _grin_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `Trainer.train` does.

        Raises:
            ValueError: there is no checkpoint to resume from, or it is incomplete; others as for the class.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, incomplete = last_complete_checkpoint(self.args.output_dir, self._find_problems)
            for path, problems in incomplete.items():
                logger.warning(f"{path} is not a complete checkpoint and is passed over: {', '.join(problems)}")
                # Rotation keeps the newest by date, which a deletion that was interrupted has made of an old one.
                os.utime(path, (0, 0))
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
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._check_weights(f"after step {self.state.global_step}", "resume from the last checkpoint")
        return result

    def _find_problems(self, checkpoint: str | os.PathLike) -> list[str]:
        """`find_problems`, and weights that are not finite, which all ranks look for together."""
        problems = find_problems(checkpoint)
        if not problems:
            name = find_non_finite(checkpoint, self.args.process_index, self.args.world_size)
            problems = [] if name is None else [f"{name} has values that are not finite"]
        return list(dict.fromkeys(chain(*gather_object([problems]))))

    def _check_weights(self, when: str, advice: str) -> None:
        """Raise ValueError, on all ranks alike, if a weight that is trained is not finite on one of them."""
        is_ruined = torch.zeros((), dtype=torch.bool, device=self.args.device)
        for parameter in self._grin_model.parameters():
            if parameter.requires_grad:
                part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                is_ruined |= ~torch.isfinite(part.detach()).all().to(is_ruined.device)
        if self.accelerator.gather(is_ruined[None]).any():
            raise ValueError(f"{when} weights are not finite: {advice}, with a lower learning_rate")

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else the folder is about to be moved
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, into a folder that one rename then gives the checkpoint's name."""
        step = self.state.global_step
        self._check_weights(f"after step {step}", "nothing is saved; resume from the last checkpoint")
        run_dir = self._get_output_dir(trial)
        staging, name = os.path.join(run_dir, STAGING_FOLDER), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        written, checkpoint = os.path.join(staging, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # a killed run left it; nothing could resume from it
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

        # Trainer saw no other checkpoints there, the best one among them.
        if self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            if os.path.isdir(checkpoint):  # an earlier run's: saved again, or incomplete
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
            super()._save(output_dir, self._adapter_state() if state_dict is None else state_dict)
            adapters = {}
            if pipeline := getattr(self.model, "pipeline", None):  # peft has saved this stage's
                adapters = pipeline.gather(get_peft_model_state_dict(self._grin_model, self._adapter_state()))
            if self.args.should_save:
                if adapters:
                    save_file(adapters, Path(folder, ADAPTER_WEIGHTS), {"format": "pt"})
                give_umasks_mode(Path(folder))  # peft's adapters among them
            return
        save_weights(self._grin_model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _adapter_state(self) -> dict[str, torch.Tensor] | None:
        """The adapters of a model that is spread over ranks; of all it has peft would gather the base. Else None."""
        model = self._grin_model
        if not (is_spread_over_ranks(self) and isinstance(model, PeftModel)):
            return None
        return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.distributed_checkpoint:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(self._grin_model, self.optimizer.optimizer, os.path.join(output_dir, OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # ---- Loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_tensors(resume_from_checkpoint)
        # Trainer reads several files with strict=False, and warns of what each of them lacks.
        is_in_parts = os.path.isfile(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_INDEX_NAME))
        if self.is_sharded or (is_in_parts and not isinstance(self._grin_model, PeftModel)):
            load_weights(self._grin_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # FSDP's own files were not looked into before.
        self._check_weights(f"in {resume_from_checkpoint}", "resume from an earlier checkpoint")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or has_only_the_model(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint, OPTIMIZER_FOLDER)
        state = load_scheduler_state(Path(checkpoint, SCHEDULER_NAME), self.lr_scheduler)
        if not folder.is_dir():
            if self.is_sharded:
                raise ValueError(
                    f"{checkpoint} has no {OPTIMIZER_FOLDER}, which a run on several ranks needs to resume: write it "
                    "with distributed_checkpoint=True, or start from the checkpoint as a model"
                )
            if (path := Path(checkpoint, OPTIMIZER_NAME)).is_file() and not self.is_fsdp_enabled:
                check_optimizer_state(path, self.optimizer.optimizer)
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self._grin_model, self.optimizer.optimizer, folder)
        # Trainer groups parameters by device mesh, too, so that another layout has another number of groups.
        num_groups, num_saved = len(self.optimizer.param_groups), len(state["_last_lr"])
        if num_groups != num_saved:
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
            raise ValueError(f"the best step was {step}, which has no checkpoint; {checkpoint} is the nearest")
        self._check_tensors(checkpoint)
        if self.is_sharded:
            return load_weights(self._grin_model, checkpoint)
        super()._load_best_model()
        # Trainer knows the default adapter's place only.
        for adapter, path in self._find_adapters(checkpoint).items():
            if path.parent != Path(checkpoint):
                set_peft_model_state_dict(self._grin_model, load_file(path), adapter_name=adapter)

    def _find_adapters(self, checkpoint: str) -> dict[str, Path]:
        """The files of the model's adapters in a checkpoint, by the adapter's name."""
        model, folder = self._grin_model, Path(checkpoint)
        if not isinstance(model, PeftModel):
            return {}
        adapters = {path.parent.name: path for path in folder.glob(f"*/{ADAPTER_WEIGHTS}")}
        if (folder / ADAPTER_WEIGHTS).is_file():
            adapters["default" if adapters else model.active_adapters[0]] = folder / ADAPTER_WEIGHTS
        return adapters

    def _check_tensors(self, checkpoint: str) -> None:
        """Raise ValueError unless a checkpoint has exactly the tensors of the model, or of its adapters."""
        model = self._grin_model
        if not isinstance(model, PeftModel):
            if files := sorted(Path(checkpoint).glob("*.safetensors")):  # else FSDP's own format, strict anyway
                check_names(make_skeleton(model), files)
            return
        adapters = self._find_adapters(checkpoint)
        if not adapters:
            raise ValueError(f"{checkpoint} has no {ADAPTER_WEIGHTS}, and the model to load it into has adapters")
        for adapter, path in adapters.items():
            with safe_open(path, framework="pt") as tensors:
                found = set(tensors.keys())
            needed = set(get_peft_model_state_dict(model, self._adapter_state(), adapter_name=adapter))
            if pipeline := getattr(model, "pipeline", None):
                needed = set(pipeline.gather(dict.fromkeys(needed)))
            if differing := sorted(found ^ needed):
                raise ValueError(
                    f"{path} and the adapter {adapter!r} of the model differ in {len(differing)} tensor(s): "
                    f"{', '.join(differing[:5])}"
                )
