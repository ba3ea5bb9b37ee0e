"""transformers' common model tests: modelling, generation, configuration, training, parallel layouts, export.

All models have the same tester, without exceptions for ours.
"""

import unittest

import tests.test_modeling_common as common
import transformers
from models import for_each_kind
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers.exporters.base import ExportedModel
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification

import modeling_grin
from tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin

# The common tests look up by class name which models are given labels; these tables hold transformers' own models.
for table, head in (
    ("MODEL_MAPPING_NAMES", "Model"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "ForCausalLM"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "ForSequenceClassification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "ForTokenClassification"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "ForQuestionAnswering"),
):
    if hasattr(common, table):
        setattr(common, table, {**getattr(common, table), "grinmoe": f"GrinMoe{head}"})

# None: every model, not the few that upstream's CI has time for.
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Export tests of transformers 5.16 and older call the program through this method.
if not hasattr(ExportedModel, "module"):
    ExportedModel.module = lambda self: self.program.module()


# Heads as a user writes them on ours, which stock Mixtral has.
class GrinMoeForTokenClassification(GenericForTokenClassification, modeling_grin.GrinMoePreTrainedModel):
    pass


class GrinMoeForQuestionAnswering(GenericForQuestionAnswering, modeling_grin.GrinMoePreTrainedModel):
    pass


class GrinMoeTester(CausalLMModelTester):
    config_class = modeling_grin.GrinMoeConfig
    base_model_class = modeling_grin.GrinMoeModel
    causal_lm_class = modeling_grin.GrinMoeForCausalLM
    sequence_classification_class = modeling_grin.GrinMoeForSequenceClassification
    token_classification_class = GrinMoeForTokenClassification
    question_answering_class = GrinMoeForQuestionAnswering
    sliding_window = None  # as the stock ones by default: upstream skips tests of masks where there is a window


class PhimoeTester(CausalLMModelTester):
    config_class = transformers.PhimoeConfig
    base_model_class = transformers.PhimoeModel
    causal_lm_class = transformers.PhimoeForCausalLM
    sequence_classification_class = transformers.PhimoeForSequenceClassification


class MixtralTester(CausalLMModelTester):
    config_class = transformers.MixtralConfig
    base_model_class = transformers.MixtralModel
    causal_lm_class = transformers.MixtralForCausalLM
    sequence_classification_class = transformers.MixtralForSequenceClassification
    token_classification_class = transformers.MixtralForTokenClassification
    question_answering_class = transformers.MixtralForQuestionAnswering


TESTERS = {"grinmoe": GrinMoeTester, "phimoe": PhimoeTester, "mixtral": MixtralTester}


class CausalLM(test_expert_parallel_mixin.ExpertParallelTesterMixin, CausalLMModelTest):
    test_can_init_all_missing_weights_before_2023 = True  # our files state no year

    @property
    def model_tester_class(self):
        return TESTERS[self.kind]

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return True  # they load models from the Hub; test_pipelines.py has local ones


globals().update(for_each_kind(CausalLM, unittest.TestCase))
del CausalLMModelTest
