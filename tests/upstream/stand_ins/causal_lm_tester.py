"""Tiny configs and inputs for transformers' common model tests, where its own tester is not to be had."""

import torch

from .test_configuration_common import ConfigTester
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CausalLMModelTester:
    batch_size, seq_length, is_training = 13, 7, True
    token_classification_class = question_answering_class = None

    def __init__(self, parent):
        vars(self).update(SIZES)

    def get_config(self):
        return self.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class CausalLMModelTest(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin
):
    def setUp(self):
        tester = self.model_tester = self.model_tester_class(self)
        heads = ("base_model", "causal_lm", "question_answering", "sequence_classification", "token_classification")
        classes = [getattr(tester, f"{head}_class") for head in heads]
        self.all_model_classes = [model_class for model_class in classes if model_class is not None]

    def test_config(self):
        ConfigTester(self, config_class=self.model_tester.config_class).run_common_tests()
