"""Convert checkpoints of GRIN-MoE between all their forms: streamed, exact, safe. Also behind `grin-moe convert`."""

from .checkpoint import Checkpoint, open_checkpoint
from .conversion import Report, convert
from .inspection import Inspection, inspect
from .tensors import ConversionError

__all__ = ["Checkpoint", "ConversionError", "Inspection", "Report", "convert", "inspect", "open_checkpoint"]
