"""Each argument of transformers' Trainer: stock Phimoe, ours, and ours under GrinMoeTrainer train alike.

The models have the same weights, and route without noise: without a keep set Phimoe's training has nothing to sample.
"""

import copy
from dataclasses import fields

import numpy as np
import pytest
import runs
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_grin.training import GrinMoeTrainer

EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}

# What a case sets; the fields that it is for are its own, and those of `fields`.
CASES = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, **EVALUATE},
    "sequential": {"train_sampling_strategy": "sequential", "include_num_input_tokens_seen": "all",
                   "remove_unused_columns": False},
    "by length": {"train_sampling_strategy": "group_by_length", "length_column_name": "length", "max_grad_norm": 0.0,
                  "include_num_input_tokens_seen": "non_padding", "activation_checkpointing": True},
    "seeds": {"seed": 3, "data_seed": 5, "full_determinism": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 6, "dataloader_drop_last": True},
    "last batch": {"max_steps": 4, "learning_rate": 0.03, "per_device_train_batch_size": 6,
                   "gradient_accumulation_steps": 2},
    "AdamW": {"optim": "adamw_torch", "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4,
              "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "fused AdamW": {"optim": "adamw_torch_fused", "adam_epsilon": 1e-4, "lr_scheduler_type": "linear"},
    "RMSprop": {"optim": "rmsprop", "optim_args": "eps=1e-3", "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 0.01}, "warmup_steps": 1},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATE},
    "bfloat16": {"bf16": True},
    "bfloat16 evaluation": {"bf16_full_eval": True, **EVALUATE},
    "NEFTune": {"neftune_noise_alpha": 5.0, "max_steps": 1},  # Phimoe's routing advances the noise's generator
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1},
    "evaluation": {"eval_on_start": True, "eval_accumulation_steps": 2, "include_for_metrics": ["inputs", "loss"],
                   "eval_delay": 1, **EVALUATE},
    "loss only": {"prediction_loss_only": True, **EVALUATE},
    "metrics by batch": {"batch_eval_metrics": True, "label_names": ["labels"], "use_cache": True, **EVALUATE},
    "batches apart": {"eval_do_concat_batches": False, "eval_use_gather_object": True, **EVALUATE},
}  # fmt: skip

ELSEWHERE = {  # where several processes, checkpoints or a NaN have their own tests
    "distributed": "average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
                   "ddp_static_graph fsdp fsdp_config parallelism_config accelerator_config",
    "test_trainer": "save_strategy save_steps save_total_limit save_only_model save_on_each_node ignore_data_skip "
                    "load_best_model_at_end metric_for_best_model greater_is_better resume_from_checkpoint "
                    "restore_callback_states_from_checkpoint logging_nan_inf_filter fp16 deepspeed",
    "test_compile": "torch_compile torch_compile_backend torch_compile_mode",
}  # fmt: skip
NEED_WHAT_IS_NOT_HERE = {
    "a GPU": "fp16_full_eval tf32 torch_empty_cache_steps dataloader_pin_memory skip_memory_metrics ddp_backend "
             "auto_find_batch_size",
    "other packages": "optim_target_modules use_liger_kernel liger_kernel_config",
}  # fmt: skip
NOT_OF_THE_LOSS = {
    "what is logged": "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
                      "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
                      "trackio_static_space_id debug",
    "the Hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "read by scripts": "do_train do_eval do_predict",
    "processes": "output_dir use_cpu local_rank ddp_timeout enable_jit_checkpoint dataloader_persistent_workers "
                 "dataloader_multiprocessing_context dataloader_in_order",
}  # fmt: skip


def test_every_argument_is_here():
    """A field that transformers adds has to be put in its place; those of other versions may be absent."""
    tried = {field for case in CASES.values() for field in case} | {"activation_checkpointing_kwargs"}
    listed = [*ELSEWHERE.values(), *NEED_WHAT_IS_NOT_HERE.values(), *NOT_OF_THE_LOSS.values()]
    known = tried | {name for names in listed for name in names.split()}
    assert {field.name for field in fields(TrainingArguments)} - known == set()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights as Phimoe and as GRIN-MoE."""
    folder = tmp_path_factory.mktemp("models")
    config = released_config(**runs.ROUTED_ALIKE, eos_token_id=2, pad_token_id=None)
    tensors = released_tensors(config)
    write_checkpoint(folder / "phimoe", config | runs.PHIMOE, tensors)
    write_checkpoint(folder / "grinmoe", config | {"router_sampling": False}, tensors)
    return {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("phimoe", "grinmoe")}


@pytest.fixture(scope="module")
def rows():
    """Padded rows with a column that the model does not take, in an order that is not that of their lengths."""
    columns = {key: [row[key].tolist() for row in runs.Rows().rows] for key in runs.Rows()[0]}
    columns["length"] = [sum(mask) for mask in columns["attention_mask"]]
    return Dataset.from_dict(columns)


def collate(examples):
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor([example[name] for example in examples]) for name in names}


class Measure:
    """A metric of everything that Trainer hands out, of all batches at once or one by one."""

    def __init__(self):
        self.total = 0.0

    def __call__(self, prediction, compute_result=True):
        arrays = [prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses]
        while arrays:
            value = arrays.pop()
            if isinstance(value, (list, tuple)):
                arrays.extend(value)
            elif value is not None:
                self.total += float(np.abs(np.asarray(value, dtype=np.float64)).mean())
        return {"total": self.total} if compute_result else {}


def train(model, trainer_class, rows, output_dir, arguments):
    """`runs.train_stock` of a copy of a model."""
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    model = copy.deepcopy(model)
    args = TrainingArguments(output_dir=output_dir, **{**defaults, **arguments})
    trainer = trainer_class(
        model, args, collate, rows, eval_dataset=rows.select(range(7)) if args.eval_strategy != "no" else None,
        compute_metrics=None if args.prediction_loss_only or args.eval_strategy == "no" else Measure(),
    )  # fmt: skip
    return runs.train_stock(trainer)


@pytest.mark.parametrize("name", CASES)
def test_trained_as_stock_phimoe(models, rows, tmp_path, name):
    """Losses, norms, rates and metrics of two steps, and the weights after them."""
    arguments = CASES[name]
    expected = train(models["phimoe"], Trainer, rows, tmp_path, arguments)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if arguments.get("bf16") else {}
    before = dict(models["phimoe"].named_parameters())
    assert any(not torch.allclose(expected[1][key], before[key]) for key in before)
    for trainer_class in (Trainer, GrinMoeTrainer):
        actual = train(models["grinmoe"], trainer_class, rows, tmp_path, arguments)
        runs.assert_trained_alike(actual, expected, **tolerance)
