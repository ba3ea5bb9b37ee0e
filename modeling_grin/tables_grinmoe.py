"""Tables of transformers and peft that are looked up by model type or class name, and our entries in them.

The Auto classes' `register` does not write them. Code that does not find a model there silently treats it as another
kind. These lines travel to the Hub with a checkpoint's code, and also serve subclasses.
"""

import importlib

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_peft_available


def list_causal_lm(class_name: str, model_type: str) -> None:
    """Name a class among transformers' causal language models.

    For these Trainer shifts the labels of label smoothing; pipelines, model cards and lm-eval ask the same table.
    """
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if class_name not in names.values():
        names[class_name if model_type in names else model_type] = class_name


def list_adapter_targets(model_type: str) -> None:
    """Give a model type what peft adapts by default in Mixtral, whose modules have our names.

    A model asks for it when it is made: peft takes seconds to import, and reading a config does not need it.
    """
    if not is_peft_available():
        return
    for name, table in vars(importlib.import_module("peft.utils.constants")).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "mixtral" in table:
            table.setdefault(model_type, table["mixtral"])
