"""trl's trainers for GRIN-MoE. trl takes seconds to import, so `modeling_grin.training` does not."""

from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from .trainer import GrinMoeTrainerMixin


class GrinMoeSFTTrainer(GrinMoeTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with `GrinMoeTrainerMixin`."""


class GrinMoeDPOTrainer(GrinMoeTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` with `GrinMoeTrainerMixin`."""


class GrinMoeGRPOTrainer(GrinMoeTrainerMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with `GrinMoeTrainerMixin`."""
