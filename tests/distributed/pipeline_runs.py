"""Cases of training in a pipeline. `checkpoint` names a folder in FOLDER."""

from pathlib import Path
from typing import Any

import runs
import torch
from datasets import Dataset
from on_cpu import as_on_gpus
from sharded_runs import adapt, count_chunked, count_forwards
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from trl import SFTConfig

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.training import RoutingCallback
from modeling_grin.training.pipeline import pipeline_model
from modeling_grin.training.sharded import weights_of
from modeling_grin.training.trl_trainers import GrinMoeDPOTrainer, GrinMoeSFTTrainer

STEPS = 3
EVALUATION_ROWS, EVALUATION_BATCH = 6, 4  # the last batch is smaller


def make_model(folder: Path, layout: dict[str, Any] | None, checkpoint: str, **settings: Any) -> GrinMoeForCausalLM:
    TrainingArguments(output_dir=folder, use_cpu=True)  # starts the process group
    set_seed(5)
    settings = {"dtype": torch.float32, **settings}
    if layout is None:
        return GrinMoeForCausalLM.from_pretrained(folder / checkpoint, **settings)
    as_on_gpus()  # from here on: cases of DDP come before
    return pipeline_model(folder / checkpoint, **layout, **settings)


def results(trainer: Trainer, **counted: Any) -> dict[str, Any]:
    """This rank's parameters and selection biases by their released names, whole; Trainer's logs; what was counted."""
    views = weights_of(trainer.model)
    parameters = {
        name: (view.full_tensor() if hasattr(view, "full_tensor") else view).detach().clone()
        for name, view in views.items()
    }
    return {"parameters": parameters, "logs": trainer.state.log_history, **counted}


def train(
    folder: Path, name: str, layout: dict[str, Any] | None, checkpoint: str, resume_from: str | None = None,
    expert_dropout: float = 0.0, lora: dict[str, Any] | None = None, quantization_config: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Training with `GrinMoeTrainer`, or what is left of it from a checkpoint in FOLDER, and evaluation at its end.

    `layout`: of `pipeline_model`; None: one process, or DDP; `arguments`: of `runs.make_trainer`. Counted are the
    `forwards` of this rank's first layer in training, recomputation included, and of the `chunked` loss.
    """
    config = GrinMoeConfig.from_pretrained(folder / checkpoint, expert_dropout=expert_dropout)
    model = make_model(folder, layout, checkpoint, config=config, quantization_config=quantization_config)
    if lora is not None:
        model = adapt(model, **lora)
    settings = {"max_steps": STEPS, "logging_steps": 1, "accumulation": 4, "micro_batch": 2, "eval_strategy": "steps",
                "eval_steps": STEPS, "per_device_eval_batch_size": EVALUATION_BATCH}  # fmt: skip
    trainer = runs.make_trainer(
        folder / f"{name}-run", model, eval_dataset=runs.Rows(EVALUATION_ROWS), **{**settings, **arguments}
    )
    forwards = count_forwards(next(layer for layer in model.get_decoder().layers if any(layer.children())))
    with count_chunked() as chunked:
        trainer.train(None if resume_from is None else str(folder / resume_from))
    return results(trainer, forwards=len(forwards), chunked=chunked.call_count)


def sft(folder: Path, name: str, layout: dict[str, Any] | None, checkpoint: str, **arguments: Any) -> dict[str, Any]:
    """Training with `GrinMoeSFTTrainer` on packed rows, whose micro-batches are one row each, of any length."""
    model = make_model(folder, layout, checkpoint)
    generator = torch.Generator().manual_seed(7)
    vocab_size = model.config.vocab_size
    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}, unk_token="2"))
    rows = [
        torch.randint(5, vocab_size, (size,), generator=generator).tolist() for size in (5, 9, 3, 16, 7, 12, 4, 11) * 4
    ]
    trainer = GrinMoeSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder / f"{name}-run", max_length=16, packing=True, per_device_train_batch_size=2,
            gradient_accumulation_steps=4, max_steps=STEPS, optim="sgd", learning_rate=runs.LEARNING_RATE,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, bf16=False, router_aux_loss_coef=runs.COEFFICIENT, **arguments,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
    )  # fmt: skip
    trainer.train()
    return results(trainer)


def errors(folder: Path, name: str, checkpoint: str) -> dict[str, str]:
    """What is said of what cannot be done, on two ranks."""

    def make(layout=None, checkpoint=checkpoint, **settings):
        return make_model(folder, {"pp_size": 2, **(layout or {})}, checkpoint, **settings)

    def make_trainer(model=None, **arguments):
        settings = {"accumulation": 4, "micro_batch": 2, **arguments}
        return runs.make_trainer(folder / f"{name}-run", model or make(), **settings)

    def train_with_callback():
        trainer = make_trainer()
        trainer.add_callback(RoutingCallback(trainer))
        trainer.train()

    tied = GrinMoeConfig.from_pretrained(folder / checkpoint, tie_word_embeddings=True)
    short = GrinMoeConfig.from_pretrained(folder / checkpoint, num_hidden_layers=3)
    attempts = {
        "schedule": lambda: make({"schedule": "1f1b"}),
        "folder": lambda: make(checkpoint="nowhere"),
        "processes": lambda: make({"pp_size": 3}),
        "layers": lambda: make({"schedule": "Interleaved1F1B"}, config=short),
        "tied": lambda: make(config=tied),
        "exact_balance": lambda: make_trainer(exact_balance=True),
        "accumulation": lambda: make_trainer(accumulation=1),
        "interleaved accumulation": lambda: make_trainer(make({"schedule": "Interleaved1F1B"}), accumulation=5),
        "smoothing": lambda: make_trainer(label_smoothing_factor=0.1),
        "dpo": lambda: GrinMoeDPOTrainer(make()),
        "callback": train_with_callback,
        "forward": lambda: make()(input_ids=torch.ones(1, 4, dtype=torch.long)),
    }
    messages = {}
    for refused, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[refused] = str(error)
    return messages
