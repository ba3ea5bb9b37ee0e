"""Convert checkpoints of GRIN-MoE between all their forms: streamed, exact, safe. Also behind `grin-moe convert`."""

from .checkpoint import Checkpoint
from .conversion import Report, convert
from .inspection import Inspection, inspect
from .open import open_checkpoint
from .tensors import ConversionError

__all__ = ["Checkpoint", "ConversionError", "Inspection", "Report", "convert", "inspect", "open_checkpoint"]
