"""trl's trainers for GRIN-MoE. trl takes seconds to import, so `modeling_grin.training` does not."""

from transformers import AutoConfig
from trl import DPOTrainer, SFTTrainer

from .checks import check_preference_routing
from .trainer import GrinMoeTrainerMixin


class _TrlTrainerMixin(GrinMoeTrainerMixin):
    """The load-balance loss is the model's own, with the coefficient that the trainer's arguments or the config give.

    trl would add Mixtral's, of each micro-batch by itself, to the loss that it computes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self._grin_model.config
        config.router_aux_loss_coef = self.router_aux_loss_coef
        config.output_router_logits = self.aux_loss_enabled = False


class GrinMoeSFTTrainer(_TrlTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with `GrinMoeTrainerMixin`."""

    steps_without_labels_are_finite = True  # trl divides by at least one label


class GrinMoeDPOTrainer(_TrlTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` with `GrinMoeTrainerMixin`.

    Raises:
        ValueError: the model samples its routing, or jitters its inputs, in training: the log-ratios of two equal
            models would not be 0; or it is in a pipeline, which computes one model's loss only.
    """

    def __init__(self, model, ref_model=None, args=None, **kwargs):
        if hasattr(model, "pipeline"):
            raise ValueError("a pipeline cannot do DPO, which compares two models: train without a pipeline")
        if isinstance(model, str):
            settings = getattr(args, "model_init_kwargs", None) or {}
            config = AutoConfig.from_pretrained(model, **settings)
        else:
            config = model.config
        check_preference_routing(config, dropout_is_disabled=args is None or args.disable_dropout)
        super().__init__(model, ref_model, args, **kwargs)
