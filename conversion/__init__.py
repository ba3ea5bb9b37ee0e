"""Checkpoints of GRIN-MoE from every form to every other: streamed, exact, safe. Also behind `grin-moe convert`."""

from .checkpoint import Checkpoint
from .conversion import Report, convert
from .inspection import Inspection, inspect
from .sources import open_checkpoint
from .tensors import ConversionError

__all__ = ["Checkpoint", "ConversionError", "Inspection", "Report", "convert", "inspect", "open_checkpoint"]
