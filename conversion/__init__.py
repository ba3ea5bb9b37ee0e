"""Convert checkpoints of GRIN-MoE between all their forms: streamed, exact, safe. Also behind `grin-moe convert`.

What is named here is imported when it is first used: `summary` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, open_checkpoint
    from .conversion import Report, convert
    from .inspection import inspect
    from .summary import Inspection
    from .tensors import ConversionError

__all__ = ["Checkpoint", "ConversionError", "Inspection", "Report", "convert", "inspect", "open_checkpoint"]
MODULES = {"Checkpoint": "checkpoint", "ConversionError": "tensors", "Inspection": "summary", "Report": "conversion",
           "convert": "conversion", "inspect": "inspection", "open_checkpoint": "checkpoint"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)
