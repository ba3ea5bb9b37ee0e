"""Rules for GRIN-MoE in each of trl's trainers, by their names: importing trl takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, TrainingArguments

from .data_checks import check_preference_routing

# The loss comes from one forward pass; in all other trainers it compares passes, of one model or of two.
ONE_PASS = {"SFTTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer", "TPOTrainer"}
# Batches hold all tokens that get a gradient; all other trainers make some of them in the step.
COUNTED = ONE_PASS | {"DPOTrainer", "KTOTrainer"}
# Batches of these have no `input_ids` whose experts could be counted before the step.
UNCOUNTABLE = {"CPOTrainer", "ORPOTrainer"}


def trl_name(trainer_class: type) -> str | None:
    """Return the name of the trl trainer that a class is or inherits from."""
    names = (cls.__name__ for cls in trainer_class.__mro__ if cls.__module__.partition(".")[0] == "trl")
    return next(names, None)


def check_trl_trainer(name: str, model: Any, args: Any, exact_balance: bool) -> None:
    """Raise ValueError if trl's trainer `name` cannot train a model; called before it prepares data."""
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
    if exact_balance and name not in COUNTED - UNCOUNTABLE:
        raise ValueError(f"exact_balance counts the experts of batches with input_ids; those of {name} have none")
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = config.router_aux_loss_coef
    for field, value in (("router_aux_loss_coef", coefficient), ("router_z_loss_coef", config.router_z_loss_coef)):
        if value > 0 and name not in COUNTED:
            raise ValueError(
                f"{field}={value} is a loss over the tokens of a step, and {name} makes some of them within the step: "
                f"set {field}=0"
            )


def check_reference(config: PreTrainedConfig, reference: PreTrainedConfig | None) -> None:
    """Raise ValueError if the reference model, which trl loads from the model's folder, routes by another rule."""
    for field in ("router_estimator", "router_jitter_noise"):
        ours, theirs = getattr(config, field), getattr(reference, field, None)
        if theirs is not None and ours != theirs:
            raise ValueError(
                f"the reference model has {field}={theirs} and the model has {field}={ours}, so that equal "
                "weights route differently: load both with one value, and give the reference as ref_model"
            )


@contextmanager
def allow_resuming(model: Any, args: TrainingArguments | None) -> Iterator[None]:
    """Let a trainer be built that saves the optimizer of a model spread over ranks; Trainer cannot, and refuses."""
    if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    save_only_model, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = save_only_model
