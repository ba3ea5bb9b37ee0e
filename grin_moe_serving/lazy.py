"""Teach transformers model type `grinmoe` without importing anything heavy before a checkpoint asks for it.

This module is imported in every Python process of `grin-moe with`, so it imports neither torch nor transformers.
"""

import sys
from typing import Any

MODEL_TYPE = "grinmoe"
ARCHITECTURES = ("GRIN-MoE", "GRINMoEForCausalLM", "GrinMoeForCausalLM")
"""Names of the language model in config.json: the release's two, and ours."""


class LazyPackage:
    """Stands for `modeling_grin` until an attribute is asked for.

    `transformers serve` looks the class up in `transformers` by its name in the config. Importing AutoProcessor puts
    another module there: the one that was there before gets the class as well.
    """

    def __init__(self) -> None:
        self.transformers = sys.modules["transformers"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # nobody who looks a module over wants it imported
            raise AttributeError(name)
        import modeling_grin

        for architecture in ARCHITECTURES:
            for module in (self.transformers, sys.modules["transformers"]):
                setattr(module, architecture, modeling_grin.GrinMoeForCausalLM)
        return getattr(modeling_grin, name)


def register(configuration_auto: Any) -> None:
    """Register `grinmoe` in transformers' module `models.auto.configuration_auto`, whose mapping is lazy itself."""
    mapping = configuration_auto.CONFIG_MAPPING
    if MODEL_TYPE not in mapping:
        configuration_auto.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "GrinMoeConfig"
        mapping._modules[MODEL_TYPE] = LazyPackage()
